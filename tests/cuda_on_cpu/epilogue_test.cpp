// Runs every CUDA kernel of the epilogue on the CPU and compares it with a plain double-precision
// evaluation. Inputs are small multiples of 1/8, so piecewise-linear results, ties at 0 and at the
// clamp included, are exact and are compared exactly.
//
//     epilogue_test all|few|far
#include <cstdio>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "epilogue.h"
#include "testing.h"

using namespace stylegan_fast;

namespace {

int failures = 0;

double act_derivative(int act, int order, double v) {
  const double s = 1 / (1 + std::exp(-v)), t = std::tanh(v), e = std::exp(v);
  const double selu_scale = 1.0507009873554805 * 1.6732632423543773;
  const bool first = order == 1;
  switch (act) {
    case tanh_: return first ? 1 - t * t : -2 * t * (1 - t * t);
    case sigmoid: return first ? s * (1 - s) : s * (1 - s) * (1 - 2 * s);
    case elu: return first ? (v > 0 ? 1 : e) : (v < 0 ? e : 0);
    case selu:
      if (first && v > 0) return 1.0507009873554805;
      return first || v < 0 ? selu_scale * e : 0;
    case softplus: return v > 20 ? (first ? 1 : 0) : (first ? s : s * (1 - s));
    case swish: return first ? s + v * s * (1 - s) : s * (1 - s) * (2 + v * (1 - 2 * s));
  }
  std::abort();
}

enum Unaligned { kX = 1, kDy = 2, kH = 4, kOut = 8, kMask = 16, kPerSample = 32 };

struct Case {
  Geometry g;
  bool bias = true, scale = false;
  int noise = 0;  // 1: shared by the samples, 2: per sample
  int unaligned = 0;  // bits of Unaligned
  int multiprocessors = 1;
  bool specials = false;  // NaN and infinities among the inputs; then no sums

  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line,
                  "outer %ld channels %ld inner %ld pixels %ld%s%s noise %d unaligned %d%s",
                  long(g.outer), long(g.channels), long(g.inner), long(g.pixels),
                  bias ? " bias" : "",
                  scale ? " scale" : "", noise, unaligned, specials ? " specials" : "");
    return line;
  }
};

template <class D>
class Problem {
  using T = typename D::T;

 public:
  Problem(const Case& c, int act, double clamp, unsigned seed)
      : c_(c), n_(c.g.numel()), random_(seed), x_(n_, shift(kX), T()), dy_(n_, shift(kDy), T()),
        h_(n_, shift(kH), T()), bias_(c.g.channels, 1, T()),
        scale_(n_ ? c.g.samples() * c.g.channels : 0, shift(kPerSample), 0),
        noise_(noise_size(c), shift(kPerSample), 0),
        strength_(1, 0, 0.5f) {
    // At infinity the derivative of a curved activation is whatever its formula gives.
    const double specials[] = {kNaN, -0.0, kInf, -kInf};
    const int kinds = is_exact(act) ? 4 : 2;
    for (auto* buffer : {&x_, &dy_, &h_}) {
      for (int64_t i = 0; i < n_; ++i) (*buffer)[i] = D::round(draw(24));
      for (int64_t i = 0; c.specials && i < n_; i += 3)
        (*buffer)[i] = D::round(specials[random_() % kinds]);
    }
    for (int64_t i = 0; i < bias_.size(); ++i) bias_[i] = D::round(draw(16));
    for (int64_t i = 0; i < scale_.size(); ++i) scale_[i] = draw(16);
    for (int64_t i = 0; i < noise_.size(); ++i) noise_[i] = draw(16);
    e_ = {D::dtype, c.g, act, 0.25, 1.5, clamp};
    if (c.bias) e_.bias = bias_.get();
    if (c.scale) e_.scale = scale_.get();
    if (c.noise) e_.noise = noise_.get(), e_.strength = strength_.get();
    e_.noise_per_sample = c.noise == 2;
    cuda_on_cpu::multiprocessors = c.multiprocessors;
  }

  void forward(bool with_mask) {
    Buffer<T> y(n_, shift(kOut), D::round(kNaN));
    Buffer<uint8_t> mask(with_mask ? mask_size() : 0, shift(kMask) % 2, 0xcd);
    cuda::epilogue_forward(e_, x_.get(), y.get(), with_mask ? mask.get() : nullptr, nullptr);
    for (int64_t i = 0; i < n_; ++i) {
      const double v = affine(i), z = e_.gain * act_value(e_.act, v, e_.alpha);
      const double want = std::isnan(z) ? z : std::min(std::max(z, -e_.clamp), e_.clamp);
      expect("forward", i, D::value(y[i]), want);
      if (!with_mask) continue;
      const int bits = (mask[i / 8 * 2] >> i % 8 & 1) | (mask[i / 8 * 2 + 1] >> i % 8 & 1) << 1;
      const bool clamped = e_.clamp < kInf && !(std::abs(z) <= e_.clamp);
      const int want_bits = (v <= 0) | clamped << 1;
      if (is_exact() || std::abs(std::abs(z) - e_.clamp) > 1e-4) check("mask", i, bits, want_bits);
    }
    for (int64_t i = n_; with_mask && i < mask_size() * 4; ++i)
      check("mask tail", i, (mask[i / 8 * 2] | mask[i / 8 * 2 + 1]) >> i % 8 & 1, 0);
  }

  void masked(double negative_slope, bool with_mask, bool with_sum) {
    Buffer<uint8_t> mask(with_mask ? mask_size() : 0, shift(kMask) % 2, 0);
    for (int64_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<uint8_t>(random_());
    backward("masked", with_sum, [&](T* dx, float* sum, float* workspace) {
      cuda::epilogue_masked(e_, negative_slope, dy_.get(), with_mask ? mask.get() : nullptr, dx,
                            sum, workspace, nullptr);
    }, [&](int64_t i) {
      const bool negative = with_mask && mask[i / 8 * 2] >> i % 8 & 1;
      const bool clamped = with_mask && mask[i / 8 * 2 + 1] >> i % 8 & 1;
      const double factor = clamped ? 0 : e_.gain * (negative ? negative_slope : 1);
      return factor == 0 ? 0 : factor * D::value(dy_[i]);
    });
  }

  void curved(int order, bool with_sum) {
    backward("curved", with_sum, [&](T* dx, float* sum, float* workspace) {
      cuda::epilogue_curved(e_, order, x_.get(), dy_.get(), order == 2 ? h_.get() : nullptr, dx,
                            sum, workspace, nullptr);
    }, [&](int64_t i) {
      const double v = affine(i), z = e_.gain * act_value(e_.act, v, e_.alpha);
      check("tie", i, std::abs(std::abs(z) - e_.clamp) < 1e-4, 0);
      if (std::abs(z) > e_.clamp) return 0.0;
      const double cotangent = D::value(dy_[i]) * (order == 2 ? D::value(h_[i]) : 1);
      return cotangent * e_.gain * act_derivative(e_.act, order, v);
    });
  }

  // With the moments' rows that are not asked for left alone; x is the output y.
  void moments(double negative_slope, bool with_mask, bool with_y, bool with_dx, bool in_place) {
    if (c_.g.inner > 1 && c_.g.inner != c_.g.pixels) return;  // NCHW and NHWC only
    Buffer<uint8_t> mask(with_mask ? mask_size() : 0, shift(kMask) % 2, 0);
    for (int64_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<uint8_t>(random_());
    const int64_t count = n_ ? c_.g.samples() * c_.g.channels : 0;
    Buffer<T> separate(with_dx ? n_ : 0, shift(kOut), D::round(kNaN));
    Buffer<float> moments(3 * count, 0, kNaN);
    Buffer<float> workspace(cuda::epilogue_moments_workspace(e_), 0, kNaN);
    std::vector<double> want(3 * count), want_dx(n_);
    for (int64_t i = 0; i < n_; ++i) {
      const bool negative = with_mask && mask[i / 8 * 2] >> i % 8 & 1;
      const bool clamped = with_mask && mask[i / 8 * 2 + 1] >> i % 8 & 1;
      const double factor = clamped ? 0 : e_.gain * (negative ? negative_slope : 1);
      const double dy = D::value(dy_[i]), d = factor == 0 ? 0 : factor * dy;
      const int64_t at = pixel(i) / c_.g.pixels * c_.g.channels + channel(i);
      want_dx[i] = d * scale(i);
      want[at] += d;
      want[count + at] += factor == 0 ? 0 : dy * D::value(x_[i]);
      if (c_.noise) want[2 * count + at] += d * noise_[c_.noise == 2 ? pixel(i) : pixel(i) % c_.g.pixels];
    }
    for (int64_t at = 0; at < count; ++at) {
      if (!with_y) want[count + at] = kNaN;
      if (!c_.noise) want[2 * count + at] = kNaN;
    }
    T* const dx = in_place ? dy_.get() : with_dx ? separate.get() : nullptr;
    cuda::epilogue_backward(e_, negative_slope, dy_.get(), with_y ? x_.get() : nullptr,
                            with_mask ? mask.get() : nullptr, dx, moments.get(), workspace.get(),
                            nullptr);
    for (int64_t i = 0; dx && i < n_; ++i) expect("backward", i, D::value(dx[i]), want_dx[i]);
    for (int64_t i = 0; i < 3 * count; ++i) check("moment", i, moments[i], want[i]);
  }

 private:
  static int64_t noise_size(const Case& c) {
    return c.noise == 0 || c.g.numel() == 0 ? 0 : c.g.pixels * (c.noise == 2 ? c.g.samples() : 1);
  }
  int64_t mask_size() const { return 2 * ((n_ + 7) / 8); }
  int shift(Unaligned buffer) const { return c_.unaligned & buffer ? 3 : 0; }
  static bool is_exact(int act) { return act <= lrelu; }
  bool is_exact() const { return is_exact(e_.act); }

  double draw(int limit) { return (static_cast<int>(random_() % (2 * limit + 1)) - limit) / 8.0; }

  int64_t channel(int64_t i) const { return i / c_.g.inner % c_.g.channels; }
  int64_t pixel(int64_t i) const {
    return i / (c_.g.inner * c_.g.channels) * c_.g.inner + i % c_.g.inner;
  }
  double scale(int64_t i) {
    return c_.scale ? scale_[pixel(i) / c_.g.pixels * c_.g.channels + channel(i)] : 1;
  }
  double affine(int64_t i) {
    double v = D::value(x_[i]) * scale(i);
    if (c_.noise) v += 0.5 * noise_[c_.noise == 2 ? pixel(i) : pixel(i) % c_.g.pixels];
    return c_.bias ? v + D::value(bias_[channel(i)]) : v;
  }

  template <class Run, class Derivative>
  void backward(const char* what, bool with_sum, Run&& run, Derivative&& derivative) {
    Buffer<T> dx(n_, shift(kOut), D::round(kNaN));
    Buffer<float> sum(with_sum ? c_.g.channels : 0, 0, kNaN);
    Buffer<float> workspace(with_sum ? cuda::epilogue_workspace(e_) : 0, 0, kNaN);
    run(dx.get(), with_sum ? sum.get() : nullptr, with_sum ? workspace.get() : nullptr);
    std::vector<double> want(c_.g.channels), tolerance(c_.g.channels);
    for (int64_t i = 0; i < n_; ++i) {
      const double d = derivative(i);
      want[channel(i)] += d;
      if (!is_exact()) tolerance[channel(i)] += kFloatError * (1 + std::abs(d));
      expect(what, i, D::value(dx[i]), d * scale(i));
    }
    for (int64_t c = 0; c < sum.size(); ++c) check("sum", c, sum[c], want[c], tolerance[c]);
  }

  void expect(const char* what, int64_t i, double got, double want) {
    const double rounded = D::value(D::round(want));
    if (is_exact() || !std::isfinite(want)) return check(what, i, got, rounded);
    check(what, i, got, want, kFloatError + (kFloatError + D::epsilon) * std::abs(want));
  }

  void check(const char* what, int64_t i, double got, double want, double tolerance = 0) {
    if (got == want || (std::isnan(got) && std::isnan(want))) return;
    if (std::abs(got - want) <= tolerance) return;
    if (++failures <= 20)
      std::printf("%s[%ld] is %.9g, not %.9g: dtype %d act %d clamp %g, %s\n", what, long(i), got,
                  want, int(D::dtype), e_.act, e_.clamp, c_.text().c_str());
  }

  const Case& c_;
  const int64_t n_;
  std::mt19937 random_;
  Buffer<T> x_, dy_, h_, bias_;
  Buffer<float> scale_, noise_, strength_;
  Epilogue e_;
};

std::vector<Case> cases(bool few) {
  std::vector<Case> list;
  const auto add = [&](Geometry g, int multiprocessors = 1) {
    list.push_back({g, true, false, 0, 0, multiprocessors});
    list.push_back({g, true, true, 2, 0, multiprocessors});
    list.push_back({g, false, true, 1, kX | kDy | kH | kOut | kMask | kPerSample, multiprocessors});
    if (g.numel() < 100) return;
    list.push_back({g, false, false, 1, 0, multiprocessors});
    list.push_back({g, false, false, 0, 0, multiprocessors});
    list.push_back({g, true, true, 0, 0, multiprocessors, true});
  };
  add({3, 5, 16, 16});         // planes: several to a block
  add({2, 3, 2472, 2472}, 2);  // planes larger than a block, not a multiple of it
  add({26, 24, 1, 13}, 3);     // columns
  add({40, 3, 1, 20});         // columns, ragged
  add({2, 3, 7, 7});           // planes that cut packs
  if (few) return list;
  for (Geometry g : {Geometry{3, 5, 16, 16}, Geometry{26, 24, 1, 13}, Geometry{40, 3, 1, 20}}) {
    for (int buffer : {kX, kDy, kH, kOut, kMask}) list.push_back({g, true, false, 0, buffer});
    list.push_back({g, true, true, 1, kPerSample});
  }
  add({7, 2, 2056, 2056});
  add({5, 1, 72, 72});
  add({6, 4, 8, 24});    // the pixels of a sample are not a plane
  add({6, 3, 5, 15});
  add({3, 2056, 1, 3});  // more channels than a block takes
  add({9, 259, 1, 3});
  add({2100, 8, 1, 700}, 2);
  add({1003, 1, 1, 59});
  add({11, 13, 1, 11});
  add({2, 2, 2049, 2049}, 2);
  add({3, 300, 3, 3});
  for (int64_t size : {1, 7, 8, 9, 17}) add({1, 1, size, size}), add({1, size, 1, 1});
  add({0, 5, 1, 1});
  // More slices than sum_kernel has rows of threads.
  list.push_back({{34, 1, 1032, 1032}, true, false, 0, 0, 3});
  return list;
}

template <class D>
void run(const std::vector<Case>& list) {
  unsigned seed = 0;
  for (const Case& c : list) {
    const auto problem = [&](int act, double clamp) { return Problem<D>(c, act, clamp, ++seed); };
    // lrelu, and one of the other piecewise-linear and of the curved activations in turn.
    const int turn = static_cast<int>(&c - list.data()) + static_cast<int>(D::dtype);
    const int others[] = {turn % 2 ? linear : relu, tanh_ + turn % 6};
    // 3 is a tie of gain * act(v) for some v; no curved activation comes near its clamp's.
    problem(lrelu, 3).forward(true);
    problem(lrelu, kInf).forward(true);
    problem(lrelu, kInf).forward(false);
    problem(lrelu, 3).masked(0.25, true, !c.specials);
    problem(lrelu, 3).masked(0.25, true, false);
    problem(others[0], 3).forward(true);
    problem(others[0], 3).masked(others[0] == linear, true, false);
    problem(linear, kInf).masked(1, false, !c.specials);
    if (!c.specials) {
      problem(lrelu, 3).moments(0.25, true, true, true, false);
      problem(lrelu, 3).moments(0, true, false, false, false);
      problem(linear, kInf).moments(1, false, true, true, true);
    }
    const double clamp = others[1] == tanh_ ? 1.2123 : 2.8123;
    problem(others[1], clamp).forward(true);
    for (int order = 1; order <= 2; ++order) {
      problem(others[1], clamp).curved(order, order == 1 && !c.specials);
      problem(others[1], kInf).curved(order, order == 2 && !c.specials);
    }
  }
}

// A tensor of more than 2^31 elements, or even packs, of which only the last column of blocks runs:
// it covers the last `tail` elements of each sample.
template <class D>
void run_far(Geometry g, int64_t tail, int64_t block, bool with_masked, int multiprocessors = 1) {
  using T = typename D::T;
  const int64_t n = g.numel(), sample = n / g.outer, samples = with_masked ? g.outer : 1;
  Sparse<T> x(n), y(n), bias(g.channels);
  Sparse<uint8_t> mask((n + 7) / 8 * 2);
  Sparse<float> sum(g.channels);
  const auto element = [&](int64_t k) { return n - 1 - k / tail * sample - k % tail; };
  const auto channel = [&](int64_t i) { return i / g.inner % g.channels; };
  const auto input = [](int64_t i) { return i % 23 - 11; };
  const auto affine = [&](int64_t i) { return input(i) + channel(i) % 5 - 2; };
  for (int64_t k = 0; k < samples * tail; ++k) {
    const int64_t i = element(k);
    x[i] = D::round(input(i));
    bias[channel(i)] = D::round(channel(i) % 5 - 2);
    y[i] = D::round(kNaN);
  }
  Epilogue e = {D::dtype, g, lrelu, 0.25, 1.5, 6};
  e.bias = bias.get();
  cuda_on_cpu::multiprocessors = multiprocessors;
  cuda_on_cpu::wants_block = [=](uint3 index) { return index.x == block; };
  const auto check = [&](const char* what, int64_t i, double got, double want) {
    if (got == want || ++failures > 20) return;
    std::printf("%s[%ld] is %g, not %g: dtype %d outer %ld channels %ld inner %ld\n", what, long(i),
                got, want, int(D::dtype), long(g.outer), long(g.channels), long(g.inner));
  };
  const auto slope = [](double v) { return v > 0 ? 1.5 : 0.375; };
  const auto is_clamped = [&](double v) { return std::abs(slope(v) * v) > 6; };

  cuda::epilogue_forward(e, x.get(), y.get(), mask.get(), nullptr);
  for (int64_t k = 0; k < samples * tail; ++k) {
    const int64_t i = element(k);
    const double v = affine(i);
    check("far y", i, D::value(y[i]), std::min(slope(v) * v, 6.0));
    check("far mask", i, mask[i / 8 * 2] >> i % 8 & 1, v <= 0);
    check("far mask", i, mask[i / 8 * 2 + 1] >> i % 8 & 1, is_clamped(v));
  }
  if (!with_masked) return;
  cuda::epilogue_masked(e, 0.25, x.get(), mask.get(), y.get(), sum.get(), nullptr, nullptr);
  std::map<int64_t, double> want_sum;
  for (int64_t k = 0; k < samples * tail; ++k) {
    const int64_t i = element(k);
    const double v = affine(i), d = is_clamped(v) ? 0 : slope(v) * input(i);
    check("far dx", i, D::value(y[i]), D::value(D::round(d)));
    want_sum[channel(i)] += d;
  }
  for (const auto& [c, want] : want_sum) check("far sum", c, sum[c], want);
}

void run_far() {
  constexpr int64_t M = 1 << 20;
  run_far<Float16>({17, 1024 * M, 1, 17}, 2048, 512 * 1024 - 1, true);       // columns
  run_far<Float32>({3, 1024 * M, 1, 3}, 1024, 1024 * 1024 - 1, true);
  run_far<Float16>({9, M + 1, 2048, 2048}, 2048, M, true);                 // planes
  run_far<Float32>({2, M / 2, 4104, 4104}, 4104, M / 2 - 1, true);
  // One row, or units: a block is 2048 elements wherever they are.
  run_far<BFloat16>({3, 1024 * M + 301, 1, 3}, 903, 3 * M / 2, false);
  run_far<BFloat16>({1, 3, 1024 * M + 341, 1024 * M + 341}, 1023, 3 * M / 2, false, 64 * M);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (mode == "far") {
    run_far();
  } else {
    const std::vector<Case> list = cases(mode == "few");
    run<Float32>(list);
    run<Float16>(list);
    run<BFloat16>(list);
  }
  std::printf("%zu kernels launched, %d failures\n", cuda_on_cpu::launched.size(), failures);
  return failures != 0;
}
