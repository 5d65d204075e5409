// CPU kernels of the epilogue (csrc/epilogue.h), compiled once per SIMD level.
//
// A buffer is walked in groups of 16 consecutive elements (two mask units). Runs of groups share
// where their operands come from: inside a plane scale and bias are constant, inside an NHWC row
// they are consecutive. A group that crosses such a border gathers its operands lane by lane.
// Constant operands are 16 equal numbers read with step 0, so one loop serves every run.

#include <cstdlib>
#include <new>
#include <type_traits>

#include "../activations.h"
#include "levels.h"
#include "simd.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kGroup = 16;
constexpr int64_t kMaxRun = 256;             // groups; bounds the error of a float accumulator
constexpr int64_t kMaxPattern = 8192;        // elements of a bias repeated to whole groups
constexpr int64_t kGroupsPerThread = 1024;   // below this a second thread costs more than it saves

// Plain storage: standard containers would be instantiated with this level's instructions.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::calloc(count + 1, sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
struct Compute {
  using Vector = Float;
};
template <>
struct Compute<double> {
  using Vector = Double;
};

template <class T, class V>
void load_padded(const T* p, int64_t count, typename V::Scalar* out) {
  T padded[kGroup] = {};
  std::memcpy(padded, p, count * sizeof(T));
  for (int lane = 0; lane < kGroup; lane += V::lanes) load(padded + lane, V()).store(out + lane);
}

int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// The operands of one problem in the accumulation type, and the geometry they are walked in.
template <class T>
class Operands {
 public:
  using V = typename Compute<T>::Vector;
  using A = typename V::Scalar;

  explicit Operands(const Epilogue& e)
      : affine(e.scale || e.noise),
        geometry(walked(e)),
        bias_(geometry.channels + kGroup),
        scale(static_cast<const A*>(e.scale)),
        noise(static_cast<const A*>(e.noise)),
        noise_stride(e.noise_per_sample ? geometry.pixels : 0),
        strength(e.strength ? *static_cast<const A*>(e.strength) : A(1)) {
    if (!e.bias) return;
    const Geometry& g = e.geometry;
    Buffer<A> plain(g.channels + kGroup);
    for (int64_t c = 0; c < g.channels; c += kGroup) {
      load_padded<T, V>(static_cast<const T*>(e.bias) + c, smaller(kGroup, g.channels - c),
                        plain.get() + c);
    }
    const int64_t repeat = geometry.channels == g.channels ? 1 : g.inner;
    for (int64_t i = 0; i < geometry.channels; ++i) bias_[i] = plain[(i / repeat) % g.channels];
  }

  const A* bias() const { return bias_.get(); }

  const bool affine;
  const Geometry geometry;

 private:
  Buffer<A> bias_;

 public:
  const A* const scale;
  const A* const noise;
  const int64_t noise_stride;
  const A strength;

 private:
  // Short planes and odd channel counts: the bias repeats with a period that, taken often enough, is
  // whole groups, which turns the buffer into rows of that many channels.
  static Geometry walked(const Epilogue& e) {
    const Geometry& g = e.geometry;
    const int64_t period = g.channels * g.inner;
    const bool has_short_runs = g.inner == 1 ? g.channels % kGroup != 0 : g.inner % kGroup != 0;
    if (e.scale || e.noise || !has_short_runs) return g;
    const int64_t pattern = period / greatest_common_divisor(period, kGroup) * kGroup;
    if (pattern > kMaxPattern || g.numel() % pattern != 0 || g.numel() < 2 * pattern) return g;
    const int64_t rows = g.numel() / pattern;
    return {rows, pattern, 1, rows};
  }
};

template <class A>
struct Run {
  int64_t first, groups;  // in groups
  const A *scale, *bias, *noise;
  int scale_step, bias_step, noise_step;  // 0 or kGroup
  int64_t channel;                        // of the first element; -1: see lanes
  const int64_t* lanes;                   // channel of each lane
};

// Calls body(run) for runs that cover the groups [begin, end).
template <class T, class Body>
void for_each_run(const Operands<T>& o, int64_t begin, int64_t end, Body&& body) {
  using A = typename Operands<T>::A;
  const Geometry& g = o.geometry;
  const int64_t last_element = g.numel();
  alignas(64) A scale[kGroup], bias[kGroup], noise[kGroup];
  int64_t lanes[kGroup];
  const auto fill = [](A* out, A value) {
    for (int lane = 0; lane < kGroup; ++lane) out[lane] = value;
  };

  int64_t group = begin;
  int64_t i = begin * kGroup;
  int64_t inner = i % g.inner;
  int64_t channel = i / g.inner % g.channels;
  int64_t outer = i / g.inner / g.channels;
  while (group < end) {
    const int64_t left = (g.inner == 1 ? g.channels - channel : g.inner - inner) / kGroup;
    const int64_t groups = smaller(left, smaller(end - group, kMaxRun));
    int64_t advance = groups * kGroup;
    if (groups > 0) {
      Run<A> run{group, groups, scale, bias, noise, 0, 0, 0, channel, nullptr};
      const int64_t pixel = outer * g.inner + inner;
      const int64_t sample = pixel / g.pixels;
      const int64_t at = pixel % g.pixels + sample * o.noise_stride;
      const A* scale_here = o.scale ? o.scale + sample * g.channels + channel : nullptr;
      if (g.inner == 1) {
        run.bias = o.bias() + channel;
        run.bias_step = kGroup;
        if (scale_here) run.scale = scale_here, run.scale_step = kGroup;
        if (!scale_here && o.affine) fill(scale, A(1));
        if (o.affine) fill(noise, o.noise ? o.noise[at] : A(0));
      } else {
        fill(bias, o.bias()[channel]);
        if (o.affine) fill(scale, scale_here ? *scale_here : A(1));
        if (o.noise) run.noise = o.noise + at, run.noise_step = kGroup;
        if (!o.noise && o.affine) fill(noise, A(0));
      }
      body(run);
    } else {
      advance = smaller(kGroup, last_element - i);
      int64_t lane_inner = inner, lane_channel = channel, lane_outer = outer;
      for (int lane = 0; lane < kGroup; ++lane) {
        lanes[lane] = lane_channel;
        bias[lane] = lane < advance ? o.bias()[lane_channel] : A(0);
        if (o.affine) {
          const int64_t pixel = lane_outer * g.inner + lane_inner;
          const int64_t sample = lane < advance ? pixel / g.pixels : 0;
          scale[lane] = o.scale ? o.scale[sample * g.channels + lane_channel] : A(1);
          noise[lane] = o.noise && lane < advance
                            ? o.noise[pixel % g.pixels + sample * o.noise_stride]
                            : A(0);
        }
        if (++lane_inner == g.inner) {
          lane_inner = 0;
          if (++lane_channel == g.channels) lane_channel = 0, ++lane_outer;
        }
      }
      body(Run<A>{group, 1, scale, bias, noise, 0, 0, 0, -1, lanes});
    }
    group += (advance + kGroup - 1) / kGroup;
    i += advance;
    if (g.inner == 1) {
      channel += advance;
    } else {
      inner += advance;
      channel += inner / g.inner;
      inner %= g.inner;
    }
    outer += channel / g.channels;
    channel %= g.channels;
  }
}

int useful_threads(int64_t groups, int threads) {
  return static_cast<int>(smaller(larger(threads, 1), larger(1, groups / kGroupsPerThread)));
}

template <class Body>
void parallel(int64_t groups, int threads, Body&& body) {
  const int used = useful_threads(groups, threads);
  const auto share = [&](int thread) { return groups * thread / used; };
#pragma omp parallel for num_threads(used) schedule(static, 1) if (used > 1)
  for (int thread = 0; thread < used; ++thread) body(thread, share(thread), share(thread + 1));
}

// Sums over all but the channels, one accumulator of doubles a thread, added up in thread order.
template <class T>
class ChannelSums {
 public:
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;

  ChannelSums(const Geometry& walked, int threads)
      : channels_(walked.channels), totals_(threads * walked.channels),
        row_(walked.inner == 1 ? threads * (walked.channels + kGroup) : 0) {}

  double* totals(int thread) const { return totals_.get() + thread * channels_; }
  A* row(int thread) const { return row_.get() + thread * (channels_ + kGroup); }

  void flush_row(int thread) const {
    A* row_sums = row(thread);
    double* sums = totals(thread);
    for (int64_t c = 0; c < channels_; ++c) sums[c] += row_sums[c], row_sums[c] = 0;
  }

  void write(const Geometry& original, int threads, void* out) const {
    A* sum = static_cast<A*>(out);
    const int64_t repeat = channels_ == original.channels ? 1 : original.inner;
    Buffer<double> folded(original.channels);
    for (int thread = 0; thread < threads; ++thread)
      for (int64_t i = 0; i < channels_; ++i)
        folded[i / repeat % original.channels] += totals(thread)[i];
    for (int64_t c = 0; c < original.channels; ++c) sum[c] = static_cast<A>(folded[c]);
  }

 private:
  int64_t channels_;
  Buffer<double> totals_;
  Buffer<A> row_;
};

// Runs step(at, operands of the run at this offset) -> V for each vector and adds the results up.
template <class T, class Step>
void sum_run(const ChannelSums<T>& sums, int thread, const Run<typename Operands<T>::A>& run,
             bool rows, Step&& step) {
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;
  if (run.lanes) {
    alignas(64) A values[kGroup];
    for (int lane = 0; lane < kGroup; lane += V::lanes) step(0, lane).store(values + lane);
    for (int lane = 0; lane < kGroup; ++lane) sums.totals(thread)[run.lanes[lane]] += values[lane];
  } else if (rows) {
    A* row = sums.row(thread) + run.channel;
    for (int64_t k = 0; k < run.groups; ++k)
      for (int lane = 0; lane < kGroup; lane += V::lanes) {
        A* at = row + k * kGroup + lane;
        (V::load(at) + step(k, lane)).store(at);
      }
  } else {
    V total[kGroup / V::lanes];
    for (V& part : total) part = V(0.0);
    for (int64_t k = 0; k < run.groups; ++k)
      for (int lane = 0; lane < kGroup; lane += V::lanes) {
        V& part = total[lane / V::lanes];
        part = part + step(k, lane);
      }
    for (const V& part : total) sums.totals(thread)[run.channel] += part.sum();
  }
}

template <class T>
bool is_tail(const Run<typename Operands<T>::A>& run, const Geometry& g) {
  return (run.first + run.groups) * kGroup > g.numel();
}

template <class T, class Act>
void forward(const Epilogue& e, const T* x, T* y, uint8_t* mask, int threads) {
  using V = typename Operands<T>::V;
  const Operands<T> operands(e);
  const int64_t numel = e.geometry.numel();
  const V alpha(e.alpha), gain(e.gain), limit(e.clamp);

  const auto kernel = [&](auto has_affine, auto has_mask, int64_t begin, int64_t end) {
    constexpr bool kAffine = decltype(has_affine)::value;
    constexpr bool kMask = decltype(has_mask)::value;
    for_each_run(operands, begin, end, [&](const auto& run) {
      const T* in = x + run.first * kGroup;
      T* out = y + run.first * kGroup;
      T padded_in[kGroup] = {}, padded_out[kGroup];
      const bool tail = is_tail<T>(run, e.geometry);
      const int64_t tail_count = numel - run.first * kGroup;
      if (tail) {
        std::memcpy(padded_in, in, tail_count * sizeof(T));
        in = padded_in;
        out = padded_out;
      }
      for (int64_t k = 0; k < run.groups; ++k) {
        uint32_t negative = 0, clamped = 0;
        for (int lane = 0; lane < kGroup; lane += V::lanes) {
          V v = load(in + k * kGroup + lane, V());
          if constexpr (kAffine) {
            v = V::load(run.scale + k * run.scale_step + lane) * v +
                V::load(run.noise + k * run.noise_step + lane) * V(operands.strength);
          }
          v = v + V::load(run.bias + k * run.bias_step + lane);
          const V u = gain * Act::value(v, alpha);
          if constexpr (kMask) {
            negative |= bits(v <= V(0.0)) << lane;
            clamped |= bits(abs(u) <= limit) << lane;
          }
          store(out + k * kGroup + lane, where(u > limit, limit, where(u < -limit, -limit, u)));
        }
        if constexpr (kMask) {
          clamped = ~clamped;
          uint8_t units[4] = {static_cast<uint8_t>(negative), static_cast<uint8_t>(clamped),
                              static_cast<uint8_t>(negative >> 8), static_cast<uint8_t>(clamped >> 8)};
          int64_t bytes = 4;
          if (tail) {
            const uint32_t present = (1u << tail_count) - 1;
            for (int byte = 0; byte < 4; ++byte) units[byte] &= present >> (byte / 2 * 8);
            bytes = (tail_count + 7) / 8 * 2;
          }
          std::memcpy(mask + (run.first + k) * 4, units, bytes);
        }
      }
      if (tail) std::memcpy(y + run.first * kGroup, padded_out, tail_count * sizeof(T));
    });
  };

  using Yes = std::true_type;
  using No = std::false_type;
  const int64_t groups = (numel + kGroup - 1) / kGroup;
  parallel(groups, threads, [&](int, int64_t begin, int64_t end) {
    if (operands.affine) {
      mask ? kernel(Yes(), Yes(), begin, end) : kernel(Yes(), No(), begin, end);
    } else {
      mask ? kernel(No(), Yes(), begin, end) : kernel(No(), No(), begin, end);
    }
  });
}

// The shape common to both backward maps: d(v) from derivative(run, in, k, lane, bits), dx = scale
// d(v), and the channel sums. `inputs` are read whole vectors at a time, padded at the tail.
template <class T, int kInputs, class Derivative>
void backward(const Epilogue& e, const T* const (&inputs)[kInputs], T* dx, void* sum, int threads,
              Derivative&& derivative) {
  using V = typename Operands<T>::V;
  const Operands<T> operands(e);
  const int64_t numel = e.geometry.numel();
  const int64_t groups = (numel + kGroup - 1) / kGroup;
  const bool rows = operands.geometry.inner == 1;
  const int used = useful_threads(groups, threads);
  const ChannelSums<T> sums(operands.geometry, sum ? used : 0);

  parallel(groups, threads, [&](int thread, int64_t begin, int64_t end) {
    int64_t since_flush = 0;
    for_each_run(operands, begin, end, [&](const auto& run) {
      const T* in[kInputs];
      T padded_in[kInputs][kGroup] = {}, padded_out[kGroup];
      T* out = dx + run.first * kGroup;
      const bool tail = is_tail<T>(run, e.geometry);
      const int64_t tail_count = numel - run.first * kGroup;
      for (int k = 0; k < kInputs; ++k) {
        in[k] = inputs[k] ? inputs[k] + run.first * kGroup : nullptr;
        if (tail && in[k]) {
          std::memcpy(padded_in[k], in[k], tail_count * sizeof(T));
          in[k] = padded_in[k];
        }
      }
      if (tail) out = padded_out;

      const auto step = [&](int64_t k, int lane) {
        const V dv = derivative(operands, run, in, k, lane);
        V result = dv;
        if (e.scale) result = V::load(run.scale + k * run.scale_step + lane) * dv;
        store(out + k * kGroup + lane, result);
        return dv;
      };
      if (sum) {
        sum_run(sums, thread, run, rows, step);
        since_flush += run.groups;
        if (rows && since_flush >= kMaxRun * 4) sums.flush_row(thread), since_flush = 0;
      } else {
        for (int64_t k = 0; k < run.groups; ++k)
          for (int lane = 0; lane < kGroup; lane += V::lanes) step(k, lane);
      }
      if (tail) std::memcpy(dx + run.first * kGroup, padded_out, tail_count * sizeof(T));
    });
    if (sum && rows) sums.flush_row(thread);
  });
  if (sum) sums.write(e.geometry, used, sum);
}

template <class T>
void masked(const Epilogue& e, double negative_slope, const T* dy, const uint8_t* mask, T* dx,
            void* sum, int threads) {
  using V = typename Operands<T>::V;
  const V positive(e.gain), negative(e.gain * negative_slope), zero(0.0);
  const bool drops_negative = e.gain * negative_slope == 0;
  const bool drops_positive = e.gain == 0;
  const T* const inputs[1] = {dy};
  backward<T>(e, inputs, dx, sum, threads,
              [&](const auto&, const auto& run, const T* const* in, int64_t k, int lane) {
                const V d = load(in[0] + k * kGroup + lane, V());
                const V above = drops_positive ? zero : positive * d;
                if (!mask) return above;
                const uint8_t* unit = mask + (run.first + k) * 4 + lane / 8 * 2;
                uint32_t below_bits, clamped_bits;
                if constexpr (V::lanes > 8) {
                  // The last group of a buffer may have one unit only.
                  const bool whole = (run.first + k) * kGroup + 8 < e.geometry.numel();
                  below_bits = unit[0] | (whole ? unit[2] : 0u) << 8;
                  clamped_bits = unit[1] | (whole ? unit[3] : 0u) << 8;
                } else {
                  const bool present = (run.first + k) * kGroup + lane < e.geometry.numel();
                  below_bits = (present ? unit[0] : 0u) >> (lane & 7);
                  clamped_bits = (present ? unit[1] : 0u) >> (lane & 7);
                }
                const V below = drops_negative ? zero : negative * d;
                return where(mask_from_bits(clamped_bits, V()), zero,
                             where(mask_from_bits(below_bits, V()), below, above));
              });
}

template <class T, class Act>
void curved(const Epilogue& e, int order, const T* x, const T* dy, const T* h, T* dx, void* sum,
            int threads) {
  using V = typename Operands<T>::V;
  const V alpha(e.alpha), gain(e.gain), limit(e.clamp), zero(0.0);
  const auto run_order = [&](auto first_order) {
    constexpr bool kFirst = decltype(first_order)::value;
    const T* const inputs[3] = {x, dy, kFirst ? nullptr : h};
    backward<T>(e, inputs, dx, sum, threads,
                [&](const auto& operands, const auto& run, const T* const* in, int64_t k, int lane) {
                  V v = load(in[0] + k * kGroup + lane, V());
                  if (operands.affine) {
                    v = V::load(run.scale + k * run.scale_step + lane) * v +
                        V::load(run.noise + k * run.noise_step + lane) * V(operands.strength);
                  }
                  v = v + V::load(run.bias + k * run.bias_step + lane);
                  const V d = load(in[1] + k * kGroup + lane, V());
                  V factor;
                  if constexpr (kFirst) {
                    factor = d * Act::slope(v, alpha);
                  } else {
                    factor = d * load(in[2] + k * kGroup + lane, V()) * Act::curvature(v, alpha);
                  }
                  const V u = gain * Act::value(v, alpha);
                  return where(abs(u) <= limit, gain * factor, zero);
                });
  };
  order == 1 ? run_order(std::true_type()) : run_order(std::false_type());
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(double());
    case DType::float32: return f(float());
    case DType::float16: return f(float16());
    case DType::bfloat16: return f(bfloat16());
  }
}

}  // namespace

void epilogue_forward(const Epilogue& e, const void* x, void* y, uint8_t* mask, int threads) {
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_activation(e.act, [&](auto act) {
      forward<T, decltype(act)>(e, static_cast<const T*>(x), static_cast<T*>(y), mask, threads);
    });
  });
}

void epilogue_masked(const Epilogue& e, double negative_slope, const void* dy, const uint8_t* mask,
                     void* dx, void* sum, int threads) {
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    masked<T>(e, negative_slope, static_cast<const T*>(dy), mask, static_cast<T*>(dx), sum, threads);
  });
}

void epilogue_curved(const Epilogue& e, int order, const void* x, const void* dy, const void* h,
                     void* dx, void* sum, int threads) {
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_curved_activation(e.act, [&](auto act) {
      curved<T, decltype(act)>(e, order, static_cast<const T*>(x), static_cast<const T*>(dy),
                               static_cast<const T*>(h), static_cast<T*>(dx), sum, threads);
    });
  });
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
