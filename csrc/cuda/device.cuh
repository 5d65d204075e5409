// What the CUDA kernels share: launches, error reports, 16-byte packs of storage types, float
// functions for activations.h and division by an invariant number.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#define STYLEGAN_FAST_HD __host__ __device__

// A header that runs kernels on the host (tests/cuda_on_cpu) supplies its own.
#ifndef STYLEGAN_FAST_LAUNCH
#define STYLEGAN_FAST_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace stylegan_fast {

// Overloads for float that activations.h finds.
STYLEGAN_FAST_HD inline float where(bool condition, float a, float b) { return condition ? a : b; }
STYLEGAN_FAST_HD inline float exp(float v) { return ::expf(v); }
STYLEGAN_FAST_HD inline float expm1(float v) { return ::expm1f(v); }
STYLEGAN_FAST_HD inline float log1p(float v) { return ::log1pf(v); }
STYLEGAN_FAST_HD inline float tanh(float v) { return ::tanhf(v); }
STYLEGAN_FAST_HD inline float sigmoid(float v) { return 1.0f / (1.0f + ::expf(-v)); }
STYLEGAN_FAST_HD inline float square(float v) { return v * v; }

namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// floor(n / d) for 0 <= n < 2^63 and 1 <= d < 2^63 without a division (Granlund & Montgomery 1994,
// figure 4.1): with l = ceil(log2 d) and m = floor(2^64 (2^l - d) / d) + 1, t = floor(m n / 2^64),
// the quotient is (t + (n - t) / 2) / 2^(l - 1).
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    int log = 0;
    while (log < 63 && (uint64_t(1) << log) < divisor_) ++log;
    // Long division: the numerator has up to 127 bits.
    uint64_t rest = (uint64_t(1) << log) - divisor_, quotient = 0;
    for (int bit = 0; bit < 64; ++bit) {
      rest *= 2;
      quotient *= 2;
      if (rest >= divisor_) rest -= divisor_, quotient += 1;
    }
    magic_ = quotient + 1;
    first_ = log > 0 ? 1 : 0;
    second_ = log > 0 ? log - 1 : 0;
  }

  __device__ int64_t operator()(int64_t n) const {
    const uint64_t t = __umul64hi(magic_, n);
    return (t + ((n - t) >> first_)) >> second_;
  }

  __device__ int64_t divisor() const { return divisor_; }

 private:
  uint64_t divisor_, magic_;
  int first_, second_;
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void round_to(float v, float& out) { out = v; }
__device__ inline void round_to(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void round_to(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Pairs of 16-bit numbers in a word.
__device__ inline float low_float(__half2 pair) { return __low2float(pair); }
__device__ inline float high_float(__half2 pair) { return __high2float(pair); }
__device__ inline float low_float(__nv_bfloat162 pair) { return __low2float(pair); }
__device__ inline float high_float(__nv_bfloat162 pair) { return __high2float(pair); }
__device__ inline void round_to(float v, float w, __half2& out) { out = __floats2half2_rn(v, w); }
__device__ inline void round_to(float v, float w, __nv_bfloat162& out) {
  out = __floats2bfloat162_rn(v, w);
}

template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

template <class To, class From>
__device__ inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// N consecutive elements, moved by one instruction. 16-bit ones stay in pairs until they are used:
// the compiler would give each a register of its own.
template <class T, int N>
class alignas(sizeof(T) * N) Pack {
  static constexpr bool kPaired = sizeof(T) == 2 && N > 1;
  using Word = std::conditional_t<kPaired, uint32_t, T>;

 public:
  __device__ float operator[](int j) const {
    if constexpr (kPaired) {
      const auto pair = bit_cast<typename PairOf<T>::type>(words_[j / 2]);
      return j % 2 ? high_float(pair) : low_float(pair);
    } else {
      return to_float(words_[j]);
    }
  }

  __device__ static Pack rounded(const float (&values)[N]) {
    Pack pack;
#pragma unroll
    for (int j = 0; j < N; j += 1 + kPaired) {
      if constexpr (kPaired) {
        typename PairOf<T>::type pair;
        round_to(values[j], values[j + 1], pair);
        pack.words_[j / 2] = bit_cast<uint32_t>(pair);
      } else {
        round_to(values[j], pack.words_[j]);
      }
    }
    return pack;
  }

  __device__ static Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ void store(T* p) const {
    if constexpr (sizeof(Pack) == 8) {  // else the compiler stores the halves
      *reinterpret_cast<uint64_t*>(p) = bit_cast<uint64_t>(*this);
    } else {
      *reinterpret_cast<Pack*>(p) = *this;
    }
  }

  // The first `count` elements, where there are no more or they are not aligned; the rest is 0.
  __device__ static Pack load_some(const T* p, int count) {
    float values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = j < count ? to_float(p[j]) : 0.0f;
    return rounded(values);
  }
  __device__ void store_some(T* p, int count) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < count) round_to((*this)[j], p[j]);
    }
  }

 private:
  Word words_[N * sizeof(T) / sizeof(Word)];
};

}  // namespace cuda
}  // namespace stylegan_fast
