// CPU kernels of csrc/conv2d.h for 3x3 taps, compiled once per SIMD level: Winograd's algorithm.
//
// A tile is some pixels of output and the pixels of input that they see. With transforms B, G, A
//
//     V[k,i,t] = B(pre * x)   U[k,o,i] = G(w)   M[k,o,t] = sum over i of U V   y = E(A(M)) + add
//
// for a number of products k that is less than that of taps times pixels. A transform is one along
// each axis, of which there are three: `Same`, `Up` and `Down`.
//
// Where the output is NCHW vectors run along tiles, U is the left operand of the products, its rows
// are output channels. Where it is NHWC they run along channels, V is the left operand, its rows
// are tiles. Vectors of a left operand run along the sum.

#include "../conv2d.h"

#include "epilogue_row.h"
#include "levels.h"
#include "pages.h"
#include "stream.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

#define STYLEGAN_FAST_INLINE __attribute__((always_inline))

constexpr int kTaps = 3, kWeightPoints = 6, kWeights = kWeightPoints * kWeightPoints;
constexpr int kTile = 4;  // of what the gradient of a weight is a sum over
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;  // of sums in registers, of which there are 32
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;                     // of such a row
constexpr int64_t kBlockTiles = 48;             // tiles transformed together
constexpr int64_t kBlockSums = 64;              // output channels
constexpr int64_t kSharedWeights = 3 << 20;     // numbers of U that are kept
constexpr int64_t kSharedTiles = 5 << 20;       // numbers of V that threads share
constexpr int64_t kTeamSums = 1 << 14;          // pairs of channels
constexpr int64_t kTeamBlock = 96, kGradientBlock = 256;  // tiles
constexpr int64_t kGradientRows = 32;           // output channels
constexpr int64_t kChannelsAhead = 2;           // fetched early
constexpr int64_t kWorkPerThread = 1 << 20;     // multiplications

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b > 0); }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }
constexpr int64_t clip(int64_t a, int64_t low, int64_t high) {
  return a < low ? low : a > high ? high : a;
}

// Not Float(double), which adds the number to zeros.
inline Float broadcast(float a) { return a - Float::Native{}; }

// The algorithms along one axis. `out` numbers of output see `seen` of input, those of the next
// tile begin `in` further on. Products from the last point of the weight on share it.

// F(4,3): a stride of 1. For the points 0, 1, -1, 1/2, -2 and infinity, whose error is a third of
// that of the usual 0, 1, -1, 2, -2 and infinity.
struct Same {
  static constexpr int in = 4, out = 4, seen = 6, points = 6;

  struct Input {
    STYLEGAN_FAST_INLINE void operator()(const Float* d, Float* v) const {
      const Float c(1.5), a = d[3] - d[1], b = d[4] - d[2];
      v[0] = (d[0] - d[2]) + b + c * a;
      v[1] = (a + b) + c * (d[2] + d[3]);
      v[2] = (b - a) + c * (d[3] - d[2]);
      v[3] = b + Float(2.0) * a;
      v[4] = b - Float(0.5) * a;
      v[5] = (d[5] - d[3]) - a + c * b;
    }
  };

  struct Weight {
    STYLEGAN_FAST_INLINE void operator()(const Float* g, Float* u) const {
      const Float even = g[0] + g[2];
      u[0] = g[0];
      u[1] = Float(1.0 / 3) * (even + g[1]);
      u[2] = Float(1.0 / 3) * (g[1] - even);
      u[3] = Float(-4.0 / 15) * (Float(4.0) * g[0] + Float(2.0) * g[1] + g[2]);
      u[4] = Float(1.0 / 15) * (g[0] - Float(2.0) * g[1] + Float(4.0) * g[2]);
      u[5] = g[2];
    }
  };

  struct Output {
    STYLEGAN_FAST_INLINE void operator()(const Float* m, Float* y) const {
      const Float sum = m[1] + m[2], difference = m[1] - m[2];
      y[0] = (m[0] + sum) + (m[3] + m[4]);
      y[1] = difference + Float(0.5) * m[3] - Float(2.0) * m[4];
      y[2] = sum + Float(0.25) * m[3] + Float(4.0) * m[4];
      y[3] = (difference + m[5]) + Float(0.125) * m[3] - Float(8.0) * m[4];
    }
  };

  // Transposes of the output's and the weight's, for the gradient of the weight.
  struct OutputGradient {
    STYLEGAN_FAST_INLINE void operator()(const Float* d, Float* m) const {
      const Float even = d[0] + d[2], odd = d[1] + d[3];
      m[0] = d[0];
      m[1] = even + odd;
      m[2] = even - odd;
      m[3] = d[0] + Float(0.5) * d[1] + Float(0.25) * d[2] + Float(0.125) * d[3];
      m[4] = d[0] - Float(2.0) * d[1] + Float(4.0) * d[2] - Float(8.0) * d[3];
      m[5] = d[3];
    }
  };

  struct WeightGradient {
    STYLEGAN_FAST_INLINE void operator()(const Float* u, Float* g) const {
      const Float sum = Float(1.0 / 3) * (u[1] + u[2]), difference = Float(1.0 / 3) * (u[1] - u[2]);
      const Float c = Float(4.0 / 15) * u[3], d = Float(1.0 / 15) * u[4];
      g[0] = (u[0] + difference) - Float(4.0) * c + d;
      g[1] = sum - Float(2.0) * c - Float(2.0) * d;
      g[2] = (difference + u[5]) - c + Float(4.0) * d;
    }
  };
};

// A stride of 2, of the input or the output: the outer taps by F(4,2) for the points 0, 1, -1, 2 and
// infinity, whose error is that of Same, and the one between them by 4 products.
struct Strided {
  static constexpr int points = 9;

  // F(4,2), of every `step`-th number.
  static STYLEGAN_FAST_INLINE void outer_input(const Float* d, int step, Float* v) {
    const Float a = d[3 * step] - d[step];
    v[0] = a + Float(2.0) * (d[0] - d[2 * step]);
    v[1] = a - (d[step] + d[2 * step]);
    v[2] = a + Float(3.0) * (d[step] - d[2 * step]);
    v[3] = a;
    v[4] = (d[4 * step] - d[2 * step]) - Float(2.0) * a;
  }
  static STYLEGAN_FAST_INLINE void outer_output(const Float* m, Float* y, int step) {
    const Float sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = (m[0] + sum) + m[3];
    y[step] = difference + Float(2.0) * m[3];
    y[2 * step] = sum + Float(4.0) * m[3];
    y[3 * step] = (difference + m[4]) + Float(8.0) * m[3];
  }

  struct Weight {
    STYLEGAN_FAST_INLINE void operator()(const Float* g, Float* u) const {
      u[0] = Float(0.5) * g[0];
      u[1] = Float(-0.5) * (g[0] + g[2]);
      u[2] = Float(1.0 / 6) * (g[2] - g[0]);
      u[3] = Float(1.0 / 6) * (g[0] + Float(2.0) * g[2]);
      u[4] = g[2];
      u[5] = g[1];
    }
  };

  struct WeightGradient {
    STYLEGAN_FAST_INLINE void operator()(const Float* u, Float* g) const {
      g[0] = Float(0.5) * (u[0] - u[1]) + Float(1.0 / 6) * (u[3] - u[2]);
      g[1] = u[5];
      g[2] = (u[4] - Float(0.5) * u[1]) + Float(1.0 / 6) * (u[2] + Float(2.0) * u[3]);
    }
  };
};

struct Up : Strided {
  static constexpr int in = 4, out = 8, seen = 5;

  struct Input {
    STYLEGAN_FAST_INLINE void operator()(const Float* d, Float* v) const {
      outer_input(d, 1, v);
      for (int j = 0; j < 4; ++j) v[5 + j] = d[1 + j];
    }
  };

  struct Output {
    STYLEGAN_FAST_INLINE void operator()(const Float* m, Float* y) const {
      outer_output(m, y, 2);
      for (int j = 0; j < 4; ++j) y[2 * j + 1] = m[5 + j];
    }
  };
};

struct Down : Strided {
  static constexpr int in = 8, out = 4, seen = 9;

  struct Input {
    STYLEGAN_FAST_INLINE void operator()(const Float* d, Float* v) const {
      outer_input(d, 2, v);
      for (int j = 0; j < 4; ++j) v[5 + j] = d[2 * j + 1];
    }
  };

  struct Output {
    STYLEGAN_FAST_INLINE void operator()(const Float* m, Float* y) const {
      outer_output(m, y, 1);
      for (int j = 0; j < 4; ++j) y[j] = y[j] + m[5 + j];
    }
  };

  struct OutputGradient {
    STYLEGAN_FAST_INLINE void operator()(const Float* d, Float* m) const {
      const Float even = d[0] + d[2], odd = d[1] + d[3];
      m[0] = d[0];
      m[1] = even + odd;
      m[2] = even - odd;
      m[3] = d[0] + Float(2.0) * d[1] + Float(4.0) * d[2] + Float(8.0) * d[3];
      m[4] = d[3];
      for (int j = 0; j < 4; ++j) m[5 + j] = d[j];
    }
  };
};

// A transform along both axes: load(k) of in x in numbers, store(k, number) of out x out.
template <int in, int out, class Transform, class Load, class Store>
STYLEGAN_FAST_INLINE inline void along_both(Transform transform, const Load& load,
                                            const Store& store) {
  Float half[out * in];
  unrolled<in>([&](auto column) STYLEGAN_FAST_INLINE {
    Float from[in], to[out];
    unrolled<in>([&](auto k) STYLEGAN_FAST_INLINE { from[k] = load(k * in + column); });
    transform(from, to);
    unrolled<out>([&](auto k) STYLEGAN_FAST_INLINE { half[k * in + column] = to[k]; });
  });
  unrolled<out>([&](auto row) STYLEGAN_FAST_INLINE {
    Float to[out];
    transform(half + row * in, to);
    unrolled<out>([&](auto k) STYLEGAN_FAST_INLINE { store(row * out + k, to[k]); });
  });
}

// Every `columns`-th number of as many vectors, and back; `step` vectors apart.
template <int columns>
STYLEGAN_FAST_INLINE inline void split_columns(const Float* from, Float* to, int step) {
  if constexpr (columns == 1) {
    to[0] = from[0];
  } else {
    Float even[columns / 2], odd[columns / 2];
    unrolled<columns / 2>([&](auto j) STYLEGAN_FAST_INLINE {
      even[j] = evens(from[2 * j], from[2 * j + 1]);
      odd[j] = odds(from[2 * j], from[2 * j + 1]);
    });
    split_columns<columns / 2>(even, to, 2 * step);
    split_columns<columns / 2>(odd, to + step, 2 * step);
  }
}

template <int columns>
STYLEGAN_FAST_INLINE inline void interleave_columns(const Float* from, int step, Float* to) {
  if constexpr (columns == 1) {
    to[0] = from[0];
  } else {
    Float even[columns / 2], odd[columns / 2];
    interleave_columns<columns / 2>(from, 2 * step, even);
    interleave_columns<columns / 2>(from + step, 2 * step, odd);
    unrolled<columns / 2>([&](auto j) STYLEGAN_FAST_INLINE {
      interleave(even[j], odd[j], to[2 * j], to[2 * j + 1]);
    });
  }
}

// Operands of the products: rows x depth on the left, depth x columns on the right. One for each of
// the products, `step` numbers apart: an odd number of cache lines, so that they do not share cache
// sets.
struct Operand {
  int64_t depth, step;

  static int64_t odd_lines(int64_t count) { return (ceil_divide(count, 16) | 1) * 16; }
  static Operand left(int64_t rows, int64_t depth) {
    return {depth, odd_lines(round_up(rows, kRows) * round_up(depth, kLanes))};
  }
  static Operand right(int64_t columns, int64_t depth) {
    return {depth, odd_lines(round_up(columns, larger(kLanes, kRows)) * depth)};
  }
  // Of the vector of row `row` and numbers [k, k + kLanes) of the sum.
  int64_t left_at(int64_t row, int64_t k) const {
    return row / kRows * kRows * round_up(depth, kLanes) + k * kRows + row % kRows * kLanes;
  }
  // Of the vector of columns [column, column + kLanes).
  int64_t right_at(int64_t column, int64_t k) const { return column * depth + k * kLanes; }
};

// kRows rows of `vectors` vectors of sums, added to what is there where they continue it. Vectors
// of the left operand run along the sum, or where it is transposed along the rows.
template <int vectors, bool transposed = false, bool continued = false>
void multiply(const float* left, const float* right, int64_t depth, float* to, int64_t row_step) {
  constexpr int kColumnStep = transposed ? kLanes : 1;
  const int64_t vector_step = depth * kLanes;
  Float sums[kRows * vectors];
  unrolled<kRows * vectors>([&](auto s) STYLEGAN_FAST_INLINE {
    const float* before = to + s / vectors * row_step + s % vectors * kLanes;
    sums[s] = continued ? Float::load(before) : Float(0.0);
  });
  for (int64_t rest = depth; rest > 0; rest -= kLanes) {
    const int64_t count = smaller(rest, kLanes);
    for (int64_t k = 0; k < count; ++k, left += kColumnStep, right += kLanes) {
      Float b[vectors];
      unrolled<vectors>([&](auto v) STYLEGAN_FAST_INLINE {
        b[v] = Float::load(right + v * vector_step);
      });
      unrolled<kRows>([&](auto r) STYLEGAN_FAST_INLINE {
        const Float a = broadcast(
            left[transposed ? r / kLanes * vector_step + r % kLanes : r * kLanes]);
        unrolled<vectors>([&](auto v) STYLEGAN_FAST_INLINE {
          sums[r * vectors + v] = sums[r * vectors + v] + a * b[v];
        });
      });
    }
    if (!transposed) left += (kRows - 1) * kLanes;
  }
  unrolled<kRows>([&](auto r) STYLEGAN_FAST_INLINE {
    unrolled<vectors>([&](auto v) STYLEGAN_FAST_INLINE {
      sums[r * vectors + v].store(to + r * row_step + v * kLanes);
    });
  });
}

// rows x columns of them, of operands of which the left one has vectors along `depth`, or rows.
template <bool transposed = false, bool continued = false>
void multiply_all(const float* left, const float* right, int64_t rows, int64_t columns,
                  int64_t depth, float* to, int64_t row_step) {
  for (int64_t c = 0; c < columns; c += kVectors * kLanes)
    for (int64_t r = 0; r < rows; r += kRows) {
      const float* a = left + (transposed ? r / kLanes * kLanes * depth + r % kLanes
                                          : r * round_up(depth, kLanes));
      const float* b = right + c * depth;
      float* sums = to + r * row_step + c;
      switch (ceil_divide(columns - c, kLanes)) {
        case 1: multiply<1, transposed, continued>(a, b, depth, sums, row_step); break;
        case 2: multiply<2, transposed, continued>(a, b, depth, sums, row_step); break;
        default: multiply<kVectors, transposed, continued>(a, b, depth, sums, row_step);
      }
    }
}

struct Image {
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_y, stride_x;

  Image(int64_t channels, int64_t height, int64_t width, bool channels_last)
      : channels(channels), height(height), width(width), stride_n(channels * height * width),
        stride_c(channels_last ? 1 : height * width),
        stride_y(channels_last ? width * channels : width),
        stride_x(channels_last ? channels : 1) {}
  int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * stride_n + c * stride_c + y * stride_y + x * stride_x;
  }
};

// The tiles of all samples, counted through along rows.
struct Tiling {
  int64_t samples, rows, columns;

  int64_t count() const { return samples * rows * columns; }
};

// Tiles of one row of them, among the lanes [first, last) of a vector of tiles.
struct Segment {
  int64_t first, last, sample, row, column;
};

// Tiles [begin, end) as rows of them.
struct Segments {
  Segment all[kLanes];
  int count = 0;

  Segments(const Tiling& tiles, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++count) {
      const int64_t column = at % tiles.columns, row = at / tiles.columns;
      const int64_t last = smaller(end, at + tiles.columns - column);
      all[count] = {at - begin, last - begin, row / tiles.rows, row % tiles.rows, column};
      at = last;
    }
  }
  int64_t lanes() const { return all[count - 1].last; }
  const Segment* begin() const { return all; }
  const Segment* end() const { return all + count; }
};

// Tiles of an image, the first of which begins at (first_y, first_x), and factors of its channels.
struct Source {
  const float* data;
  Image image;
  Tiling tiles;
  int64_t first_y, first_x;
  const float* scale;  // [samples, channels], or null
};

// Pixels [x, x + count) of a row of `width`, 0 outside.
inline void copy_row(const float* row, int64_t width, int64_t step, int64_t x, int64_t count,
                     float* to) {
  const int64_t first = clip(-x, 0, count), last = clip(width - x, first, count);
  std::memset(to, 0, first * sizeof(float));
  if (step == 1) {
    std::memcpy(to + first, row + x + first, (last - first) * sizeof(float));
  } else {
    for (int64_t j = first; j < last; ++j) to[j] = row[(x + j) * step];
  }
  std::memset(to + last, 0, (count - last) * sizeof(float));
}

// A vector of tiles of a channel, `tile` pixels apart, of which `seen` x `seen` pixels are seen.
template <int tile, int seen, int points, class Transform>
void transform_planes(const Source& source, const Segments& segments, int64_t c,
                      Transform transform, float* to, int64_t step) {
  const Image& image = source.image;
  constexpr int kBeyond = seen - tile;
  alignas(64) float lines[seen][tile * kLanes];
  alignas(64) float beyond[seen][kBeyond + 1][kLanes], scales[kLanes] = {};
  const float* rows[seen];
  uint32_t ends = 0;
  if (segments.lanes() < kLanes) std::memset(lines, 0, sizeof lines);
  for (const Segment& s : segments) {
    const float* plane = source.data + image.at(s.sample, c, 0, 0);
    const int64_t x = s.column * tile + source.first_x, pixels = (s.last - s.first) * tile;
    const bool direct = pixels == tile * kLanes && image.stride_x == 1 && x >= 0 &&
                        x + pixels <= image.width;
    ends |= 1u << (s.last - 1);
    for (int r = 0; r < seen; ++r) {
      const int64_t y = s.row * tile + source.first_y + r;
      const bool inside = y >= 0 && y < image.height;
      const float* row = plane + (inside ? y * image.stride_y : 0);
      for (int64_t j = 0; direct && j <= pixels; j += 64 / sizeof(float))
        __builtin_prefetch(row + x + j + kChannelsAhead * image.stride_c, 0, 2);
      for (int j = 0; j < kBeyond; ++j) {
        const int64_t at = x + pixels + j;
        const bool present = inside && at >= 0 && at < image.width;
        beyond[r][j][s.last - 1] = present ? row[at * image.stride_x] : 0;
      }
      rows[r] = direct && inside ? row + x : lines[r];
      if (rows[r] == lines[r]) {
        copy_row(row, inside ? image.width : 0, image.stride_x, x, pixels,
                 lines[r] + s.first * tile);
      }
    }
    for (int64_t lane = s.first; source.scale && lane < s.last; ++lane)
      scales[lane] = source.scale[s.sample * image.channels + c];
  }
  const Mask last_of_row = mask_from_bits(ends, Float());
  alignas(64) Float numbers[seen * seen];
  unrolled<seen>([&](auto r) STYLEGAN_FAST_INLINE {
    Float vectors[tile];
    unrolled<tile>([&](auto v) STYLEGAN_FAST_INLINE {
      vectors[v] = Float::load(rows[r] + v * kLanes);
    });
    Float* columns = numbers + r * seen;
    split_columns<tile>(vectors, columns, 1);
    unrolled<kBeyond>([&](auto j) STYLEGAN_FAST_INLINE {
      columns[tile + j] = where(last_of_row, Float::load(beyond[r][j]),
                                 shifted<1>(columns[j], columns[j]));
    });
  });
  if (source.scale) {
    const Float scale = Float::load(scales);
    unrolled<seen * seen>([&](auto k) STYLEGAN_FAST_INLINE { numbers[k] = scale * numbers[k]; });
  }
  along_both<seen, points>(
      transform, [&](int k) STYLEGAN_FAST_INLINE { return numbers[k]; },
      [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(to + k * step); });
}

// Some channels of a tile, or where it is beyond the last one zeros. The vectors of channel c are
// stored from at(c) on.
template <int tile, int seen, int points, class Transform, class At>
void transform_pixels(const Source& source, int64_t t, const float* zeros, int64_t first_channel,
                      int64_t last_channel, Transform transform, const At& at, int64_t step) {
  const Image& image = source.image;
  const Tiling& tiles = source.tiles;
  const bool present = t < tiles.count();
  const int64_t sample = t / tiles.columns / tiles.rows;
  const int64_t y0 = t / tiles.columns % tiles.rows * tile + source.first_y;
  const int64_t x0 = t % tiles.columns * tile + source.first_x;
  const float* pixels[seen * seen];
  for (int k = 0; k < seen * seen; ++k) {
    const int64_t y = y0 + k / seen, x = x0 + k % seen;
    const bool inside = present && y >= 0 && y < image.height && x >= 0 && x < image.width;
    pixels[k] = inside ? source.data + image.at(sample, 0, y, x) : zeros;
  }
  for (int64_t c = first_channel; c < last_channel; c += kLanes) {
    const int count = static_cast<int>(smaller(kLanes, last_channel - c));
    float* to = at(c);
    Float scale(1.0);
    if (source.scale && present) {
      scale = load_lanes(source.scale + sample * image.channels + c, 0, count);
    }
    const auto apply = [&](const auto& load) STYLEGAN_FAST_INLINE {
      along_both<seen, points>(
          transform, [&](int k) STYLEGAN_FAST_INLINE { return scale * load(k); },
          [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(to + k * step); });
    };
    if (image.stride_c == 1 && count == kLanes) {
      apply([&](int k) STYLEGAN_FAST_INLINE { return Float::load(pixels[k] + c); });
    } else {
      alignas(64) float gathered[seen * seen][kLanes] = {};
      for (int k = 0; k < seen * seen; ++k)
        for (int lane = 0; pixels[k] != zeros && lane < count; ++lane)
          gathered[k][lane] = pixels[k][(c + lane) * image.stride_c];
      apply([&](int k) STYLEGAN_FAST_INLINE { return Float::load(gathered[k]); });
    }
  }
}

// Where in the weight of a pair of channels the k-th of 3x3 taps is, or -1.
inline int64_t weight_at(const Conv2d& p, int k) {
  const int y = p.correlate ? k / kTaps : p.kernel_y - 1 - k / kTaps;
  const int x = p.correlate ? k % kTaps : p.kernel_x - 1 - k % kTaps;
  const bool present = y >= 0 && y < p.kernel_y && x >= 0 && x < p.kernel_x;
  return present ? y * p.stride_y + x * p.stride_x : -1;
}

// The points that share a point of the weight: [it, points_end).
constexpr int points_end(int weight_point, int points) {
  return weight_point + 1 < kWeightPoints ? weight_point + 1 : points;
}

// The product of transformed weights that product k of `points` x `points` is of.
constexpr int weight_product(int k, int points) {
  const auto point = [](int at) { return at < kWeightPoints ? at : kWeightPoints - 1; };
  return point(k / points) * kWeightPoints + point(k % points);
}

int useful_threads(double work, int most) {
  const double useful = work / kWorkPerThread;
  return static_cast<int>(larger(1, useful < most ? static_cast<int64_t>(useful) : most));
}

template <class Algorithm>
struct Problem {
  static constexpr int kProducts = Algorithm::points * Algorithm::points;

  Problem(const Conv2d& p, const Epilogue* e, const float* x, const float* w, const float* pre,
          const float* add, float* y, uint8_t* mask, int most_threads)
      : p(p), w(w), add(add), y(y), tail(e, mask),
        out(p.out_channels, p.out_height, p.out_width, p.out_channels_last),
        tiles{p.samples, ceil_divide(p.out_height, Algorithm::out),
              ceil_divide(p.out_width, Algorithm::out)},
        in{x, Image(p.in_channels, p.in_height, p.in_width, p.in_channels_last), tiles,
           -p.pad_y / p.up, -p.pad_x / p.up, pre},
        planes(!p.out_channels_last) {
    const double work = static_cast<double>(kProducts) * tiles.count() * p.in_channels *
                        p.out_channels;
    threads = useful_threads(work, most_threads);
    block_tiles = smaller(kBlockTiles, round_up(tiles.count(), planes ? kLanes : kRows));
    tile_blocks = ceil_divide(tiles.count(), block_tiles);
    const int64_t unit = planes ? kRows : kLanes;
    const auto cut = [&](int64_t most) {
      block_channels = smaller(most, round_up(p.out_channels, unit));
      channel_blocks = ceil_divide(p.out_channels, block_channels);
      weights = planes ? Operand::left(block_channels, p.in_channels)
                       : Operand::right(block_channels, p.in_channels);
    };
    cut(kBlockSums);
    inputs = planes ? Operand::right(block_tiles, p.in_channels)
                    : Operand::left(block_tiles, p.in_channels);
    shares_tiles = tile_blocks < 2 * threads ||
                   channel_blocks * weights.step * kWeights > kSharedWeights;
    if (shares_tiles) {
      cut(clip(round_up(ceil_divide(p.out_channels, threads), unit), unit, block_channels));
      shared_blocks = clip(kSharedTiles / (inputs.step * kProducts), 1, tile_blocks);
    }
    sum_step = planes ? block_tiles : block_channels;
    const int64_t sum_rows = planes ? block_channels : round_up(block_tiles, kRows);
    sums_step = Operand::odd_lines(sum_rows * sum_step);
  }

  const Conv2d& p;
  const float *w, *add;
  float* y;
  const Tail<Float> tail;
  const Image out;
  const Tiling tiles;
  const Source in;
  const bool planes;
  int threads;
  int64_t block_tiles, tile_blocks, block_channels, channel_blocks;
  Operand weights, inputs;
  // Few tiles or many weights: threads share tiles and transform weights of their own, else the
  // other way round.
  bool shares_tiles;
  int64_t shared_blocks;
  int64_t sum_step, sums_step;  // of a row and of a product, in M
};

template <class Algorithm>
class Worker {
  using Problem = cpu::STYLEGAN_FAST_SIMD::Problem<Algorithm>;
  static constexpr int in = Algorithm::in, out = Algorithm::out, seen = Algorithm::seen;
  static constexpr int points = Algorithm::points;

 public:
  Worker(const Problem& problem, float* sums, const float* zeros)
      : problem_(problem), p_(problem.p), sums_(sums), zeros_(zeros) {}

  // U of a block of output channels.
  void transform_weights(int64_t block, float* to) const {
    const int64_t begin = block * problem_.block_channels, end = begin + problem_.block_channels;
    for (int64_t o = begin; o < end; o += kLanes)
      for (int64_t i = 0; i < p_.in_channels; i += kLanes)
        transform_some_weights(begin, o, smaller(end, o + kLanes), i, to);
  }

  // V of some channels of a block of tiles.
  void transform_input(int64_t block, int64_t first_channel, int64_t last_channel,
                       float* to) const {
    const int64_t begin = block * problem_.block_tiles, step = problem_.inputs.step;
    const int64_t end = smaller(begin + problem_.block_tiles, problem_.tiles.count());
    if (problem_.planes) {
      for (int64_t t = begin; t < end; t += kLanes) {
        const Segments segments(problem_.tiles, t, smaller(t + kLanes, end));
        for (int64_t c = first_channel; c < last_channel; ++c)
          transform_planes<in, seen, points>(problem_.in, segments, c,
                                             typename Algorithm::Input(),
                                             to + problem_.inputs.right_at(t - begin, c), step);
      }
    } else {
      for (int64_t t = begin; t < begin + round_up(end - begin, kRows); ++t)
        transform_pixels<in, seen, points>(
            problem_.in, t, zeros_, first_channel, last_channel, typename Algorithm::Input(),
            [&](int64_t c) { return to + problem_.inputs.left_at(t - begin, c); }, step);
    }
  }

  // A block of tiles of a block of output channels.
  void compute(int64_t tile_block, int64_t channel_block, const float* inputs,
               const float* weights) const {
    const int64_t begin = tile_block * problem_.block_tiles;
    const int64_t end = smaller(begin + problem_.block_tiles, problem_.tiles.count());
    const int64_t sums = problem_.block_channels;
    for (int k = 0; k < Problem::kProducts; ++k) {
      const float* u = weights + weight_product(k, points) * problem_.weights.step;
      const float* v = inputs + k * problem_.inputs.step;
      float* to = sums_ + k * problem_.sums_step;
      const int64_t depth = p_.in_channels, step = problem_.sum_step;
      problem_.planes ? multiply_all(u, v, sums, end - begin, depth, to, step)
                      : multiply_all(v, u, end - begin, sums, depth, to, step);
    }
    const int64_t first = channel_block * problem_.block_channels;
    const int64_t last = smaller(first + problem_.block_channels, p_.out_channels);
    if (problem_.planes) {
      write_planes(begin, end, first, last);
    } else {
      for (int64_t t = begin; t < end; ++t) write_pixels(t, t - begin, first, last);
    }
  }

 private:
  // Of output channels [o, last) and input channels from i on, as many as a vector has lanes.
  void transform_some_weights(int64_t begin, int64_t o, int64_t last, int64_t i,
                              float* to) const {
    alignas(64) float taps[kTaps * kTaps][kLanes][kLanes];
    const int64_t outs = clip(p_.out_channels - o, 0, last - o);
    const int64_t ins = smaller(p_.in_channels - i, kLanes);
    if (outs < kLanes || ins < kLanes) std::memset(taps, 0, sizeof taps);
    const bool planes = problem_.planes;
    for (int k = 0; k < kTaps * kTaps; ++k) {
      const int64_t at = weight_at(p_, k);
      if (at < 0) {
        std::memset(taps[k], 0, sizeof taps[k]);
        continue;
      }
      const float* from = problem_.w + at + o * p_.stride_o + i * p_.stride_i;
      for (int a = 0; a < outs; ++a)
        for (int b = 0; b < ins; ++b)
          taps[k][planes ? a : b][planes ? b : a] = from[a * p_.stride_o + b * p_.stride_i];
    }
    const Operand& u = problem_.weights;
    for (int64_t row = 0; row < (planes ? last - o : ins); ++row) {
      float* at = to + (planes ? u.left_at(o - begin + row, i) : u.right_at(o - begin, i + row));
      along_both<kTaps, kWeightPoints>(
          typename Algorithm::Weight(),
          [&](int k) STYLEGAN_FAST_INLINE { return Float::load(taps[k][row]); },
          [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(at + k * u.step); });
    }
  }

  void write_planes(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    for (int64_t t = begin; t < end; t += kLanes) {
      const Segments segments(problem_.tiles, t, smaller(t + kLanes, end));
      for (int64_t o = first; o < last; ++o)
        write_plane(segments, o, sums_ + (o - first) * problem_.sum_step + t - begin);
    }
  }

  void write_plane(const Segments& segments, int64_t o, const float* sums) const {
    alignas(64) float rows[out][out * kLanes];
    const int64_t step = problem_.sums_step;
    Float tile[out * out];
    along_both<points, out>(
        typename Algorithm::Output(),
        [&](int k) STYLEGAN_FAST_INLINE { return Float::load(sums + k * step); },
        [&](int k, Float v) STYLEGAN_FAST_INLINE { tile[k] = v; });
    unrolled<out>([&](auto j) STYLEGAN_FAST_INLINE {
      Float row[out];
      interleave_columns<out>(tile + j * out, 1, row);
      unrolled<out>([&](auto c) STYLEGAN_FAST_INLINE { row[c].store(rows[j] + c * kLanes); });
    });
    for (const Segment& s : segments) {
      const int64_t y = s.row * out, x = s.column * out;
      const int64_t count = smaller((s.last - s.first) * out, p_.out_width - x);
      for (int64_t j = 0; j < smaller(out, p_.out_height - y); ++j)
        finish(s.sample, o, y + j, x, count, rows[j] + s.first * out);
    }
  }

  void write_pixels(int64_t t, int64_t row, int64_t first, int64_t last) const {
    alignas(64) float pixels[out * out][kBlockSums];
    const Tiling& tiles = problem_.tiles;
    const int64_t sample = t / tiles.columns / tiles.rows;
    const int64_t step = problem_.sums_step;
    const float* from = sums_ + row * problem_.sum_step;
    for (int64_t o = 0; o < last - first; o += kLanes)
      along_both<points, out>(
          typename Algorithm::Output(),
          [&](int k) STYLEGAN_FAST_INLINE { return Float::load(from + o + k * step); },
          [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(pixels[k] + o); });
    const int64_t y0 = t / tiles.columns % tiles.rows * out, x0 = t % tiles.columns * out;
    for (int k = 0; k < out * out; ++k) {
      const int64_t y = y0 + k / out, x = x0 + k % out;
      if (y < p_.out_height && x < p_.out_width) {
        finish(sample, first, y, x, last - first, pixels[k]);
      }
    }
  }

  // The epilogue and `add` on numbers that are consecutive in the output: pixels from (y, x) on of
  // channel o, or channels from o on of that pixel.
  void finish(int64_t n, int64_t o, int64_t y, int64_t x, int64_t count, float* from) const {
    const int64_t at = problem_.out.at(n, o, y, x);
    float* to = problem_.y + at;
    if (const Epilogue* e = problem_.tail.e) {
      alignas(64) float scale[kGroup], bias[kGroup], noise[kGroup];
      const auto fill = [](float* lanes, float value) {
        for (int lane = 0; lane < kGroup; ++lane) lanes[lane] = value;
      };
      Coefficients<float> c{scale, bias, noise, 0, 0, 0};
      const float* scales = static_cast<const float*>(e->scale);
      const float* biases = static_cast<const float*>(e->bias);
      const float* noises = static_cast<const float*>(e->noise);
      if (scales) scales += n * p_.out_channels + o;
      if (biases) biases += o;
      if (noises) {
        noises += ((e->noise_per_sample ? n * p_.out_height : 0) + y) * p_.out_width + x;
      }
      const bool along_channels = !problem_.planes;
      if (along_channels && scales) c.scale = scales, c.scale_step = kGroup;
      else fill(scale, scales ? *scales : 1);
      if (along_channels && biases) c.bias = biases, c.bias_step = kGroup;
      else fill(bias, biases ? *biases : 0);
      if (!along_channels && noises) c.noise = noises, c.noise_step = kGroup;
      else fill(noise, noises ? *noises : 0);
      uint8_t* units = problem_.tail.mask ? problem_.tail.mask + at / 8 * 2 : nullptr;
      float* finished = problem_.add ? from : to;
      problem_.tail.apply(ForwardConstants<Float>(*e), c, count, from, finished, units);
      if (!problem_.add) return;
    }
    if (problem_.add) {
      for (int64_t j = 0; j < count; ++j) to[j] = from[j] + problem_.add[at + j];
    } else {
      std::memcpy(to, from, count * sizeof(float));
    }
  }

  const Problem& problem_;
  const Conv2d& p_;
  float* const sums_;
  const float* const zeros_;
};

// Numbers in whole cache lines, not zeroed.
class Workspace {
 public:
  explicit Workspace(int64_t count) : data_(std::malloc(count * sizeof(float) + 64)) {
    if (!data_) throw std::bad_alloc();
    want_huge_pages(data_, count * sizeof(float));
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* get() const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data_) + 63) / 64 * 64);
  }

 private:
  void* data_;
};

template <class Body>
void parallel(int64_t count, int threads, Body&& body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread)
    body(thread, count * thread / threads, count * (thread + 1) / threads);
}

// dU[k,o,i] = sum over tiles t of D[k,o,t] V[k,i,t] with D = A'(post * dy), the sum for a block of
// tiles at a time; then dw = G'(dU).
template <class Algorithm>
class WeightGradient {
  static constexpr int in = Algorithm::in, seen = Algorithm::seen, points = Algorithm::points;
  static constexpr int kProducts = points * points;
  static constexpr bool strided = kProducts > kWeights;
  using Input = typename Algorithm::Input;
  using OutputGradient = typename Algorithm::OutputGradient;

 public:
  WeightGradient(const Conv2d& p, const float* x, const float* dy, const float* pre,
                 const float* post, float* dw, int most_threads)
      : p_(p), tiles_{p.samples, ceil_divide(p.out_height, kTile), ceil_divide(p.out_width, kTile)},
        x_{x, Image(p.in_channels, p.in_height, p.in_width, p.in_channels_last), tiles_, -p.pad_y,
           -p.pad_x, pre},
        dy_{dy, Image(p.out_channels, p.out_height, p.out_width, p.out_channels_last), tiles_, 0, 0,
            post},
        dw_(dw), planes_(!p.in_channels_last && !p.out_channels_last),
        threads_(useful_threads(static_cast<double>(kProducts) * tiles_.count() * p.in_channels *
                                    p.out_channels, most_threads)),
        teams_(p.in_channels * p.out_channels <= kTeamSums ? threads_ : 1),
        block_(even_share(ceil_divide(tiles_.count(), teams_),
                          (teams_ > 1 ? kTeamBlock : kGradientBlock) / (strided ? 2 : 1))),
        keeps_sums_(teams_ > 1 || block_ < tiles_.count()),
        row_block_(keeps_sums_ ? round_up(p.out_channels, kRows) : kGradientRows),
        rows_(operand(p.out_channels, block_, planes_)),
        columns_(operand(p.in_channels, block_, false)),
        sum_step_(round_up(p.in_channels, kLanes)),
        sums_step_(Operand::odd_lines(row_block_ * sum_step_)),
        zeros_size_(larger(p.in_channels, p.out_channels) + kLanes),
        workspace_((rows_.step + columns_.step) * teams_ * kProducts +
                   sums_step_ * (keeps_sums_ ? teams_ : threads_) * kWeights + zeros_size_),
        to_rows_(workspace_.get()), to_columns_(to_rows_ + rows_.step * kProducts * teams_),
        sums_(to_columns_ + columns_.step * kProducts * teams_),
        zeros_(sums_ + sums_step_ * kWeights * (keeps_sums_ ? teams_ : threads_)) {
    std::memset(zeros_, 0, zeros_size_ * sizeof(float));
  }

  void run() const {
    if (keeps_sums_) {
      const int64_t blocks = ceil_divide(tiles_.count(), block_);
      parallel(blocks, teams_, [&](int team, int64_t first, int64_t last) {
        float* sums = sums_ + team * sums_step_ * kWeights;
        std::memset(sums, 0, sums_step_ * kWeights * sizeof(float));
        for (int64_t block = first; block < last; ++block) {
          const int64_t begin = block * block_, end = smaller(begin + block_, tiles_.count());
          transform(team, begin, end);
          parallel(kWeights, threads_ / teams_, [&](int, int64_t k, int64_t last_k) {
            for (; k < last_k; ++k)
              multiply_products(team, k, 0, p_.out_channels, end - begin, sums);
          });
        }
      });
      parallel(p_.out_channels, threads_,
               [&](int, int64_t first, int64_t last) { write(first, last, 0, teams_, sums_); });
      return;
    }
    transform(0, 0, tiles_.count());
    parallel(ceil_divide(p_.out_channels, row_block_), threads_,
             [&](int thread, int64_t first, int64_t last) {
      float* sums = sums_ + thread * sums_step_ * kWeights;
      for (int64_t block = first; block < last; ++block) {
        const int64_t o = block * row_block_, end = smaller(o + row_block_, p_.out_channels);
        std::memset(sums, 0, sums_step_ * kWeights * sizeof(float));
        for (int64_t k = 0; k < kWeights; ++k)
          multiply_products(0, k, o, end - o, tiles_.count(), sums);
        write(o, end, o, 1, sums);
      }
    });
  }

 private:
  // Of the fewest equal blocks of at most `most`, whole vectors, that make up `count`.
  static int64_t even_share(int64_t count, int64_t most) {
    return round_up(ceil_divide(count, ceil_divide(count, most)), kLanes);
  }

  static Operand operand(int64_t channels, int64_t tiles, bool left) {
    return left ? Operand::left(channels, tiles) : Operand::right(channels, tiles);
  }

  // D and V of tiles [begin, end).
  void transform(int team, int64_t begin, int64_t end) const {
    float* rows = to_rows_ + team * rows_.step * kProducts;
    float* columns = to_columns_ + team * columns_.step * kProducts;
    const int64_t row_pieces = ceil_divide(p_.out_channels, kLanes);
    const int64_t pieces = row_pieces + ceil_divide(p_.in_channels, kLanes);
    parallel(pieces, threads_ / teams_, [&](int, int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        piece < row_pieces
            ? transform_rows(begin, end, piece * kLanes, rows)
            : transform_columns(begin, end, (piece - row_pieces) * kLanes, columns);
      }
    });
  }

  // D of as many channels as a vector has lanes, from channel o on.
  void transform_rows(int64_t begin, int64_t end, int64_t o, float* to) const {
    const int64_t last = smaller(o + kLanes, p_.out_channels);
    const Operand rows = operand(p_.out_channels, end - begin, planes_);
    if (!planes_) {
      return transform_channels<kTile, kTile>(dy_, begin, end, o, OutputGradient(), rows,
                                              rows_.step, to);
    }
    for (int64_t t = begin; t < end; t += kLanes) {
      const Segments segments(tiles_, t, smaller(t + kLanes, end));
      for (int64_t c = o; c < last; ++c)
        transform_planes<kTile, kTile, points>(dy_, segments, c, OutputGradient(),
                                               to + rows.left_at(c, t - begin), rows_.step);
    }
  }

  // V of as many channels as a vector has lanes, from channel i on.
  void transform_columns(int64_t begin, int64_t end, int64_t i, float* to) const {
    const Operand columns = Operand::right(p_.in_channels, end - begin);
    if (!planes_) {
      return transform_channels<in, seen>(x_, begin, end, i, Input(), columns, columns_.step, to);
    }
    const int64_t count = smaller(kLanes, p_.in_channels - i);
    alignas(64) float vectors[kProducts][kLanes][kLanes];
    if (count < kLanes) std::memset(vectors, 0, sizeof vectors);
    for (int64_t t = begin; t < end; t += kLanes) {
      const int64_t last = smaller(t + kLanes, end);
      const Segments segments(tiles_, t, last);
      for (int64_t c = 0; c < count; ++c)
        transform_planes<in, seen, points>(x_, segments, i + c, Input(), vectors[0][c],
                                           kLanes * kLanes);
      for (int k = 0; k < kProducts; ++k) {
        Float from[kLanes], transposed[kLanes];
        unrolled<kLanes>([&](auto c) STYLEGAN_FAST_INLINE {
          from[c] = Float::load(vectors[k][c]);
        });
        interleave_columns<kLanes>(from, 1, transposed);
        float* at = to + k * columns_.step + columns.right_at(i, t - begin);
        unrolled<kLanes>([&](auto j) STYLEGAN_FAST_INLINE {
          if (t + j < last) transposed[j].store(at + j * kLanes);
        });
      }
    }
  }

  template <int tile, int seen, class Transform>
  void transform_channels(const Source& source, int64_t begin, int64_t end, int64_t c,
                          Transform transform, const Operand& operand, int64_t step,
                          float* to) const {
    for (int64_t t = begin; t < end; ++t)
      transform_pixels<tile, seen, points>(
          source, t, zeros_, c, smaller(c + kLanes, source.image.channels), transform,
          [&](int64_t at) { return to + operand.right_at(at, t - begin); }, step);
  }

  // Adds rows [o, o + count) of the products of transformed weight k.
  void multiply_products(int team, int64_t k, int64_t o, int64_t count, int64_t depth,
                         float* sums) const {
    const int row = k / kWeightPoints, column = k % kWeightPoints;
    for (int r = row; r < points_end(row, points); ++r)
      for (int c = column; c < points_end(column, points); ++c)
        multiply_product(team, r * points + c, o, count, depth, sums + k * sums_step_);
  }

  void multiply_product(int team, int64_t k, int64_t o, int64_t count, int64_t depth,
                        float* to) const {
    const Operand rows = operand(p_.out_channels, depth, planes_);
    const float* left = to_rows_ + (team * kProducts + k) * rows_.step;
    const float* right = to_columns_ + (team * kProducts + k) * columns_.step;
    planes_ ? multiply_all<false, true>(left + rows.left_at(o, 0), right, count, p_.in_channels,
                                        depth, to, sum_step_)
            : multiply_all<true, true>(left + rows.right_at(o, 0), right, count, p_.in_channels,
                                       depth, to, sum_step_);
  }

  // dw of output channels [o, end), of the sums of some teams, which begin with channel `first`.
  void write(int64_t o, int64_t end, int64_t first, int teams, const float* sums) const {
    for (; o < end; ++o)
      for (int64_t i = 0; i < p_.in_channels; i += kLanes)
        write_vector(o, i, teams, sums + (o - first) * sum_step_ + i);
  }

  void write_vector(int64_t o, int64_t i, int teams, const float* from) const {
    alignas(64) float taps[kTaps * kTaps][kLanes];
    along_both<kWeightPoints, kTaps>(
        typename Algorithm::WeightGradient(),
        [&](int k) STYLEGAN_FAST_INLINE {
          Float sum = Float::load(from + k * sums_step_);
          for (int team = 1; team < teams; ++team)
            sum = sum + Float::load(from + (team * kWeights + k) * sums_step_);
          return sum;
        },
        [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(taps[k]); });
    float* to = dw_ + o * p_.stride_o + i * p_.stride_i;
    for (int k = 0; k < kTaps * kTaps; ++k) {
      const int64_t at = weight_at(p_, k);
      for (int64_t lane = 0; at >= 0 && lane < smaller(kLanes, p_.in_channels - i); ++lane)
        to[at + lane * p_.stride_i] = taps[k][lane];
    }
  }

  const Conv2d& p_;
  const Tiling tiles_;
  const Source x_, dy_;
  float* const dw_;
  const bool planes_;     // else vectors run along channels, those of D too
  // Where the sums are few each thread is a team of its own, with tiles and sums of its own.
  const int threads_, teams_;
  const int64_t block_;    // of tiles
  const bool keeps_sums_;  // of all output channels, for the next block
  const int64_t row_block_;
  const Operand rows_, columns_;
  const int64_t sum_step_, sums_step_;
  const int64_t zeros_size_;
  const Workspace workspace_;
  float *const to_rows_, *const to_columns_, *const sums_, *const zeros_;
};

template <class Algorithm>
void forward(const Problem<Algorithm>& problem) {
  const Conv2d& p = problem.p;
  const int64_t used = problem.threads;
  const int64_t weights = problem.weights.step * kWeights;
  const int64_t inputs = problem.inputs.step * problem.kProducts;
  const int64_t sums = problem.sums_step * problem.kProducts;
  const int64_t weight_blocks = problem.shares_tiles ? used : problem.channel_blocks;
  const int64_t input_blocks = problem.shares_tiles ? problem.shared_blocks : used;
  const Workspace workspace(weights * weight_blocks + inputs * input_blocks + sums * used +
                            p.in_channels + kLanes);
  float* const all_weights = workspace.get();
  float* const all_inputs = all_weights + weights * weight_blocks;
  float* const all_sums = all_inputs + inputs * input_blocks;
  float* const zeros = all_sums + sums * used;
  std::memset(zeros, 0, (p.in_channels + kLanes) * sizeof(float));
  const auto worker = [&](int64_t thread) {
    return Worker<Algorithm>(problem, all_sums + thread * sums, zeros);
  };

  if (!problem.shares_tiles) {
    parallel(problem.channel_blocks, used, [&](int thread, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        worker(thread).transform_weights(c, all_weights + c * weights);
    });
    parallel(problem.tile_blocks, used, [&](int thread, int64_t begin, int64_t end) {
      float* own = all_inputs + thread * inputs;
      for (int64_t t = begin; t < end; ++t) {
        worker(thread).transform_input(t, 0, p.in_channels, own);
        for (int64_t c = 0; c < problem.channel_blocks; ++c)
          worker(thread).compute(t, c, own, all_weights + c * weights);
      }
    });
    return;
  }
  const int64_t pieces = ceil_divide(p.in_channels, kLanes);
  for (int64_t first = 0; first < problem.tile_blocks; first += problem.shared_blocks) {
    const int64_t blocks = smaller(problem.shared_blocks, problem.tile_blocks - first);
    parallel(blocks * pieces, used, [&](int thread, int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t t = begin / pieces, piece = begin % pieces;
        const int64_t last = smaller(pieces, piece + end - begin);
        worker(thread).transform_input(first + t, piece * kLanes,
                                       smaller(last * kLanes, p.in_channels),
                                       all_inputs + t * inputs);
        begin += last - piece;
      }
    });
    parallel(problem.channel_blocks, used, [&](int thread, int64_t begin, int64_t end) {
      float* own = all_weights + thread * weights;
      for (int64_t c = begin; c < end; ++c) {
        worker(thread).transform_weights(c, own);
        for (int64_t t = 0; t < blocks; ++t)
          worker(thread).compute(first + t, c, all_inputs + t * inputs, own);
      }
    });
  }
}

}  // namespace

void conv2d_weight_gradient(const Conv2d& p, const void* x, const void* dy, const float* pre,
                            const float* post, void* dw, int threads) {
  const auto run = [&](auto algorithm) {
    WeightGradient<decltype(algorithm)>(p, static_cast<const float*>(x),
                                        static_cast<const float*>(dy), pre, post,
                                        static_cast<float*>(dw), threads)
        .run();
  };
  p.down == 2 ? run(Down()) : run(Same());
}

void conv2d_forward(const Conv2d& p, const Epilogue* e, const void* x, const void* w,
                    const float* pre, const void* add, void* y, uint8_t* mask, int threads) {
  const auto run = [&](auto algorithm) {
    forward(Problem<decltype(algorithm)>(p, e, static_cast<const float*>(x),
                                         static_cast<const float*>(w), pre,
                                         static_cast<const float*>(add), static_cast<float*>(y),
                                         mask, threads));
  };
  p.up == 2 ? run(Up()) : p.down == 2 ? run(Down()) : run(Same());
}

#undef STYLEGAN_FAST_INLINE

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
