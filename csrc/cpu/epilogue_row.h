// The maps of csrc/epilogue.h on a run of consecutive elements, in groups of 16 (two mask units).
#pragma once

#include "../activations.h"
#include "common.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kGroup = 16;

// Where a run's operands come from: 16 equal numbers read with step 0, or consecutive ones.
template <class A>
struct Coefficients {
  const A *scale, *bias, *noise;
  int scale_step, bias_step, noise_step;  // 0 or kGroup
};

template <class V>
struct ForwardConstants {
  V alpha, gain, limit, strength;
  uint32_t unlimited;  // without a clamp NaN is not clamped either

  explicit ForwardConstants(const Epilogue& e)
      : alpha(e.alpha), gain(e.gain), limit(e.clamp),
        strength(e.strength ? *static_cast<const typename V::Scalar*>(e.strength) : 1.0),
        unlimited(std::isinf(e.clamp) ? ~0u : 0u) {}
};

template <class T, class V>
void load_padded(const T* p, int64_t count, typename V::Scalar* out) {
  T padded[kGroup] = {};
  std::memcpy(padded, p, count * sizeof(T));
  for (int lane = 0; lane < kGroup; lane += V::lanes) load(padded + lane, V()).store(out + lane);
}

// Two mask units from one bit an element: bytes in memory order whatever the machine's byte order.
inline void store_units(uint8_t* units, uint32_t negative, uint32_t kept) {
  const uint32_t clamped = ~kept;
  units[0] = static_cast<uint8_t>(negative);
  units[1] = static_cast<uint8_t>(clamped);
  units[2] = static_cast<uint8_t>(negative >> 8);
  units[3] = static_cast<uint8_t>(clamped >> 8);
}

// Constants by value: what is reached through a reference is reloaded after each store.
template <class Act, bool kAffine, bool kMask, class V, class In, class Out>
inline void forward_groups(const ForwardConstants<V> constants,
                           const Coefficients<typename V::Scalar> c, int64_t groups, const In* in,
                           Out* out, uint8_t* units) {
  const auto [alpha, gain, limit, strength, unlimited] = constants;
  const V lower = -limit, zero(0.0);
  for (int64_t k = 0; k < groups; ++k) {
    uint32_t negative = 0, kept = 0;
    for (int lane = 0; lane < kGroup; lane += V::lanes) {
      V v = load(in + k * kGroup + lane, V());
      if constexpr (kAffine) {
        v = V::load(c.scale + k * c.scale_step + lane) * v +
            V::load(c.noise + k * c.noise_step + lane) * strength;
      }
      v = v + V::load(c.bias + k * c.bias_step + lane);
      const V u = gain * Act::value(v, alpha);
      if constexpr (kMask) {
        negative |= bits(v <= zero) << lane;
        kept |= bits(abs(u) <= limit) << lane;
      }
      store(out + k * kGroup + lane, where(u > limit, limit, where(u < lower, lower, u)));
    }
    if constexpr (kMask) store_units(units + k * 4, negative, kept | unlimited);
  }
}

// The same for less than a group.
template <class Act, bool kAffine, bool kMask, class V, class In, class Out>
inline void forward_rest(const ForwardConstants<V>& constants,
                         const Coefficients<typename V::Scalar>& c, int64_t count, const In* in,
                         Out* out, uint8_t* units) {
  using A = typename V::Scalar;
  In padded[kGroup] = {};
  Out whole[kGroup];
  uint8_t whole_units[4];
  A scale[kGroup] = {}, bias[kGroup] = {}, noise[kGroup] = {};
  std::memcpy(padded, in, count * sizeof(In));
  std::memcpy(bias, c.bias, count * sizeof(A));
  if (kAffine) {
    std::memcpy(scale, c.scale, count * sizeof(A));
    std::memcpy(noise, c.noise, count * sizeof(A));
  }
  forward_groups<Act, kAffine, kMask>(constants, Coefficients<A>{scale, bias, noise, 0, 0, 0}, 1,
                                      padded, whole, whole_units);
  std::memcpy(out, whole, count * sizeof(Out));
  for (int byte = 0; kMask && byte < (count + 7) / 8 * 2; ++byte)
    units[byte] = whole_units[byte] & ((1u << count) - 1) >> (byte / 2 * 8);
}

// An epilogue on a row in L1.
template <class V>
struct Tail {
  using A = typename V::Scalar;
  using Apply = void (*)(const ForwardConstants<V>&, const Coefficients<A>&, int64_t count,
                         const A* in, A* out, uint8_t* units);

  const Epilogue* e;
  uint8_t* mask;
  Apply apply;

  Tail(const Epilogue* epilogue, uint8_t* units) : e(epilogue), mask(units), apply(nullptr) {
    if (!e) return;
    with_activation(e->act, [this](auto act) {
      using Act = decltype(act);
      apply = mask ? run<Act, !Act::curved> : run<Act, false>;
    });
  }

  template <class Act, bool kMask>
  static void run(const ForwardConstants<V>& constants, const Coefficients<A>& c, int64_t count,
                  const A* in, A* out, uint8_t* units) {
    const int64_t groups = count / kGroup, done = groups * kGroup;
    forward_groups<Act, true, kMask>(constants, c, groups, in, out, units);
    if (done == count) return;
    const Coefficients<A> rest{c.scale + groups * c.scale_step, c.bias + groups * c.bias_step,
                               c.noise + groups * c.noise_step, 0, 0, 0};
    forward_rest<Act, true, kMask>(constants, rest, count - done, in + done, out + done,
                                   kMask ? units + groups * 4 : nullptr);
  }
};

// The map `masked` on one vector; `in` and `units` point to the first group of a run.
template <class V, bool kMask>
struct MaskedDerivative {
  struct Slope {
    V factor;  // d(v) / dy
    decltype(mask_from_bits(0u, V())) dropped;  // where it is 0
  };
  V above, below;
  // A factor of zero gives zero, also for an infinite dy.
  uint32_t drop_all, drop_negative;

  MaskedDerivative(double gain, double negative_slope)
      : above(gain), below(gain * negative_slope), drop_all(gain == 0 ? ~0u : 0u),
        drop_negative(gain * negative_slope == 0 ? ~0u : 0u) {}

  Slope slope(const uint8_t* units, int64_t k, int lane) const {
    if constexpr (kMask) {
      const uint8_t* unit = units + k * 4 + lane / 8 * 2;
      uint32_t negative = unit[0] >> (lane & 7), dropped = unit[1] >> (lane & 7);
      if constexpr (V::lanes > 8) {
        negative |= static_cast<uint32_t>(unit[2]) << 8;
        dropped |= static_cast<uint32_t>(unit[3]) << 8;
      }
      dropped |= drop_all | (negative & drop_negative);
      return {where(mask_from_bits(negative, V()), below, above), mask_from_bits(dropped, V())};
    } else {
      return {above, mask_from_bits(drop_all, V())};
    }
  }

  // d(v)
  template <class T>
  V operator()(const T* in, const uint8_t* units, int64_t k, int lane) const {
    const Slope s = slope(units, k, lane);
    return where(s.dropped, V(0.0), s.factor * load(in + k * kGroup + lane, V()));
  }
};

}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
