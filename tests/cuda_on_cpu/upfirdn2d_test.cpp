// Runs every CUDA kernel of upfirdn2d on the CPU and compares it with its definition in double
// precision. Inputs are small multiples of 1/8 and taps of 1/4, so all but curved activations is
// exact and is compared exactly.
//
//     upfirdn2d_test all|few|float32|far
#include <array>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing.h"
#include "upfirdn2d.h"

using namespace stylegan_fast;

namespace {

int failures = 0;

enum Filter { none, separable, product, arbitrary };
enum Strides { dense, other_format, sliced, expanded };

struct Case {
  int64_t n, c, h, w;
  std::array<int, 4> factors;  // up x, y; down x, y
  std::array<int, 4> padding;  // left, right, top, bottom
  Filter filter;
  int taps_x, taps_y;
  Strides strides = dense;
  int shift = 0;  // of every buffer off 16-byte alignment, in elements
  int multiprocessors = 1;
};

template <class D>
class Problem {
  using T = typename D::T;

 public:
  Problem(const Case& c, bool channels_last, unsigned seed)
      : c_(c), last_(channels_last), random_(seed),
        taps_(c.filter == none ? 0 : c.filter == separable ? c.taps_x : c.taps_x * c.taps_y, 0, 0) {
    const int tx = c.filter == none ? 1 : c.taps_x, ty = c.filter == none ? 1 : c.taps_y;
    const auto out = [](int64_t in, int up, int down, int before, int after, int taps) {
      return (in * up + before + after - taps) / down + 1;
    };
    p_ = {D::dtype, c.n, c.c, c.h, c.w,
          out(c.h, c.factors[1], c.factors[3], c.padding[2], c.padding[3], ty),
          out(c.w, c.factors[0], c.factors[2], c.padding[0], c.padding[1], tx),
          0, 0, 0, 0, channels_last, c.factors[0], c.factors[1], c.factors[2], c.factors[3],
          c.padding[0], c.padding[2], c.filter == none ? nullptr : taps_.get(), tx, ty,
          c.filter == separable, seed % 2 == 0, -0.5};
    fill_taps();
    numel_ = c.n * c.c * p_.out_height * p_.out_width;
    cuda_on_cpu::multiprocessors = c.multiprocessors;
  }

  void forward(int act, double clamp, bool with_add, bool with_nan) {
    set_strides(c_.strides);
    Buffer<T> x(input_size(), c_.shift, T()), add(numel_, c_.shift, T()), bias(c_.c, c_.shift, T());
    Buffer<T> y(numel_, c_.shift, D::round(kNaN));
    Buffer<float> scale(c_.n * c_.c, 1, 0), strength(1, 0, 0.5f);
    const bool per_sample = random_() % 2;
    const int64_t pixels = p_.out_height * p_.out_width;
    Buffer<float> noise(per_sample ? c_.n * pixels : pixels, 0, 0);
    fill(x, 24), fill(add, 24), fill(bias, 16), fill(scale, 16), fill(noise, 16);
    if (with_nan) x[x.size() / 2] = D::round(kNaN);
    const bool with_mask = act && row(last_, p_.out_width) % 8 == 0;
    Buffer<uint8_t> mask(with_mask ? numel_ / 4 : 0, 0, 0xcd);
    Epilogue e = {D::dtype, geometry(last_, pixels), act, 0.25, 1.5, clamp};
    const unsigned parts = random_();
    if (parts & 1) e.scale = scale.get();
    if (parts & 2) e.noise = noise.get(), e.noise_per_sample = per_sample;
    if (parts & 4) e.strength = strength.get();
    if (parts & 8) e.bias = bias.get();
    cuda::upfirdn2d_forward(p_, act ? &e : nullptr, x.get(), with_add ? add.get() : nullptr,
                            y.get(), with_mask ? mask.get() : nullptr, nullptr);
    each_output([&](int64_t n, int64_t c, int64_t oy, int64_t ox, int64_t i) {
      double v = u(n, c, oy, ox, [&](int64_t element) { return D::value(x[element]); });
      double want = v;
      if (act) {
        if (e.scale) v *= scale[n * c_.c + c];
        const int64_t pixel = oy * p_.out_width + ox;
        if (e.noise) v += (e.strength ? 0.5 : 1) * noise[per_sample ? n * pixels + pixel : pixel];
        if (e.bias) v += D::value(bias[c]);
        const double z = e.gain * act_value(act, v, e.alpha);
        want = std::isnan(z) ? z : std::min(std::max(z, -clamp), clamp);
        if (with_mask && act <= lrelu) {
          const int bits = (mask[i / 8 * 2] >> i % 8 & 1) | (mask[i / 8 * 2 + 1] >> i % 8 & 1) << 1;
          check("mask", i, bits, (v <= 0) | (clamp < kInf && !(std::abs(z) <= clamp)) << 1);
        }
      }
      if (with_add) want += D::value(add[i]);
      const double error = kFloatError + (kFloatError + D::epsilon) * std::abs(want);
      const bool is_exact = act <= lrelu;
      if (is_exact) want = D::value(D::round(want));
      check("y", i, D::value(y[i]), want, is_exact ? 0 : error);
    });
  }

  void masked(double negative_slope, bool with_mask, bool with_scale, bool with_sum) {
    const bool dy_last = c_.strides == other_format ? !last_ : last_;
    set_strides(c_.strides == other_format ? other_format : dense);
    with_mask = with_mask && row(dy_last, c_.w) % 8 == 0;
    Buffer<T> dy(input_size(), c_.shift, T()), dx(numel_, c_.shift, D::round(kNaN));
    Buffer<uint8_t> mask(with_mask ? dy.size() / 4 : 0, 0, 0);
    Buffer<float> scale(c_.n * c_.c, 1, 0), sum(with_sum ? c_.c : 0, 0, kNaN);
    fill(dy, 24), fill(scale, 16);
    for (int64_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<uint8_t>(random_());
    Epilogue e = {D::dtype, geometry(dy_last, c_.h * c_.w), linear, 0, 1.5, kInf};
    if (with_scale) e.scale = scale.get();
    Buffer<float> workspace(with_sum ? cuda::upfirdn2d_workspace(p_, e) : 0, 0, kNaN);
    cuda::upfirdn2d_masked(p_, e, negative_slope, dy.get(), with_mask ? mask.get() : nullptr,
                           dx.get(), with_sum ? sum.get() : nullptr, workspace.get(), nullptr);
    const auto d = [&](int64_t i) {
      const bool negative = with_mask && mask[i / 8 * 2] >> i % 8 & 1;
      const bool clamped = with_mask && mask[i / 8 * 2 + 1] >> i % 8 & 1;
      return clamped ? 0 : D::value(dy[i]) * e.gain * (negative ? negative_slope : 1);
    };
    each_output([&](int64_t n, int64_t c, int64_t oy, int64_t ox, int64_t i) {
      const double want = u(n, c, oy, ox, d) * (with_scale ? scale[n * c_.c + c] : 1);
      check("dx", i, D::value(dx[i]), D::value(D::round(want)));
    });
    for (int64_t c = 0; c < sum.size(); ++c) {
      double want = 0;
      for (int64_t n = 0; n < c_.n; ++n) {
        for (int64_t pixel = 0; pixel < c_.h * c_.w; ++pixel) {
          want += d(n * p_.stride_n + c * p_.stride_c + pixel / c_.w * p_.stride_h +
                    pixel % c_.w * p_.stride_w);
        }
      }
      check("sum", c, sum[c], want);
    }
  }

 private:
  int64_t row(bool last, int64_t width) const { return last ? c_.c : width; }

  Geometry geometry(bool last, int64_t pixels) const {
    if (last) return {c_.n * pixels, c_.c, 1, pixels};
    return {c_.n, c_.c, pixels, pixels};
  }

  void set_strides(Strides strides) {
    const bool last = strides == other_format ? !last_ : last_;
    const int64_t step = strides == sliced ? 2 : 1, w = c_.w * step + (step - 1);
    p_.stride_w = last ? c_.c * step : step;
    p_.stride_c = last ? 1 : c_.h * w;
    p_.stride_h = last ? c_.c * w : w;
    p_.stride_n = c_.c * c_.h * w;
    if (strides == expanded) p_.stride_n = 0, p_.stride_h = 0;
  }
  int64_t input_size() const {
    return 1 + (c_.n - 1) * p_.stride_n + (c_.c - 1) * p_.stride_c + (c_.h - 1) * p_.stride_h +
           (c_.w - 1) * p_.stride_w;
  }

  // Few bits, so that sums of many products are exact; asymmetric; some are 0.
  void fill_taps() {
    const bool is_short = taps_.size() <= 64;
    for (int64_t k = 0; k < taps_.size(); ++k) taps_[k] = is_short ? draw(7) * 2 : draw(8) >= 0;
    if (c_.filter != product) return;
    const float factors[] = {0.25f, -0.75f, 0.5f, 1.0f};
    for (int64_t k = 0; k < taps_.size(); ++k) {
      const float x = factors[k % c_.taps_x % 4], y = factors[k / c_.taps_x % 4] - 0.5f;
      taps_[k] = x * y;
    }
  }
  template <class U>
  void fill(Buffer<U>& buffer, int limit) {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      if constexpr (std::is_same_v<U, T>) {
        buffer[i] = D::round(draw(limit));
      } else {
        buffer[i] = static_cast<U>(draw(limit));
      }
    }
  }
  double draw(int limit) { return (static_cast<int>(random_() % (2 * limit + 1)) - limit) / 8.0; }

  double tap(int ky, int kx) {
    if (c_.filter == none) return 1;
    const int y = p_.correlate ? ky : p_.taps_y - 1 - ky;
    const int x = p_.correlate ? kx : p_.taps_x - 1 - kx;
    return c_.filter == separable ? double(taps_[x]) * taps_[y] : taps_[y * p_.taps_x + x];
  }

  template <class Read>
  double u(int64_t n, int64_t c, int64_t oy, int64_t ox, Read&& read) {
    double sum = 0;
    for (int ky = 0; ky < p_.taps_y; ++ky) {
      const int64_t y = oy * p_.down_y + ky - p_.pad_y;
      if (y < 0 || y >= c_.h * p_.up_y || y % p_.up_y) continue;
      for (int kx = 0; kx < p_.taps_x; ++kx) {
        const int64_t x = ox * p_.down_x + kx - p_.pad_x;
        if (x < 0 || x >= c_.w * p_.up_x || x % p_.up_x) continue;
        sum += tap(ky, kx) * read(n * p_.stride_n + c * p_.stride_c + y / p_.up_y * p_.stride_h +
                                  x / p_.up_x * p_.stride_w);
      }
    }
    return p_.gain * sum;
  }

  template <class F>
  void each_output(F&& f) const {
    for (int64_t i = 0; i < numel_; ++i) {
      const int64_t w = p_.out_width, h = p_.out_height;
      if (last_) {
        f(i / (w * h * c_.c), i % c_.c, i / (c_.c * w) % h, i / c_.c % w, i);
      } else {
        f(i / (w * h * c_.c), i / (w * h) % c_.c, i / w % h, i % w, i);
      }
    }
  }

  void check(const char* what, int64_t i, double got, double want, double tolerance = 0) {
    if (got == want || (std::isnan(got) && std::isnan(want))) return;
    if (std::abs(got - want) <= tolerance) return;
    if (++failures > 20) return;
    std::printf("%s[%ld] is %.9g, not %.9g: dtype %d %s [%ld, %ld, %ld, %ld] up %d %d down %d %d "
                "padding %d %d %d %d filter %d of %d x %d strides %d shift %d\n",
                what, long(i), got, want, int(D::dtype), last_ ? "NHWC" : "NCHW", long(c_.n),
                long(c_.c), long(c_.h), long(c_.w), c_.factors[0], c_.factors[1], c_.factors[2],
                c_.factors[3], c_.padding[0], c_.padding[1], c_.padding[2], c_.padding[3],
                c_.filter, p_.taps_x, p_.taps_y, c_.strides, c_.shift);
  }

  const Case& c_;
  const bool last_;
  std::mt19937 random_;
  Buffer<float> taps_;
  Upfirdn2d p_;
  int64_t numel_;
};

constexpr std::array<int, 4> kSame = {1, 1, 1, 1}, kUp = {2, 2, 1, 1}, kDown = {1, 1, 2, 2};

// Kernels: streams of packs (NHWC) and of planes; tiles; direct.
std::vector<Case> cases(bool few) {
  std::vector<Case> list = {
      {2, 16, 19, 17, kSame, {1, 1, 1, 1}, product, 4, 4},
      {2, 8, 11, 4, kUp, {2, 1, 2, 1}, product, 4, 4},
      {1, 8, 21, 16, kDown, {1, 1, 1, 1}, product, 4, 4},
      {2, 3, 9, 8, kUp, {6, 5, 6, 5}, separable, 12, 12},
      {2, 3, 17, 16, kDown, {5, 5, 5, 5}, separable, 12, 12},
      {1, 8, 12, 16, kSame, {4, 4, 4, 4}, separable, 9, 9},
      {1, 3, 12, 16, kSame, {4, 4, 4, 4}, separable, 9, 9},
      {1, 1, 133, 35, kSame, {2, 3, 2, 3}, separable, 6, 6},  // four tiles
      {2, 8, 5, 8, kSame, {1, 1, 0, 2}, arbitrary, 3, 2},
      {2, 5, 4, 6, kSame, {0, 1, 2, 0}, arbitrary, 2, 3},
  };
  if (few) return list;
  const std::vector<Case> more = {
      // Four taps: neither factor of a product, odd offsets, crops, short and wide, unaligned.
      {1, 8, 9, 11, kSame, {2, 2, 2, 2}, arbitrary, 4, 4},
      {1, 8, 9, 11, kUp, {1, 2, 3, 4}, arbitrary, 4, 4},
      {2, 8, 9, 11, kUp, {3, 0, 1, 2}, separable, 4, 4},
      {1, 24, 10, 13, kDown, {-1, 3, 2, -2}, arbitrary, 4, 4},
      {1, 8, 26, 9, kSame, {-2, 6, 5, -1}, product, 4, 4},
      {3, 5, 8, 9, kUp, {-3, 2, -2, -1}, product, 4, 4},
      {2, 3, 1, 1, kSame, {2, 3, 1, 2}, product, 4, 4},
      {1, 8, 1, 3, kUp, {9, 9, 8, 8}, product, 4, 4},
      {2, 12, 7, 10, kDown, {1, 1, 1, 1}, product, 4, 4, dense, 1},
      {2, 8, 9, 17, kSame, {1, 1, 1, 1}, product, 4, 4, dense, 1},
      {2, 8, 5, 6, kUp, {2, 1, 2, 1}, product, 4, 4, sliced},
      {2, 8, 6, 9, kSame, {2, 2, 2, 2}, product, 4, 4, expanded},
      {2, 8, 6, 9, kDown, {2, 1, 2, 2}, product, 4, 4, other_format},
      {2, 8, 70, 8, kSame, {1, 2, 1, 2}, product, 4, 4, dense, 0, 2},
      // Twelve.
      {1, 3, 7, 11, kUp, {-1, 3, 5, 2}, separable, 12, 12, sliced, 1},
      {1, 2, 23, 30, kDown, {-1, -1, 4, 0}, separable, 12, 12},
      {1, 8, 7, 9, kUp, {6, 5, 6, 5}, arbitrary, 12, 12},
      // Tiles.
      {1, 11, 9, 8, {2, 3, 1, 1}, {6, 5, 4, 6}, separable, 11, 11},
      {1, 16, 18, 16, kDown, {5, 5, 5, 5}, separable, 12, 12},
      {2, 2, 7, 5, {4, 4, 1, 1}, {9, 6, 8, 7}, separable, 16, 16},
      {1, 8, 13, 24, {1, 1, 4, 3}, {3, 4, 5, 2}, separable, 8, 8},
      {1, 3, 9, 8, {3, 2, 2, 3}, {-1, 4, 7, -2}, separable, 7, 7},
      {1, 1, 30, 40, kSame, {30, 30, 30, 30}, separable, 61, 61},
      {1, 8, 7, 8, kSame, {63, 63, 63, 63}, separable, 127, 127},
      {1, 8, 5, 8, kUp, {6, 5, 6, 5}, separable, 12, 12, expanded, 1},
      {2, 8, 5, 8, kSame, {2, 2, 3, 1}, separable, 5, 5, other_format},
      // Direct.
      {2, 3, 5, 4, {1, 2, 2, 1}, {0, 0, 0, 0}, none, 1, 1},
      {1, 8, 6, 8, {2, 3, 3, 1}, {4, 1, -2, 5}, arbitrary, 5, 2},
      {2, 5, 7, 6, {2, 1, 1, 2}, {2, 1, 1, 1}, product, 4, 4, sliced},
      {1, 2, 3, 4, kSame, {150, 150, 151, 149}, separable, 300, 300},
      {1, 2, 4, 3, {40, 1, 1, 40}, {3, 2, 80, 90}, separable, 9, 9},
      {1, 1, 3, 4, {4, 4, 1, 1}, {23, 23, 23, 23}, arbitrary, 47, 47},
      {1, 8, 4, 5, kSame, {-1, -2, -1, 0}, separable, 1, 1},
  };
  list.insert(list.end(), more.begin(), more.end());
  return list;
}

template <class D>
void run(const std::vector<Case>& list) {
  unsigned seed = 0;
  for (const Case& c : list) {
    for (bool last : {false, true}) {
      // One of the piecewise-linear and of the curved activations in turn.
      const int turn = static_cast<int>(++seed);
      Problem<D>(c, last, turn).forward(0, kInf, turn % 2, true);
      const double clamp = turn % 3 ? 3 : kInf;
      Problem<D>(c, last, turn + 1).forward(lrelu, clamp, turn % 4 < 2, turn % 5 == 0);
      Problem<D>(c, last, turn).forward(turn % 2 ? relu : linear, kInf, false, false);
      Problem<D>(c, last, turn).forward(tanh_ + turn % 6, 2.8123, turn % 2, false);
      Problem<D>(c, last, turn).masked(0.25, true, turn % 2, true);
      Problem<D>(c, last, turn + 1).masked(0, turn % 2, true, false);
    }
  }
}

// An image of more than 2^31 elements, of which only the last block runs, in both directions of
// adjacent kernels. What is not set is 0.
void run_far(int64_t c, int64_t h, int64_t w, bool last, bool separable, int taps) {
  using D = BFloat16;
  const int64_t n = c * h * w;
  Sparse<D::T> x(n), y(n);
  Sparse<uint8_t> mask(n / 4);
  Buffer<float> filter(separable ? taps : taps * taps, 0, 1);
  const int64_t stride_w = last ? c : 1, stride_h = w * stride_w, stride_c = last ? 1 : h * w;
  const int pad = taps / 2;
  const Upfirdn2d p = {D::dtype, 1, c, h, w, h, w, n, stride_c, stride_h, stride_w, last,
                       1, 1, 1, 1, pad, pad, filter.get(), taps, taps, separable, true, 1};
  const auto input = [&](int64_t column, int64_t row) {
    return column < w && row < h ? column % 3 + row % 5 : 0;
  };
  const int64_t depth = 2 * taps, from = w - 1 - taps;
  for (int64_t row = h - depth; row < h; ++row) {
    for (int64_t column = from - taps; column < w; ++column) {
      x[(c - 1) * stride_c + row * stride_h + column * stride_w] = D::round(input(column, row));
    }
  }
  cuda_on_cpu::wants_block = [](uint3 index) { return index.x == gridDim.x - 1; };
  const auto compare = [&](const char* what, double gain) {
    for (int64_t column = from; column < w; ++column) {
      double want = 0;
      for (int64_t k = 0; k < taps * taps; ++k) {
        want += input(column + k % taps - pad, h - 1 + k / taps - pad);
      }
      const double got = D::value(y[(c - 1) * stride_c + (h - 1) * stride_h + column * stride_w]);
      want = D::value(D::round(gain * want));
      if (got == want || ++failures > 20) continue;
      std::printf("%s: column %ld is %g, not %g: %ld x %ld x %ld taps %d\n", what, long(column),
                  got, want, long(c), long(h), long(w), taps);
    }
  };
  Epilogue e = {D::dtype, {1, c, h * w, h * w}, linear, 0, 1, kInf};
  if (last) e.geometry = {h * w, c, 1, h * w};
  cuda::upfirdn2d_forward(p, &e, x.get(), nullptr, y.get(), mask.get(), nullptr);
  compare("far y", 1);
  e.gain = 3;
  cuda::upfirdn2d_masked(p, e, 0.5, x.get(), nullptr, y.get(), nullptr, nullptr, nullptr);
  compare("far dx", 3);
}

void run_far() {
  run_far(64, 20008, 2000, true, true, 4);
  run_far(3, 32776, 32768, false, true, 4);
  run_far(64, 20000, 2008, true, true, 7);
  run_far(3, 32768, 32776, false, true, 7);
  run_far(5, 32768, 32776, false, false, 3);
}

template <class F>
void expect_error(const char* what, F&& f) {
  try {
    f();
  } catch (const std::invalid_argument&) {
    return;
  }
  ++failures;
  std::printf("no error: %s\n", what);
}

void run_errors() {
  alignas(2) uint8_t mask[8] = {};
  float x[16] = {};
  Upfirdn2d p = {DType::float32, 1, 2, 1, 8, 1, 8, 16, 8, 8, 1, false, 1, 1, 1, 1, 0, 0, nullptr, 1,
                 1, false, false, 1};
  Epilogue e = {DType::float32, {1, 2, 8, 8}, lrelu, 0.25, 1, kInf};
  const auto forward = [&](uint8_t* to) {
    cuda::upfirdn2d_forward(p, &e, x, nullptr, x, to, nullptr);
  };
  expect_error("mask at an odd address", [&] { forward(mask + 1); });
  e.act = 77;
  expect_error("activation", [&] { forward(nullptr); });
  e.act = lrelu;
  p.in_width = p.out_width = 4;
  expect_error("mask of half units", [&] { forward(mask); });
  expect_error("mask of half units", [&] {
    cuda::upfirdn2d_masked(p, e, 0.5, x, mask, x, nullptr, nullptr, nullptr);
  });
  p.dtype = e.dtype = DType::float64;
  expect_error("float64", [&] { forward(nullptr); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "far") {
    run_far();
  } else {
    run_errors();
    const std::vector<Case> list = cases(mode != "all");
    run<Float32>(list);
    if (mode != "float32") {
      run<Float16>(list);
      run<BFloat16>(list);
    }
  }
  std::printf("%zu kernels launched, %d failures\n", cuda_on_cpu::launched.size(), failures);
  return failures != 0;
}
