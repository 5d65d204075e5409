// Runs the CPU kernels of one SIMD level on buffers of exactly the size the contract names, under the sanitizers, and
// compares float64 and float32 results with a plain evaluation of the formula.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/levels.h"

using namespace stylegan_fast;
namespace level = stylegan_fast::cpu::STYLEGAN_FAST_SIMD;

namespace {

int failures = 0;
int checks = 0;

// malloc, so that the sanitizer sees the first byte beyond.
struct Bytes {
  explicit Bytes(size_t size) : data(static_cast<uint8_t*>(std::malloc(size ? size : 1))) {}
  ~Bytes() { std::free(data); }
  Bytes(const Bytes&) = delete;
  uint8_t* data;
};

double ramp(int64_t i) { return 2 * std::sin(0.7 * static_cast<double>(i) + 0.3); }

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

void put(DType dtype, void* buffer, int64_t i, double value) {
  if (dtype == DType::float64) static_cast<double*>(buffer)[i] = value;
  if (dtype == DType::float32) static_cast<float*>(buffer)[i] = static_cast<float>(value);
  if (dtype == DType::float16) static_cast<uint16_t*>(buffer)[i] = value > 0 ? 0x3c00 : 0xbc00;
  if (dtype == DType::bfloat16) static_cast<uint16_t*>(buffer)[i] = value > 0 ? 0x3f80 : 0xbf80;
}

double get(DType dtype, const void* buffer, int64_t i) {
  return dtype == DType::float64 ? static_cast<const double*>(buffer)[i]
                                 : static_cast<const float*>(buffer)[i];
}

void fill(DType dtype, void* buffer, int64_t count, int64_t shift) {
  for (int64_t i = 0; i < count; ++i) put(dtype, buffer, i, ramp(i + shift));
}

void expect(bool wide, const char* what, int64_t i, double actual, double expected) {
  ++checks;
  const double limit = (wide ? 1e-12 : 2e-5) * (1 + std::fabs(expected));
  if (std::fabs(actual - expected) <= limit) return;
  if (++failures <= 10) std::printf("%s[%ld]: %.9g, expected %.9g\n", what, long(i), actual, expected);
}

double activation(int act, double v) {
  return act == 3 ? (v > 0 ? v : 0.25 * v) : act == 4 ? std::tanh(v) : v / (1 + std::exp(-v));
}

double slope(int act, double v) {
  const double s = 1 / (1 + std::exp(-v)), t = std::tanh(v);
  return act == 3 ? (v > 0 ? 1 : 0.25) : act == 4 ? 1 - t * t : s * (1 + v * (1 - s));
}

void run(DType dtype, const Geometry& g, int act, bool with_bias, bool affine, bool per_sample,
         int threads) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t numel = g.numel(), mask_size = (numel + 7) / 8 * 2;
  const size_t size = size_of(dtype);
  Bytes x(numel * size), y(numel * size), dy(numel * size), dx(numel * size);
  Bytes mask(mask_size), bias(g.channels * size), sum(g.channels * size_of(wide));
  Bytes scale(g.samples() * g.channels * size_of(wide));
  Bytes noise((per_sample ? g.samples() : 1) * g.pixels * size_of(wide)), strength(size_of(wide));
  fill(dtype, x.data, numel, 0);
  fill(dtype, dy.data, numel, 5);
  fill(dtype, bias.data, g.channels, 11);
  fill(wide, scale.data, g.samples() * g.channels, 17);
  fill(wide, noise.data, (per_sample ? g.samples() : 1) * g.pixels, 23);
  fill(wide, strength.data, 1, 29);

  Epilogue e{dtype, g, act, 0.25, 1.25, 1.7};
  if (with_bias) e.bias = bias.data;
  if (affine) {
    e.scale = scale.data;
    e.noise = noise.data;
    e.noise_per_sample = per_sample;
    e.strength = strength.data;
  }
  const bool curved = act > 3;
  level::epilogue_forward(e, x.data, y.data, curved ? nullptr : mask.data, threads);
  if (curved) {
    level::epilogue_curved(e, 1, x.data, dy.data, nullptr, dx.data, sum.data, threads);
  } else {
    level::epilogue_masked(e, 0.25, dy.data, mask.data, dx.data, sum.data, threads);
  }
  if (size >= 4) {
    std::vector<double> sums(g.channels, 0.0);
    for (int64_t i = 0; i < numel; ++i) {
      const int64_t c = i / g.inner % g.channels;
      const int64_t q = i / g.inner / g.channels * g.inner + i % g.inner;
      const int64_t n = q / g.pixels;
      double v = get(dtype, x.data, i), s = 1;
      if (affine) {
        s = get(wide, scale.data, n * g.channels + c);
        v = s * v + get(wide, strength.data, 0) *
                        get(wide, noise.data, q % g.pixels + (per_sample ? n * g.pixels : 0));
      }
      if (with_bias) v += get(dtype, bias.data, c);
      const double u = 1.25 * activation(act, v);
      // At the clamp float32 may decide otherwise than double.
      if (std::fabs(std::fabs(u) - 1.7) < 1e-5 || std::fabs(v) < 1e-6) {
        sums[c] = std::nan("");
        continue;
      }
      const bool kept = std::fabs(u) <= 1.7;
      const double dv = kept ? 1.25 * slope(act, v) * get(dtype, dy.data, i) : 0;
      sums[c] += dv;
      expect(size == 8, "y", i, get(dtype, y.data, i), kept ? u : std::copysign(1.7, u));
      expect(size == 8, "dx", i, get(dtype, dx.data, i), s * dv);
      if (!curved) {
        const uint8_t* unit = mask.data + i / 8 * 2;
        expect(true, "negative", i, unit[0] >> (i % 8) & 1, v <= 0);
        expect(true, "clamped", i, unit[1] >> (i % 8) & 1, !kept);
      }
    }
    for (int64_t c = 0; c < g.channels; ++c)
      if (!std::isnan(sums[c])) expect(size == 8, "sum", c, get(wide, sum.data, c), sums[c]);
  }
  if (curved) level::epilogue_curved(e, 2, x.data, dy.data, x.data, dx.data, nullptr, threads);
}

// epilogue_backward with a mask that has nothing to do with y; dx is dy itself.
void run_backward(DType dtype, const Geometry& g, bool with_mask, bool with_operands,
                  bool per_sample, int threads) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t numel = g.numel(), mask_size = (numel + 7) / 8 * 2;
  const int64_t sums = g.samples() * g.channels;
  const size_t size = size_of(dtype);
  Bytes y(numel * size), dy(numel * size), mask(mask_size), moments(3 * sums * size_of(wide));
  Bytes scale(sums * size_of(wide));
  Bytes noise((per_sample ? g.samples() : 1) * g.pixels * size_of(wide));
  fill(dtype, y.data, numel, 3);
  fill(dtype, dy.data, numel, 5);
  fill(wide, moments.data, 3 * sums, 0);
  fill(wide, scale.data, sums, 17);
  fill(wide, noise.data, (per_sample ? g.samples() : 1) * g.pixels, 23);
  for (int64_t i = 0; i < mask_size; ++i) mask.data[i] = static_cast<uint8_t>(i * 37 + 11);

  std::vector<double> expected(3 * sums, 0.0), expected_dx(numel);
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t c = i / g.inner % g.channels;
    const int64_t q = i / g.inner / g.channels * g.inner + i % g.inner;
    const int64_t n = q / g.pixels, sum = n * g.channels + c;
    const uint8_t* unit = mask.data + i / 8 * 2;
    double factor = with_mask && unit[0] >> (i % 8) & 1 ? 1.25 * 0.25 : 1.25;
    if (with_mask && unit[1] >> (i % 8) & 1) factor = 0;
    const double d = size >= 4 ? get(dtype, dy.data, i) : 0;
    expected_dx[i] = factor * d * (with_operands ? get(wide, scale.data, sum) : 1);
    expected[sum] += factor * d;
    if (size >= 4 && factor != 0) expected[sums + sum] += d * get(dtype, y.data, i);
    expected[2 * sums + sum] +=
        factor * d * get(wide, noise.data, q % g.pixels + (per_sample ? n * g.pixels : 0));
  }
  if (!with_operands)  // rows that are not written
    for (int64_t i = sums; i < 3 * sums; ++i) expected[i] = get(wide, moments.data, i);

  Epilogue e{dtype, g, 1, 0, 1.25, INFINITY};
  if (with_operands) {
    e.scale = scale.data;
    e.noise = noise.data;
    e.noise_per_sample = per_sample;
  }
  const void* const output = with_operands ? y.data : nullptr;
  const uint8_t* const units = with_mask ? mask.data : nullptr;
  level::epilogue_backward(e, 0.25, dy.data, output, units, nullptr, moments.data, threads);
  level::epilogue_backward(e, 0.25, dy.data, output, units, dy.data, nullptr, threads);
  if (size < 4) return;
  for (int64_t i = 0; i < numel; ++i) expect(size == 8, "dx", i, get(dtype, dy.data, i), expected_dx[i]);
  for (int64_t i = 0; i < 3 * sums; ++i)
    expect(size == 8, "moments", i, get(wide, moments.data, i), expected[i]);
}

}  // namespace

int main() {
  // outer, channels, inner, pixels: NCHW and NHWC, whole and broken groups, patterns, one element.
  const Geometry geometries[] = {
      {2, 3, 32, 32},   {2, 3, 35, 35},    {1, 5, 7, 7},        {40, 16, 1, 20}, {42, 5, 1, 21},
      {300, 3, 1, 100}, {2, 64, 16, 16},   {64, 5, 9, 9},       {1, 1, 1, 1},    {3, 1, 50, 50},
      {33, 37, 1, 11},  {2, 1100, 1, 1},   {2, 2, 20000, 20000}, {1, 2, 8191, 8191},
  };
  for (int dtype = 0; dtype < 4; ++dtype)
    for (const Geometry& g : geometries)
      for (int act : {3, 4, 9})
        for (int options = 0; options < 4; ++options)
          for (int threads : {1, 2})
            run(static_cast<DType>(dtype), g, act, options != 1, options >= 2, options == 3, threads);
  for (int dtype = 0; dtype < 4; ++dtype)
    for (const Geometry& g : geometries)
      for (int options = 0; options < 4; ++options)
        for (int threads : {1, 2})
          run_backward(static_cast<DType>(dtype), g, options % 2, options > 0, options == 3, threads);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
