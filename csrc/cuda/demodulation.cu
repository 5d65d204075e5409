// CUDA kernel of the demodulation coefficients (csrc/demodulation.h), one launch.
//
// A block takes an output. Its threads sum the squares of the taps of their channels, out of shared
// memory where the taps of a channel are neighbours, so that the weight comes in packs of 16 bytes;
// then each warp takes samples, its lanes channels.

#include "../demodulation.h"

#include <algorithm>
#include <cmath>

#include "epilogue.cuh"

namespace stylegan_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kTile = 9 * 512;  // numbers of the weight

__device__ inline float energy_of(const float* taps, int64_t step, int64_t count) {
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += square(taps[k * step]);
  return sum;
}

// kStaged: the taps of a channel are neighbours, and a row of the weight is packs.
template <bool kStaged>
__global__ void __launch_bounds__(kThreads)
    demodulation_kernel(const Demodulation p, const float eps, const float* weight,
                        const float* styles, float* energy, float* d) {
  const int64_t channels = p.in_channels, output = blockIdx.x;
  weight += output * channels * p.taps;
  energy += output * channels;
  if constexpr (kStaged) {
    alignas(16) __shared__ float tile[kTile];
    const int taps = static_cast<int>(p.taps), most = kTile / taps / 4 * 4;
    for (int64_t first = 0; first < channels; first += most) {
      const int count = static_cast<int>(min(channels - first, static_cast<int64_t>(most)));
      const float* const from = weight + first * taps;
#pragma unroll 4
      for (int j = threadIdx.x * 4; j < count * taps; j += kThreads * 4) {
        Pack<float, 4>::load(from + j).store(tile + j);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        energy[first + i] = energy_of(tile + i * taps, 1, taps);
      }
      __syncthreads();
    }
  } else {
    const int64_t across = p.channels_last ? 1 : p.taps, along = p.channels_last ? channels : 1;
    for (int64_t i = threadIdx.x; i < channels; i += kThreads) {
      energy[i] = energy_of(weight + i * across, along, p.taps);
    }
    __syncthreads();
  }

  const int lane = threadIdx.x % kWarp;
  for (int64_t n = threadIdx.x / kWarp; n < p.samples; n += kThreads / kWarp) {
    const float* const row = styles + n * channels;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = lane; i < channels; i += kWarp) sum += square(row[i]) * energy[i];
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      sum += bit_cast<float>(__shfl_xor_sync(~0u, bit_cast<unsigned>(sum), apart));
    }
    if (lane == 0) d[n * p.out_channels + output] = 1.0f / sqrtf(sum + eps);
  }
}

}  // namespace

void demodulation(const Demodulation& p, const void* weight, const void* styles, void* energy,
                  void* d, void* stream) {
  if (p.dtype != DType::float32 || p.out_channels > INT32_MAX) {
    throw std::invalid_argument("demodulation: the cuda backend takes float32 and up to 2^31 - 1 "
                                "outputs, not dtype code " +
                                std::to_string(static_cast<int>(p.dtype)) + " and " +
                                std::to_string(p.out_channels));
  }
  const bool neighbours = !p.channels_last || p.taps == 1;
  const bool packs = p.in_channels * p.taps % 4 == 0 && are_aligned<16>(weight);
  const bool staged = neighbours && packs && p.taps <= kTile / 4;
  launch(staged ? demodulation_kernel<true> : demodulation_kernel<false>,
         dim3(static_cast<unsigned>(p.out_channels)), kThreads, stream, p,
         static_cast<float>(p.eps), static_cast<const float*>(weight),
         static_cast<const float*>(styles), static_cast<float*>(energy), static_cast<float*>(d));
}

}  // namespace cuda
}  // namespace stylegan_fast
