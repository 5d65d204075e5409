// Blocks of a separable filter's output through registers, for the filters that networks run, with
// as many taps and the same factor along both axes.
//
// A strip walks down a plane, a few vectors wide, or along the pixels of NHWC, a vector of channels
// of a few rows. Each line of input is read once, filtered across the strip, and added to all the
// lines of output that see it. Lines that are not complete yet stay in registers.
#pragma once

#include <type_traits>

#include "common.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int64_t kAhead = 16;  // pixels

// Whether to, to + step, to + 2 * step, ... may be stored to past the cache.
template <class T>
bool aligned(const T* to, int64_t step) {
  return (reinterpret_cast<uintptr_t>(to) | step * sizeof(T)) % sizeof(Float) == 0;
}
template <class T, class V>
STYLEGAN_FAST_INLINE inline void store(T* to, V v, bool past_cache) {
  if constexpr (std::is_same<T, float>::value) {
    if (past_cache) return store_past_cache(to, v);
  }
  store(to, v);
}

template <int taps_, int down_>
struct StreamFilter {
  static constexpr int taps = taps_, down = down_;
  static constexpr int in_flight = taps / down;  // rows, or pixels, of output
  static constexpr bool fits = (taps - 1) / down <= kLanes;
  // A strip's vectors and rows, as many as registers hold.
  static constexpr int vectors = taps > 4 ? 1 : 4;
  static constexpr int rows = taps > 4 ? 2 : 4;
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

// Pixels [begin, end) of the rows of input that a block sees, null where there is no image, and
// where its output goes: `count` rows of `width` pixels, of which the first of a row sees the
// pixels from `first` on.
template <class T>
struct Block {
  const void* const* rows;
  int64_t begin, end, pixel;  // numbers from one pixel to the next
  T* to;
  int64_t row_step, pixel_step;
  int64_t count, width, first;
  bool past_cache;  // the output is too large to be found in a cache later
};

template <class F, class T>
class Stream {
 public:
  Stream(const Block<T>& block, const float* along_x, const float* along_y)
      : b_(block), along_x_(along_x), along_y_(along_y) {}

  void plane() const {
    int64_t x = 0;
    while (x < b_.width) {
      const bool wide = b_.width - x > (F::vectors - 1) * kLanes;
      wide ? down_rows<F::vectors>(x) : down_rows<1>(x);
      x += (wide ? F::vectors : 1) * kLanes;
    }
  }

  // `channels` of every pixel, at least a vector.
  void pixels(int64_t channels) const {
    int64_t row = 0;
    while (row < b_.count) {
      const bool tall = b_.count - row >= F::rows;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t channel = smaller(c, channels - kLanes);
        tall ? along_rows<F::rows>(row, channel) : along_rows<1>(row, channel);
      }
      row += tall ? F::rows : 1;
    }
  }

 private:
  // Pixels of a row: all of a vector, or the even and the odd ones of two.
  struct Vectors {
    Float even, odd;
  };

  // A strip of N vectors from pixel x of the output on.
  template <int N>
  void down_rows(int64_t x) const {
    const int64_t at = b_.first + x * F::down - b_.begin, end = b_.end - b_.begin;
    const int64_t count = b_.width - x, row_step = b_.row_step;
    T* const to = b_.to + x;
    const bool past_cache = b_.past_cache && aligned(to, row_step);
    const auto write = [=](int64_t row, const Float* sums) STYLEGAN_FAST_INLINE {
      T* out = to + row * row_step;
      unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
        store(out + v * kLanes, sums[v], past_cache);
      });
    };
    const auto write_some = [=](int64_t row, const Float* sums) STYLEGAN_FAST_INLINE {
      T* out = to + row * row_step;
      unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
        store_some(out + v * kLanes, clip_lanes(count - v * kLanes), sums[v]);
      });
    };
    const auto read = [=](const T* row, int64_t j) STYLEGAN_FAST_INLINE {
      const T* from = row + at + j;
      __builtin_prefetch(from + N * F::down * kLanes);
      if constexpr (F::down == 1) return Vectors{load(from, Float()), Float()};
      __builtin_prefetch(from + (N * F::down + 1) * kLanes);
      return split(load(from, Float()), load(from + kLanes, Float()));
    };
    const auto read_some = [=](const T* row, int64_t j) STYLEGAN_FAST_INLINE {
      const Float a = inside(row, at + j, end);
      if constexpr (F::down == 1) return Vectors{a, Float()};
      return split(a, inside(row, at + j + kLanes, end));
    };
    const auto strip = [=](const auto& read, const auto& write) STYLEGAN_FAST_INLINE {
      const auto line = [=](int64_t i, const Float* across, Float* filtered) STYLEGAN_FAST_INLINE {
        const T* row = static_cast<const T*>(b_.rows[i]);
        if (!row) return false;
        Vectors here = read(row, 0);
        unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
          const Vectors next = read(row, (v + 1) * F::down * kLanes);
          filtered[v] = shifted_sum(across, here, next, Taps());
          here = next;
        });
        return true;
      };
      walk<N>(b_.count, along_x_, along_y_, line, write);
    };
    const bool inner = at >= 0 && at + (N + 1) * F::down * kLanes <= end;
    if (count < N * kLanes) return strip(read_some, write_some);
    inner ? strip(read, write) : strip(read_some, write);
  }

  // A vector of channels of N rows of output.
  template <int N>
  void along_rows(int64_t row, int64_t channel) const {
    constexpr int seen = (N - 1) * F::down + F::taps;
    const int64_t first = b_.first, begin = b_.begin, end = b_.end, pixel = b_.pixel;
    const int64_t row_step = b_.row_step, pixel_step = b_.pixel_step;
    const T* rows[seen];
    bool inner = true;
    for (int k = 0; k < seen; ++k) {
      rows[k] = static_cast<const T*>(b_.rows[row * F::down + k]);
      if (rows[k]) rows[k] += channel;
      inner = inner && rows[k];
    }
    T* const to = b_.to + row * row_step + channel;
    const bool past_cache = b_.past_cache && aligned(to, row_step | pixel_step);
    const auto write = [=](int64_t x, const Float* sums) STYLEGAN_FAST_INLINE {
      T* out = to + x * pixel_step;
      unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
        store(out + v * row_step, sums[v], past_cache);
      });
    };
    const auto strip = [&](const auto& read) STYLEGAN_FAST_INLINE {
      const auto line = [&](int64_t i, const Float* across, Float* filtered) STYLEGAN_FAST_INLINE {
        const int64_t x = first + i;
        if (x < begin || x >= end) return false;
        const int64_t at = (x - begin) * pixel;
        unrolled<seen>([&](auto k) STYLEGAN_FAST_INLINE {
          const Float here = read(rows[k], at);
          unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
            constexpr int tap = k - v * F::down;
            // From zero on: of two products a compiler may fuse either, and of one row not that of
            // the next.
            if constexpr (tap == 0) filtered[v] = Float(0.0);
            if constexpr (tap >= 0 && tap < F::taps) filtered[v] = filtered[v] + across[tap] * here;
          });
        });
        return true;
      };
      walk<N>(b_.width, along_y_, along_x_, line, write);
    };
    if (inner) {
      strip([=](const T* row, int64_t at) STYLEGAN_FAST_INLINE {
        __builtin_prefetch(row + at + kAhead * pixel, 0, 2);  // the rows may share a set of L1
        return load(row + at, Float());
      });
    } else {
      strip([](const T* row, int64_t at) STYLEGAN_FAST_INLINE {
        return row ? load(row + at, Float()) : Float(0.0);
      });
    }
  }

  // Line after line of the input filtered across, line(i, weights, filtered) -> is there one, and
  // added to the lines of output that see it; write(line of the output, sums).
  template <int N, class Line, class Write>
  STYLEGAN_FAST_INLINE static void walk(int64_t count, const float* across_weights,
                                        const float* along_weights, const Line& line,
                                        const Write& write) {
    Float across[F::taps], along[F::taps], sums[F::in_flight * N];
    unrolled<F::taps>([&](auto k) STYLEGAN_FAST_INLINE {
      across[k] = Float(across_weights[k]);
      along[k] = Float(along_weights[k]);
    });
    unrolled<F::in_flight * N>([&](auto i) STYLEGAN_FAST_INLINE { sums[i] = Float(0.0); });
    int64_t at = 0;
    for (int64_t o = 1 - F::in_flight; o < count; ++o) {
      unrolled<F::down>([&](auto j) STYLEGAN_FAST_INLINE {
        Float filtered[N];
        if (!line(at++, across, filtered)) return;
        unrolled<F::in_flight * N>([&](auto i) STYLEGAN_FAST_INLINE {
          constexpr int tap = F::taps - F::down + j - F::down * (i / N);
          sums[i] = sums[i] + along[tap] * filtered[i % N];
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

  using Taps = std::make_integer_sequence<int, F::taps>;
  template <int... k>
  STYLEGAN_FAST_INLINE static Float shifted_sum(const Float* weights, const Vectors& a,
                                                const Vectors& b, std::integer_sequence<int, k...>) {
    return ((weights[k] * (k % F::down ? shifted<k / F::down>(a.odd, b.odd)
                                       : shifted<k / F::down>(a.even, b.even))) +
            ...);
  }
  STYLEGAN_FAST_INLINE static Vectors split(Float a, Float b) { return {evens(a, b), odds(a, b)}; }

  static Float inside(const T* row, int64_t at, int64_t end) {
    const int low = clip_lanes(-at), high = clip_lanes(end - at);
    return low < high ? load_lanes(row + at, low, high) : Float(0.0);
  }
  static void store_some(T* to, int count, Float v) {
    T whole[kLanes];
    store(whole, v);
    std::memcpy(to, whole, count * sizeof(T));
  }
  static int clip_lanes(int64_t count) {
    return static_cast<int>(smaller(larger(count, 0), kLanes));
  }

  const Block<T> b_;
  const float *along_x_, *along_y_;
};

// Rows of output filtered along y, of which row r sees the row of input r + k through tap k. Rows
// of input are null where there is no image; a vector too much of them may be read. Several rows
// of output share what is read of each.
template <class V>
class TallFir {
 public:
  using A = typename V::Scalar;

  TallFir(const A* const* rows, const A* weights, int64_t taps)
      : rows_(rows), weights_(weights), taps_(taps) {}

  void run(int64_t rows, int64_t count, A* to, int64_t row_step) const {
    int64_t r = 0;
    for (; r <= rows - kRows; r += kRows) columns<kRows>(r, count, to + r * row_step, row_step);
    for (; r < rows; ++r) columns<1>(r, count, to + r * row_step, row_step);
  }

 private:
  static constexpr int kRows = 4, kVectors = 4;

  template <int R>
  void columns(int64_t first, int64_t count, A* to, int64_t row_step) const {
    V sums[R * kVectors];
    int64_t j = 0;
    for (; j <= count - kVectors * V::lanes; j += kVectors * V::lanes) {
      block<R, kVectors>(first, j, sums);
      unrolled<R * kVectors>([&](auto i) STYLEGAN_FAST_INLINE {
        sums[i].store(to + i / kVectors * row_step + j + i % kVectors * V::lanes);
      });
    }
    for (; j < count; j += V::lanes) {
      block<R, 1>(first, j, sums);
      for (int r = 0; r < R; ++r)
        std::memcpy(to + r * row_step + j, &sums[r], smaller(count - j, V::lanes) * sizeof(A));
    }
  }

  template <int R, int N>
  STYLEGAN_FAST_INLINE void block(int64_t first, int64_t j, V* out) const {
    V sums[R * N];
    unrolled<R * N>([&](auto i) STYLEGAN_FAST_INLINE { sums[i] = V(0.0); });
    for (int64_t k = 0; k < taps_ + R - 1; ++k) {
      const A* row = rows_[first + k];
      if (!row) continue;
      V here[N];
      unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE { here[v] = V::load(row + j + v * V::lanes); });
      const bool all = k >= R - 1 && k < taps_;
      unrolled<R>([&](auto r) STYLEGAN_FAST_INLINE {
        if (!all && (k < r || k - r >= taps_)) return;
        const V weight(weights_[k - r]);
        unrolled<N>([&](auto v) STYLEGAN_FAST_INLINE {
          sums[r * N + v] = sums[r * N + v] + weight * here[v];
        });
      });
    }
    unrolled<R * N>([&](auto i) STYLEGAN_FAST_INLINE { out[i] = sums[i]; });
  }

  const A* const* rows_;
  const A* weights_;
  const int64_t taps_;
};

}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
