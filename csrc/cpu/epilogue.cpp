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

  explicit Operands(const Epilogue& e, bool sums_by_sample = false)
      : affine(e.scale || e.noise),
        sums_by_sample(sums_by_sample),
        geometry(walked(e, sums_by_sample)),
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

  const bool affine, sums_by_sample;
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
  static Geometry walked(const Epilogue& e, bool sums_by_sample) {
    const Geometry& g = e.geometry;
    const int64_t period = g.channels * g.inner;
    if (e.scale || e.noise || sums_by_sample || g.inner >= kLongRun ||
        (g.inner == 1 && g.channels >= kLongRun && g.channels % kGroup == 0)) {
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
  int64_t channel;       // of the first element
  int64_t sums;          // number of the sum of channel 0: other than 0 where each sample has its own
  const int64_t* lanes;  // null, or the number of the sum of each lane
};

// What is done with a run, called through a pointer, so that what finds the runs is compiled once.
template <class A>
class RunBody {
 public:
  template <class Body>
  RunBody(const Body& body)
      : body_(&body), call_([](const void* body, const Run<A>& run) {
          (*static_cast<const Body*>(body))(run);
        }) {}
  void operator()(const Run<A>& run) const { call_(body_, run); }

 private:
  const void* body_;
  void (*call_)(const void*, const Run<A>&);
};

// Calls body(run) for runs that cover the groups [begin, end) of a buffer of `numel` elements.
template <class T, class A>
void for_each_run(const Operands<T>& o, int64_t numel, int64_t begin, int64_t end,
                  RunBody<A> body) {
  const Geometry& g = o.geometry;
  alignas(64) A scale[kGroup], bias[kGroup], noise[kGroup];
  int64_t lanes[kGroup];
  const auto fill = [](A* out, A value) {
    for (int lane = 0; lane < kGroup; ++lane) out[lane] = value;
  };
  const bool per_sample = o.affine || o.sums_by_sample;
  const int64_t sample_sums = o.sums_by_sample ? g.channels : 0;

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
      int64_t sample = 0;
      if (g.inner == 1) {
        c.bias = o.bias() + channel;
        c.bias_step = kGroup;
      } else {
        fill(bias, o.bias()[channel]);
      }
      if (per_sample) {
        const int64_t pixel = outer * g.inner + inner;
        sample = pixel / g.pixels;
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
      body(Run<A>{group, groups, c, channel, sample * sample_sums, nullptr});
    } else {
      advance = smaller(kGroup, numel - i);
      int64_t lane_inner = inner, lane_channel = channel, lane_outer = outer;
      for (int lane = 0; lane < kGroup; ++lane) {
        const int64_t pixel = lane_outer * g.inner + lane_inner;
        const int64_t sample = per_sample && lane < advance ? pixel / g.pixels : 0;
        lanes[lane] = lane < advance ? sample * sample_sums + lane_channel : lanes[0];
        bias[lane] = lane < advance ? o.bias()[lane_channel] : A(0);
        if (o.affine) {
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
      body(Run<A>{group, 1, {scale, bias, noise, 0, 0, 0}, channel, lanes[0] - channel, lanes});
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

// First group of a thread's share.
int64_t share(int64_t groups, int used, int thread) { return groups * thread / used; }

template <class Body>
void parallel(int64_t groups, int threads, Body&& body) {
  const int used = useful_threads(groups, threads);
#pragma omp parallel for num_threads(used) schedule(static, 1) if (used > 1)
  for (int thread = 0; thread < used; ++thread)
    body(thread, share(groups, used, thread), share(groups, used, thread + 1));
}

// What a map adds up at each element, d(v) first.
template <class V, int kSums>
struct Terms {
  V of[kSums];
};

// Sums of kSums terms over all but the channels, or over the pixels of each sample. A thread adds
// to doubles of its own, which are added up in thread order.
template <class T, int kSums>
class Sums {
 public:
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;

  // Sums come in blocks, each of a stretch of elements: all channels of the tensor or, of NHWC, of a
  // sample; one plane of NCHW. Only the first block of a thread's share can be another's last.
  Sums(const Operands<T>& o, int64_t numel, int threads)
      : by_sample_(o.sums_by_sample),
        channels_(o.geometry.channels),
        numel_(numel),
        threads_(threads),
        stretch_(larger(1, !by_sample_              ? numel
                           : o.geometry.inner == 1 ? o.geometry.pixels * channels_
                                                   : o.geometry.inner)),
        block_(by_sample_ && o.geometry.inner > 1 ? 1 : channels_),
        count_(by_sample_ ? o.geometry.samples() * channels_ : channels_),
        slots_(count_ + threads * block_),
        totals_(threads ? kSums * slots_ : 0),
        row_(o.geometry.inner == 1 ? threads * kSums * row_size() : 0) {}

  double* totals(int thread, int term) const {
    return totals_.get() + term * slots_ + thread * block_;
  }
  A* row(int thread, int term) const { return row_.get() + (thread * kSums + term) * row_size(); }

  // `sums` is the number of the sum of channel 0.
  void flush_row(int thread, int64_t sums) const {
    for (int term = 0; term < kSums; ++term) {
      A* row_sums = row(thread, term);
      double* to = totals(thread, term) + sums;
      for (int64_t c = 0; c < channels_; ++c) to[c] += row_sums[c], row_sums[c] = 0;
    }
  }

  void write(const Geometry& original, A* const (&out)[kSums]) const {
    Buffer<double> sums(count_), folded(original.channels);
    const int64_t groups = (numel_ + kGroup - 1) / kGroup;
    for (int term = 0; term < kSums; ++term) {
      if (!out[term]) continue;
      for (int64_t i = 0; i < count_; ++i) sums[i] = 0;
      for (int thread = 0; thread < threads_; ++thread) {
        const int64_t begin = share(groups, threads_, thread) * kGroup;
        const int64_t end = smaller(numel_, share(groups, threads_, thread + 1) * kGroup);
        const int64_t last = (end + stretch_ - 1) / stretch_ * block_;
        for (int64_t i = begin / stretch_ * block_; i < last; ++i)
          sums[i] += totals(thread, term)[i];
      }
      if (by_sample_) {
        for (int64_t i = 0; i < count_; ++i) out[term][i] = static_cast<A>(sums[i]);
        continue;
      }
      for (int64_t c = 0; c < original.channels; ++c) folded[c] = 0;
      for_each_pattern_channel(original, channels_,
                               [&](int64_t i, int64_t c) { folded[c] += sums[i]; });
      for (int64_t c = 0; c < original.channels; ++c) out[term][c] = static_cast<A>(folded[c]);
    }
  }

 private:
  int64_t row_size() const { return channels_ + kGroup; }

  bool by_sample_;
  int64_t channels_, numel_;
  int threads_;
  int64_t stretch_, block_, count_, slots_;
  Buffer<double> totals_;
  Buffer<A> row_;
};

// Runs step(at, operands of the run at this offset) -> Terms for each vector and adds them up.
// Inlined, because a closure that is passed on is reloaded after each store.
template <class T, int kSums, class Step>
STYLEGAN_FAST_INLINE inline void sum_run(const Sums<T, kSums>& sums, int thread, const Run<typename Operands<T>::A>& run,
             bool rows, Step&& step) {
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;
  if (run.lanes) {
    alignas(64) A values[kSums][kGroup];
    for (int lane = 0; lane < kGroup; lane += V::lanes) {
      const Terms<V, kSums> terms = step(0, lane);
      unrolled<kSums>([&](auto term) STYLEGAN_FAST_INLINE { terms.of[term].store(values[term] + lane); });
    }
    for (int term = 0; term < kSums; ++term)
      for (int lane = 0; lane < kGroup; ++lane)
        sums.totals(thread, term)[run.lanes[lane]] += values[term][lane];
  } else if (rows) {
    A* row[kSums];
    unrolled<kSums>([&](auto term) STYLEGAN_FAST_INLINE { row[term] = sums.row(thread, term) + run.channel; });
    for (int64_t k = 0; k < run.groups; ++k)
      for (int lane = 0; lane < kGroup; lane += V::lanes) {
        const Terms<V, kSums> terms = step(k, lane);
        unrolled<kSums>([&](auto term) STYLEGAN_FAST_INLINE {
          A* at = row[term] + k * kGroup + lane;
          (V::load(at) + terms.of[term]).store(at);
        });
      }
  } else {
    constexpr int kVectors = kGroup / V::lanes;
    V total[kVectors * kSums];
    unrolled<kVectors * kSums>([&](auto i) STYLEGAN_FAST_INLINE { total[i] = V(0.0); });
    for (int64_t k = 0; k < run.groups; ++k)
      unrolled<kVectors>([&](auto vector) STYLEGAN_FAST_INLINE {
        const Terms<V, kSums> terms = step(k, vector * V::lanes);
        unrolled<kSums>([&](auto term) STYLEGAN_FAST_INLINE {
          V& part = total[vector * kSums + term];
          part = part + terms.of[term];
        });
      });
    unrolled<kVectors * kSums>([&](auto i) STYLEGAN_FAST_INLINE {
      sums.totals(thread, i % kSums)[run.sums + run.channel] += total[i].sum();
    });
  }
}

template <class T, class Act>
void forward(const Epilogue& e, const T* x, T* y, uint8_t* mask, int threads) {
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;
  const Operands<T> operands(e);
  const int64_t numel = e.geometry.numel();
  const ForwardConstants<V> constants(e);

  const auto walk = [&](auto has_affine, auto has_mask, int64_t begin, int64_t end) {
    constexpr bool kAffine = decltype(has_affine)::value;
    constexpr bool kMask = decltype(has_mask)::value && !Act::curved;
    const auto body = [&](const Run<A>& run) {
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
    };
    for_each_run(operands, numel, begin, end, RunBody<A>(body));
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

// What the backward maps share: dx = scale d(v) and the sums, into `out` unless all are null.
// derivative(operands, run, in, units, k, lane) returns the terms of one vector; `in` and `units`
// point to the run's first group.
template <class T, int kInputs, int kSums, class Derivative>
void backward(const Epilogue& e, bool sums_by_sample, const T* const (&inputs)[kInputs],
              const uint8_t* mask, T* dx, typename Operands<T>::A* const (&out)[kSums], int threads,
              Derivative&& derivative) {
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;
  const Operands<T> operands(e, sums_by_sample);
  const int64_t numel = e.geometry.numel();
  const int64_t groups = (numel + kGroup - 1) / kGroup;
  const bool rows = operands.geometry.inner == 1;
  const int used = useful_threads(groups, threads);
  bool sum = false;
  for (const auto* sums : out) sum = sum || sums;
  const Sums<T, kSums> sums(operands, numel, sum ? used : 0);

  const auto walk = [&](auto has_scale, int thread, int64_t begin, int64_t end) {
    int64_t since_flush = 0, row_sums = 0;
    const auto apply = [&](auto run, const T* const* in, const uint8_t* units, T* to) {
      // A copy: what is reached through a reference is reloaded after each store.
      const auto local = derivative;
      const auto step = [=, &operands](int64_t k, int lane) STYLEGAN_FAST_INLINE {
        const Terms<V, kSums> terms = local(operands, run, in, units, k, lane);
        if (to) {
          V d = terms.of[0];
          if constexpr (decltype(has_scale)::value) {
            const auto& c = run.coefficients;
            d = V::load(c.scale + k * c.scale_step + lane) * d;
          }
          store(to + k * kGroup + lane, d);
        }
        return terms;
      };
      if (sum) return sum_run(sums, thread, run, rows, step);
      for (int64_t k = 0; k < run.groups; ++k)
        for (int lane = 0; lane < kGroup; lane += V::lanes) step(k, lane);
    };
    const auto body = [&](const Run<A>& run) {
      if (sum && rows && (since_flush >= kFlush || run.sums != row_sums)) {
        if (since_flush) sums.flush_row(thread, row_sums);
        since_flush = 0;
        row_sums = run.sums;
      }
      since_flush += run.groups;
      const int64_t first = run.first * kGroup;
      const int64_t present = numel - first;
      const T* in[kInputs];
      for (int k = 0; k < kInputs; ++k) in[k] = inputs[k] + first;
      if (present >= kGroup) {
        apply(run, in, mask + run.first * 4, dx ? dx + first : nullptr);
      } else {
        T padded[kInputs][kGroup] = {}, result[kGroup];
        uint8_t units[4] = {};
        for (int k = 0; k < kInputs; ++k) {
          std::memcpy(padded[k], in[k], present * sizeof(T));
          in[k] = padded[k];
        }
        if (mask) std::memcpy(units, mask + run.first * 4, (present + 7) / 8 * 2);
        apply(run, in, units, result);
        if (dx) std::memcpy(dx + first, result, present * sizeof(T));
      }
    };
    for_each_run(operands, numel, begin, end, RunBody<A>(body));
    if (since_flush && sum && rows) sums.flush_row(thread, row_sums);
  };
  parallel(groups, threads, [&](int thread, int64_t begin, int64_t end) {
    e.scale ? walk(std::true_type(), thread, begin, end)
            : walk(std::false_type(), thread, begin, end);
  });
  if (sum) sums.write(e.geometry, out);
}

template <class T, class F>
void with_masked_derivative(const Epilogue& e, double negative_slope, const uint8_t* mask, F&& f) {
  using V = typename Operands<T>::V;
  mask ? f(MaskedDerivative<V, true>(e.gain, negative_slope))
       : f(MaskedDerivative<V, false>(e.gain, negative_slope));
}

template <class T>
void masked(const Epilogue& e, double negative_slope, const T* dy, const uint8_t* mask, T* dx,
            void* sum, int threads) {
  using V = typename Operands<T>::V;
  const T* const inputs[1] = {dy};
  typename V::Scalar* const out[1] = {static_cast<typename V::Scalar*>(sum)};
  with_masked_derivative<T>(e, negative_slope, mask, [&](auto dv) {
    const auto derivative = [=](const auto&, const auto&, const T* const* in, const uint8_t* units,
                                int64_t k, int lane) {
      return Terms<V, 1>{{dv(in[0], units, k, lane)}};
    };
    backward<T>(e, false, inputs, mask, dx, out, threads, derivative);
  });
}

// `masked` with the moments. An output y that is not there is dy, and its sums are not written.
template <class T>
void masked_moments(const Epilogue& e, double negative_slope, const T* dy, const T* y,
                    const uint8_t* mask, T* dx, void* moments, int threads) {
  using V = typename Operands<T>::V;
  using A = typename V::Scalar;
  const T* const inputs[2] = {dy, y ? y : dy};
  const int64_t count = e.geometry.samples() * e.geometry.channels;
  A* const row = static_cast<A*>(moments);
  with_masked_derivative<T>(e, negative_slope, mask, [&](auto masked) {
    const auto run_with = [&](auto& out) {
      constexpr int kSums = std::extent_v<std::remove_reference_t<decltype(out)>>;
      const auto derivative = [=](const auto&, const auto& run, const T* const* in,
                                  const uint8_t* units, int64_t k, int lane) STYLEGAN_FAST_INLINE {
        const auto slope = masked.slope(units, k, lane);
        const V zero(0.0), d = load(in[0] + k * kGroup + lane, V());
        const V dv = where(slope.dropped, zero, slope.factor * d);
        const V dv_v = where(slope.dropped, zero, d * load(in[1] + k * kGroup + lane, V()));
        if constexpr (kSums == 3) {
          const auto& c = run.coefficients;
          return Terms<V, 3>{{dv, dv_v, dv * V::load(c.noise + k * c.noise_step + lane)}};
        } else {
          return Terms<V, 2>{{dv, dv_v}};
        }
      };
      backward<T>(e, true, inputs, mask, dx, out, threads, derivative);
    };
    A* const of_y = row && y ? row + count : nullptr;
    if (row && e.noise) {
      A* const out[3] = {row, of_y, row + 2 * count};
      run_with(out);
    } else {
      A* const out[2] = {row, of_y};
      run_with(out);
    }
  });
}

template <class T, class Act>
void curved(const Epilogue& e, int order, const T* x, const T* dy, const T* h, T* dx, void* sum,
            int threads) {
  using V = typename Operands<T>::V;
  const V zero(0.0);
  const ForwardConstants<V> constants(e);
  typename V::Scalar* const out[1] = {static_cast<typename V::Scalar*>(sum)};
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
      return Terms<V, 1>{{where(abs(u) > constants.limit, zero, constants.gain * factor)}};
    };
    backward<T>(e, false, inputs, nullptr, dx, out, threads, derivative);
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

void epilogue_backward(const Epilogue& e, double negative_slope, const void* dy, const void* y,
                       const uint8_t* mask, void* dx, void* moments, int threads) {
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    masked_moments<T>(e, negative_slope, static_cast<const T*>(dy), static_cast<const T*>(y), mask,
                      static_cast<T*>(dx), moments, threads);
  });
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
