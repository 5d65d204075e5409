// Runs the CPU kernels of adain of one SIMD level on buffers of exactly the size the contract names,
// under the sanitizers, and compares float64 and float32 results with a plain evaluation.
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

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// malloc, so that the sanitizer sees the first byte beyond.
class Numbers {
 public:
  Numbers(DType dtype, int64_t count, int64_t seed)
      : dtype_(dtype), data(std::malloc(count * size_of(dtype))) {
    for (int64_t i = 0; i < count; ++i) {
      const double value = 2 * std::sin(0.7 * static_cast<double>(i + seed) + 0.3);
      if (dtype == DType::float64) static_cast<double*>(data)[i] = value;
      if (dtype == DType::float32) static_cast<float*>(data)[i] = static_cast<float>(value);
      if (dtype == DType::float16) static_cast<uint16_t*>(data)[i] = value > 0 ? 0x3c00 : 0xbc00;
      if (dtype == DType::bfloat16) static_cast<uint16_t*>(data)[i] = value > 0 ? 0x3f80 : 0xbf80;
    }
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;

  double operator[](int64_t i) const {
    if (dtype_ == DType::float64) return static_cast<const double*>(data)[i];
    if (dtype_ == DType::float32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return bits & 0x8000 ? -1 : 1;
  }

 private:
  DType dtype_;

 public:
  void* const data;
};

double value(int act, double v) { return act == 3 ? (v > 0 ? v : 0.25 * v) : std::tanh(v); }
double slope(int act, double v) {
  return act == 3 ? (v > 0 ? 1 : 0.25) : 1 - std::tanh(v) * std::tanh(v);
}

void run(DType dtype, const Geometry& g, int act, int noises, bool per_channel, int threads) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t sums = g.samples() * g.channels;
  const double gain = 1.25, clamp = 1.7, eps = 0.01;
  Numbers x(dtype, g.numel(), 0), dy(dtype, g.numel(), 5);
  Numbers y(dtype, g.numel(), 7), dx(dtype, g.numel(), 7);
  Numbers styles(wide, 2 * sums, 11), bias(wide, g.channels, 13);
  Numbers strength(wide, per_channel ? g.channels : 1, 17);
  Numbers noise(wide, noises == 2 ? g.samples() * g.pixels : g.pixels, 19);
  Numbers statistics(wide, 2 * sums, 23), d_styles(wide, 2 * sums, 23), moments(wide, 2 * sums, 23);

  Adain p;
  p.epilogue = {dtype, g, act, 0.25, gain, clamp};
  p.epilogue.bias = bias.data;
  p.epilogue.strength = strength.data;
  if (noises) p.epilogue.noise = noise.data;
  p.epilogue.noise_per_sample = noises == 2;
  p.strength_per_channel = per_channel;
  p.styles = styles.data;
  level::adain_forward(p, eps, x.data, y.data, statistics.data, threads);
  level::adain_backward(p, x.data, dy.data, statistics.data, dx.data, d_styles.data, moments.data,
                        threads);
  if (size_of(dtype) < 4) return;

  const auto expect = [&](const char* what, double actual, double expected) {
    ++checks;
    const double limit = (size_of(dtype) == 8 ? 1e-11 : 2e-4) * (1 + std::fabs(expected));
    if (std::fabs(actual - expected) <= limit) return;
    if (++failures <= 10) std::printf("%s: %.9g, expected %.9g\n", what, actual, expected);
  };
  for (int64_t s = 0; s < sums; ++s) {
    const int64_t n = s / g.channels, c = s % g.channels;
    const auto at = [&](int64_t q) {
      return g.inner == 1 ? (n * g.pixels + q) * g.channels + c : s * g.pixels + q;
    };
    const auto z = [&](int64_t q) { return noises ? noise[q + (noises == 2 ? n * g.pixels : 0)] : 0; };
    const auto v = [&](int64_t q) { return x[at(q)] + strength[per_channel ? c : 0] * z(q) + bias[c]; };
    const auto unclamped = [&](int64_t q) { return gain * value(act, v(q)); };
    const auto u = [&](int64_t q) { return std::fmin(std::fmax(unclamped(q), -clamp), clamp); };
    double mean = 0, variance = 0, product = 0, total = 0, of_dx = 0, of_noise = 0;
    bool sharp = true;  // at an edge float32 may decide otherwise than double
    for (int64_t q = 0; q < g.pixels; ++q) {
      mean += u(q) / g.pixels;
      sharp = sharp && std::fabs(std::fabs(unclamped(q)) - clamp) > 1e-5 && std::fabs(v(q)) > 1e-6;
    }
    for (int64_t q = 0; q < g.pixels; ++q) variance += (u(q) - mean) * (u(q) - mean) / g.pixels;
    const double rstd = 1 / std::sqrt(variance + eps);
    const double scale = styles[n * 2 * g.channels + c] + 1;
    for (int64_t q = 0; q < g.pixels; ++q) {
      product += dy[at(q)] * (u(q) - mean) * rstd;
      total += dy[at(q)];
      const double shift = styles[(n * 2 + 1) * g.channels + c];
      expect("y", y[at(q)], (u(q) - mean) * rstd * scale + shift);
    }
    expect("mean", statistics[s], mean);
    expect("d(scale)", d_styles[n * 2 * g.channels + c], product);
    expect("d(shift)", d_styles[(n * 2 + 1) * g.channels + c], total);
    if (!sharp) continue;
    for (int64_t q = 0; q < g.pixels; ++q) {
      const double w = (u(q) - mean) * rstd;
      const double du = scale * rstd * (dy[at(q)] - total / g.pixels - w * product / g.pixels);
      const double dv = std::fabs(unclamped(q)) > clamp ? 0 : gain * slope(act, v(q)) * du;
      of_dx += dv;
      of_noise += dv * z(q);
      expect("dx", dx[at(q)], dv);
    }
    expect("sum of dx", moments[s], of_dx);
    expect("sum of dx * noise", moments[sums + s], of_noise);
  }
}

}  // namespace

int main() {
  // NCHW and NHWC; whole and broken groups, more of them than a chunk has, one pixel, one channel.
  const Geometry geometries[] = {
      {2, 3, 64, 64},      {2, 3, 35, 35},     {1, 2, 4087, 4087}, {40, 16, 1, 20},
      {42, 5, 1, 21},      {290, 21, 1, 290},  {3, 37, 1, 1},      {3, 1, 50, 50},
  };
  for (int dtype = 0; dtype < 4; ++dtype)
    for (const Geometry& g : geometries)
      for (int act : {3, 4})
        for (int noises = 0; noises < 3; ++noises)
          for (int threads : {1, 2})
            run(static_cast<DType>(dtype), g, act, noises, noises != 1, threads);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
