// Runs upfirdn2d of one SIMD level on buffers of exactly the size the contract names, under the
// sanitizers, and compares it with the definition, evaluated in double.
#include "driver.h"

namespace {

int64_t divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

struct Case {
  int64_t samples, channels, height, width;
  int up_x, up_y, down_x, down_y;
  int64_t pad_x0, pad_x1, pad_y0, pad_y1;
  int taps_x, taps_y;
  char filter;  // separable, rank one, full, none
};

enum Layout { nchw, nhwc, strided, repeated };

Upfirdn2d problem(const Case& c, DType dtype, Layout layout, const Numbers& taps, bool correlate) {
  const int64_t n = c.samples, ch = c.channels, h = c.height, w = c.width;
  const int64_t out_h = divide(h * c.up_y + c.pad_y0 + c.pad_y1 - c.taps_y, c.down_y) + 1;
  const int64_t out_w = divide(w * c.up_x + c.pad_x0 + c.pad_x1 - c.taps_x, c.down_x) + 1;
  Upfirdn2d p{dtype, n, ch, h, w, out_h, out_w, ch * h * w, h * w, w, 1, layout == nhwc,
              c.up_x, c.up_y, c.down_x, c.down_y, c.pad_x0, c.pad_y0, taps.data, c.taps_x, c.taps_y,
              c.filter == 's', correlate, -1.5};
  if (layout == nhwc) p.stride_c = 1, p.stride_h = w * ch, p.stride_w = ch;
  if (layout == strided) p.stride_w = 3, p.stride_h = 3 * w + 1, p.stride_c = 0, p.stride_n = (3 * w + 1) * h;
  if (layout == repeated) p.stride_n = 0, p.stride_c = 0, p.stride_h = 0, p.stride_w = 0;
  if (c.filter == 'n') p.taps = nullptr;
  return p;
}

// u and the sum of the magnitudes of its terms, of an input x(n, c, y, x).
template <class X>
void definition(const Upfirdn2d& p, const Numbers& taps, const X& x, int64_t n, int64_t c,
                int64_t oy, int64_t ox, double& u, double& size) {
  u = size = 0;
  for (int ky = 0; ky < p.taps_y; ++ky)
    for (int kx = 0; kx < p.taps_x; ++kx) {
      const int64_t zy = oy * p.down_y + ky - p.pad_y, zx = ox * p.down_x + kx - p.pad_x;
      if (zy < 0 || zx < 0 || zy % p.up_y || zx % p.up_x) continue;
      if (zy / p.up_y >= p.in_height || zx / p.up_x >= p.in_width) continue;
      const int fy = p.correlate ? ky : p.taps_y - 1 - ky, fx = p.correlate ? kx : p.taps_x - 1 - kx;
      const double g = !p.taps         ? 1
                       : p.separable ? taps.get(fy) * taps.get(fx)
                                     : taps.get(fy * p.taps_x + fx);
      const double term = p.gain * g * x(n, c, zy / p.up_y, zx / p.up_x);
      u += term;
      size += std::fabs(term);
    }
}

void fill_taps(const Case& c, Numbers& taps) {
  taps.fill(3);
  if (c.filter != 'r') return;
  for (int k = c.taps_x * c.taps_y - 1; k >= 0; --k)
    taps.put(k, 0.25 * (1 + k / c.taps_x) * (k % c.taps_x - 1.5));
}

int64_t taps_of(const Case& c) {
  return c.filter == 's' ? c.taps_x : static_cast<int64_t>(c.taps_x) * c.taps_y;
}

int64_t out_index(const Upfirdn2d& p, bool channels_last, int64_t h, int64_t w, int64_t n, int64_t c,
                  int64_t y, int64_t x) {
  return channels_last ? ((n * h + y) * w + x) * p.channels + c
                       : ((n * p.channels + c) * h + y) * w + x;
}

Geometry geometry(const Upfirdn2d& p, bool channels_last, int64_t pixels) {
  return channels_last ? Geometry{p.samples * pixels, p.channels, 1, pixels}
                       : Geometry{p.samples, p.channels, pixels, pixels};
}

template <class F>
void each(const Upfirdn2d& p, int64_t h, int64_t w, F&& f) {
  for (int64_t n = 0; n < p.samples; ++n)
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x) f(n, c, y, x);
}

// extra: 0 nothing, 1 add, 2 epilogue with mask, 3 epilogue with noise of each sample and add.
void forward(const Case& c, DType dtype, Layout layout, int extra, int threads) {
  Numbers taps(wide(dtype), taps_of(c));
  fill_taps(c, taps);
  Upfirdn2d p = problem(c, dtype, layout, taps, threads % 2);
  if (layout >= strided) p.channels_last = threads == 2;
  const bool last = p.channels_last;
  const int64_t size = (p.samples - 1) * p.stride_n + (p.channels - 1) * p.stride_c +
                       (p.in_height - 1) * p.stride_h + (p.in_width - 1) * p.stride_w + 1;
  const int64_t pixels = p.out_height * p.out_width, numel = p.samples * p.channels * pixels;
  Numbers x(dtype, size), y(dtype, numel), add(dtype, numel), bias(dtype, p.channels);
  Numbers scale(wide(dtype), p.samples * p.channels), strength(wide(dtype), 1);
  Numbers noise(wide(dtype), pixels * (extra == 3 ? p.samples : 1));
  for (Numbers* numbers : {&x, &add, &bias, &scale, &strength, &noise}) numbers->fill(numbers - &x);
  const bool masked = extra == 2 && (last || pixels == 1 ? p.channels : p.out_width) % 8 == 0;
  std::vector<uint8_t> mask(masked ? (numel + 7) / 8 * 2 : 0);
  const double limit = extra == 2 ? 1.7 : std::numeric_limits<double>::infinity();
  Epilogue e{dtype, geometry(p, last, pixels), 3, 0.25, 1.25, limit};
  e.scale = scale.data;
  e.noise = noise.data;
  e.noise_per_sample = extra == 3;
  e.strength = strength.data;
  e.bias = bias.data;
  level::upfirdn2d_forward(p, extra >= 2 ? &e : nullptr, x.data, extra % 2 ? add.data : nullptr,
                           y.data, masked ? mask.data() : nullptr, threads);

  const auto image = [&](int64_t n, int64_t c, int64_t iy, int64_t ix) {
    return x.get(n * p.stride_n + c * p.stride_c + iy * p.stride_h + ix * p.stride_w);
  };
  each(p, p.out_height, p.out_width, [&](int64_t n, int64_t c, int64_t oy, int64_t ox) {
    const int64_t i = out_index(p, last, p.out_height, p.out_width, n, c, oy, ox);
    double u, terms;
    definition(p, taps, image, n, c, oy, ox, u, terms);
    if (extra >= 2) {
      const double s = scale.get(n * p.channels + c);
      const double drawn = noise.get((extra == 3) * n * pixels + oy * p.out_width + ox);
      const double v = s * u + strength.get(0) * drawn + bias.get(c);
      terms = std::fabs(s) * terms + 6;
      const double value = 1.25 * (v > 0 ? v : 0.25 * v);
      u = std::max(-limit, std::min(limit, value));
      // On the edge float32 may decide otherwise than double.
      if (masked && std::fabs(v) > 1e-5 * terms && std::fabs(std::fabs(value) - limit) > 1e-5 * terms) {
        expect("negative", i, mask[i / 8 * 2] >> i % 8 & 1, v <= 0, 0);
        expect("clamped", i, mask[i / 8 * 2 + 1] >> i % 8 & 1, std::fabs(value) > limit, 0);
      }
    }
    if (extra % 2) u += add.get(i), terms += 2;
    const double rounded = rounding(dtype) * std::fabs(u);
    expect("y", i, y.get(i), u, rounding(wide(dtype)) * (terms + 1) + rounded);
  });
}

void masked(const Case& c, DType dtype, Layout layout, bool with_mask, bool with_sum, int threads) {
  Numbers taps(wide(dtype), taps_of(c));
  fill_taps(c, taps);
  Upfirdn2d p = problem(c, dtype, layout, taps, threads % 2);
  const bool last = layout == nhwc;
  if (threads == 3) p.channels_last = !last;
  const int64_t pixels = p.in_height * p.in_width, numel = p.samples * p.channels * pixels;
  if (with_mask && (last || pixels == 1 ? p.channels : p.in_width) % 8) return;
  Numbers dy(dtype, numel), dx(dtype, p.samples * p.channels * p.out_height * p.out_width);
  Numbers scale(wide(dtype), p.samples * p.channels), sum(wide(dtype), p.channels);
  dy.fill(5);
  scale.fill(7);
  std::vector<uint8_t> mask((numel + 7) / 8 * 2);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<uint8_t>(i * 37 + i / 5);
  Epilogue e{dtype, geometry(p, last, pixels), 1, 0.0, 1.25, 1.0};
  if (with_sum) e.scale = scale.data;
  level::upfirdn2d_masked(p, e, 0.25, dy.data, with_mask ? mask.data() : nullptr, dx.data,
                          with_sum ? sum.data : nullptr, threads);

  const auto derivative = [&](int64_t n, int64_t c, int64_t iy, int64_t ix) {
    const int64_t i = out_index(p, last, p.in_height, p.in_width, n, c, iy, ix);
    const bool negative = with_mask && mask[i / 8 * 2] >> i % 8 & 1;
    const bool clamped = with_mask && mask[i / 8 * 2 + 1] >> i % 8 & 1;
    return clamped ? 0 : dy.get(i) * 1.25 * (negative ? 0.25 : 1);
  };
  each(p, p.out_height, p.out_width, [&](int64_t n, int64_t c, int64_t oy, int64_t ox) {
    const int64_t i = out_index(p, p.channels_last, p.out_height, p.out_width, n, c, oy, ox);
    double u, terms;
    definition(p, taps, derivative, n, c, oy, ox, u, terms);
    const double s = with_sum ? scale.get(n * p.channels + c) : 1;
    expect("dx", i, dx.get(i), s * u,
           rounding(wide(dtype)) * (std::fabs(s) * terms + 1) + rounding(dtype) * std::fabs(s * u));
  });
  for (int64_t c = 0; with_sum && c < p.channels; ++c) {
    double total = 0;
    for (int64_t n = 0; n < p.samples; ++n)
      for (int64_t iy = 0; iy < p.in_height; ++iy)
        for (int64_t ix = 0; ix < p.in_width; ++ix) total += derivative(n, c, iy, ix);
    expect("sum", c, sum.get(c), total, rounding(wide(dtype)) * 2 * numel / p.channels);
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      // Same, up 2, down 2 of the real workloads, short rows and long ones.
      {2, 3, 9, 40, 1, 1, 1, 1, 1, 2, 2, 1, 4, 4, 'r'},
      {1, 24, 7, 16, 1, 1, 1, 1, 2, 1, 1, 2, 4, 4, 'r'},
      {2, 8, 5, 32, 2, 2, 1, 1, 2, 1, 2, 1, 4, 4, 'r'},
      {1, 70, 6, 17, 2, 2, 1, 1, 2, 1, 2, 1, 4, 4, 'r'},
      {2, 5, 8, 48, 1, 1, 2, 2, 1, 1, 1, 1, 4, 4, 'r'},
      {1, 40, 12, 18, 1, 1, 2, 2, 1, 1, 1, 1, 4, 4, 'r'},
      {1, 3, 14, 36, 2, 2, 1, 1, 6, 5, 6, 5, 12, 12, 's'},
      {1, 19, 14, 24, 1, 1, 2, 2, 5, 5, 5, 5, 12, 12, 's'},
      {1, 1, 4, 5000, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 's'},
      {1, 1, 3, 40000, 1, 1, 2, 1, 1, 1, 0, 0, 3, 1, 'r'},
      {1, 72, 2, 1000, 1, 1, 1, 1, 1, 1, 1, 1, 3, 2, 'r'},
      {1, 200, 4, 30, 2, 1, 1, 2, 2, 1, 1, 1, 4, 4, 'r'},
      {1, 136, 3, 16, 1, 1, 1, 1, 1, 2, 1, 2, 4, 4, 'r'},
      {1, 144, 6, 7, 1, 1, 1, 1, 1, 2, 2, 1, 4, 4, 'r'},
      {1, 33, 11, 5, 1, 1, 2, 2, 2, 1, 1, 3, 4, 4, 'r'},
      {2, 16, 9, 8, 1, 1, 1, 1, -2, 4, 5, -3, 4, 4, 'r'},
      // Other factors, both at once, odd numbers of taps, crops, more padding than image.
      {1, 2, 7, 11, 4, 3, 1, 2, 5, 7, 3, 2, 9, 5, 'f'},
      {2, 3, 7, 21, 3, 2, 2, 3, 4, 3, 2, 5, 7, 6, 'r'},
      {1, 17, 6, 16, 3, 2, 2, 3, -2, 3, 5, -1, 5, 4, 'f'},
      {1, 3, 9, 24, 2, 2, 1, 1, 3, 3, 3, 3, 7, 7, 's'},
      {1, 8, 20, 40, 1, 1, 1, 1, -5, -11, -3, -6, 3, 5, 'f'},
      {1, 4, 40, 24, 1, 1, 3, 4, -9, -1, -13, -2, 2, 1, 'f'},
      {1, 2, 3, 8, 1, 1, 1, 1, 30, 45, 21, 12, 4, 4, 'r'},
      {1, 16, 3, 5, 5, 4, 1, 1, 20, 9, 7, 8, 2, 2, 'f'},
      {1, 2, 40, 64, 1, 1, 1, 1, 20, 20, 20, 20, 41, 41, 's'},
      {1, 18, 35, 9, 1, 1, 1, 1, 0, 40, 40, 0, 37, 37, 's'},
      {1, 2, 12, 16, 4, 4, 1, 1, 23, 23, 23, 23, 23, 21, 'f'},
      {1, 1, 5, 33, 1, 1, 1, 1, 6, 6, 0, 0, 13, 1, 'f'},
      {1, 8, 33, 8, 1, 1, 1, 1, 0, 0, 3, 9, 1, 13, 'f'},
      // No filter, one pixel.
      {2, 5, 4, 9, 2, 3, 1, 1, 1, 0, 0, 2, 1, 1, 'n'},
      {2, 16, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 'n'},
      {1, 8, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 4, 'r'},
  };
  for (const Case& c : cases) {
    const bool large = c.channels * c.height * c.width * c.taps_x * c.taps_y > 50000;
    for (int dtype = 0; dtype < 4; ++dtype)
      for (int threads = 1; threads <= 3; ++threads) {
        if (large && threads != 1 + dtype % 3) continue;
        const DType type = static_cast<DType>(dtype);
        for (Layout layout : {nchw, nhwc, strided, repeated})
          if (!large || layout < strided) {
            forward(c, type, layout, (threads + layout + dtype) % 4, threads);
          }
        for (Layout layout : {nchw, nhwc}) {
          if (!large) forward(c, type, layout, 2, threads);
          masked(c, type, layout, false, threads == 2, threads);
          masked(c, type, layout, true, threads != 2, threads);
        }
      }
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
