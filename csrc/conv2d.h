// A convolution of scaled channels, followed by the epilogue:
//
//     z[i, j * up, l * up] = pre[n,i] * x[n,i,j,l], 0 elsewhere
//     u[o, oy, ox] = sum over i, ky, kx of
//                    w[o,i,ky,kx] * z[i, oy * down + ky - pad_y, ox * down + kx - pad_x]
//     y = E(u) + add
//
// for every sample n, with w rotated by 180 degrees where correlate is false: upfirdn2d with a
// filter for each pair of channels.
#pragma once

#include "epilogue.h"

namespace stylegan_fast {

struct Conv2d {
  DType dtype;
  int64_t samples, in_channels, out_channels, in_height, in_width, out_height, out_width;
  bool in_channels_last, out_channels_last;  // x and y are dense: NHWC, or NCHW
  int up, down;
  int64_t pad_x, pad_y;  // left and top; negative crops
  int kernel_x, kernel_y;
  int64_t stride_o, stride_i, stride_y, stride_x;  // of the weight, in elements; any
  bool correlate;
};

// The gradient is that of the weight, where w is, summed over the samples:
//
//     dw[o,i,ky,kx] = sum over n, oy, ox of
//         post[n,o] * dy[o,oy,ox] * z[i, oy * down + ky - pad_y, ox * down + kx - pad_x]
//
// Masks and `add` as in csrc/upfirdn2d.h. `pre` [samples, in_channels] and `post` [samples,
// out_channels] may be null.
namespace cpu {
void conv2d_forward(const Conv2d&, const Epilogue* epilogue, const void* x, const void* w,
                    const float* pre, const void* add, void* y, uint8_t* mask, int threads);
void conv2d_weight_gradient(const Conv2d&, const void* x, const void* dy, const float* pre,
                            const float* post, void* dw, int threads);
}  // namespace cpu

}  // namespace stylegan_fast
