// Adaptive instance normalisation after an epilogue that has no scale (csrc/epilogue.h):
//
//     u = clamp(gain * act(x + strength[c] * noise[n,pixel] + bias[c]; alpha), -clamp, +clamp)
//     y = (styles[n,c] + 1) * (u - mean[n,c]) * rstd[n,c] + styles[n,C+c]
//
// with the mean and rstd = 1 / sqrt(variance + eps) of u over the pixels of each sample and channel.
#pragma once

#include "epilogue.h"

namespace stylegan_fast {

// NCHW and NHWC only. Of the accumulation type are all operands, the bias and the strength ([1], or
// [channels]) too, and what comes of the channels: statistics [2, samples, channels], the mean and
// rstd; d_styles [samples, 2 * channels]; sums [2, samples, channels].
struct Adain {
  Epilogue epilogue;
  bool strength_per_channel = false;
  const void* styles = nullptr;  // [samples, 2 * channels]
};

//   forward   y and the statistics, which are precise also where the mean is far from 0: a variance
//             is summed up around a pixel's value or a mean. A constant channel becomes its shift.
//   backward  d(u) = (styles[n,c] + 1) * rstd * (dy - mean(dy) - w * mean(dy * w))
//             where w = (u - mean) * rstd, and dx = d(u) * gain * act'(v), 0 where clamped;
//             d_styles: the sums over the pixels of dy * w, and of dy;
//             sums: those of dx, and of dx * noise, without the strength and 0 where there is none.
namespace cpu {
void adain_forward(const Adain&, double eps, const void* x, void* y, void* statistics, int threads);
void adain_backward(const Adain&, const void* x, const void* dy, const void* statistics, void* dx,
                    void* d_styles, void* sums, int threads);
}  // namespace cpu

// In parts, adain_parts() at most. The workspace holds 4 floats for each part of each sample and
// channel. `partial` is [2, samples, channels, parts] with the returned number of parts, and its sum
// over them is `sums`. float64 is not supported.
namespace cuda {
int adain_parts(const Adain&);
void adain_forward(const Adain&, double eps, const void* x, void* y, void* statistics,
                   void* workspace, void* stream);
int adain_backward(const Adain&, const void* x, const void* dy, const void* statistics, void* dx,
                   void* d_styles, void* partial, void* workspace, void* stream);
}  // namespace cuda

}  // namespace stylegan_fast
