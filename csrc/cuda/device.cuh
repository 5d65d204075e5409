// What the CUDA kernels share: launches, error reports, 16-byte packs of storage types, float
// functions for activations.h and division by an invariant number.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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

// N consecutive elements, moved by one instruction where they are 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void round_to(float v, float& out) { out = v; }
__device__ inline void round_to(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void round_to(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Two at a time: one conversion instruction for both.
__device__ inline void round_to(float v, float w, float* out) { out[0] = v, out[1] = w; }
__device__ inline void round_to(float v, float w, __half* out) {
  const __half2 pair = __floats2half2_rn(v, w);
  out[0] = pair.x, out[1] = pair.y;
}
__device__ inline void round_to(float v, float w, __nv_bfloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v, w);
  out[0] = pair.x, out[1] = pair.y;
}

template <class T, int N>
__device__ inline Pack<T, N> rounded(const float (&values)[N]) {
  Pack<T, N> result;
  if constexpr (N == 1) {
    round_to(values[0], result.at[0]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 2) round_to(values[j], values[j + 1], result.at + j);
  }
  return result;
}

template <class T, int N>
__device__ inline Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T, int N>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// The first `count` elements of a pack that the buffer ends in, or that is not aligned.
template <class T, int N>
__device__ inline Pack<T, N> load_some(const T* p, int count) {
  Pack<T, N> pack = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < count) pack.at[j] = p[j];
  }
  return pack;
}

template <class T, int N>
__device__ inline void store_some(T* p, const Pack<T, N>& pack, int count) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < count) p[j] = pack.at[j];
  }
}

}  // namespace cuda
}  // namespace stylegan_fast
