// Zero-stuff, pad or crop, FIR filter, decimate, alone or fused with what surrounds it:
//
//     z[j * up_y, i * up_x] = x[j, i], 0 elsewhere
//     u[oy, ox] = gain * sum over ky, kx of
//                 g[ky, kx] * z[oy * down_y + ky - pad_y, ox * down_x + kx - pad_x]
//
// for every channel of every sample, with g = f if correlate, else f rotated by 180 degrees.
#pragma once

#include "epilogue.h"

namespace stylegan_fast {

struct Upfirdn2d {
  DType dtype;
  int64_t samples, channels, in_height, in_width, out_height, out_width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of the input, in elements; any
  bool channels_last;                              // the output is dense: NHWC, or NCHW
  int up_x, up_y, down_x, down_y;
  int64_t pad_x, pad_y;  // left and top; negative crops
  // The filter, in the accumulation type: [taps_y, taps_x], or where it is separable one row of
  // taps_x = taps_y taps, which runs along x and along y. Null: one tap of 1.
  const void* taps;
  int taps_x, taps_y;
  bool separable, correlate;
  double gain;
};

// Two fused forms. Masks are those of csrc/epilogue.h. A mask needs whole units in a row: width (of
// NCHW) or channels (of NHWC) a multiple of 8, else std::invalid_argument.
//
//   forward   y = E(u(x)) + add, with v = scale * u + strength * noise + bias in E. `epilogue`
//             describes y; null leaves E out: y = u(x) + add. add, in the order of y and in dtype,
//             may be null. The mask may be null.
//   masked    dx = scale * u(d(v)) with d(v) = dy * gain * (1 or negative_slope, 0 where clamped),
//             as epilogue_masked. `epilogue` describes dy, which is dense: its geometry says in
//             which order. sum, where not null, receives the sum of d(v) over all but the
//             channels, also of those pixels that u does not read. The mask may be null: slope 1.
namespace cpu {
void upfirdn2d_forward(const Upfirdn2d&, const Epilogue* epilogue, const void* x, const void* add,
                       void* y, uint8_t* mask, int threads);
void upfirdn2d_masked(const Upfirdn2d&, const Epilogue& epilogue, double negative_slope,
                      const void* dy, const uint8_t* mask, void* dx, void* sum, int threads);
}  // namespace cpu

// float64 is not supported. `workspace` as in csrc/epilogue.h.
namespace cuda {
int64_t upfirdn2d_workspace(const Upfirdn2d&, const Epilogue& epilogue);
void upfirdn2d_forward(const Upfirdn2d&, const Epilogue* epilogue, const void* x, const void* add,
                       void* y, uint8_t* mask, void* stream);
void upfirdn2d_masked(const Upfirdn2d&, const Epilogue& epilogue, double negative_slope,
                      const void* dy, const uint8_t* mask, void* dx, void* sum, void* workspace,
                      void* stream);
}  // namespace cuda

}  // namespace stylegan_fast
