// The steps of filtered_lrelu through registers, for the filters that networks run: six samples
// under every phase of the one filter, six outputs over every number of the other.
#pragma once

#include "fir.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kPhaseTaps = 6;

enum class Signs { none, kept, read };

// Two units of signs: the bytes where u <= 0 are the first and the third.
using Word = uint32_t;

inline Word load_word(const uint8_t* units) {
  return static_cast<Word>(units[0]) | static_cast<Word>(units[1]) << 8 |
         static_cast<Word>(units[2]) << 16 | static_cast<Word>(units[3]) << 24;
}
inline void store_word(uint8_t* units, Word word) {
  for (int byte = 0; byte < 4; ++byte) units[byte] = static_cast<uint8_t>(word >> 8 * byte);
}

inline Word spread(uint32_t bits) { return (bits | bits << 8) & 0x00ff00ffu; }

// A vector's lanes from `lane` on, of the first byte of each unit, and back.
template <class V>
STYLEGAN_FAST_INLINE inline auto lanes_of(Word word, int lane) {
  if constexpr (V::lanes > 8) {
    return mask_from_bytes(word, V());
  } else {
    return mask_from_bits(word >> (lane + (lane & 8)), V());
  }
}
template <class V>
STYLEGAN_FAST_INLINE inline Word word_of(uint32_t bits, int lane) {
  if constexpr (V::lanes > 8) {
    return spread(bits);
  } else {
    return bits << (lane + (lane & 8));
  }
}

template <int up_, int down_>
struct WalkFactors {
  static constexpr int up = up_, down = down_;
  static constexpr int step = up > down ? up : down;  // rows between the filters
  static constexpr int samples = step / up, outputs = step / down;
  static constexpr int offsets = up < down ? up : down;
};

// Calls f(WalkFactors) if there is a walk for these filters; whether there is.
template <class F>
bool with_walk(int up, int up_taps, int down, int down_taps, F&& f) {
  if (up_taps != kPhaseTaps * up || down_taps != kPhaseTaps * down) return false;
  if (up == 2 && down == 2) return f(WalkFactors<2, 2>()), true;
  if (up == 4 && down == 2) return f(WalkFactors<4, 2>()), true;
  if (up == 2 && down == 4) return f(WalkFactors<2, 4>()), true;
  return false;
}

// One strip of 16 columns, some steps down. Each step takes `samples` rows from rows[5] on, makes
// `step` rows between the filters, the first of phase `offset` of the filter down, and completes
// `outputs` rows. The sums of those not complete yet stay in registers, between two calls in
// `saved`.
template <class Factors, int offset, class V, class Activation>
void walk(const typename V::Scalar* const* rows, int64_t at, int64_t steps,
          const typename V::Scalar* up_taps, const typename V::Scalar* down_taps,
          const Activation activation, uint8_t* units, int64_t units_step,
          typename V::Scalar* saved, int64_t saved_step, typename V::Scalar* to, int64_t to_step) {
  constexpr int up = Factors::up, down = Factors::down, last = kPhaseTaps - 1;
  for (int lane = 0; lane < kGroup; lane += V::lanes) {
    V window[kPhaseTaps], sums[kPhaseTaps];
    unrolled<last>([&](auto k) STYLEGAN_FAST_INLINE { window[k] = V::load(rows[k] + at + lane); });
    unrolled<kPhaseTaps>([&](auto j) STYLEGAN_FAST_INLINE {
      sums[j] = V::load(saved + j * saved_step + lane);
    });
    const auto* const* next = rows + last;
    uint8_t* unit = units;
    auto* out = to + lane;
    for (int64_t s = 0; s < steps; ++s) {
      unrolled<Factors::samples>([&](auto m) STYLEGAN_FAST_INLINE {
        window[last] = V::load(*next++ + at + lane);
        unrolled<up>([&](auto i) STYLEGAN_FAST_INLINE {
          V u = broadcast(up_taps[up - 1 - i], V()) * window[0];
          unrolled<last>([&](auto k) STYLEGAN_FAST_INLINE {
            u = u + broadcast(up_taps[up - 1 - i + (k + 1) * up], V()) * window[k + 1];
          });
          Word word = 0;
          if (Activation::signs == Signs::read || (Activation::signs == Signs::kept && lane)) {
            word = load_word(unit);
          }
          const V v = activation(u, word, lane);
          if constexpr (Activation::signs == Signs::kept) store_word(unit, word);
          if constexpr (Activation::signs != Signs::none) unit += units_step;
          constexpr int phase = (offset + m * up + i) % down;
          unrolled<kPhaseTaps>([&](auto j) STYLEGAN_FAST_INLINE {
            sums[j] = sums[j] + broadcast(down_taps[phase + down * (last - j)], V()) * v;
          });
          if constexpr (phase == down - 1) {
            sums[0].store(out);
            out += to_step;
            unrolled<last>([&](auto j) STYLEGAN_FAST_INLINE { sums[j] = sums[j + 1]; });
            sums[last] = V(0.0);
          }
        });
        unrolled<last>([&](auto k) STYLEGAN_FAST_INLINE { window[k] = window[k + 1]; });
      });
    }
    unrolled<kPhaseTaps>([&](auto j) STYLEGAN_FAST_INLINE {
      sums[j].store(saved + j * saved_step + lane);
    });
  }
}

// Groups of `up` columns, each of the six samples from its own on: a plane. Writes, and reads,
// whole vectors.
template <int up, class V>
void expand_plane(const typename V::Scalar* from, const typename V::Scalar* taps, int64_t groups,
                  typename V::Scalar* to) {
  for (int64_t g = 0; g < groups; g += V::lanes, to += up * V::lanes) {
    V sums[up];
    unrolled<kPhaseTaps>([&](auto k) STYLEGAN_FAST_INLINE {
      const V here = V::load(from + g + k);
      unrolled<up>([&](auto i) STYLEGAN_FAST_INLINE {
        const V product = broadcast(taps[up - 1 - i + k * up], V()) * here;
        if constexpr (k == 0) {
          sums[i] = product;
        } else {
          sums[i] = sums[i] + product;
        }
      });
    });
    V low, high;
    if constexpr (up == 4) {
      V even_low, even_high, odd_low, odd_high;
      interleave(sums[0], sums[2], even_low, even_high);
      interleave(sums[1], sums[3], odd_low, odd_high);
      interleave(even_low, odd_low, low, high);
      low.store(to);
      high.store(to + V::lanes);
      interleave(even_high, odd_high, low, high);
    } else {
      interleave(sums[0], sums[1], low, high);
    }
    low.store(to + (up - 2) * V::lanes);
    high.store(to + (up - 1) * V::lanes);
  }
}

// The same of pixels of 16 channels.
template <int up, class V>
void expand_pixels(const typename V::Scalar* from, const typename V::Scalar* taps, int64_t groups,
                   typename V::Scalar* to) {
  for (int lane = 0; lane < kGroup; lane += V::lanes) {
    V window[kPhaseTaps];
    unrolled<kPhaseTaps - 1>([&](auto k) STYLEGAN_FAST_INLINE {
      window[k] = V::load(from + k * kGroup + lane);
    });
    const auto* next = from + (kPhaseTaps - 1) * kGroup + lane;
    auto* out = to + lane;
    for (int64_t g = 0; g < groups; ++g, next += kGroup, out += up * kGroup) {
      window[kPhaseTaps - 1] = V::load(next);
      unrolled<up>([&](auto i) STYLEGAN_FAST_INLINE {
        V sum = broadcast(taps[up - 1 - i], V()) * window[0];
        unrolled<kPhaseTaps - 1>([&](auto k) STYLEGAN_FAST_INLINE {
          sum = sum + broadcast(taps[up - 1 - i + (k + 1) * up], V()) * window[k + 1];
        });
        sum.store(out + i * kGroup);
      });
      unrolled<kPhaseTaps - 1>([&](auto k) STYLEGAN_FAST_INLINE { window[k] = window[k + 1]; });
    }
  }
}

// Columns phase, phase + down, ... of `down` vectors.
template <int down, class V>
struct Phases {
  V phase[down];

  STYLEGAN_FAST_INLINE explicit Phases(const typename V::Scalar* from) {
    const auto at = [=](int k) STYLEGAN_FAST_INLINE { return V::load(from + k * V::lanes); };
    if constexpr (down == 2) {
      phase[0] = evens(at(0), at(1));
      phase[1] = odds(at(0), at(1));
    } else {
      const V low_even = evens(at(0), at(1)), high_even = evens(at(2), at(3));
      const V low_odd = odds(at(0), at(1)), high_odd = odds(at(2), at(3));
      phase[0] = evens(low_even, high_even);
      phase[1] = evens(low_odd, high_odd);
      phase[2] = odds(low_even, high_even);
      phase[3] = odds(low_odd, high_odd);
    }
  }
};

// Every `down`th column of a plane. Reads whole vectors.
template <int down, class V, class T>
void contract_plane(const typename V::Scalar* from, const typename V::Scalar* taps, int64_t count,
                    T* to) {
  Phases<down, V> here(from);
  for (int64_t x = 0; x < count; x += V::lanes) {
    const Phases<down, V> next(from + (x + V::lanes) * down);
    V sums[down];
    unrolled<down>([&](auto p) STYLEGAN_FAST_INLINE {
      sums[p] = broadcast(taps[p], V()) * here.phase[p];
      unrolled<kPhaseTaps - 1>([&](auto k) STYLEGAN_FAST_INLINE {
        sums[p] = sums[p] + broadcast(taps[p + (k + 1) * down], V()) *
                                shifted<k + 1>(here.phase[p], next.phase[p]);
      });
    });
    V sum = sums[0] + sums[1];
    if constexpr (down == 4) sum = sum + (sums[2] + sums[3]);
    if (count - x >= V::lanes) {
      store(to + x, sum);
    } else {
      store_some(to + x, count - x, sum);
    }
    here = next;
  }
}

// Every `down`th pixel of 16 channels, of which `channels` are the image's.
template <int down, class V, class T>
void contract_pixels(const typename V::Scalar* from, const typename V::Scalar* taps, int64_t count,
                     int64_t channels, T* to, int64_t to_step) {
  for (int lane = 0; lane < channels; lane += V::lanes) {
    V sums[kPhaseTaps];
    unrolled<kPhaseTaps>([&](auto j) STYLEGAN_FAST_INLINE { sums[j] = V(0.0); });
    const auto* next = from + lane;
    const int64_t rest = channels - lane;
    for (int64_t x = 1 - kPhaseTaps; x < count; ++x) {
      unrolled<down>([&](auto p) STYLEGAN_FAST_INLINE {
        const V here = V::load(next + p * kGroup);
        unrolled<kPhaseTaps>([&](auto j) STYLEGAN_FAST_INLINE {
          sums[j] = sums[j] + broadcast(taps[p + down * (kPhaseTaps - 1 - j)], V()) * here;
        });
      });
      next += down * kGroup;
      if (x >= 0 && rest >= V::lanes) {
        store(to + x * to_step + lane, sums[0]);
      } else if (x >= 0) {
        store_some(to + x * to_step + lane, rest, sums[0]);
      }
      unrolled<kPhaseTaps - 1>([&](auto j) STYLEGAN_FAST_INLINE { sums[j] = sums[j + 1]; });
      sums[kPhaseTaps - 1] = V(0.0);
    }
  }
}

}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
