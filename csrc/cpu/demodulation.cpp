// CPU kernel of the demodulation coefficients (csrc/demodulation.h), compiled once per SIMD level.
//
// A few rows of energies at a time: they stay in L1 while the samples go over them, and share what
// is read of the styles.

#include "../demodulation.h"

#include "common.h"
#include "levels.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kRows = 4;
constexpr int64_t kProductsPerThread = 65536;  // below this a second thread costs more than it saves

template <class V>
class Rows {
 public:
  using A = typename V::Scalar;

  Rows(const Demodulation& p, const void* weight, const void* styles, void* energy, void* d)
      : p_(p), weight_(static_cast<const A*>(weight)), styles_(static_cast<const A*>(styles)),
        energy_(static_cast<A*>(energy)), d_(static_cast<A*>(d)) {}

  // Those of the outputs [first, first + kRows) that there are.
  void run(int64_t first) const {
    const int64_t end = smaller(first + kRows, p_.out_channels);
    for (int64_t o = first; o < end; ++o) {
      const A* const from = weight_ + o * p_.in_channels * p_.taps;
      A* const to = energy_ + o * p_.in_channels;
      if (p_.channels_last || p_.taps == 1) {
        of_vectors(from, to);
      } else {
        p_.taps == 9 ? of_runs<9>(from, to) : of_runs<0>(from, to);
      }
    }
    if (end - first == kRows) return finish<kRows>(first);
    for (int64_t o = first; o < end; ++o) finish<1>(o);
  }

 private:
  void of_vectors(const A* weight, A* energy) const {
    const int64_t channels = p_.in_channels, taps = p_.taps;
    int64_t i = 0;
    for (; i <= channels - V::lanes; i += V::lanes) {
      V sum(0.0);
      for (int64_t k = 0; k < taps; ++k) {
        const V v = V::load(weight + k * channels + i);
        sum = sum + v * v;
      }
      sum.store(energy + i);
    }
    for (; i < channels; ++i) {
      A sum = 0;
      for (int64_t k = 0; k < taps; ++k) sum += squared(weight[k * channels + i]);
      energy[i] = sum;
    }
  }

  template <int kTaps>
  void of_runs(const A* weight, A* energy) const {
    const int64_t channels = p_.in_channels, taps = kTaps ? kTaps : p_.taps;
    for (int64_t i = 0; i < channels; ++i, weight += taps) {
      A sum = 0;
      for (int64_t k = 0; k < taps; ++k) sum += squared(weight[k]);
      energy[i] = sum;
    }
  }

  template <int R>
  void finish(int64_t first) const {
    const int64_t channels = p_.in_channels;
    const A* const energy = energy_ + first * channels;
    for (int64_t n = 0; n < p_.samples; ++n) {
      const A* const styles = styles_ + n * channels;
      V sums[R];
      A rest[R] = {};
      unrolled<R>([&](auto r) STYLEGAN_FAST_INLINE { sums[r] = V(0.0); });
      int64_t i = 0;
      for (; i <= channels - V::lanes; i += V::lanes) {
        const V style = V::load(styles + i), square = style * style;
        unrolled<R>([&](auto r) STYLEGAN_FAST_INLINE {
          sums[r] = sums[r] + square * V::load(energy + r * channels + i);
        });
      }
      for (; i < channels; ++i)
        for (int r = 0; r < R; ++r) rest[r] += squared(styles[i]) * energy[r * channels + i];
      for (int r = 0; r < R; ++r) {
        const A total = sums[r].sum() + rest[r] + static_cast<A>(p_.eps);
        d_[n * p_.out_channels + first + r] = 1 / std::sqrt(total);
      }
    }
  }

  static A squared(A number) { return number * number; }

  const Demodulation& p_;
  const A* const weight_;
  const A* const styles_;
  A* const energy_;
  A* const d_;
};

}  // namespace

void demodulation(const Demodulation& p, const void* weight, const void* styles, void* energy,
                  void* d, int threads) {
  const auto run = [&](auto zero) {
    const Rows<decltype(zero)> rows(p, weight, styles, energy, d);
    const int64_t groups = (p.out_channels + kRows - 1) / kRows;
    const int64_t products = p.out_channels * p.in_channels * (p.taps + p.samples);
    const int64_t useful = smaller(groups, larger(1, products / kProductsPerThread));
    const int used = static_cast<int>(smaller(larger(threads, 1), useful));
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (int64_t group = 0; group < groups; ++group) rows.run(group * kRows);
  };
  p.dtype == DType::float64 ? run(Double()) : run(Float());
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
