// Kernels that are right until a fault is seeded. The sanitizers must see each fault, or their
// silence about the real kernels means nothing.
#include "cuda_runtime.h"

#include <memory>

constexpr int kThreads = 64;
#ifdef SEED_OUT_OF_BOUNDS
constexpr int kShift = 1;
#else
constexpr int kShift = 0;
#endif

__global__ void reverse(const float* in, float* out) {
  __shared__ float values[kThreads];
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  values[t] = in[first + t];
#ifndef SEED_MISSING_BARRIER
  __syncthreads();
#endif
  out[first + t + kShift] = values[kThreads - 1 - t];
}

// A barrier too few between two rounds, not before the first.
__global__ void rotate_twice(float* out) {
  __shared__ float values[kThreads];
  const int t = threadIdx.x;
  values[t] = t;
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    const float next = values[(t + 1) % kThreads];
#ifndef SEED_MISSING_SECOND_BARRIER
    __syncthreads();
#endif
    values[t] = next;
    __syncthreads();
  }
  out[t] = values[t];
}

__global__ void swap_neighbours(float* out) {
  const unsigned t = threadIdx.x;
#ifdef SEED_DIVERGENT_BARRIER
  if (t % 2) __syncthreads();
#endif
  out[t] = __shfl_xor_sync(~0u, t, 1);
}

int main() {
  constexpr int blocks = 3;
  const auto in = std::make_unique<float[]>(blocks * kThreads);
  const auto out = std::make_unique<float[]>(blocks * kThreads);
  for (int i = 0; i < blocks * kThreads; ++i) in[i] = i;
  const float* from = in.get();
  float* to = out.get();
  STYLEGAN_FAST_LAUNCH(reverse, dim3(blocks), dim3(kThreads), nullptr, from, to);
  if (to[0] != kThreads - 1 || to[blocks * kThreads - 1] != (blocks - 1) * kThreads) return 1;
  STYLEGAN_FAST_LAUNCH(rotate_twice, dim3(1), dim3(kThreads), nullptr, to);
  if (to[0] != 2 || to[kThreads - 1] != 1) return 1;
  STYLEGAN_FAST_LAUNCH(swap_neighbours, dim3(1), dim3(kThreads), nullptr, to);
  if (to[0] != 1 || to[kThreads - 1] != kThreads - 2) return 1;
  std::puts("all kernels are right");
  return 0;
}
