// What the tests of the kernels share: storage types, exact buffers and activations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "epilogue.h"

namespace stylegan_fast {

enum Act { linear = 1, relu, lrelu, tanh_, sigmoid, elu, selu, softplus, swish };
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kFloatError = 1e-5;  // of float32 terms up to 10 that may cancel

struct Float32 {
  using T = float;
  static constexpr DType dtype = DType::float32;
  static constexpr double epsilon = 0x1p-24;
  static float round(double v) { return static_cast<float>(v); }
  static double value(float v) { return v; }
};
struct Float16 {
  using T = __half;
  static constexpr DType dtype = DType::float16;
  static constexpr double epsilon = 0x1p-11;
  static T round(double v) { return __float2half_rn(static_cast<float>(v)); }
  static double value(T v) { return __half2float(v); }
};
struct BFloat16 {
  using T = __nv_bfloat16;
  static constexpr DType dtype = DType::bfloat16;
  static constexpr double epsilon = 0x1p-8;
  static T round(double v) { return __float2bfloat16_rn(static_cast<float>(v)); }
  static double value(T v) { return __bfloat162float(v); }
};

// A heap buffer that ends where its last element does, `shift` elements off 16-byte alignment.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, int shift, T fill) : size_(size), shift_(shift) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, (size + shift) * sizeof(T) + (size + shift == 0))) std::abort();
    base_ = static_cast<T*>(memory);
    std::fill(base_, base_ + size + shift, fill);
  }
  ~Buffer() { std::free(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() { return base_ + shift_; }
  T& operator[](int64_t i) { return base_[shift_ + i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  int shift_;
  T* base_;
};

inline double act_value(int act, double v, double alpha) {
  switch (act) {
    case linear: return v;
    case relu: return std::isnan(v) ? v : std::max(v, 0.0);
    case lrelu: return v > 0 ? v : alpha * v;
    case tanh_: return std::tanh(v);
    case sigmoid: return 1 / (1 + std::exp(-v));
    case elu: return v > 0 ? v : std::expm1(v);
    case selu: return 1.0507009873554805 * (v > 0 ? v : 1.6732632423543773 * std::expm1(v));
    case softplus: return v > 20 ? v : std::log1p(std::exp(v));
    case swish: return v / (1 + std::exp(-v));
  }
  std::abort();
}

// Address space for a buffer of which only a few pages are touched.
template <class T>
class Sparse {
 public:
  explicit Sparse(int64_t size) : bytes_(size * sizeof(T)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) cuda_on_cpu::fail("no address space for a huge tensor");
    base_ = static_cast<T*>(memory);
  }
  ~Sparse() { munmap(base_, bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  T* get() { return base_; }
  T& operator[](int64_t i) { return base_[i]; }

 private:
  size_t bytes_;
  T* base_;
};

}  // namespace stylegan_fast
