// Runs both CUDA kernels of the demodulation coefficients on the CPU and compares them with a plain
// double-precision evaluation.
//
//     demodulation_test all|few
#include "demodulation.h"

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "testing.h"

using namespace stylegan_fast;

namespace {

int failures = 0;

struct Case {
  int64_t samples, outputs, inputs, taps;
  bool channels_last = false;
  int shift = 0;  // elements off alignment
};

void run(const Case& c) {
  const Demodulation p = {DType::float32, c.samples, c.outputs, c.inputs, c.taps,
                          c.channels_last, 0.01};
  Buffer<float> weight(c.outputs * c.inputs * c.taps, c.shift, 0);
  Buffer<float> styles(c.samples * c.inputs, 1, 0);
  Buffer<float> energy(c.outputs * c.inputs, 1, NAN), d(c.samples * c.outputs, 1, NAN);
  std::mt19937 random(1);
  for (auto* buffer : {&weight, &styles}) {
    for (int64_t i = 0; i < buffer->size(); ++i) {
      (*buffer)[i] = static_cast<float>(static_cast<int>(random() % 33) / 8.0 - 2.03);
    }
  }
  cuda::demodulation(p, weight.get(), styles.get(), energy.get(), d.get(), nullptr);

  const auto expect = [&](const char* what, int64_t i, double got, double want) {
    if (std::abs(got - want) <= kFloatError * (1 + std::abs(want))) return;
    if (++failures > 20) return;
    std::printf("%s[%ld] is %.9g, not %.9g: %ld samples, %ld outputs, %ld inputs, %ld taps, %s\n",
                what, long(i), got, want, long(c.samples), long(c.outputs), long(c.inputs),
                long(c.taps), c.channels_last ? "NHWC" : "NCHW");
  };
  for (int64_t o = 0; o < c.outputs; ++o) {
    std::vector<double> energies(c.inputs, 0.0);
    for (int64_t i = 0; i < c.inputs; ++i) {
      for (int64_t k = 0; k < c.taps; ++k) {
        const int64_t place = c.channels_last ? k * c.inputs + i : i * c.taps + k;
        const double v = weight[o * c.inputs * c.taps + place];
        energies[i] += v * v;
      }
      expect("energy", o * c.inputs + i, energy[o * c.inputs + i], energies[i]);
    }
    for (int64_t n = 0; n < c.samples; ++n) {
      double sum = p.eps;
      for (int64_t i = 0; i < c.inputs; ++i) {
        const double style = styles[n * c.inputs + i];
        sum += style * style * energies[i];
      }
      expect("d", n * c.outputs + o, d[n * c.outputs + o], 1 / std::sqrt(sum));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  // In packs, of which a row may need several tiles, and number by number.
  std::vector<Case> cases = {{3, 2, 36, 9}, {9, 3, 35, 9}, {2, 2, 40, 1, true}};
  if (argc > 1 && std::string(argv[1]) == "all") {
    const std::vector<Case> more = {
        {4, 2, 1100, 9},          // three tiles
        {1, 2, 8, 1152},          // tiles of 4 channels
        {2, 1, 4, 1156},          // too many taps for a tile
        {2, 3, 36, 9, true},      {2, 3, 36, 9, false, 1},  {0, 2, 12, 9},
        {5, 2, 1, 9},             {17, 1, 300, 1},          {1, 5, 64, 25},
    };
    cases.insert(cases.end(), more.begin(), more.end());
  }
  for (const Case& c : cases) run(c);
  std::printf("%zu kernels launched, %d failures\n", cuda_on_cpu::launched.size(), failures);
  return failures != 0;
}
