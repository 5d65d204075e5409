// Pieces of the FIR kernels: axes, filters, and weighted sums of shifted rows.
#pragma once

#include <limits>

#include "epilogue_row.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kAccumulators = 8;  // vectors
constexpr int kChains = 4;        // of additions, each waits for the one before it

// Divisors are factors, mostly 1 or 2, and a division costs as much as a few vectors of a row.
constexpr int64_t floor_divide(int64_t a, int64_t b) {
  return b == 1 ? a : b == 2 ? a >> 1 : a / b - (a % b < 0);
}
constexpr int64_t ceil_divide(int64_t a, int64_t b) { return -floor_divide(-a, b); }
constexpr int64_t clip(int64_t a, int64_t low, int64_t high) {
  return a < low ? low : a > high ? high : a;
}

// Output o sees the samples first(o) to last(o), sample i through tap(o, i).
struct Axis {
  int64_t in, out, pad;
  int up, down, taps;

  int64_t at(int64_t o) const { return o * down - pad; }
  int64_t first(int64_t o) const { return ceil_divide(at(o), up); }
  int64_t last(int64_t o) const { return floor_divide(at(o) + taps - 1, up); }
  int64_t tap(int64_t o, int64_t i) const { return i * up - at(o); }
};

// The filter as it is correlated with the image, gain included: along_y[ky] * along_x[kx], or
// where that is impossible full[ky * taps_x + kx].
template <class A>
class Filter {
 public:
  // `one_row`: the filter is separable, and one row of taps_x = taps_y taps. Null: one tap of 1.
  Filter(const void* filter, int taps_x, int taps_y, bool one_row, bool correlate, double gain)
      : separable(true), x_(taps_x * (one_row ? 1 : taps_y)), y_(taps_y) {
    const int64_t size = static_cast<int64_t>(one_row ? 1 : taps_y) * taps_x;
    const A* taps = static_cast<const A*>(filter);
    for (int64_t k = 0; k < size; ++k) x_[k] = taps ? taps[correlate ? k : size - 1 - k] : A(1);
    if (one_row) {
      for (int k = 0; k < taps_y; ++k) y_[k] = x_[k];
    } else {
      separable = factorise(taps_x, taps_y);
    }
    for (int64_t k = 0; k < (separable ? taps_x : size); ++k) x_[k] = static_cast<A>(gain * x_[k]);
  }

  const A* along_x() const { return x_.get(); }
  const A* along_y() const { return y_.get(); }
  const A* full() const { return x_.get(); }

  bool separable;

 private:
  bool factorise(int taps_x, int taps_y) {
    const int64_t size = static_cast<int64_t>(taps_x) * taps_y;
    int64_t pivot = 0;
    for (int64_t k = 0; k < size; ++k)
      if (std::fabs(x_[k]) > std::fabs(x_[pivot])) pivot = k;
    const A* row = x_.get() + pivot / taps_x * taps_x;
    for (int ky = 0; ky < taps_y; ++ky)
      y_[ky] = x_[pivot] == 0 ? A(0) : x_[ky * taps_x + pivot % taps_x] / x_[pivot];
    for (int64_t k = 0; k < size; ++k) {
      const double product = static_cast<double>(y_[k / taps_x]) * row[k % taps_x];
      const double limit = 2.0 * std::numeric_limits<A>::epsilon() * std::fabs(x_[k]);
      if (!(std::fabs(product - x_[k]) <= limit)) return false;
    }
    std::memmove(x_.get(), row, taps_x * sizeof(A));
    return true;
  }

  Buffer<A> x_, y_;
};

// Some taps: the rows they read, already shifted, and their weights.
template <class A>
struct Taps {
  const A** from;
  A* weight;
  int64_t count;

  void add(const A* row, A w) {
    from[count] = row;
    weight[count++] = w;
  }
};

// `runs` runs of `count` consecutive numbers, from `start` on.
struct Runs {
  int64_t start, runs, count, from_step, to_step;

  Runs(int64_t start, int64_t runs, int64_t count, int64_t from_step, int64_t to_step)
      : start(start), runs(runs), count(count), from_step(from_step), to_step(to_step) {
    if (runs > 1 && from_step == count && to_step == count) this->count *= runs, this->runs = 1;
  }
};

template <class D, class V>
void store_some(D* to, int64_t count, V v) {
  D whole[V::lanes];
  store(whole, v);
  std::memcpy(to, whole, count * sizeof(D));
}

// The weighted sum over taps of one vector at an offset. kTaps = 0: any number of taps.
template <int kTaps, class V>
struct Sum {
  using A = typename V::Scalar;
  V weight[kTaps];
  const A* from[kTaps];

  explicit Sum(const Taps<A>& taps) {
    for (int k = 0; k < kTaps; ++k) {
      weight[k] = V(taps.weight[k]);
      from[k] = taps.from[k];
    }
  }
  V operator()(int64_t at) const {
    V sum = weight[0] * V::load(from[0] + at);
    for (int k = 1; k < kTaps; ++k) sum = sum + weight[k] * V::load(from[k] + at);
    return sum;
  }
};
template <class V>
struct Sum<0, V> {
  using A = typename V::Scalar;
  Taps<A> taps;

  explicit Sum(const Taps<A>& t) : taps(t) {}
  V operator()(int64_t at) const {
    V sums[kChains];
    for (V& sum : sums) sum = V(0.0);
    const auto add = [&](int chain, int64_t k) {
      sums[chain] = sums[chain] + V(taps.weight[k]) * V::load(taps.from[k] + at);
    };
    int64_t k = 0;
    for (; k <= taps.count - kChains; k += kChains)
      for (int chain = 0; chain < kChains; ++chain) add(chain, k + chain);
    for (; k < taps.count; ++k) add(0, k);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// to[r * to_step + j] = sum of weight[k] * from[k][start + r * from_step + j]. Reads whole vectors only
// where count >= V::lanes, else up to a vector too much.
template <int kTaps, class V, class D>
void fir(const Taps<typename V::Scalar>& taps, const Runs& runs, D* to) {
  const Sum<kTaps, V> sum(taps);
  const int64_t count = runs.count, last = count - V::lanes;
  for (int64_t r = 0; r < runs.runs; ++r, to += runs.to_step) {
    const int64_t at = runs.start + r * runs.from_step;
    if (last < 0) {
      store_some(to, count, sum(at));
      continue;
    }
    // Stores that straddle cache lines are slow: one such vector, the next ones aligned.
    store(to, sum(at));
    int64_t j = V::lanes - reinterpret_cast<uintptr_t>(to) / sizeof(D) % V::lanes;
    if constexpr (kTaps == 0) {
      for (; j <= count - kAccumulators * V::lanes; j += kAccumulators * V::lanes) {
        V sums[kAccumulators];
        for (V& part : sums) part = V(0.0);
        for (int64_t k = 0; k < taps.count; ++k) {
          const V weight(taps.weight[k]);
          const auto* from = taps.from[k] + at + j;
          for (int i = 0; i < kAccumulators; ++i)
            sums[i] = sums[i] + weight * V::load(from + i * V::lanes);
        }
        for (int i = 0; i < kAccumulators; ++i) store(to + j + i * V::lanes, sums[i]);
      }
    }
    for (; j <= last; j += V::lanes) store(to + j, sum(at + j));
    if (j < count) store(to + last, sum(at + last));
  }
}

// Calls f with the number of taps as a constant if the real workloads have it, else with 0.
template <class F>
void with_taps(int64_t count, F&& f) {
  switch (count) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 6: return f(std::integral_constant<int, 6>());
    default: return f(std::integral_constant<int, 0>());
  }
}

template <class V, class D>
void fir(const Taps<typename V::Scalar>& taps, const Runs& runs, D* to) {
  with_taps(taps.count, [&](auto count) { fir<decltype(count)::value, V>(taps, runs, to); });
}

// Numbers to the next 64 bytes.
template <class A>
int64_t to_alignment(const A* p) {
  return (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(A);
}
// With room for a vector; an odd number of cache lines, so that rows do not share cache sets.
inline int64_t padded(int64_t count) { return ((count + 2 * kGroup) / kGroup | 1) * kGroup; }

// Pixels some numbers apart to pixels some numbers apart.
template <class A>
void copy_pixels(const A* __restrict from, int64_t from_step, A* __restrict to, int64_t to_step,
                 int64_t pixels, int depth) {
  const auto copy = [=](auto size) {
    for (int64_t t = 0; t < pixels; ++t)
      for (int c = 0; c < size; ++c) to[t * to_step + c] = from[t * from_step + c];
  };
  if (depth == 1) return copy(std::integral_constant<int, 1>());
  if (depth == 3) return copy(std::integral_constant<int, 3>());
  copy(depth);
}

// Pixel t * phases + r of a row to pixel t of phase r, and back.
template <class A>
void split(const A* row, int64_t pixels, int depth, int phases, int64_t phase_length, A* to) {
  for (int r = 0; r < phases; ++r)
    copy_pixels(row + r * depth, static_cast<int64_t>(phases) * depth, to + r * phase_length, depth,
                ceil_divide(pixels - r, phases), depth);
}

template <class A>
void unsplit(const A* from, int64_t pixels, int depth, int phases, int64_t phase_length, A* row) {
  for (int r = 0; r < phases; ++r)
    copy_pixels(from + r * phase_length, depth, row + r * depth,
                static_cast<int64_t>(phases) * depth, ceil_divide(pixels - r, phases), depth);
}
}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
