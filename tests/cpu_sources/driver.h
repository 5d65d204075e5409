// What drivers share: buffers of a contract's types and of exactly its sizes, and comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cpu/levels.h"

using namespace stylegan_fast;
namespace level = stylegan_fast::cpu::STYLEGAN_FAST_SIMD;

namespace {

int failures = 0;
int checks = 0;

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

DType wide(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// Relative to the sum of the magnitudes of what is added.
double rounding(DType dtype) {
  return dtype == DType::float64   ? 1e-14
         : dtype == DType::float32 ? 2e-6
         : dtype == DType::float16 ? 6e-4
                                   : 5e-3;
}

// Numbers of a type in malloc'ed memory, so that the sanitizer sees the first byte beyond.
struct Numbers {
  Numbers(DType dtype, int64_t count) : dtype(dtype), count(count) {
    data = static_cast<uint8_t*>(std::malloc(std::max<size_t>(1, count * size_of(dtype))));
    std::memset(data, 0xff, count * size_of(dtype));  // NaN
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;

  // Multiples of 1/8 up to 15/8, exact in every type.
  void fill(int64_t seed) {
    uint32_t state = static_cast<uint32_t>(seed * 2654435761u + 12345u);
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      put(i, (static_cast<int>(state >> 27) - 15.5) / 8 + 1.0 / 16);
    }
  }
  void put(int64_t i, double value) {
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    if (dtype == DType::float64) reinterpret_cast<double*>(data)[i] = value;
    if (dtype == DType::float32) reinterpret_cast<float*>(data)[i] = single;
    if (dtype == DType::bfloat16) {
      reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(word >> 16);
    }
    if (dtype == DType::float16) {
      const uint32_t magnitude = word & 0x7fffffffu;
      reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(
          (word >> 16 & 0x8000u) | (magnitude ? (magnitude - 0x38000000u) >> 13 : 0));
    }
  }
  double get(int64_t i) const {
    if (dtype == DType::float64) return reinterpret_cast<const double*>(data)[i];
    if (dtype == DType::float32) return reinterpret_cast<const float*>(data)[i];
    const uint16_t half = reinterpret_cast<const uint16_t*>(data)[i];
    if (dtype == DType::bfloat16) {
      const uint32_t word = static_cast<uint32_t>(half) << 16;
      float single;
      std::memcpy(&single, &word, 4);
      return single;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double magnitude = exponent == 31  ? (fraction ? std::nan("") : HUGE_VAL)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return half & 0x8000u ? -magnitude : magnitude;
  }

  DType dtype;
  int64_t count;
  uint8_t* data;
};

void expect(const char* what, int64_t i, double actual, double expected, double limit) {
  ++checks;
  if (std::fabs(actual - expected) <= limit) return;
  if (++failures <= 10) {
    std::printf("%s[%ld]: %.9g, expected %.9g\n", what, long(i), actual, expected);
  }
}

}  // namespace
