// CPU kernels of the epilogue (csrc/epilogue.h), compiled once per SIMD level.
//
// A buffer is walked in groups of 16 consecutive elements (two mask units). Runs of groups share
// where their operands come from: inside a plane scale and bias are constant, inside an NHWC row
// they are consecutive. A group that crosses such a border gathers its operands lane by lane.
// Constant operands are 16 equal numbers read with step 0, so one loop serves every run.

#include <type_traits>

#include "epilogue_row.h"
#include "levels.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int64_t kMaxRun = 256;             // groups; bounds the error of a float accumulator
constexpr int64_t kLongRun = 1024;            // elements; makes the cost of starting a run small
constexpr int64_t kMaxPattern = 8192;        // elements of a bias repeated to a long row
constexpr int64_t kFlush = 4096;              // groups; likewise for the sums of a row
constexpr int64_t kGroupsPerThread = 1024;   // below this a second thread costs more than it saves

// Calls body(i, channel of element i) for the first `count` elements of a buffer.
template <class Body>
void for_each_pattern_channel(const Geometry& g, int64_t count, Body&& body) {
  const int64_t repeat = count == g.channels ? 1 : g.inner;
  for (int64_t i = 0, c = 0; i < count; c = c + 1 == g.channels ? 0 : c + 1)
    for (int64_t k = 0; k < repeat; ++k) body(i++, c);
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
        noise_stride(e.noise_per_sample ? geometry.pixels : 0) {
    if (!e.bias) return;
    const Geometry& g = e.geometry;
    Buffer<A> plain(g.channels + kGroup);
    for (int64_t c = 0; c < g.channels; c += kGroup) {
      load_padded<T, V>(static_cast<const T*>(e.bias) + c, smaller(kGroup, g.channels - c),
                        plain.get() + c);
    }
    for_each_pattern_channel(g, geometry.channels,
                             [&](int64_t i, int64_t c) { bias_[i] = plain[c]; });
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

 private:
  // Short planes and rows: the bias repeats, and a multiple of its period is a long row of whole
  // groups. The last such row may be cut short by the end of the buffer.
  static Geometry walked(const Epilogue& e) {
    const Geometry& g = e.geometry;
    const int64_t period = g.channels * g.inner;
    if (e.scale || e.noise || g.inner >= kLongRun || (g.inner == 1 && g.channels >= kLongRun &&
                                                      g.channels % kGroup == 0)) {
      return g;
    }
    int64_t pattern = period / greatest_common_divisor(period, kGroup) * kGroup;
    pattern *= larger(1, kLongRun / pattern);
    if (pattern > kMaxPattern || 4 * pattern > g.numel()) return g;
    const int64_t rows = (g.numel() + pattern - 1) / pattern;
    return {rows, pattern, 1, rows};
  }
};

template <class A>
struct Run {
  int64_t first, groups;  // in groups
  Coefficients<A> coefficients;
  int64_t channel;       // of the first element; -1: see lanes
  const int64_t* lanes;  // channel of each lane
};

// Calls body(run) for runs that cover the groups [begin, end) of a buffer of `numel` elements.
template <class T, class Body>
void for_each_run(const Operands<T>& o, int64_t numel, int64_t begin, int64_t end, Body&& body) {
  using A = typename Operands<T>::A;
  const Geometry& g = o.geometry;
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
    const int64_t run_end = smaller(numel, i + (g.inner == 1 ? g.channels - channel : g.inner - inner));
    const int64_t groups = smaller((run_end - i) / kGroup, smaller(end - group, kMaxRun));
    int64_t advance = groups * kGroup;
    if (groups > 0) {
      Coefficients<A> c{scale, bias, noise, 0, 0, 0};
      if (g.inner == 1) {
        c.bias = o.bias() + channel;
        c.bias_step = kGroup;
      } else {
        fill(bias, o.bias()[channel]);
      }
      if (o.affine) {
        const int64_t pixel = outer * g.inner + inner;
        const int64_t sample = pixel / g.pixels;
        const int64_t at = pixel % g.pixels + sample * o.noise_stride;
        const A* scale_here = o.scale ? o.scale + sample * g.channels + channel : nullptr;
        if (g.inner == 1 && scale_here) {
          c.scale = scale_here;
          c.scale_step = kGroup;
        } else {
          fill(scale, scale_here ? *scale_here : A(1));
        }
        if (g.inner > 1 && o.noise) {
          c.noise = o.noise + at;
          c.noise_step = kGroup;
        } else {
          fill(noise, o.noise ? o.noise[at] : A(0));
        }
      }
      body(Run<A>{group, groups, c, channel, nullptr});
    } else {
      advance = smaller(kGroup, numel - i);
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
      body(Run<A>{group, 1, {scale, bias, noise, 0, 0, 0}, -1, lanes});
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
    Buffer<double> folded(original.channels);
    for (int thread = 0; thread < threads; ++thread)
      for_each_pattern_channel(original, channels_, [&](int64_t i, int64_t c) {
        folded[c] += totals(thread)[i];
      });
    for (int64_t c = 0; c < original.channels; ++c) static_cast<A*>(out)[c] = static_cast<A>(folded[c]);
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

template <class T, class Act>
void forward(const Epilogue& e, const T* x, T* y, uint8_t* mask, int threads) {
  using V = typename Operands<T>::V;
  const Operands<T> operands(e);
  const int64_t numel = e.geometry.numel();
  const ForwardConstants<V> constants(e);

  const auto walk = [&](auto has_affine, auto has_mask, int64_t begin, int64_t end) {
    constexpr bool kAffine = decltype(has_affine)::value;
    constexpr bool kMask = decltype(has_mask)::value;
    for_each_run(operands, numel, begin, end, [&](const auto& run) {
      const int64_t first = run.first * kGroup;
      const int64_t present = numel - first;
      uint8_t* units = kMask ? mask + run.first * 4 : nullptr;
      if (present >= kGroup) {
        forward_groups<Act, kAffine, kMask>(constants, run.coefficients, run.groups, x + first,
                                            y + first, units);
      } else {
        forward_rest<Act, kAffine, kMask>(constants, run.coefficients, present, x + first,
                                          y + first, units);
      }
    });
  };

  using Yes = std::true_type;
  using No = std::false_type;
  parallel((numel + kGroup - 1) / kGroup, threads, [&](int, int64_t begin, int64_t end) {
    if (operands.affine) {
      mask ? walk(Yes(), Yes(), begin, end) : walk(Yes(), No(), begin, end);
    } else {
      mask ? walk(No(), Yes(), begin, end) : walk(No(), No(), begin, end);
    }
  });
}

// What both backward maps share: dx = scale d(v) and the channel sums. derivative(operands, run, in,
// units, k, lane) returns d(v) of one vector; `in` and `units` point to the run's first group.
template <class T, int kInputs, class Derivative>
void backward(const Epilogue& e, const T* const (&inputs)[kInputs], const uint8_t* mask, T* dx,
              void* sum, int threads, Derivative&& derivative) {
  using V = typename Operands<T>::V;
  const Operands<T> operands(e);
  const int64_t numel = e.geometry.numel();
  const int64_t groups = (numel + kGroup - 1) / kGroup;
  const bool rows = operands.geometry.inner == 1;
  const int used = useful_threads(groups, threads);
  const ChannelSums<T> sums(operands.geometry, sum ? used : 0);

  const auto walk = [&](auto has_scale, int thread, int64_t begin, int64_t end) {
    int64_t since_flush = 0;
    const auto apply = [&](auto run, const T* const* in, const uint8_t* units, T* out) {
      // A copy: what is reached through a reference is reloaded after each store.
      const auto local = derivative;
      const auto step = [=, &operands](int64_t k, int lane) {
        const V dv = local(operands, run, in, units, k, lane);
        if constexpr (decltype(has_scale)::value) {
          const auto& c = run.coefficients;
          store(out + k * kGroup + lane, V::load(c.scale + k * c.scale_step + lane) * dv);
        } else {
          store(out + k * kGroup + lane, dv);
        }
        return dv;
      };
      if (sum) return sum_run(sums, thread, run, rows, step);
      for (int64_t k = 0; k < run.groups; ++k)
        for (int lane = 0; lane < kGroup; lane += V::lanes) step(k, lane);
    };
    for_each_run(operands, numel, begin, end, [&](const auto& run) {
      const int64_t first = run.first * kGroup;
      const int64_t present = numel - first;
      const T* in[kInputs];
      for (int k = 0; k < kInputs; ++k) in[k] = inputs[k] + first;
      if (present >= kGroup) {
        apply(run, in, mask + run.first * 4, dx + first);
      } else {
        T padded[kInputs][kGroup] = {}, out[kGroup];
        uint8_t units[4] = {};
        for (int k = 0; k < kInputs; ++k) {
          std::memcpy(padded[k], in[k], present * sizeof(T));
          in[k] = padded[k];
        }
        if (mask) std::memcpy(units, mask + run.first * 4, (present + 7) / 8 * 2);
        apply(run, in, units, out);
        std::memcpy(dx + first, out, present * sizeof(T));
      }
      since_flush += run.groups;
      if (sum && rows && since_flush >= kFlush) sums.flush_row(thread), since_flush = 0;
    });
    if (sum && rows) sums.flush_row(thread);
  };
  parallel(groups, threads, [&](int thread, int64_t begin, int64_t end) {
    e.scale ? walk(std::true_type(), thread, begin, end)
            : walk(std::false_type(), thread, begin, end);
  });
  if (sum) sums.write(e.geometry, used, sum);
}

template <class T>
void masked(const Epilogue& e, double negative_slope, const T* dy, const uint8_t* mask, T* dx,
            void* sum, int threads) {
  using V = typename Operands<T>::V;
  const T* const inputs[1] = {dy};
  const auto differentiate = [&](auto masked_derivative) {
    const auto derivative = [=](const auto&, const auto&, const T* const* in, const uint8_t* units,
                                int64_t k, int lane) {
      return masked_derivative(in[0], units, k, lane);
    };
    backward<T>(e, inputs, mask, dx, sum, threads, derivative);
  };
  mask ? differentiate(MaskedDerivative<V, true>(e.gain, negative_slope))
       : differentiate(MaskedDerivative<V, false>(e.gain, negative_slope));
}

template <class T, class Act>
void curved(const Epilogue& e, int order, const T* x, const T* dy, const T* h, T* dx, void* sum,
            int threads) {
  using V = typename Operands<T>::V;
  const V zero(0.0);
  const ForwardConstants<V> constants(e);
  const auto differentiate = [=](auto first_order, const auto& inputs) {
    const auto derivative = [=](const auto& operands, const auto& run, const T* const* in,
                                const uint8_t*, int64_t k, int lane) {
      V v = load(in[0] + k * kGroup + lane, V());
      const auto& c = run.coefficients;
      if (operands.affine) {
        v = V::load(c.scale + k * c.scale_step + lane) * v +
            V::load(c.noise + k * c.noise_step + lane) * constants.strength;
      }
      v = v + V::load(c.bias + k * c.bias_step + lane);
      V factor = load(in[1] + k * kGroup + lane, V());
      if constexpr (decltype(first_order)::value) {
        factor = factor * Act::slope(v, constants.alpha);
      } else {
        factor = factor * load(in[2] + k * kGroup + lane, V()) * Act::curvature(v, constants.alpha);
      }
      const V u = constants.gain * Act::value(v, constants.alpha);
      return where(abs(u) > constants.limit, zero, constants.gain * factor);
    };
    backward<T>(e, inputs, nullptr, dx, sum, threads, derivative);
  };
  if (order == 1) {
    const T* const inputs[2] = {x, dy};
    differentiate(std::true_type(), inputs);
  } else {
    const T* const inputs[3] = {x, dy, h};
    differentiate(std::false_type(), inputs);
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
