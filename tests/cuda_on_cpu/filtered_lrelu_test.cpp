// Runs every CUDA kernel of filtered_lrelu on the CPU and compares it with its definition in double
// precision. Inputs are small multiples of 1/4 and taps of 1/2, so all is exact and is compared
// exactly.
//
//     filtered_lrelu_test [all|far] float32|float16|bfloat16 ...
#include <array>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "filtered_lrelu.h"
#include "testing.h"

using namespace stylegan_fast;

namespace {

int failures = 0;

struct Taps {
  int x = 0, y = 0;  // no filter where x is 0, a separable one where y is
  bool none() const { return x == 0; }
  bool separable() const { return x > 0 && y == 0; }
  int width() const { return none() ? 1 : x; }
  int height() const { return none() ? 1 : separable() ? x : y; }
};

struct Case {
  int64_t n, c, h, w;
  int up, down;
  std::array<int, 4> padding;  // left, right, top, bottom
  Taps fu, fd;
  int shift = 0;  // of every buffer off 16-byte alignment, in elements
  int multiprocessors = 1;
};

class Filter {
 public:
  template <class Random>
  Filter(const Taps& taps, bool correlate, Random& random)
      : taps_(taps), correlate_(correlate),
        values_(taps.none() ? 0 : taps.separable() ? taps.x : taps.x * taps.y, 0, 0) {
    for (int64_t k = 0; k < values_.size(); ++k) values_[k] = (int(random() % 5) - 2) / 2.0f;
  }

  FilteredLreluFilter operand() {
    return {taps_.none() ? nullptr : values_.get(), taps_.width(), taps_.height(),
            taps_.separable()};
  }
  double tap(int ky, int kx) {
    const int y = correlate_ ? ky : taps_.height() - 1 - ky;
    const int x = correlate_ ? kx : taps_.width() - 1 - kx;
    if (taps_.none()) return 1;
    return taps_.separable() ? double(values_[x]) * values_[y] : values_[y * taps_.x + x];
  }

 private:
  Taps taps_;
  bool correlate_;
  Buffer<float> values_;
};

template <class D>
class Problem {
  using T = typename D::T;

 public:
  Problem(const Case& c, bool channels_last, unsigned seed)
      : c_(c), last_(channels_last), random_(seed), fu_(c.fu, seed % 2, random_),
        fd_(c.fd, seed % 2, random_) {
    height_ = c.h * c.up + c.padding[2] + c.padding[3] - c.fu.height() + 1;
    width_ = c.w * c.up + c.padding[0] + c.padding[1] - c.fu.width() + 1;
    p_ = {D::dtype, c.n, c.c, c.h, c.w, (height_ - c.fd.height()) / c.down + 1,
          (width_ - c.fd.width()) / c.down + 1, height_, width_, 0, 0, channels_last, c.up, c.down,
          c.padding[0], c.padding[2], fu_.operand(), fd_.operand(), seed % 2 == 1, 0.5, 0.25, kInf};
    cuda_on_cpu::multiprocessors = c.multiprocessors;
  }

  void forward(double clamp, bool with_bias, bool with_signs, bool with_nan) {
    p_.clamp = clamp;
    Buffer<T> x(c_.n * c_.c * c_.h * c_.w, c_.shift, T()), bias(c_.c, c_.shift, T());
    fill(x), fill(bias);
    if (with_nan) x[x.size() / 2] = D::round(kNaN);
    if (with_bias) p_.bias = bias.get();
    Buffer<T> y(outputs(), c_.shift, D::round(kNaN));
    Buffer<uint8_t> signs(with_signs ? signs_size(p_) : 0, 0, 0xcd);
    cuda::filtered_lrelu_forward(p_, x.get(), y.get(), with_signs ? signs.get() : nullptr, nullptr);
    const int64_t seen_y = (p_.out_height - 1) * c_.down + c_.fd.height();
    const int64_t seen_x = (p_.out_width - 1) * c_.down + c_.fd.width();
    compare(y, x, with_bias ? &bias : nullptr,
            [&](int64_t n, int64_t c, int64_t row, int64_t column, double u) {
              const double v = u > 0 || std::isnan(u) ? u : p_.slope * u;
              if (with_signs && row < seen_y && column < seen_x) {
                const int want = (u <= 0) | (clamp < kInf && !(std::abs(v) <= clamp)) << 1;
                check("sign", at(last_, n, c, row, column, height_, width_),
                      sign(signs, n, c, row, column), want);
              }
              return std::isnan(v) ? v : std::min(std::max(v, -clamp), clamp);
            });
  }

  // The signs are of an image that begins `before` it and ends `after` it.
  void masked(double slope, std::array<int, 4> around, bool with_infinity) {
    p_.slope = slope;
    p_.sign_x = around[0], p_.sign_y = around[2];
    p_.sign_width += around[0] + around[1], p_.sign_height += around[2] + around[3];
    Buffer<T> x(c_.n * c_.c * c_.h * c_.w, c_.shift, T()), y(outputs(), c_.shift, D::round(kNaN));
    fill(x);
    if (with_infinity) x[x.size() / 2] = D::round(kInf);
    Buffer<uint8_t> signs(signs_size(p_), 0, 0);
    for (int64_t i = 0; i < signs.size(); ++i) signs[i] = static_cast<uint8_t>(random_());
    cuda::filtered_lrelu_masked(p_, x.get(), signs.get(), y.get(), nullptr);
    compare(y, x, nullptr, [&](int64_t n, int64_t c, int64_t row, int64_t column, double u) {
      row += p_.sign_y, column += p_.sign_x;
      if (row < 0 || row >= p_.sign_height || column < 0 || column >= p_.sign_width) return 0.0;
      const int bits = sign(signs, n, c, row, column);
      return bits & 2 || (bits & 1 && slope == 0) ? 0 : bits & 1 ? slope * u : u;
    });
  }

 private:
  int64_t outputs() const { return c_.n * c_.c * p_.out_height * p_.out_width; }

  int64_t at(bool last, int64_t n, int64_t c, int64_t y, int64_t x, int64_t h, int64_t w) const {
    return last ? ((n * h + y) * w + x) * c_.c + c : ((n * c_.c + c) * h + y) * w + x;
  }

  int sign(Buffer<uint8_t>& signs, int64_t n, int64_t c, int64_t y, int64_t x) const {
    const int64_t row = last_ ? (n * p_.sign_height + y) * p_.sign_width + x
                              : (n * c_.c + c) * p_.sign_height + y;
    const int64_t units = ((last_ ? c_.c : p_.sign_width) + 7) / 8, place = last_ ? c : x;
    const int64_t byte = (row * units + place / 8) * 2;
    return (signs[byte] >> place % 8 & 1) | (signs[byte + 1] >> place % 8 & 1) << 1;
  }

  void fill(Buffer<T>& buffer) {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      buffer[i] = D::round((static_cast<int>(random_() % 9) - 4) / 4.0);
    }
  }

  template <class V>
  void compare(Buffer<T>& y, Buffer<T>& x, Buffer<T>* bias, V&& v) {
    std::vector<double> between(height_ * width_);
    for (int64_t n = 0; n < c_.n; ++n) {
      for (int64_t c = 0; c < c_.c; ++c) {
        const double add = bias ? D::value((*bias)[c]) : 0;
        for (int64_t row = 0; row < height_; ++row) {
          for (int64_t column = 0; column < width_; ++column) {
            between[row * width_ + column] = v(n, c, row, column, u(x, add, n, c, row, column));
          }
        }
        for (int64_t j = 0; j < p_.out_height; ++j) {
          for (int64_t i = 0; i < p_.out_width; ++i) {
            double sum = 0;
            for (int ky = 0; ky < c_.fd.height(); ++ky) {
              for (int kx = 0; kx < c_.fd.width(); ++kx) {
                sum += fd_.tap(ky, kx) *
                       between[(j * c_.down + ky) * width_ + i * c_.down + kx];
              }
            }
            const int64_t place = at(last_, n, c, j, i, p_.out_height, p_.out_width);
            check("y", place, D::value(y[place]), D::value(D::round(sum)));
          }
        }
      }
    }
  }

  double u(Buffer<T>& x, double bias, int64_t n, int64_t c, int64_t row, int64_t column) {
    double sum = 0;
    for (int ky = 0; ky < c_.fu.height(); ++ky) {
      const int64_t j = row + ky - p_.pad_y;
      if (j < 0 || j >= c_.h * c_.up || j % c_.up) continue;
      for (int kx = 0; kx < c_.fu.width(); ++kx) {
        const int64_t i = column + kx - p_.pad_x;
        if (i < 0 || i >= c_.w * c_.up || i % c_.up) continue;
        const int64_t place = at(last_, n, c, j / c_.up, i / c_.up, c_.h, c_.w);
        sum += fu_.tap(ky, kx) * (D::value(x[place]) + bias);
      }
    }
    return p_.gain * sum;
  }

  void check(const char* what, int64_t i, double got, double want) {
    if (got == want || (std::isnan(got) && std::isnan(want))) return;
    if (++failures > 20) return;
    std::printf("%s[%ld] is %.9g, not %.9g: dtype %d %s [%ld, %ld, %ld, %ld] up %d down %d "
                "padding %d %d %d %d taps %d x %d, %d x %d\n",
                what, long(i), got, want, int(D::dtype), last_ ? "NHWC" : "NCHW", long(c_.n),
                long(c_.c), long(c_.h), long(c_.w), c_.up, c_.down, c_.padding[0], c_.padding[1],
                c_.padding[2], c_.padding[3], c_.fu.width(), c_.fu.height(), c_.fd.width(),
                c_.fd.height());
  }

  const Case& c_;
  const bool last_;
  std::mt19937 random_;
  Filter fu_, fd_;
  FilteredLrelu p_;
  int64_t height_, width_;  // of u
};

std::vector<Case> cases(bool few) {
  std::vector<Case> list = {
      {2, 3, 5, 7, 2, 2, {3, 2, 1, 4}, {5}, {2, 3}},
      {1, 9, 4, 3, 4, 2, {9, 8, 7, 9}, {12}, {6}},
      {2, 2, 3, 8, 1, 1, {0, 0, 0, 0}, {}, {}},
      {1, 2, 8, 61, 2, 2, {9, 8, 9, 8}, {12}, {12}},  // strips, two abreast
      {1, 1, 19, 38, 4, 2, {-6, -9, -6, -9}, {24}, {12}},
      {1, 1, 10, 12, 2, 4, {40, 43, 40, 43}, {12}, {24}},
  };
  if (few) return list;
  const std::vector<Case> more = {
      {1, 3, 4, 5, 3, 1, {1, 1, 1, 1}, {3, 2}, {}},
      {1, 2, 9, 8, 1, 2, {-1, 2, 0, 3}, {}, {5}},
      {2, 2, 9, 70, 1, 1, {2, 1, 2, 2}, {4}, {3}},  // tiles
      {1, 2, 13, 12, 2, 2, {12, 11, 12, 11}, {12, 12}, {12}},
      {1, 1, 8, 9, 2, 2, {11, 10, 11, 10}, {12}, {12, 12}},
      {1, 2, 4, 4, 4, 3, {40, 38, 40, 39}, {32}, {32}},
      {1, 1, 3, 2, 1, 3, {31, 40, 33, 36}, {32, 31}, {32, 30}},
      {2, 3, 4, 5, 1, 1, {-1, 2, 3, -2}, {}, {}},
      {1, 16, 3, 5, 1, 1, {0, 0, 0, 0}, {}, {}, 1},
      {1, 16, 3, 16, 1, 1, {0, 0, 0, 0}, {}, {}},
      {2, 3, 6, 5, 2, 4, {33, 30, 31, 35}, {12}, {24}, 1},
      {2, 1, 78, 37, 2, 2, {-11, -12, -13, -8}, {12}, {12}, 1},  // two strips
      {1, 1, 8, 9, 2, 2, {10, 9, 9, 8}, {12}, {12}},
      {1, 1, 42, 41, 4, 2, {-2, -5, -6, -9}, {24}, {12}, 1},
      {1, 3, 68, 56, 2, 4, {40, 43, 38, 44}, {12}, {24}, 1},
  };
  list.insert(list.end(), more.begin(), more.end());
  return list;
}

template <class D>
void run(const std::vector<Case>& list) {
  unsigned seed = 0;
  for (const Case& c : list) {
    for (bool last : {false, true}) {
      const unsigned turn = ++seed;
      Problem<D>(c, last, turn).forward(turn % 3 ? 1.375 : kInf, true, true, turn % 2);
      Problem<D>(c, last, turn + 1).forward(turn % 3 ? kInf : 0.75, turn % 2, false, false);
      Problem<D>(c, last, turn).masked(0.25, {3, 2, 1, 4}, turn % 2);
      Problem<D>(c, last, turn + 1).masked(turn % 2 ? 0 : 0.5, {-2, 0, -1, -1}, turn % 2 == 0);
    }
  }
}

// All that the backend says it takes has room in shared memory.
template <class D>
void run_largest() {
  cuda_on_cpu::wants_block = [](uint3) { return false; };
  typename D::T x[16] = {};
  float taps[32 * 32] = {};
  for (int kind = 0; kind < 4; ++kind) {
    for (int factors = 0; factors < 16; ++factors) {
      const FilteredLreluFilter fu = {taps, 32, 32, kind % 2 == 0}, fd = {taps, 32, 32, kind < 2};
      cuda::filtered_lrelu_forward({D::dtype, 1, 1, 2, 2, 300, 300, 400, 400, 0, 0, false,
                                    1 + factors % 4, 1 + factors / 4, 40, 40, fu, fd, false, 1, 1,
                                    kInf},
                                   x, x, nullptr, nullptr);
    }
  }
  cuda_on_cpu::wants_block = nullptr;
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

template <class D>
void run_errors() {
  alignas(2) uint8_t signs[64] = {};
  typename D::T x[16] = {};
  float taps[64 * 64] = {};
  FilteredLrelu p = {D::dtype, 1, 1, 2, 4, 2, 4, 2, 4, 0, 0, false, 1, 1, 0, 0, {}, {}, false,
                     1, 0.25, kInf};
  p.fu = p.fd = {nullptr, 1, 1, false};
  const auto forward = [&](uint8_t* to) {
    cuda::filtered_lrelu_forward(p, x, x, to, nullptr);
  };
  expect_error("signs at an odd address", [&] { forward(signs + 1); });
  expect_error("signs at an odd address", [&] {
    cuda::filtered_lrelu_masked(p, x, signs + 1, x, nullptr);
  });
  p.fu = p.fd = {taps, 64, 64, false};
  expect_error("large filters", [&] { forward(nullptr); });
  p.dtype = DType::float64;
  expect_error("float64", [&] { forward(nullptr); });
}

// An image of more than 2^31 elements, of which only the last block runs, forward and back through
// the signs that it kept. Inputs are negative at the end of the last channel and 0 elsewhere.
template <class D>
void run_far(int64_t c, int64_t h, int64_t w, bool last, int up, int down, int pad) {
  const int taps_u = up > 1 ? 6 * up : 1, taps_d = down > 1 ? 6 * down : 1;
  const int64_t height = h * up + 2 * pad - taps_u + 1, width = w * up + 2 * pad - taps_u + 1;
  const int64_t rows = (height - taps_d) / down + 1, columns = (width - taps_d) / down + 1;
  Buffer<float> taps(24, 0, 1);
  const FilteredLrelu p = {D::dtype, 1, c, h, w, rows, columns, height, width, 0, 0, last, up, down,
                           pad, pad, {up > 1 ? taps.get() : nullptr, taps_u, taps_u, true},
                           {down > 1 ? taps.get() : nullptr, taps_d, taps_d, true}, true, 1, 0.25,
                           kInf};
  Sparse<typename D::T> x(c * h * w), y(c * rows * columns);
  Sparse<uint8_t> signs(signs_size(p));
  const auto at = [&](int64_t row, int64_t column, int64_t h, int64_t w) {
    return last ? (row * w + column) * c + c - 1 : ((c - 1) * h + row) * w + column;
  };
  const auto input = [&](int64_t row, int64_t column) {
    const bool exists = row >= h - 24 && row < h && column >= w - 24 && column < w;
    return exists ? -1 - row % 5 - column % 3 : 0;
  };
  for (int64_t row = h - 24; row < h; ++row) {
    for (int64_t column = w - 24; column < w; ++column) {
      x[at(row, column, h, w)] = D::round(input(row, column));
    }
  }
  // Of everything along an axis, which filters of ones are.
  const auto reads = [&](int64_t out, int64_t in, auto&& f) {
    for (int k = 0; k < taps_d; ++k) {
      for (int tap = 0; tap < taps_u; ++tap) {
        const int64_t place = out * down + k + tap - pad;
        if (place >= 0 && place % up == 0 && place / up < in) f(place / up);
      }
    }
  };
  const auto compare = [&](const char* what) {
    const int64_t row = rows - 1;
    for (int64_t column = columns - 3; column < columns; ++column) {
      double want = 0;
      reads(row, h, [&](int64_t j) {
        reads(column, w, [&](int64_t i) { want += 0.25 * input(j, i); });
      });
      const double got = D::value(y[at(row, column, rows, columns)]);
      want = D::value(D::round(want));
      if (got == want || ++failures > 20) continue;
      std::printf("%s: column %ld is %g, not %g: %ld x %ld x %ld up %d pad %d\n", what,
                  long(column), got, want, long(c), long(h), long(w), up, pad);
    }
  };
  cuda_on_cpu::multiprocessors = 1 << 20;
  cuda_on_cpu::wants_block = [](uint3 index) { return index.x == gridDim.x - 1; };
  cuda::filtered_lrelu_forward(p, x.get(), y.get(), signs.get(), nullptr);
  compare("far y");
  y[at(rows - 1, columns - 1, rows, columns)] = D::round(0);
  cuda::filtered_lrelu_masked(p, x.get(), signs.get(), y.get(), nullptr);
  compare("far dx");
}

template <class D>
void run_far() {
  run_far<D>(3, 27008, 27016, false, 2, 2, 9);
  run_far<D>(64, 5808, 5800, true, 2, 2, 9);
  run_far<D>(3, 27008, 27016, false, 2, 2, 8);
  run_far<D>(64, 5808, 5800, true, 2, 2, 8);
  run_far<D>(3, 27008, 27016, false, 1, 1, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const std::vector<Case> list = cases(mode != "all");
  const auto run_dtype = [&](auto dtype) {
    using D = decltype(dtype);
    if (mode == "far") return run_far<D>();
    run_errors<D>();
    run_largest<D>();
    run<D>(list);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string dtype = argv[i];
    if (dtype == "float32") run_dtype(Float32());
    if (dtype == "float16") run_dtype(Float16());
    if (dtype == "bfloat16") run_dtype(BFloat16());
  }
  std::printf("%zu kernels launched, %d failures\n", cuda_on_cpu::launched.size(), failures);
  return failures != 0;
}
