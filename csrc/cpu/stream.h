// A row of a separable filter's output from the rows of input that it sees, through registers: each
// vector of the input is filtered along y once, and along x by shifting it against its neighbour (of
// a plane) or by passing it on from pixel to pixel (of channels). For the filters that networks run,
// with as many taps, up and down along both axes.
#pragma once

#include "common.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

// The rows that an output row sees, from pixel `begin` to `end`: all there is of them.
struct StreamRows {
  const float* const* rows;
  const float* weights;
  int64_t begin, end;
  int64_t step;  // from pixel to pixel
};

// Up by 2, outputs alternate between two phases; odd: the first of a row has the odd taps.
template <int taps_, int up_, int down_, bool odd_ = false>
struct StreamFilter {
  static constexpr int taps = taps_, up = up_, down = down_, rows = taps / up;
  static constexpr bool odd = odd_;
  static constexpr int window = up == 1 ? taps : taps / 2 + !odd;  // pixels that `up` outputs see
  static constexpr bool fits = (window - 1) / down <= kLanes;
  using Taps = std::make_integer_sequence<int, rows>;

  static constexpr int tap(int phase, int k) { return up == 1 ? k : 2 * k + (phase ^ odd); }
  static constexpr int pixel(int phase, int k) { return up == 1 || odd ? k : k + phase; }
  // The first pixel that output o of a row sees, o - pad + odd being a multiple of up.
  static int64_t first(int64_t o, int64_t pad) { return (o * down - pad + odd) / up; }
};

template <class F>
class Stream {
 public:
  Stream(const StreamRows& in, const float* along_x) : in_(in) {
    for (int k = 0; k < F::taps; ++k) along_x_[k] = Float(along_x[k]);
    for (int k = 0; k < F::rows; ++k) along_y_[k] = Float(in.weights[k]), rows_[k] = in.rows[k];
  }

  // `count` outputs of a plane, of which the first sees the pixels from `first` on.
  template <class D>
  void plane(int64_t first, int64_t count, D* to) const {
    Vectors here = vectors(first);
    for (int64_t j = 0; j < count; j += kLanes * F::up) {
      const Vectors next = vectors(first += kLanes * F::down);
      const Float sum = shifted_sum<0>(here, next, typename F::Taps());
      if constexpr (F::up == 2) {
        Float low, high;
        interleave(sum, shifted_sum<1>(here, next, typename F::Taps()), low, high);
        store_first(to + j, count - j, low);
        if (count - j > kLanes) store_first(to + j + kLanes, count - j - kLanes, high);
      } else {
        store_first(to + j, count - j, sum);
      }
      here = next;
    }
  }

  // `count` pixels of `depth` channels each, `to_step` apart.
  template <class D>
  void channels(int64_t first, int64_t count, int64_t depth, int64_t to_step, D* to) const {
    constexpr int64_t kPixels = 32;  // of all channels before the next ones: L1
    for (; count > 0; count -= kPixels, first += kPixels * F::down / F::up, to += kPixels * to_step)
      for (int64_t c = 0; c < depth; c += kLanes)
        some_channels(first, smaller(count, kPixels), smaller(c, depth - kLanes), to_step, to);
  }

 private:
  // Pixels of a row: all, or the even and the odd ones.
  struct Vectors {
    Float even, odd;
  };

  Float filter_along_y(int64_t at) const {
    Float sum = along_y_[0] * Float::load(rows_[0] + at);
    for (int k = 1; k < F::rows; ++k) sum = sum + along_y_[k] * Float::load(rows_[k] + at);
    return sum;
  }

  Float vector(int64_t pixel) const {
    const int64_t at = pixel - in_.begin, end = in_.end - in_.begin;
    if (at >= 0 && at + kLanes <= end) return filter_along_y(at);
    Float sum(0.0);
    if (at <= -kLanes || at >= end) return sum;
    const int low = at < 0 ? static_cast<int>(-at) : 0;
    const int high = end - at < kLanes ? static_cast<int>(end - at) : kLanes;
    for (int k = 0; k < F::rows; ++k)
      sum = sum + along_y_[k] * load_lanes(rows_[k] + at, low, high);
    return sum;
  }

  Vectors vectors(int64_t pixel) const {
    const Float a = vector(pixel);
    if constexpr (F::down == 1) return {a, a};
    const Float b = vector(pixel + kLanes);
    return {evens(a, b), odds(a, b)};
  }

  template <int phase, int... k>
  Float shifted_sum(const Vectors& a, const Vectors& b, std::integer_sequence<int, k...>) const {
    return ((along_x_[F::tap(phase, k)] * shifted_tap<F::pixel(phase, k)>(a, b)) + ...);
  }
  template <int pixel>
  static Float shifted_tap(const Vectors& a, const Vectors& b) {
    constexpr int shift = pixel / F::down;
    return pixel % F::down ? shifted<shift>(a.odd, b.odd) : shifted<shift>(a.even, b.even);
  }

  template <class D>
  void some_channels(int64_t first, int64_t count, int64_t channel, int64_t to_step, D* to) const {
    Float window[F::window];
    const auto pixel = [&](int64_t i) {
      const bool inside = i >= in_.begin && i < in_.end;
      return inside ? filter_along_y((i - in_.begin) * in_.step + channel) : Float(0.0);
    };
    for (int k = 0; k < F::window - F::down; ++k) window[k + F::down] = pixel(first + k);
    int64_t next = first + F::window - F::down;
    to += channel;
    for (int64_t t = 0; t < count; t += F::up, to += F::up * to_step) {
      for (int k = 0; k < F::window - F::down; ++k) window[k] = window[k + F::down];
      for (int k = F::window - F::down; k < F::window; ++k) window[k] = pixel(next++);
      store(to, window_sum<0>(window, typename F::Taps()));
      if (F::up == 2 && t + 1 < count) {
        store(to + to_step, window_sum<1>(window, typename F::Taps()));
      }
    }
  }

  template <int phase, int... k>
  Float window_sum(const Float (&window)[F::window], std::integer_sequence<int, k...>) const {
    return ((along_x_[F::tap(phase, k)] * window[F::pixel(phase, k)]) + ...);
  }

  template <class D>
  static void store_first(D* to, int64_t count, Float v) {
    if (count >= kLanes) return store(to, v);
    D whole[kLanes];
    store(whole, v);
    std::memcpy(to, whole, count * sizeof(D));
  }

  const StreamRows in_;
  const float* rows_[F::rows];
  Float along_x_[F::taps], along_y_[F::rows];
};

// Calls f(StreamFilter) if there is one; whether there is.
template <class F>
bool with_stream_filter(int taps, int up, int down, bool odd, F&& f) {
  bool found = false;
  const auto is = [&](auto filter) {
    using Filter = decltype(filter);
    if constexpr (Filter::fits) {
      if (taps != Filter::taps || up != Filter::up || down != Filter::down || odd != Filter::odd)
        return;
      found = true;
      f(filter);
    }
  };
  is(StreamFilter<4, 1, 1>());
  is(StreamFilter<4, 2, 1, false>());
  is(StreamFilter<4, 2, 1, true>());
  is(StreamFilter<4, 1, 2>());
  is(StreamFilter<12, 2, 1, false>());
  is(StreamFilter<12, 2, 1, true>());
  is(StreamFilter<12, 1, 2>());
  return found;
}

}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
