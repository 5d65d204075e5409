// What the sources of a SIMD level share: types, storage, the choice of the dtype.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "../epilogue.h"
#include "simd.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

#define STYLEGAN_FAST_INLINE __attribute__((always_inline))

// Calls body(constant) for 0 ... count - 1. Indexed so, unlike in a loop, arrays stay in registers.
template <class Body, int... i>
STYLEGAN_FAST_INLINE inline void for_each(std::integer_sequence<int, i...>, Body&& body) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int count, class Body>
STYLEGAN_FAST_INLINE inline void unrolled(Body&& body) {
  for_each(std::make_integer_sequence<int, count>(), body);
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

constexpr int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Plain storage, zeroed: standard containers would be instantiated with this level's instructions.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::calloc(count + 1, sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

template <class T>
struct Compute {
  using Vector = Float;
};
template <>
struct Compute<double> {
  using Vector = Double;
};

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(double());
    case DType::float32: return f(float());
    case DType::float16: return f(float16());
    case DType::bfloat16: return f(bfloat16());
  }
}

}  // namespace
}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
