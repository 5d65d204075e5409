// The epilogue of every fused op, which is a linear operator followed by
//
//     v = scale[n,c] * x + strength * noise[n,pixel] + bias[c]
//     y = clamp(gain * act(v; alpha), -clamp, +clamp)
//
// Each part but the activation is optional: an absent buffer is null, an absent clamp is +infinity.
#pragma once

#include <cstdint>

namespace stylegan_fast {

enum class DType : int { float64 = 0, float32 = 1, float16 = 2, bfloat16 = 3 };

// A dense tensor in memory order, whatever its strides: element i = (outer_index * channels + c) *
// inner + inner_index. NCHW: outer = N, inner = H*W. NHWC: outer = N*H*W, inner = 1.
// The pixel number of an element is q = outer_index * inner + inner_index; with per-sample inputs
// (scale, noise) the sample is n = q / pixels and the pixel inside it q % pixels.
struct Geometry {
  int64_t outer, channels, inner, pixels;

  int64_t numel() const { return outer * channels * inner; }
  int64_t samples() const { return outer * inner / pixels; }
};

// Buffers of dtype: x, y, dy, h, dx, bias. Buffers of the accumulation type (double for float64,
// float otherwise): scale [samples, channels], noise [pixels] or [samples, pixels], strength [1],
// sum [channels].
//
// The mask holds two bytes for every 8 elements in memory order: bit j of the first byte is set
// where v <= 0 at element 8k+j, bit j of the second where there is a clamp and |gain * act(v)| <=
// clamp is false, both from the value before rounding to dtype. It has 2 * ceil(numel / 8) bytes.
struct Epilogue {
  DType dtype;
  Geometry geometry;
  int act;  // code of csrc/activations.h
  double alpha, gain, clamp;
  const void* scale = nullptr;
  const void* noise = nullptr;
  bool noise_per_sample = false;
  const void* strength = nullptr;  // null: 1
  const void* bias = nullptr;
};

// The four maps. `sum`, where not null, receives the sum of d(v) over all but the channels, in the
// same pass and in an order that does not depend on chance.
//
//   forward   y = clamp(gain * act(v)); mask may be null.
//   masked    d(v) = dy * gain * (1 or negative_slope, 0 where clamped); dx = scale * d(v).
//             For piecewise-linear activations; mask may be null, which means slope 1 everywhere.
//             Where the factor is 0 the result is 0, also for a dy that is not finite.
//   curved    order 1: d(v) = dy * gain * act'(v), order 2: d(v) = dy * h * gain * act''(v), both 0
//             where |gain * act(v)| > clamp; dx = scale * d(v). For curved activations, from x.
//   backward  `masked` with what else the gradients of a layer need, from its output y and not from
//             x: the sums over the pixels of each sample
//                 moments[0][n][c] = sum of d(v)
//                 moments[1][n][c] = sum of dy * y, which is d(v) * v; 0 where the factor is 0
//                 moments[2][n][c] = sum of d(v) * noise, without the strength
//             moments is [3, samples, channels] of the accumulation type, summed like `sum`, or
//             null; row 1 is not written where y is null, row 2 where the noise is. dx may be null,
//             or dy itself. NCHW and NHWC only; strength and bias are not read.
namespace cpu {
void epilogue_forward(const Epilogue&, const void* x, void* y, uint8_t* mask, int threads);
void epilogue_masked(const Epilogue&, double negative_slope, const void* dy, const uint8_t* mask,
                     void* dx, void* sum, int threads);
void epilogue_curved(const Epilogue&, int order, const void* x, const void* dy, const void* h,
                     void* dx, void* sum, int threads);
void epilogue_backward(const Epilogue&, double negative_slope, const void* dy, const void* y,
                       const uint8_t* mask, void* dx, void* moments, int threads);
}  // namespace cpu

// `workspace` holds the partial sums of the first stage: epilogue_workspace() elements of the
// accumulation type, epilogue_moments_workspace() for the moments; the second stage writes `sum` or
// `moments`. It may be null where they are null.
// float64 is not supported. Errors are std::runtime_error / std::invalid_argument.
namespace cuda {
int64_t epilogue_workspace(const Epilogue&);
int64_t epilogue_moments_workspace(const Epilogue&);
void epilogue_forward(const Epilogue&, const void* x, void* y, uint8_t* mask, void* stream);
void epilogue_masked(const Epilogue&, double negative_slope, const void* dy, const uint8_t* mask,
                     void* dx, void* sum, void* workspace, void* stream);
void epilogue_curved(const Epilogue&, int order, const void* x, const void* dy, const void* h,
                     void* dx, void* sum, void* workspace, void* stream);
void epilogue_backward(const Epilogue&, double negative_slope, const void* dy, const void* y,
                       const uint8_t* mask, void* dx, void* moments, void* workspace, void* stream);
}  // namespace cuda

}  // namespace stylegan_fast
