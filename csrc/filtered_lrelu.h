// An activation at a higher resolution, between two FIR filters:
//
//     z[j * up, i * up] = x[j, i] + bias[c], 0 elsewhere
//     u[Y, X] = gain * sum over ky, kx of gu[ky, kx] * z[Y + ky - pad_y, X + kx - pad_x]
//     v[Y, X] = clamp(lrelu(u[Y, X]; slope), -clamp, +clamp)
//     y[j, i] = sum over ky, kx of gd[ky, kx] * v[j * down + ky, i * down + kx]
//
// for every channel of every sample, with g = f if correlate, else f rotated by 180 degrees. Where
// a filter is absent, g is one tap of 1.
#pragma once

#include "epilogue.h"

namespace stylegan_fast {

// In the accumulation type: [taps_y, taps_x], or where it is separable one row of taps_x = taps_y
// taps, which runs along x and along y. Null: one tap of 1.
struct FilteredLreluFilter {
  const void* taps;
  int taps_x, taps_y;
  bool separable;
};

// Signs: what the derivative needs of u. In memory order of the image u, whose rows (lines of
// pixels of NCHW, the channels of a pixel of NHWC) are padded to whole units of 8: two bytes a
// unit, bit j of the first set where u <= 0 at element 8k+j of the row, bit j of the second where
// there is a clamp and |lrelu(u)| <= clamp is false, both before rounding. So [samples, channels,
// sign_height, ceil(sign_width / 8), 2] bytes, or [samples, sign_height, sign_width,
// ceil(channels / 8), 2]. The bits of padding mean nothing.
struct FilteredLrelu {
  DType dtype;
  int64_t samples, channels, in_height, in_width, out_height, out_width;
  int64_t sign_height, sign_width;  // of u in the forward pass
  int64_t sign_y, sign_x;           // where u[0, 0] lies in the signs that are read
  bool channels_last;               // input, output and signs are dense: NHWC, or NCHW
  int up, down;
  int64_t pad_x, pad_y;  // left and top; negative crops
  FilteredLreluFilter fu, fd;
  bool correlate;
  double gain, slope, clamp;   // clamp is +infinity where there is none
  const void* bias = nullptr;  // [channels] of dtype
};

inline int64_t signs_size(const FilteredLrelu& p) {
  const int64_t rows = p.sign_height * (p.channels_last ? p.sign_width : p.channels);
  const int64_t row = p.channels_last ? p.channels : p.sign_width;
  return p.samples * rows * ((row + 7) / 8 * 2);
}

//   forward   y, and where signs is not null those of every u that an output sees; the others may
//             stay as they are.
//   masked    y with v[Y, X] = u[Y, X] * (slope where u was <= 0, else 1), 0 where it was clamped,
//             also for a u that is not finite, as the signs at [Y + sign_y, X + sign_x] say; where
//             these lie outside of the signs v is 0. bias and clamp are not read. It is linear in
//             x: the derivative of the forward pass, its transpose, and theirs.
namespace cpu {
void filtered_lrelu_forward(const FilteredLrelu&, const void* x, void* y, uint8_t* signs,
                            int threads);
void filtered_lrelu_masked(const FilteredLrelu&, const void* x, const uint8_t* signs, void* y,
                           int threads);
}  // namespace cpu

// float64 is not supported.
namespace cuda {
void filtered_lrelu_forward(const FilteredLrelu&, const void* x, void* y, uint8_t* signs,
                            void* stream);
void filtered_lrelu_masked(const FilteredLrelu&, const void* x, const uint8_t* signs, void* y,
                           void* stream);
}  // namespace cuda

}  // namespace stylegan_fast
