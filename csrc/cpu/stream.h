// Blocks of a plane of a separable filter's output through registers, for the filters that networks
// run, with as many taps and the same factor along both axes.
//
// A strip of a few vectors walks down the plane: every row of input is read once, filtered along x by
// shifting vectors against each other, and added to all the rows of output that see it. Rows that are
// not complete yet stay in registers.
#pragma once

#include "common.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

#define STYLEGAN_FAST_INLINE __attribute__((always_inline))

// Calls body(constant) for 0 ... count - 1. Indexed so, unlike in a loop, arrays stay in registers.
template <class Body, int... i>
STYLEGAN_FAST_INLINE inline void for_each(std::integer_sequence<int, i...>, Body&& body) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int count, class Body>
STYLEGAN_FAST_INLINE inline void unrolled(Body&& body) {
  for_each(std::make_integer_sequence<int, count>(), body);
}

template <int taps_, int down_>
struct StreamFilter {
  static constexpr int taps = taps_, down = down_;
  static constexpr int in_flight = taps / down;  // rows of output
  static constexpr bool fits = (taps - 1) / down <= kLanes;
  static constexpr int vectors = taps > 4 ? 1 : 4;  // of a strip, as many as registers hold
};

// Calls f(StreamFilter) if there is one; whether there is.
template <class F>
bool with_stream_filter(int taps, int down, F&& f) {
  bool found = false;
  const auto is = [&](auto filter) {
    using Filter = decltype(filter);
    if constexpr (Filter::fits) {
      if (taps == Filter::taps && down == Filter::down) found = true, f(filter);
    }
  };
  is(StreamFilter<4, 1>());
  is(StreamFilter<4, 2>());
  is(StreamFilter<12, 2>());
  return found;
}

// Pixels [begin, end) of the rows of input that a block sees, null where there is no image. A step
// reads `down` rows of them and finishes one of the `count` rows of output.
struct StreamRows {
  const float* const* rows;
  int64_t begin, end;
  int64_t count;
  bool past_cache;  // the output is too large to be found in a cache later
};

template <class F>
class Stream {
 public:
  Stream(const StreamRows& in, const float* along_x, const float* along_y)
      : in_(in), along_x_(along_x), along_y_(along_y) {}

  // `count` pixels a row, of which the first sees the pixels from `first` on.
  void run(int64_t first, int64_t count, int64_t row_step, float* to) const {
    while (count > 0) {
      const bool wide = count > (F::vectors - 1) * kLanes;
      wide ? strip<F::vectors>(first, count, row_step, to) : strip<1>(first, count, row_step, to);
      const int64_t done = (wide ? F::vectors : 1) * kLanes;
      first += done * F::down;
      count -= done;
      to += done;
    }
    if (in_.past_cache) store_fence();
  }

 private:
  // Pixels of a row: all of a vector, or the even and the odd ones of two.
  struct Vectors {
    Float even, odd;
  };

  template <int N>
  void strip(int64_t first, int64_t count, int64_t row_step, float* to) const {
    const int64_t at = first - in_.begin, end = in_.end - in_.begin;
    const bool whole = count >= N * kLanes;
    const auto aligned = reinterpret_cast<uintptr_t>(to) | row_step * sizeof(float);
    const bool past_cache = in_.past_cache && aligned % sizeof(Float) == 0;
    const auto write = [=](int64_t row, const Float* sums) STYLEGAN_FAST_INLINE {
      float* out = to + row * row_step;
      unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
        past_cache ? store_past_cache(out + v * kLanes, sums[v]) : sums[v].store(out + v * kLanes);
      });
    };
    const auto write_some = [=](int64_t row, const Float* sums) STYLEGAN_FAST_INLINE {
      float* out = to + row * row_step;
      unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
        store_some(out + v * kLanes, clip_lanes(count - v * kLanes), sums[v]);
      });
    };
    const auto read = [=](const float* row, int64_t j) STYLEGAN_FAST_INLINE {
      const float* from = row + at + j;
      __builtin_prefetch(from + N * F::down * kLanes);
      if constexpr (F::down == 1) return Vectors{Float::load(from), Float()};
      __builtin_prefetch(from + (N * F::down + 1) * kLanes);
      return split(Float::load(from), Float::load(from + kLanes));
    };
    const auto read_some = [=](const float* row, int64_t j) STYLEGAN_FAST_INLINE {
      const Float a = inside(row, at + j, end);
      if constexpr (F::down == 1) return Vectors{a, Float()};
      return split(a, inside(row, at + j + kLanes, end));
    };
    const bool inner = at >= 0 && at + (N + 1) * F::down * kLanes <= end;
    if (!whole) return walk<N>(read_some, write_some);
    inner ? walk<N>(read, write) : walk<N>(read_some, write);
  }

  // read(row, j) -> Vectors, write(row of the output, sums).
  template <int N, class Read, class Write>
  STYLEGAN_FAST_INLINE void walk(const Read& read, const Write& write) const {
    Float along_x[F::taps], along_y[F::taps], sums[F::in_flight * N];
    unrolled<F::taps>([&](auto k) STYLEGAN_FAST_INLINE {
      along_x[k] = Float(along_x_[k]);
      along_y[k] = Float(along_y_[k]);
    });
    unrolled<F::in_flight * N>([&](auto i) STYLEGAN_FAST_INLINE { sums[i] = Float(0.0); });
    const int64_t count = in_.count;
    const float* const* row = in_.rows;
    for (int64_t o = 1 - F::in_flight; o < count; ++o) {
      unrolled<F::down>([&](auto j) STYLEGAN_FAST_INLINE {
        const float* from = *row++;
        if (!from) return;
        Float filtered[N];
        Vectors here = read(from, 0);
        unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
          const Vectors next = read(from, (v + 1) * F::down * kLanes);
          filtered[v] = shifted_sum(along_x, here, next, std::make_integer_sequence<int, F::taps>());
          here = next;
        });
        unrolled<F::in_flight * N>([&](auto i) STYLEGAN_FAST_INLINE {
          constexpr int tap = F::taps - F::down + j - F::down * (i / N);
          sums[i] = sums[i] + along_y[tap] * filtered[i % N];
        });
      });
      if (o >= 0) write(o, sums);
      unrolled<F::in_flight * N>([&](auto i) STYLEGAN_FAST_INLINE {
        if constexpr (i + N < F::in_flight * N) {
          sums[i] = sums[i + N];
        } else {
          sums[i] = Float(0.0);
        }
      });
    }
  }

  template <int... k>
  STYLEGAN_FAST_INLINE static Float shifted_sum(const Float* weights, const Vectors& a,
                                                const Vectors& b, std::integer_sequence<int, k...>) {
    return ((weights[k] * (k % F::down ? shifted<k / F::down>(a.odd, b.odd)
                                       : shifted<k / F::down>(a.even, b.even))) +
            ...);
  }
  STYLEGAN_FAST_INLINE static Vectors split(Float a, Float b) { return {evens(a, b), odds(a, b)}; }

  static Float inside(const float* row, int64_t at, int64_t end) {
    const int low = clip_lanes(-at), high = clip_lanes(end - at);
    return low < high ? load_lanes(row + at, low, high) : Float(0.0);
  }
  static void store_some(float* to, int count, Float v) {
    std::memcpy(to, &v, count * sizeof(float));
  }
  static int clip_lanes(int64_t count) {
    return static_cast<int>(smaller(larger(count, 0), kLanes));
  }

  const StreamRows in_;
  const float *along_x_, *along_y_;
};

#undef STYLEGAN_FAST_INLINE

}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
