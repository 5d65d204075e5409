// Runs the convolutions of one SIMD level on buffers of exactly the size the contract names, under
// the sanitizers, and compares them with the definition, evaluated in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/levels.h"

using namespace stylegan_fast;
namespace level = stylegan_fast::cpu::STYLEGAN_FAST_SIMD;

namespace {

int failures = 0;
int checks = 0;

// Relative to the sum of the magnitudes of what is added; Winograd's transforms grow rounding
// errors by two orders of magnitude at worst.
constexpr double kRounding = 1e-5;

// Numbers in malloc'ed memory, so that the sanitizer sees the first byte beyond.
struct Numbers {
  explicit Numbers(int64_t count) : count(count) {
    data = static_cast<float*>(std::malloc(std::max<size_t>(1, count * sizeof(float))));
    std::memset(data, 0xff, count * sizeof(float));  // NaN
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;

  // Between -1 and 1.
  void fill(uint32_t seed) {
    uint32_t state = seed * 2654435761u + 12345u;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      data[i] = (static_cast<int>(state >> 24) - 127.5f) / 128;
    }
  }
  double operator[](int64_t i) const { return data[i]; }

  int64_t count;
  float* data;
};

void expect(const char* what, int64_t i, double actual, double expected, double limit) {
  ++checks;
  if (std::fabs(actual - expected) <= limit) return;
  if (++failures <= 10) {
    std::printf("%s[%ld]: %.9g, expected %.9g\n", what, long(i), actual, expected);
  }
}

struct Case {
  int64_t samples, in_channels, out_channels, height, width;
  int up, down, kernel_y, kernel_x;
  int64_t pad_y0, pad_y1, pad_x0, pad_x1;
};

// w is [O, I, kh, kw], or its transpose [I, O, kh, kw] rotated.
Conv2d problem(const Case& c, bool in_last, bool out_last, bool transposed) {
  const int64_t out_height = (c.height * c.up + c.pad_y0 + c.pad_y1 - c.kernel_y) / c.down + 1;
  const int64_t out_width = (c.width * c.up + c.pad_x0 + c.pad_x1 - c.kernel_x) / c.down + 1;
  const int64_t taps = static_cast<int64_t>(c.kernel_y) * c.kernel_x;
  return {DType::float32, c.samples, c.in_channels, c.out_channels, c.height, c.width, out_height,
          out_width, in_last, out_last, c.up, c.down, c.pad_x0, c.pad_y0, c.kernel_x, c.kernel_y,
          transposed ? taps : taps * c.in_channels, transposed ? taps * c.out_channels : taps,
          c.kernel_x, 1, !transposed};
}

int64_t index(bool last, int64_t channels, int64_t h, int64_t w, int64_t n, int64_t c, int64_t y,
              int64_t x) {
  return last ? ((n * h + y) * w + x) * channels + c : ((n * channels + c) * h + y) * w + x;
}
int64_t in_index(const Conv2d& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  return index(p.in_channels_last, p.in_channels, p.in_height, p.in_width, n, c, y, x);
}
int64_t out_index(const Conv2d& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  return index(p.out_channels_last, p.out_channels, p.out_height, p.out_width, n, c, y, x);
}

// Calls f(weight's index, input's row and column) for the taps of an output pixel inside the image.
template <class F>
void each_tap(const Conv2d& p, int64_t oy, int64_t ox, F&& f) {
  for (int ky = 0; ky < p.kernel_y; ++ky)
    for (int kx = 0; kx < p.kernel_x; ++kx) {
      const int64_t zy = oy * p.down + ky - p.pad_y, zx = ox * p.down + kx - p.pad_x;
      if (zy < 0 || zx < 0 || zy % p.up || zx % p.up) continue;
      if (zy / p.up >= p.in_height || zx / p.up >= p.in_width) continue;
      const int fy = p.correlate ? ky : p.kernel_y - 1 - ky;
      const int fx = p.correlate ? kx : p.kernel_x - 1 - kx;
      f(fy * p.stride_y + fx * p.stride_x, zy / p.up, zx / p.up);
    }
}

template <class F>
void each_output(const Conv2d& p, F&& f) {
  for (int64_t n = 0; n < p.samples; ++n)
    for (int64_t o = 0; o < p.out_channels; ++o)
      for (int64_t y = 0; y < p.out_height; ++y)
        for (int64_t x = 0; x < p.out_width; ++x) f(n, o, y, x);
}

// extra: 0 nothing, 1 add and pre, 2 epilogue with mask, 3 epilogue with noise of each sample, add.
void forward(const Case& c, bool in_last, bool out_last, int extra, int threads) {
  const Conv2d p = problem(c, in_last, out_last, threads == 2);
  const int64_t pixels = p.out_height * p.out_width, numel = p.samples * p.out_channels * pixels;
  const bool masked = extra == 2 && (out_last ? p.out_channels : p.out_width) % 8 == 0;
  Numbers x(p.samples * p.in_channels * p.in_height * p.in_width);
  Numbers w(p.out_channels * p.in_channels * p.kernel_y * p.kernel_x);
  Numbers pre(p.samples * p.in_channels), add(numel), y(numel);
  Numbers scale(p.samples * p.out_channels), noise(p.samples * pixels), strength(1);
  Numbers bias(p.out_channels);
  uint32_t seed = 0;
  for (Numbers* numbers : {&x, &w, &pre, &add, &scale, &noise, &strength, &bias})
    numbers->fill(++seed);
  std::vector<uint8_t> mask((numel + 7) / 8 * 2);
  const double limit = 1.5;
  Epilogue e{DType::float32,
             out_last ? Geometry{p.samples * pixels, p.out_channels, 1, pixels}
                      : Geometry{p.samples, p.out_channels, pixels, pixels},
             3, 0.25, 1.25, limit, scale.data, noise.data, extra == 3, strength.data, bias.data};
  level::conv2d_forward(p, extra >= 2 ? &e : nullptr, x.data, w.data,
                        extra == 1 ? pre.data : nullptr, extra % 2 ? add.data : nullptr, y.data,
                        masked ? mask.data() : nullptr, threads);
  each_output(p, [&](int64_t n, int64_t o, int64_t oy, int64_t ox) {
    double u = 0, terms = 0;
    each_tap(p, oy, ox, [&](int64_t tap, int64_t iy, int64_t ix) {
      for (int64_t i = 0; i < p.in_channels; ++i) {
        const double factor = extra == 1 ? pre[n * p.in_channels + i] : 1;
        u += factor * x[in_index(p, n, i, iy, ix)] * w[o * p.stride_o + i * p.stride_i + tap];
      }
    });
    terms = static_cast<double>(p.in_channels) * 9;
    const int64_t at = out_index(p, n, o, oy, ox);
    if (extra >= 2) {
      const double drawn = noise[(extra == 3) * n * pixels + oy * p.out_width + ox];
      const double v = scale[n * p.out_channels + o] * u + strength[0] * drawn + bias[o];
      const double value = 1.25 * (v > 0 ? v : 0.25 * v);
      u = std::max(-limit, std::min(limit, value));
      const double near = kRounding * (terms + 3);
      if (masked && std::fabs(v) > near && std::fabs(std::fabs(value) - limit) > 2 * near) {
        expect("negative", at, mask[at / 8 * 2] >> at % 8 & 1, v <= 0, 0);
        expect("clamped", at, mask[at / 8 * 2 + 1] >> at % 8 & 1, std::fabs(value) > limit, 0);
      }
    }
    if (extra % 2) u += add[at];
    expect("y", at, y[at], u, 1.25 * kRounding * (terms + 3));
  });
}

void weight_gradient(const Case& c, bool in_last, bool out_last, bool scaled, int threads) {
  const Conv2d p = problem(c, in_last, out_last, threads == 2);
  Numbers x(p.samples * p.in_channels * p.in_height * p.in_width);
  Numbers dy(p.samples * p.out_channels * p.out_height * p.out_width);
  Numbers pre(p.samples * p.in_channels), post(p.samples * p.out_channels);
  Numbers dw(p.out_channels * p.in_channels * p.kernel_y * p.kernel_x);
  x.fill(1), dy.fill(2), pre.fill(3), post.fill(4);
  level::conv2d_weight_gradient(p, x.data, dy.data, scaled ? pre.data : nullptr,
                                scaled ? post.data : nullptr, dw.data, threads);
  std::vector<double> sums(dw.count);
  each_output(p, [&](int64_t n, int64_t o, int64_t oy, int64_t ox) {
    const double d = dy[out_index(p, n, o, oy, ox)] * (scaled ? post[n * p.out_channels + o] : 1);
    each_tap(p, oy, ox, [&](int64_t tap, int64_t iy, int64_t ix) {
      for (int64_t i = 0; i < p.in_channels; ++i)
        sums[o * p.stride_o + i * p.stride_i + tap] +=
            d * x[in_index(p, n, i, iy, ix)] * (scaled ? pre[n * p.in_channels + i] : 1);
    });
  });
  const double terms = static_cast<double>(p.samples) * p.out_height * p.out_width + 16;
  for (int64_t i = 0; i < dw.count; ++i) expect("dw", i, dw[i], sums[i], kRounding * terms);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1},
      {2, 1, 3, 5, 8, 1, 1, 3, 3, 1, 1, 1, 1},
      {1, 3, 16, 6, 72, 1, 1, 3, 3, 1, 1, 1, 1},
      {3, 16, 8, 8, 8, 1, 1, 3, 3, 1, 1, 1, 1},
      {1, 33, 18, 9, 13, 1, 1, 3, 3, 0, 0, 0, 0},
      {1, 17, 40, 4, 24, 1, 1, 3, 3, 2, 0, 1, 1},
      {2, 5, 70, 4, 6, 1, 1, 3, 3, -1, 2, 1, -1},
      {1, 2, 3, 20, 200, 1, 1, 2, 3, 0, 1, 2, 0},
      {1, 4, 5, 3, 7, 1, 1, 1, 1, 0, 0, 0, 0},
      {1, 3, 4, 3, 3, 1, 1, 3, 3, 6, 5, 7, 4},
      {2, 3, 8, 5, 12, 2, 1, 3, 3, 2, 0, 2, 0},
      {1, 17, 24, 4, 4, 2, 1, 3, 3, 2, 2, 2, 2},
      {1, 5, 3, 7, 70, 2, 1, 3, 3, 2, 1, 2, 1},
      {1, 2, 9, 5, 6, 2, 1, 2, 3, 4, 0, -2, 3},
      {2, 3, 8, 5, 17, 1, 2, 3, 3, 0, 0, 0, 0},
      {1, 17, 24, 9, 9, 1, 2, 3, 3, 1, 1, 1, 1},
      {1, 5, 3, 7, 150, 1, 2, 3, 3, 2, 1, -1, 1},
      {1, 2, 9, 5, 6, 1, 2, 3, 2, 2, 0, 1, 3},
  };
  for (const Case& c : cases)
    for (int threads = 1; threads <= 3; ++threads)
      for (int layouts = 0; layouts < 4; ++layouts) {
        const bool in_last = layouts % 2, out_last = layouts / 2;
        forward(c, in_last, out_last, (threads + layouts) % 4, threads);
        forward(c, in_last, out_last, 2, threads);
        if (c.up == 1) weight_gradient(c, in_last, out_last, threads % 2, threads);
      }
  // More tiles than a block of them, more channels than a block of sums.
  weight_gradient({1, 3, 2, 70, 75, 1, 1, 3, 3, 1, 1, 1, 1}, false, false, true, 2);
  weight_gradient({1, 2, 3, 70, 75, 1, 1, 3, 3, 1, 1, 1, 1}, true, true, true, 3);
  weight_gradient({1, 2, 3, 141, 150, 1, 2, 3, 3, 0, 0, 0, 0}, false, false, true, 2);
  forward({1, 18, 136, 28, 32, 1, 1, 3, 3, 1, 1, 1, 1}, false, false, 2, 3);
  forward({1, 18, 136, 28, 30, 1, 1, 3, 3, 1, 1, 1, 1}, true, true, 2, 3);
  forward({1, 18, 136, 28, 32, 2, 1, 3, 3, 2, 1, 2, 1}, false, false, 2, 3);
  forward({1, 18, 136, 57, 65, 1, 2, 3, 3, 0, 0, 0, 0}, false, false, 2, 3);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
