// CPU kernels of csrc/conv2d.h, compiled once per SIMD level: Winograd's F(4x4, 3x3).
//
// A tile is 4x4 pixels of output and the 6x6 pixels of input that they see. With transforms B, G, A
//
//     V[k,i,t] = B(pre * x)   U[k,o,i] = G(w)   M[k,o,t] = sum over i of U V   y = E(A(M)) + add
//
// for 36 products k: 4 times fewer multiplications than the sum over 3x3 taps. An up=2 convolution is
// four of up=1, one for each parity of the output's rows and columns, of the same tiles of input.
//
// Where the output is NCHW vectors run along tiles, U is the left operand of the products, its rows
// are output channels. Where it is NHWC they run along channels, V is the left operand, its rows are
// tiles. Vectors of a left operand run along the sum.

#include "../conv2d.h"

#include "epilogue_row.h"
#include "levels.h"
#include "stream.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

#define STYLEGAN_FAST_INLINE __attribute__((always_inline))

constexpr int kTile = 4, kTaps = 3, kPoints = kTile + kTaps - 1;
constexpr int kProducts = kPoints * kPoints;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;  // of sums in registers, of which there are 32
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;                     // of such a row
constexpr int64_t kBlockTiles = 48;             // tiles transformed together
constexpr int64_t kBlockSums = 64;              // output channels, times phases
constexpr int64_t kSharedWeights = 3 << 20;     // numbers of U that are kept
constexpr int64_t kSharedTiles = 5 << 20;       // numbers of V that threads share
constexpr int64_t kAhead = 2;  // channels
constexpr int64_t kWorkPerThread = 1 << 20;     // multiplications

constexpr int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }
constexpr int64_t ceil_divide(int64_t a, int64_t b) { return -floor_divide(-a, b); }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }
constexpr int64_t clip(int64_t a, int64_t low, int64_t high) {
  return a < low ? low : a > high ? high : a;
}

// Not Float(double), which adds the number to zeros.
inline Float broadcast(float a) { return a - Float::Native{}; }

// The transforms along one axis, for the points 0, 1, -1, 1/2, -2 and infinity, whose error is a third
// of that of the usual 0, 1, -1, 2, -2 and infinity.
struct InputTransform {
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

struct WeightTransform {
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

struct OutputTransform {
  STYLEGAN_FAST_INLINE void operator()(const Float* m, Float* y) const {
    const Float sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = (m[0] + sum) + (m[3] + m[4]);
    y[1] = difference + Float(0.5) * m[3] - Float(2.0) * m[4];
    y[2] = sum + Float(0.25) * m[3] + Float(4.0) * m[4];
    y[3] = (difference + m[5]) + Float(0.125) * m[3] - Float(8.0) * m[4];
  }
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

// Operands of the products: rows x depth on the left, depth x columns on the right. One for each of the
// products, `step` numbers apart: an odd number of cache lines, so that they do not share cache sets.
struct Operand {
  int64_t depth, step;

  static int64_t odd_lines(int64_t count) { return (ceil_divide(count, 16) | 1) * 16; }
  static Operand left(int64_t rows, int64_t depth) {
    return {depth, odd_lines(round_up(rows, kRows) * round_up(depth, kLanes))};
  }
  static Operand right(int64_t columns, int64_t depth) {
    return {depth, odd_lines(round_up(columns, kLanes) * depth)};
  }
  // Of the vector of row `row` and numbers [k, k + kLanes) of the sum.
  int64_t left_at(int64_t row, int64_t k) const {
    return row / kRows * kRows * round_up(depth, kLanes) + k * kRows + row % kRows * kLanes;
  }
  // Of the vector of columns [column, column + kLanes).
  int64_t right_at(int64_t column, int64_t k) const { return column * depth + k * kLanes; }
};

// kRows rows of `vectors` vectors of sums.
template <int vectors>
void multiply(const float* left, const float* right, int64_t depth, float* to, int64_t row_step) {
  Float sums[kRows * vectors];
  unrolled<kRows * vectors>([&](auto s) STYLEGAN_FAST_INLINE { sums[s] = Float(0.0); });
  const int64_t vector_step = depth * kLanes;
  for (int64_t rest = depth; rest > 0; rest -= kLanes) {
    const int64_t count = smaller(rest, kLanes);
    for (int64_t k = 0; k < count; ++k, ++left, right += kLanes) {
      Float b[vectors];
      unrolled<vectors>([&](auto v) STYLEGAN_FAST_INLINE {
        b[v] = Float::load(right + v * vector_step);
      });
      unrolled<kRows>([&](auto r) STYLEGAN_FAST_INLINE {
        const Float a = broadcast(left[r * kLanes]);
        unrolled<vectors>([&](auto v) STYLEGAN_FAST_INLINE {
          sums[r * vectors + v] = sums[r * vectors + v] + a * b[v];
        });
      });
    }
    left += (kRows - 1) * kLanes;
  }
  unrolled<kRows>([&](auto r) STYLEGAN_FAST_INLINE {
    unrolled<vectors>([&](auto v) STYLEGAN_FAST_INLINE {
      sums[r * vectors + v].store(to + r * row_step + v * kLanes);
    });
  });
}

struct Image {
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_y, stride_x;

  Image(int64_t channels, int64_t height, int64_t width, bool channels_last)
      : channels(channels), height(height), width(width), stride_n(channels * height * width),
        stride_c(channels_last ? 1 : height * width), stride_y(channels_last ? width * channels : width),
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

struct Problem {
  Problem(const Conv2d& p, const Epilogue* e, const float* x, const float* w, const float* pre,
          const float* add, float* y, uint8_t* mask, int most_threads)
      : p(p), x(x), w(w), pre(pre), add(add), y(y), tail(e, mask),
        in(p.in_channels, p.in_height, p.in_width, p.in_channels_last),
        out(p.out_channels, p.out_height, p.out_width, p.out_channels_last),
        phases(p.up * p.up),
        tiles{p.samples, ceil_divide(p.out_height, p.up * kTile),
              ceil_divide(p.out_width, p.up * kTile)},
        first_y(ceil_divide(-p.pad_y, p.up)), first_x(ceil_divide(-p.pad_x, p.up)),
        planes(!p.out_channels_last) {
    const double work = static_cast<double>(kProducts) * tiles.count() * phases * p.in_channels *
                        p.out_channels;
    threads = static_cast<int>(larger(1, work / kWorkPerThread < most_threads
                                             ? static_cast<int64_t>(work / kWorkPerThread)
                                             : most_threads));
    block_tiles = smaller(kBlockTiles, round_up(tiles.count(), planes ? kLanes : kRows));
    tile_blocks = ceil_divide(tiles.count(), block_tiles);
    const int64_t unit = planes ? kRows : kLanes;
    const auto cut = [&](int64_t most) {
      block_channels = smaller(most, round_up(p.out_channels, unit));
      channel_blocks = ceil_divide(p.out_channels, block_channels);
      const int64_t sums = block_channels * phases;
      weights = planes ? Operand::left(sums, p.in_channels) : Operand::right(sums, p.in_channels);
    };
    cut(round_up(kBlockSums / phases, unit));
    inputs = planes ? Operand::right(block_tiles, p.in_channels)
                    : Operand::left(block_tiles, p.in_channels);
    shares_tiles = tile_blocks < 2 * threads ||
                   channel_blocks * weights.step * kProducts > kSharedWeights;
    if (shares_tiles) {
      cut(clip(round_up(ceil_divide(p.out_channels, threads), unit), unit, block_channels));
      shared_blocks = clip(kSharedTiles / (inputs.step * kProducts), 1, tile_blocks);
    }
    sum_step = planes ? block_tiles : block_channels * phases;
    const int64_t sum_rows = planes ? block_channels * phases : round_up(block_tiles, kRows);
    sums_step = Operand::odd_lines(sum_rows * sum_step);
  }

  const Conv2d& p;
  const float *x, *w, *pre, *add;
  float* y;
  const Tail<Float> tail;
  const Image in, out;
  const int phases;  // of the output's rows and columns
  const Tiling tiles;
  const int64_t first_y, first_x;  // of the input pixels of tile 0
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

class Worker {
 public:
  Worker(const Problem& problem, float* sums, const float* zeros)
      : problem_(problem), p_(problem.p), sums_(sums), zeros_(zeros) {}

  // U of a block of output channels.
  void transform_weights(int64_t block, float* to) const {
    const int64_t begin = block * problem_.block_channels, end = begin + problem_.block_channels;
    for (int phase = 0; phase < problem_.phases; ++phase)
      for (int64_t o = begin; o < end; o += kLanes)
        for (int64_t i = 0; i < p_.in_channels; i += kLanes)
          transform_some_weights(phase, begin, o, smaller(end, o + kLanes), i, to);
  }

  // V of some channels of a block of tiles.
  void transform_input(int64_t block, int64_t first_channel, int64_t last_channel, float* to) const {
    const int64_t begin = block * problem_.block_tiles, count = problem_.tiles.count();
    const int64_t end = smaller(begin + problem_.block_tiles, count);
    if (problem_.planes) {
      for (int64_t t = begin; t < end; t += kLanes) {
        const Segments segments(problem_.tiles, t, smaller(t + kLanes, end));
        for (int64_t c = first_channel; c < last_channel; ++c)
          transform_planes(segments, c, to + problem_.inputs.right_at(t - begin, c));
      }
    } else {
      for (int64_t t = begin; t < begin + round_up(end - begin, kRows); ++t)
        transform_pixels(t, t < end, first_channel, last_channel, to, t - begin);
    }
  }

  // A block of tiles of a block of output channels.
  void compute(int64_t tile_block, int64_t channel_block, const float* inputs,
               const float* weights) const {
    const int64_t begin = tile_block * problem_.block_tiles;
    const int64_t end = smaller(begin + problem_.block_tiles, problem_.tiles.count());
    const int64_t sums = problem_.block_channels * problem_.phases;
    for (int k = 0; k < kProducts; ++k) {
      const float* u = weights + k * problem_.weights.step;
      const float* v = inputs + k * problem_.inputs.step;
      float* to = sums_ + k * problem_.sums_step;
      problem_.planes ? multiply_all(u, v, sums, end - begin, to)
                      : multiply_all(v, u, end - begin, sums, to);
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
  void multiply_all(const float* left, const float* right, int64_t rows, int64_t columns,
                    float* to) const {
    const int64_t depth = p_.in_channels, step = problem_.sum_step;
    for (int64_t c = 0; c < columns; c += kVectors * kLanes)
      for (int64_t r = 0; r < rows; r += kRows) {
        const float* a = left + r * round_up(depth, kLanes);
        const float* b = right + c * depth;
        float* sums = to + r * step + c;
        switch (ceil_divide(columns - c, kLanes)) {
          case 1: multiply<1>(a, b, depth, sums, step); break;
          case 2: multiply<2>(a, b, depth, sums, step); break;
          default: multiply<kVectors>(a, b, depth, sums, step);
        }
      }
  }

  // Of output channels [o, last) and input channels from i on, as many as a vector has lanes.
  void transform_some_weights(int phase, int64_t begin, int64_t o, int64_t last, int64_t i,
                              float* to) const {
    alignas(64) float taps[kTaps * kTaps][kLanes][kLanes];
    const int64_t outs = clip(p_.out_channels - o, 0, last - o);
    const int64_t ins = smaller(p_.in_channels - i, kLanes);
    if (outs < kLanes || ins < kLanes) std::memset(taps, 0, sizeof taps);
    const bool planes = problem_.planes;
    for (int k = 0; k < kTaps * kTaps; ++k) {
      const int64_t ky = tap(k / kTaps, phase / p_.up, problem_.first_y, p_.pad_y, p_.kernel_y);
      const int64_t kx = tap(k % kTaps, phase % p_.up, problem_.first_x, p_.pad_x, p_.kernel_x);
      if (ky < 0 || kx < 0) {
        std::memset(taps[k], 0, sizeof taps[k]);
        continue;
      }
      const float* from = problem_.w + ky * p_.stride_y + kx * p_.stride_x + o * p_.stride_o +
                          i * p_.stride_i;
      for (int a = 0; a < outs; ++a)
        for (int b = 0; b < ins; ++b)
          taps[k][planes ? a : b][planes ? b : a] = from[a * p_.stride_o + b * p_.stride_i];
    }
    const Operand& u = problem_.weights;
    for (int64_t row = 0; row < (planes ? last - o : ins); ++row) {
      float* at = to + (planes ? u.left_at((o - begin + row) * problem_.phases + phase, i)
                               : u.right_at(phase * problem_.block_channels + o - begin, i + row));
      along_both<kTaps, kPoints>(
          WeightTransform(), [&](int k) STYLEGAN_FAST_INLINE { return Float::load(taps[k][row]); },
          [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(at + k * u.step); });
    }
  }

  // The tap through which an output row of this phase sees the a-th row of its tile, or -1.
  int64_t tap(int a, int phase, int64_t first, int64_t pad, int taps) const {
    const int64_t k = p_.up * (first + a) - phase + pad;
    if (k < 0 || k >= taps) return -1;
    return p_.correlate ? k : taps - 1 - k;
  }

  // A vector of tiles of a channel.
  void transform_planes(const Segments& segments, int64_t c, float* to) const {
    const Image& in = problem_.in;
    alignas(64) float lines[kPoints][kTile * kLanes];
    alignas(64) float after[2 * kPoints][kLanes], scales[kLanes];
    const float* rows[kPoints];
    uint32_t ends = 0;
    if (segments.lanes() < kLanes) std::memset(lines, 0, sizeof lines);
    for (const Segment& s : segments) {
      const float* plane = problem_.x + in.at(s.sample, c, 0, 0);
      const int64_t x = s.column * kTile + problem_.first_x, pixels = (s.last - s.first) * kTile;
      const bool direct = pixels == kTile * kLanes && in.stride_x == 1 && x >= 0 &&
                          x + pixels <= in.width;
      ends |= 1u << (s.last - 1);
      for (int r = 0; r < kPoints; ++r) {
        const int64_t y = s.row * kTile + problem_.first_y + r;
        const bool inside = y >= 0 && y < in.height;
        const float* row = plane + y * in.stride_y;
        for (int64_t j = 0; direct && j <= pixels; j += 64 / sizeof(float))
          __builtin_prefetch(row + x + j + kAhead * in.stride_c, 0, 2);
        for (int j = 0; j < 2; ++j) {
          const int64_t at = x + pixels + j;
          const bool seen = inside && at >= 0 && at < in.width;
          after[2 * r + j][s.last - 1] = seen ? row[at * in.stride_x] : 0;
        }
        rows[r] = direct && inside ? row + x : lines[r];
        if (rows[r] == lines[r]) {
          copy_row(row, inside ? in.width : 0, x, pixels, lines[r] + s.first * kTile);
        }
      }
      for (int64_t lane = s.first; problem_.pre && lane < s.last; ++lane)
        scales[lane] = problem_.pre[s.sample * in.channels + c];
    }
    const Mask last_of_row = mask_from_bits(ends, Float());
    alignas(64) Float tile[kProducts];
    unrolled<kPoints>([&](auto r) STYLEGAN_FAST_INLINE {
      Float vectors[kTile];
      unrolled<kTile>([&](auto v) STYLEGAN_FAST_INLINE {
        vectors[v] = Float::load(rows[r] + v * kLanes);
      });
      Float* columns = tile + r * kPoints;
      split_columns<kTile>(vectors, columns, 1);
      unrolled<kPoints - kTile>([&](auto j) STYLEGAN_FAST_INLINE {
        columns[kTile + j] = where(last_of_row, Float::load(after[2 * r + j]),
                                   shifted<1>(columns[j], columns[j]));
      });
    });
    if (problem_.pre) {
      const Float scale = Float::load(scales);
      unrolled<kProducts>([&](auto k) STYLEGAN_FAST_INLINE { tile[k] = scale * tile[k]; });
    }
    const int64_t step = problem_.inputs.step;
    along_both<kPoints, kPoints>(
        InputTransform(), [&](int k) STYLEGAN_FAST_INLINE { return tile[k]; },
        [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(to + k * step); });
  }

  // Pixels [x, x + count) of a row of `width`, 0 outside.
  void copy_row(const float* row, int64_t width, int64_t x, int64_t count, float* to) const {
    const int64_t step = problem_.in.stride_x;
    const int64_t first = clip(-x, 0, count), last = clip(width - x, first, count);
    std::memset(to, 0, first * sizeof(float));
    if (step == 1) {
      std::memcpy(to + first, row + x + first, (last - first) * sizeof(float));
    } else {
      for (int64_t j = first; j < last; ++j) to[j] = row[(x + j) * step];
    }
    std::memset(to + last, 0, (count - last) * sizeof(float));
  }

  void transform_pixels(int64_t t, bool present, int64_t first_channel, int64_t last_channel,
                        float* to, int64_t row) const {
    const Image& in = problem_.in;
    const Tiling& tiles = problem_.tiles;
    const int64_t sample = t / tiles.columns / tiles.rows;
    const int64_t y0 = t / tiles.columns % tiles.rows * kTile + problem_.first_y;
    const int64_t x0 = t % tiles.columns * kTile + problem_.first_x;
    const float* pixels[kProducts];
    for (int k = 0; k < kProducts; ++k) {
      const int64_t y = y0 + k / kPoints, x = x0 + k % kPoints;
      const bool inside = present && y >= 0 && y < in.height && x >= 0 && x < in.width;
      pixels[k] = inside ? problem_.x + in.at(sample, 0, y, x) : zeros_;
    }
    const int64_t step = problem_.inputs.step;
    for (int64_t c = first_channel; c < last_channel; c += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, last_channel - c));
      float* vectors = to + problem_.inputs.left_at(row, c);
      Float scale(1.0);
      if (problem_.pre && present) {
        scale = load_lanes(problem_.pre + sample * in.channels + c, 0, count);
      }
      const auto transform = [&](const auto& load) STYLEGAN_FAST_INLINE {
        along_both<kPoints, kPoints>(
            InputTransform(), [&](int k) STYLEGAN_FAST_INLINE { return scale * load(k); },
            [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(vectors + k * step); });
      };
      if (in.stride_c == 1 && count == kLanes) {
        transform([&](int k) STYLEGAN_FAST_INLINE { return Float::load(pixels[k] + c); });
      } else {
        alignas(64) float gathered[kProducts][kLanes] = {};
        for (int k = 0; k < kProducts; ++k)
          for (int lane = 0; pixels[k] != zeros_ && lane < count; ++lane)
            gathered[k][lane] = pixels[k][(c + lane) * in.stride_c];
        transform([&](int k) STYLEGAN_FAST_INLINE { return Float::load(gathered[k]); });
      }
    }
  }

  void write_planes(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    for (int64_t t = begin; t < end; t += kLanes) {
      const Segments segments(problem_.tiles, t, smaller(t + kLanes, end));
      for (int64_t o = first; o < last; ++o) {
        const float* sums =
            sums_ + (o - first) * problem_.phases * problem_.sum_step + t - begin;
        p_.up == 1 ? write_plane<1>(segments, o, sums) : write_plane<2>(segments, o, sums);
      }
    }
  }

  template <int up>
  void write_plane(const Segments& segments, int64_t o, const float* sums) const {
    constexpr int columns = up * kTile;
    alignas(64) float rows[up * kTile][columns * kLanes];
    const int64_t step = problem_.sums_step;
    for (int phase_y = 0; phase_y < up; ++phase_y) {
      Float tile[kTile * columns];
      unrolled<up>([&](auto phase_x) STYLEGAN_FAST_INLINE {
        const float* from = sums + (phase_y * up + phase_x) * problem_.sum_step;
        along_both<kPoints, kTile>(
            OutputTransform(),
            [&](int k) STYLEGAN_FAST_INLINE { return Float::load(from + k * step); },
            [&](int k, Float v) STYLEGAN_FAST_INLINE { tile[k * up + phase_x] = v; });
      });
      unrolled<kTile>([&](auto j) STYLEGAN_FAST_INLINE {
        Float row[columns];
        interleave_columns<columns>(tile + j * columns, 1, row);
        unrolled<columns>([&](auto c) STYLEGAN_FAST_INLINE {
          row[c].store(rows[j * up + phase_y] + c * kLanes);
        });
      });
    }
    for (const Segment& s : segments) {
      const int64_t y = s.row * columns, x = s.column * columns;
      const int64_t count = smaller((s.last - s.first) * columns, p_.out_width - x);
      for (int64_t j = 0; j < smaller(columns, p_.out_height - y); ++j)
        finish(s.sample, o, y + j, x, count, rows[j] + s.first * columns);
    }
  }

  void write_pixels(int64_t t, int64_t row, int64_t first, int64_t last) const {
    alignas(64) float pixels[kTile * kTile][kBlockSums];
    const Tiling& tiles = problem_.tiles;
    const int64_t sample = t / tiles.columns / tiles.rows;
    const int64_t step = problem_.sums_step;
    for (int phase = 0; phase < problem_.phases; ++phase) {
      const float* from = sums_ + row * problem_.sum_step + phase * problem_.block_channels;
      for (int64_t o = 0; o < last - first; o += kLanes)
        along_both<kPoints, kTile>(
            OutputTransform(),
            [&](int k) STYLEGAN_FAST_INLINE { return Float::load(from + o + k * step); },
            [&](int k, Float v) STYLEGAN_FAST_INLINE { v.store(pixels[k] + o); });
      for (int k = 0; k < kTile * kTile; ++k) {
        const int64_t y = (t / tiles.columns % tiles.rows * kTile + k / kTile) * p_.up + phase / p_.up;
        const int64_t x = (t % tiles.columns * kTile + k % kTile) * p_.up + phase % p_.up;
        if (y < p_.out_height && x < p_.out_width) {
          finish(sample, first, y, x, last - first, pixels[k]);
        }
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

}  // namespace

void conv2d_forward(const Conv2d& p, const Epilogue* e, const void* x, const void* w,
                    const float* pre, const void* add, void* y, uint8_t* mask, int threads) {
  const Problem problem(p, e, static_cast<const float*>(x), static_cast<const float*>(w), pre,
                        static_cast<const float*>(add), static_cast<float*>(y), mask, threads);
  const int64_t used = problem.threads;
  const int64_t weights = problem.weights.step * kProducts;
  const int64_t inputs = problem.inputs.step * kProducts, sums = problem.sums_step * kProducts;
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
    return Worker(problem, all_sums + thread * sums, zeros);
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

#undef STYLEGAN_FAST_INLINE

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
