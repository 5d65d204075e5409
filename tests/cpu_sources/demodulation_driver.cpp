// Runs the CPU kernel of the demodulation coefficients of one SIMD level on buffers of exactly the
// size the contract names, under the sanitizers, and compares it with a plain evaluation.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../../csrc/cpu/levels.h"

using namespace stylegan_fast;
namespace level = stylegan_fast::cpu::STYLEGAN_FAST_SIMD;

namespace {

int failures = 0;
int checks = 0;

// malloc, so that the sanitizer sees the first byte beyond.
template <class T>
class Numbers {
 public:
  Numbers(int64_t count, int64_t seed)
      : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    for (int64_t i = 0; i < count; ++i)
      data[i] = static_cast<T>(2 * std::sin(0.7 * static_cast<double>(i + seed) + 0.3));
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;
  double operator[](int64_t i) const { return data[i]; }

  T* const data;
};

template <class T>
void run(const Demodulation& p, int threads) {
  const int64_t inputs = p.in_channels, taps = p.taps;
  Numbers<T> weight(p.out_channels * inputs * taps, 0), styles(p.samples * inputs, 5);
  Numbers<T> energy(p.out_channels * inputs, 7), d(p.samples * p.out_channels, 11);
  level::demodulation(p, weight.data, styles.data, energy.data, d.data, threads);

  const auto expect = [](const char* what, double actual, double expected) {
    ++checks;
    const double limit = (sizeof(T) == 8 ? 1e-12 : 1e-5) * (1 + std::fabs(expected));
    if (std::fabs(actual - expected) <= limit) return;
    if (++failures <= 10) std::printf("%s: %.9g, expected %.9g\n", what, actual, expected);
  };
  const auto expected_energy = [&](int64_t o, int64_t i) {
    double sum = 0;
    for (int64_t k = 0; k < taps; ++k) {
      const double v = weight[o * inputs * taps + (p.channels_last ? k * inputs + i : i * taps + k)];
      sum += v * v;
    }
    return sum;
  };
  for (int64_t o = 0; o < p.out_channels; ++o) {
    for (int64_t i = 0; i < inputs; ++i)
      expect("energy", energy[o * inputs + i], expected_energy(o, i));
    for (int64_t n = 0; n < p.samples; ++n) {
      double sum = p.eps;
      for (int64_t i = 0; i < inputs; ++i)
        sum += styles[n * inputs + i] * styles[n * inputs + i] * energy[o * inputs + i];
      expect("d", d[n * p.out_channels + o], 1 / std::sqrt(sum));
    }
  }
}

}  // namespace

int main() {
  // Samples, outputs, inputs, taps: whole and broken rows and vectors, one of each, no samples.
  const int64_t sizes[][4] = {
      {2, 8, 64, 9},  {3, 9, 67, 9},  {1, 5, 33, 25}, {4, 6, 48, 1}, {5, 3, 35, 1},
      {17, 4, 20, 3}, {0, 7, 12, 9}, {2, 1, 1, 9},   {1, 130, 161, 9},
  };
  for (const auto& [samples, outputs, inputs, taps] : sizes)
    for (bool channels_last : {false, true})
      for (int threads : {1, 3}) {
        Demodulation p = {DType::float64, samples, outputs, inputs, taps, channels_last, 0.01};
        run<double>(p, threads);
        p.dtype = DType::float32;
        run<float>(p, threads);
      }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
