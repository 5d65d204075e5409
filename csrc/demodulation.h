// The coefficients that demodulate a layer, and what they are made of:
//
//     energy[o,i] = sum over taps of weight[o,i,tap]^2
//     d[n,o] = (sum over i of styles[n,i]^2 * energy[o,i] + eps)^-1/2
#pragma once

#include "epilogue.h"

namespace stylegan_fast {

// Everything is dense and of this dtype: weight [out_channels, in_channels, taps], or of
// channels_last [out_channels, taps, in_channels]; styles [samples, in_channels]; energy
// [out_channels, in_channels]; d [samples, out_channels]. There may be no samples.
struct Demodulation {
  DType dtype = DType::float32;
  int64_t samples = 0, out_channels = 0, in_channels = 0, taps = 0;
  bool channels_last = false;
  double eps = 0.0;
};

// Sums are taken in an order that does not depend on the threads. float64 and float32.
namespace cpu {
void demodulation(const Demodulation&, const void* weight, const void* styles, void* energy,
                  void* d, int threads);
}  // namespace cpu

// float32.
namespace cuda {
void demodulation(const Demodulation&, const void* weight, const void* styles, void* energy,
                  void* d, void* stream);
}  // namespace cuda

}  // namespace stylegan_fast
