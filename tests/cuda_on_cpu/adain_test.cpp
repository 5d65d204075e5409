// Runs every CUDA kernel of adain on the CPU and compares it with a plain double-precision
// evaluation.
//
//     adain_test all|few float32|float16|bfloat16 ...
#include "adain.h"

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "testing.h"

using namespace stylegan_fast;

namespace {

int failures = 0;

struct Case {
  Geometry g;
  int noise = 0;  // 1: shared by the samples, 2: per sample
  bool per_channel = false;
  int shift = 0;  // elements off alignment
  int multiprocessors = 1;
};

double derivative(int act, double v) {
  const double t = std::tanh(v);
  return act == tanh_ ? 1 - t * t : v > 0 ? 1 : 0.25;
}

template <class D>
void run(const Case& c, int act) {
  using T = typename D::T;
  const Geometry& g = c.g;
  const int64_t n = g.numel(), sums = g.samples() * g.channels;
  const double gain = 1.5, clamp = 1.7, eps = 0.01;
  std::mt19937 random(1);
  const auto draw = [&] { return static_cast<int>(random() % 33) / 8.0 - 2.03; };

  Buffer<T> x(n, c.shift, T()), dy(n, c.shift, T());
  Buffer<T> y(n, c.shift, D::round(kNaN)), dx(n, c.shift, D::round(kNaN));
  for (int64_t i = 0; i < n; ++i) x[i] = D::round(draw()), dy[i] = D::round(draw());
  const auto numbers = [&](Buffer<float>& buffer) {
    for (int64_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<float>(draw());
  };
  Buffer<float> bias(g.channels, 1, 0), strength(c.per_channel ? g.channels : 1, 1, 0);
  Buffer<float> noise(c.noise == 2 ? g.samples() * g.pixels : g.pixels, c.shift, 0);
  Buffer<float> styles(2 * sums, 1, 0), statistics(2 * sums, 1, NAN), d_styles(2 * sums, 1, NAN);
  for (auto* buffer : {&bias, &strength, &noise, &styles}) numbers(*buffer);

  Adain p;
  p.epilogue = {D::dtype, g, act, 0.25, gain, clamp};
  p.epilogue.bias = bias.get();
  p.epilogue.strength = strength.get();
  if (c.noise) p.epilogue.noise = noise.get();
  p.epilogue.noise_per_sample = c.noise == 2;
  p.strength_per_channel = c.per_channel;
  p.styles = styles.get();
  cuda_on_cpu::multiprocessors = c.multiprocessors;
  const int parts = cuda::adain_parts(p);
  Buffer<float> workspace(4 * sums * parts, 0, NAN), partial(2 * sums * parts, 0, NAN);
  cuda::adain_forward(p, eps, x.get(), y.get(), statistics.get(), workspace.get(), nullptr);
  const int used = cuda::adain_backward(p, x.get(), dy.get(), statistics.get(), dx.get(),
                                        d_styles.get(), partial.get(), workspace.get(), nullptr);

  const auto expect = [&](const char* what, int64_t i, double got, double want, double error) {
    if (std::abs(got - want) <= error * (1 + std::abs(want))) return;
    if (++failures > 20) return;
    std::printf("%s[%ld] is %.9g, not %.9g: dtype %d act %d outer %ld channels %ld inner %ld\n",
                what, long(i), got, want, int(D::dtype), act, long(g.outer), long(g.channels),
                long(g.inner));
  };
  const double precise = kFloatError * std::sqrt(1.0 + g.pixels);
  const double rounded = precise + 2 * D::epsilon;
  for (int64_t s = 0; s < sums; ++s) {
    const int64_t sample = s / g.channels, channel = s % g.channels;
    const auto element = [&](int64_t q) {
      return g.inner == 1 ? (sample * g.pixels + q) * g.channels + channel : s * g.pixels + q;
    };
    const auto z = [&](int64_t q) {
      return c.noise ? double(noise[q + (c.noise == 2 ? sample * g.pixels : 0)]) : 0.0;
    };
    const double weight = strength[c.per_channel ? channel : 0];
    const auto v = [&](int64_t q) { return D::value(x[element(q)]) + weight * z(q) + bias[channel]; };
    const auto u = [&](int64_t q) {
      return std::min(std::max(gain * act_value(act, v(q), 0.25), -clamp), clamp);
    };
    double mean = 0, variance = 0, product = 0, total = 0, of_dx = 0, of_noise = 0;
    for (int64_t q = 0; q < g.pixels; ++q) mean += u(q) / g.pixels;
    for (int64_t q = 0; q < g.pixels; ++q) variance += (u(q) - mean) * (u(q) - mean) / g.pixels;
    const double rstd = 1 / std::sqrt(variance + eps);
    const double scale = 1.0 + styles[sample * 2 * g.channels + channel];
    const double shift = styles[(sample * 2 + 1) * g.channels + channel];
    for (int64_t q = 0; q < g.pixels; ++q) {
      const double d = D::value(dy[element(q)]);
      product += d * (u(q) - mean) * rstd;
      total += d;
      expect("y", element(q), D::value(y[element(q)]), scale * (u(q) - mean) * rstd + shift, rounded);
    }
    for (int64_t q = 0; q < g.pixels; ++q) {
      const double w = (u(q) - mean) * rstd, d = D::value(dy[element(q)]);
      const double du = scale * rstd * (d - total / g.pixels - w * product / g.pixels);
      const bool kept = std::abs(gain * act_value(act, v(q), 0.25)) <= clamp;
      const double dv = kept ? gain * derivative(act, v(q)) * du : 0;
      of_dx += dv;
      of_noise += dv * z(q);
      expect("dx", element(q), D::value(dx[element(q)]), dv, 10 * rounded);
    }
    const double summed = 10 * precise * std::sqrt(1.0 + g.pixels);
    expect("mean", s, statistics[s], mean, precise);
    expect("rstd", s, statistics[sums + s], rstd, precise);
    expect("d(scale)", s, d_styles[sample * 2 * g.channels + channel], product, summed);
    expect("d(shift)", s, d_styles[(sample * 2 + 1) * g.channels + channel], total, summed);
    double of_parts[2] = {};
    for (int64_t i = 0; i < used; ++i)
      for (int kind = 0; kind < 2; ++kind) of_parts[kind] += partial[(kind * sums + s) * used + i];
    expect("sum of dx", s, of_parts[0], of_dx, summed);
    expect("sum of dx * noise", s, of_parts[1], of_noise, summed);
  }
}

template <class D>
void run(const std::vector<Case>& cases) {
  for (const Case& c : cases)
    for (int act : {lrelu, tanh_}) run<D>(c, act);
}

}  // namespace

int main(int argc, char** argv) {
  // NCHW and NHWC, in packs and in single elements.
  std::vector<Case> cases = {
      {{2, 3, 64, 64}, 2, true},
      {{2, 5, 35, 35}, 1, false},
      {{2 * 21, 16, 1, 21}, 2, true},
      {{2 * 35, 5, 1, 35}, 1, true},
  };
  if (argc > 1 && std::string(argv[1]) == "all") {
    const std::vector<Case> more = {
        {{1, 2, 4608, 4608}, 1, true, 0, 64},          // parts, of which the last is smaller
        {{1, 1, 1021, 1021}, 0, false, 0, 64},
        {{3, 40, 1, 1}, 2, false},                     // one pixel
        {{1, 3, 64, 64}, 2, true, 1},                  // off alignment
        {{2 * 33, 16, 1, 33}, 0, false, 1, 64},
        {{600, 24, 1, 600}, 1, false, 0, 64},
        {{1, 300, 16, 16}, 2, false},
    };
    cases.insert(cases.end(), more.begin(), more.end());
  }
  for (int i = 2; i < argc; ++i) {
    const std::string dtype = argv[i];
    if (dtype == "float32") run<Float32>(cases);
    if (dtype == "float16") run<Float16>(cases);
    if (dtype == "bfloat16") run<BFloat16>(cases);
  }
  std::printf("%zu kernels launched, %d failures\n", cuda_on_cpu::launched.size(), failures);
  return failures != 0;
}
