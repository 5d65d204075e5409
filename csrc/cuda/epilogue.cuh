// The epilogue (csrc/epilogue.h) as every CUDA kernel uses it: its operands, activations and masks.
#pragma once

#include "../epilogue.h"

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.cuh"

#include "../activations.h"

namespace stylegan_fast {
namespace cuda {

constexpr int kUnit = 8;  // elements of a mask unit

// The affine part v = scale * x + strength * noise + bias.
template <class T>
struct Parts {
  Parts(const Epilogue& e, const Geometry& g)
      : scale(static_cast<const float*>(e.scale)), noise(static_cast<const float*>(e.noise)),
        strength(static_cast<const float*>(e.strength)), bias(static_cast<const T*>(e.bias)),
        noise_per_sample(e.noise_per_sample), channels(g.channels), inner(g.inner),
        pixels(g.pixels) {}

  __device__ float strength_value() const { return strength ? *strength : 1.0f; }
  __device__ float bias_value(int64_t channel) const {
    return bias ? to_float(bias[channel]) : 0.0f;
  }

  const float *scale, *noise, *strength;
  const T* bias;
  bool noise_per_sample;
  int64_t channels, inner;
  Divider pixels;
};

template <int N>
__device__ inline void load_floats(const float* p, float (&out)[N]) {
  constexpr int step = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int j = 0; j < N; j += step) {
    const auto pack = Pack<float, step>::load(p + j);
#pragma unroll
    for (int k = 0; k < step; ++k) out[j + k] = pack[k];
  }
}

// Every piecewise-linear activation: its slope on the negative branch is read off the table, and so
// is whether it is 0 there, also for an infinite v.
class PiecewiseLinear {
 public:
  static constexpr int kUnroll = 4;

  template <class A>
  PiecewiseLinear(A, const Epilogue& e)
      : negative_slope_(-A::value(-1.0f, static_cast<float>(e.alpha))),
        rectifies_(A::value(-INFINITY, static_cast<float>(e.alpha)) == 0.0f) {}

  template <int P>
  __device__ void apply(const float (&v)[P], float (&value)[P]) const {
#pragma unroll
    for (int j = 0; j < P; ++j) {
      value[j] = where(v[j] <= 0.0f, rectifies_ ? 0.0f : negative_slope_ * v[j], v[j]);
    }
  }

 private:
  float negative_slope_;
  bool rectifies_;
};

// Every curved activation; one branch for a whole pack, so that they share a kernel.
class AnyCurved {
 public:
  static constexpr int kUnroll = 2;

  explicit AnyCurved(const Epilogue& e) : code_(e.act), alpha_(static_cast<float>(e.alpha)) {}

  template <int P>
  __device__ void apply(const float (&v)[P], float (&value)[P]) const {
    with_curved_activation(code_, [&](auto act) {
#pragma unroll
      for (int j = 0; j < P; ++j) value[j] = act.value(v[j], alpha_);
    });
  }

  // Puts the derivative of this order, 1 or 2, in place of v. Returns a bit for each element that
  // the clamp keeps.
  template <int P>
  __device__ unsigned differentiate(int order, float gain, float clamp, float (&v)[P]) const {
    unsigned kept = 0;
    with_curved_activation(code_, [&](auto act) {
#pragma unroll
      for (int j = 0; j < P; ++j) {
        kept |= static_cast<unsigned>(!(fabsf(gain * act.value(v[j], alpha_)) > clamp)) << j;
        v[j] = order == 1 ? act.slope(v[j], alpha_) : act.curvature(v[j], alpha_);
      }
    });
    return kept;
  }

 private:
  int code_;
  float alpha_;
};

// y from v, in place; NaN stays NaN, as in torch.clamp. Returns a pack's bits of the mask.
template <int P, class Act>
__device__ inline unsigned finish(float (&values)[P], const Act& act, float gain, float clamp,
                                  bool with_mask) {
  float z[P];
  act.apply(values, z);
  unsigned bits = 0;
  // Without a clamp NaN is not clamped either.
  const bool limited = clamp != INFINITY;
#pragma unroll
  for (int j = 0; j < P; ++j) {
    z[j] *= gain;
    if (with_mask) {
      bits |= static_cast<unsigned>(values[j] <= 0.0f) << j |
              static_cast<unsigned>(limited && !(fabsf(z[j]) <= clamp)) << (kUnit + j);
    }
    values[j] = fabsf(z[j]) > clamp ? copysignf(clamp, z[j]) : z[j];
  }
  return bits;
}

// Writes the mask of a thread's P elements, at this place of the tensor. Neighbours in a warp have
// neighbouring elements, and all threads of it take part. The mask is aligned to 2 bytes.
template <int P>
__device__ inline void write_mask(uint8_t* mask, int64_t element, unsigned bits, bool is_on) {
  if constexpr (P < kUnit) {
    bits <<= static_cast<unsigned>(element) % kUnit;
#pragma unroll
    for (int lanes = 1; lanes * P < kUnit; lanes *= 2) bits |= __shfl_xor_sync(~0u, bits, lanes);
  }
  if (is_on && element % kUnit == 0) {
    reinterpret_cast<uint16_t*>(mask)[element / kUnit] = static_cast<uint16_t>(bits);
  }
}

// The derivative of a piecewise-linear activation, from the mask.
class Branches {
 public:
  Branches(const Epilogue& e, double negative_slope, const uint8_t* mask)
      : mask_(mask), factor_(static_cast<float>(e.gain)),
        negative_factor_(static_cast<float>(e.gain * negative_slope)),
        dead_(factor_ == 0 ? 0xff : 0), negative_dead_(negative_factor_ == 0 ? 0xff : 0) {}

  struct Origin {
    const uint8_t* mask;
    int place;
  };
  __device__ Origin at(int64_t element) const {
    return {mask_ ? mask_ + element / kUnit * 2 : nullptr, static_cast<int>(element % kUnit)};
  }

  // The bits of the elements of a unit from this one on. `aligned`: the mask is, to 2 bytes.
  template <bool aligned>
  __device__ unsigned bits(const Origin& origin, int offset) const {
    if (!origin.mask) return 0;
    const int place = origin.place + offset;
    const uint8_t* const unit = origin.mask + place / kUnit * 2;
    unsigned bits;
    if constexpr (aligned) {
      bits = *reinterpret_cast<const uint16_t*>(unit);
    } else {
      bits = unit[0] | unit[1] << kUnit;
    }
    return bits >> place % kUnit;
  }

  // A bit for each element whose factor is 0.
  __device__ unsigned zeros(unsigned bits) const {
    return bits >> kUnit | (bits & negative_dead_) | dead_;
  }

  template <class T, int P>
  __device__ void derive(const Pack<T, P>& dy, unsigned bits, float (&dv)[P]) const {
    const unsigned zero = zeros(bits);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float positive = factor_ * dy[j], negative = negative_factor_ * dy[j];
      const float d = bits >> j & 1 ? negative : positive;
      dv[j] = zero >> j & 1 ? 0.0f : d;
    }
  }

 private:
  const uint8_t* mask_;
  float factor_, negative_factor_;
  unsigned dead_, negative_dead_;
};

template <int bytes, class... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float());
    case DType::float16: return f(__half());
    case DType::bfloat16: return f(__nv_bfloat16());
    default:
      throw std::invalid_argument("the cuda backend supports float32, float16 and "
                                  "bfloat16, not dtype code " +
                                  std::to_string(static_cast<int>(dtype)));
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream,
            const Arguments&... arguments) {
  STYLEGAN_FAST_LAUNCH(kernel, grid, dim3(threads), static_cast<cudaStream_t>(stream),
                       arguments...);
  check(cudaGetLastError(), "launch");
}

[[noreturn]] inline void throw_unknown(int act) {
  throw std::invalid_argument("epilogue: no such activation code: " + std::to_string(act));
}

// Calls f with the functor of this activation.
template <class F>
void with_functor(const Epilogue& e, F&& f) {
  const bool known = with_activation(e.act, [&](auto act) {
    if constexpr (decltype(act)::curved) {
      f(AnyCurved(e));
    } else {
      f(PiecewiseLinear(act, e));
    }
  });
  if (!known) throw_unknown(e.act);
}

}  // namespace cuda
}  // namespace stylegan_fast
