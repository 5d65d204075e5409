// Runs filtered_lrelu of one SIMD level on buffers of exactly the size the contract names, under the
// sanitizers, and compares it with the definition, evaluated in double.
#include "driver.h"

namespace {

struct Case {
  int64_t samples, channels, in_height, in_width, out_height, out_width;
  int up, down;
  int64_t pad_x, pad_y;
  int up_x, up_y, down_x, down_y;  // taps
  char filters;                    // separable, full, none
};

// Signs in malloc'ed memory, too.
struct Bytes {
  explicit Bytes(int64_t count)
      : data(static_cast<uint8_t*>(std::malloc(std::max<int64_t>(1, count)))) {
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<uint8_t>(i * 37 + i / 5);
  }
  ~Bytes() { std::free(data); }
  Bytes(const Bytes&) = delete;

  uint8_t* data;
};

double tap(const FilteredLreluFilter& f, const Numbers& taps, bool correlate, int ky, int kx) {
  const int y = correlate ? ky : f.taps_y - 1 - ky, x = correlate ? kx : f.taps_x - 1 - kx;
  if (!f.taps) return 1;
  return f.separable ? taps.get(y) * taps.get(x) : taps.get(static_cast<int64_t>(y) * f.taps_x + x);
}

int64_t taps_of(char filters, int x, int y) {
  return filters == 's' ? x : static_cast<int64_t>(x) * y;
}

void run(const Case& c, DType dtype, bool channels_last, bool correlate, int threads) {
  Numbers fu(wide(dtype), taps_of(c.filters, c.up_x, c.up_y));
  Numbers fd(wide(dtype), taps_of(c.filters, c.down_x, c.down_y));
  Numbers x(dtype, c.samples * c.channels * c.in_height * c.in_width), bias(dtype, c.channels);
  Numbers y(dtype, c.samples * c.channels * c.out_height * c.out_width);
  fu.fill(3), fd.fill(4), x.fill(5), bias.fill(6);
  const int64_t height = (c.out_height - 1) * c.down + c.down_y;
  const int64_t width = (c.out_width - 1) * c.down + c.down_x;
  FilteredLrelu p{};
  p.dtype = dtype;
  p.samples = c.samples, p.channels = c.channels;
  p.in_height = c.in_height, p.in_width = c.in_width;
  p.out_height = c.out_height, p.out_width = c.out_width;
  p.sign_height = height, p.sign_width = width;
  p.channels_last = channels_last;
  p.up = c.up, p.down = c.down, p.pad_x = c.pad_x, p.pad_y = c.pad_y;
  const bool absent = c.filters == 'n', separable = c.filters == 's';
  p.fu = {absent ? nullptr : fu.data, c.up_x, c.up_y, separable};
  p.fd = {absent ? nullptr : fd.data, c.down_x, c.down_y, separable};
  p.correlate = correlate;
  p.gain = 1.25, p.slope = 0.25, p.clamp = 3;
  p.bias = bias.data;

  const auto index = [&](int64_t h, int64_t w, int64_t n, int64_t ch, int64_t row, int64_t column) {
    return channels_last ? ((n * h + row) * w + column) * c.channels + ch
                         : ((n * c.channels + ch) * h + row) * w + column;
  };
  const auto sum_of = [&](int64_t n, int64_t ch, int64_t Y, int64_t X, double& u, double& size) {
    u = size = 0;
    for (int ky = 0; ky < c.up_y; ++ky)
      for (int kx = 0; kx < c.up_x; ++kx) {
        const int64_t zy = Y + ky - c.pad_y, zx = X + kx - c.pad_x;
        if (zy < 0 || zx < 0 || zy % c.up || zx % c.up) continue;
        if (zy / c.up >= c.in_height || zx / c.up >= c.in_width) continue;
        const double sample = x.get(index(c.in_height, c.in_width, n, ch, zy / c.up, zx / c.up)) +
                              (p.bias ? bias.get(ch) : 0);
        const double term = p.gain * tap(p.fu, fu, correlate, ky, kx) * sample;
        u += term;
        size += std::fabs(term);
      }
  };
  // u, and the sum of the magnitudes of its terms.
  std::vector<double> all, sizes_of_all;
  const auto define = [&] {
    all.resize(c.samples * c.channels * height * width);
    sizes_of_all.resize(all.size());
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i), plane = at / width / height;
      sum_of(plane / c.channels, plane % c.channels, at / width % height, at % width, all[i],
             sizes_of_all[i]);
    }
  };
  const auto between = [&](int64_t n, int64_t ch, int64_t Y, int64_t X, double& u, double& size) {
    const int64_t at = ((n * c.channels + ch) * height + Y) * width + X;
    u = all[at];
    size = sizes_of_all[at];
  };
  const auto units = [&](int64_t n, int64_t ch, int64_t Y, int64_t X, int& bit) {
    const int64_t row = channels_last ? (n * p.sign_height + Y) * p.sign_width + X
                                      : (n * c.channels + ch) * p.sign_height + Y;
    const int64_t at = channels_last ? ch : X, length = channels_last ? c.channels : p.sign_width;
    bit = static_cast<int>(at % 8);
    return (row * ((length + 7) / 8) + at / 8) * 2;
  };
  // One plane between the filters after the other, then what the outputs see of it.
  const auto compare = [&](const char* what, const auto& value) {
    std::vector<double> v(height * width), sizes(height * width);
    for (int64_t n = 0; n < c.samples; ++n)
      for (int64_t ch = 0; ch < c.channels; ++ch) {
        for (int64_t Y = 0; Y < height; ++Y)
          for (int64_t X = 0; X < width; ++X)
            v[Y * width + X] = value(n, ch, Y, X, sizes[Y * width + X]);
        for (int64_t oy = 0; oy < c.out_height; ++oy)
          for (int64_t ox = 0; ox < c.out_width; ++ox) {
            double sum = 0, size = 0;
            for (int ky = 0; ky < c.down_y; ++ky)
              for (int kx = 0; kx < c.down_x; ++kx) {
                const int64_t at = (oy * c.down + ky) * width + ox * c.down + kx;
                const double weight = tap(p.fd, fd, correlate, ky, kx);
                sum += weight * v[at];
                size += std::fabs(weight) * (std::fabs(v[at]) + sizes[at]);
              }
            const int64_t i = index(c.out_height, c.out_width, n, ch, oy, ox);
            expect(what, i, y.get(i), sum,
                   rounding(wide(dtype)) * (size + 1) + rounding(dtype) * std::fabs(sum));
          }
      }
  };

  const auto forward = [&](int64_t n, int64_t ch, int64_t Y, int64_t X, double& size) {
    double u;
    between(n, ch, Y, X, u, size);
    const double leaky = u > 0 ? u : p.slope * u;
    return std::max(-p.clamp, std::min(p.clamp, leaky));
  };
  define();
  Bytes signs(signs_size(p));
  level::filtered_lrelu_forward(p, x.data, y.data, signs.data, threads);
  compare("y", forward);
  for (int64_t n = 0; n < c.samples; ++n)
    for (int64_t ch = 0; ch < c.channels; ++ch)
      for (int64_t Y = 0; Y < height; ++Y)
        for (int64_t X = 0; X < width; ++X) {
          // A gap between the taps is seen by no output.
          if (Y % c.down >= c.down_y || X % c.down >= c.down_x) continue;
          double u, size;
          between(n, ch, Y, X, u, size);
          const double leaky = std::fabs(u > 0 ? u : p.slope * u), edge = 1e-5 * (size + 1);
          int bit;
          const int64_t at = units(n, ch, Y, X, bit);
          // On an edge float32 may decide otherwise than double.
          if (std::fabs(u) > edge) expect("negative", at, signs.data[at] >> bit & 1, u <= 0, 0);
          if (std::fabs(leaky - p.clamp) > edge) {
            expect("clamped", at, signs.data[at + 1] >> bit & 1, leaky > p.clamp, 0);
          }
        }
  std::memset(y.data, 0xff, y.count * size_of(dtype));
  level::filtered_lrelu_forward(p, x.data, y.data, nullptr, threads);
  compare("y without signs", forward);

  p.bias = nullptr;
  define();
  const int64_t offsets[][2] = {{0, 0}, {2, 5}, {-3, -9}};
  for (const auto& offset : offsets) {
    p.sign_y = offset[0], p.sign_x = offset[1];
    p.sign_height = std::max<int64_t>(1, height - 1), p.sign_width = width + 3;
    Bytes read(signs_size(p));
    level::filtered_lrelu_masked(p, x.data, read.data, y.data, threads);
    compare("masked", [&](int64_t n, int64_t ch, int64_t Y, int64_t X, double& size) {
      double u;
      between(n, ch, Y, X, u, size);
      const int64_t row = Y + p.sign_y, column = X + p.sign_x;
      if (row < 0 || column < 0 || row >= p.sign_height || column >= p.sign_width) return 0.0;
      int bit;
      const int64_t at = units(n, ch, row, column, bit);
      if (read.data[at + 1] >> bit & 1) return 0.0;
      return read.data[at] >> bit & 1 ? p.slope * u : u;
    });
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      // Those of the networks: padded and cropped, phases of both parities, whole blocks and rests.
      {1, 18, 7, 11, 5, 9, 2, 2, 9, 8, 12, 12, 12, 12, 's'},
      {2, 5, 9, 30, 3, 22, 2, 2, -3, -4, 12, 12, 12, 12, 's'},
      {1, 3, 5, 9, 6, 13, 4, 2, 10, 11, 24, 24, 12, 12, 's'},
      {1, 17, 6, 8, 3, 5, 4, 2, -2, 5, 24, 24, 12, 12, 's'},
      {1, 17, 15, 17, 3, 4, 2, 4, 8, 7, 12, 12, 24, 24, 's'},
      {1, 2, 9, 25, 4, 8, 2, 4, 17, 20, 12, 12, 24, 24, 's'},
      {1, 1, 2, 3, 21, 20, 2, 2, 21, 22, 12, 12, 12, 12, 's'},
      {1, 1, 1, 140, 1, 135, 2, 2, 9, 9, 12, 12, 12, 12, 's'},
      // Any other.
      {1, 1, 1, 2060, 1, 2055, 2, 2, 1, 1, 2, 2, 2, 2, 's'},
      {1, 19, 6, 7, 5, 6, 2, 2, 5, 4, 11, 11, 7, 7, 's'},
      {1, 3, 5, 6, 4, 5, 3, 2, 2, -1, 5, 5, 4, 4, 's'},
      {1, 17, 4, 5, 3, 4, 4, 3, 1, 2, 1, 1, 2, 2, 's'},
      {1, 5, 9, 19, 3, 6, 1, 2, 3, 4, 3, 3, 12, 12, 's'},
      {1, 18, 5, 6, 4, 5, 2, 2, 7, 8, 5, 6, 7, 4, 'f'},
      {2, 3, 4, 21, 4, 21, 1, 1, 0, 0, 1, 1, 1, 1, 'n'},
      {1, 21, 3, 4, 2, 3, 2, 3, 1, -1, 1, 1, 1, 1, 'n'},
  };
  int number = 0;
  for (const Case& c : cases)
    for (int dtype = 0; dtype < 4; ++dtype)
      for (bool channels_last : {false, true}) {
        ++number;
        run(c, static_cast<DType>(dtype), channels_last, number % 3 == 0, 1 + number % 3);
      }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
