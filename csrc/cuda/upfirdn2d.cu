// CUDA kernels of upfirdn2d (csrc/upfirdn2d.h). Each reads the input once and ends in the epilogue:
//
//   stream  4 taps (and 12, resampling by 2): a thread walks down a strip of rows and keeps partial
//           sums of outputs in registers. Neighbours share what they read in the L1 cache.
//   tile    longer separable filters: a block filters a tile along x into shared memory, then y
//   direct  everything else: a thread an output
//
// All rest on one fact about resampling: outputs up / gcd(up, down) apart along an axis have the
// same taps, on inputs down / gcd(up, down) apart.

#include "../upfirdn2d.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "epilogue.cuh"

namespace stylegan_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStreamThreads = 128;
// Blocks of a multiprocessor, which bounds their registers to 96, or 128.
constexpr int stream_blocks(int taps) { return taps > 4 ? 4 : 5; }
constexpr int kStreamWaves = 4;    // of blocks, as far as strips stay long enough
constexpr int kShortestStrip = 8;  // rows or pairs of rows
constexpr int kLongestStrip = 64;
constexpr int kStreamBytes = 32;   // new to a thread and its neighbours, read before it waits
constexpr int kPlaneColumns = 4;   // outputs of a thread side by side
constexpr int kPackColumns = 2;    // the same, of packs
constexpr int kPackBytes = 8;      // more would cost registers, so warps
constexpr int kTileTaps = 256, kTileStage = 4608, kTileMiddle = 7168;  // floats: 47 KiB together
constexpr int kTileFactor = 64;    // of up and down, at most
constexpr int kTileOutputs = 4;    // of a thread, that share taps and inputs

struct Axis {
  int64_t in, out, pad;
  int up, down, taps;
};

// u without its input and output.
struct Fir {
  explicit Fir(const Upfirdn2d& p)
      : x{p.in_width, p.out_width, p.pad_x, p.up_x, p.down_x, p.taps ? p.taps_x : 1},
        y{p.in_height, p.out_height, p.pad_y, p.up_y, p.down_y, p.taps ? p.taps_y : 1},
        taps(static_cast<const float*>(p.taps)), separable(p.separable), correlate(p.correlate),
        gain(static_cast<float>(p.gain)), samples(p.samples), channels(p.channels),
        stride_n(p.stride_n), stride_c(p.stride_c), stride_h(p.stride_h), stride_w(p.stride_w),
        out_w(p.channels_last ? channels : 1), out_c(p.channels_last ? 1 : x.out * y.out) {}

  __device__ float tap(int k) const {
    return taps ? taps[correlate ? k : x.taps - 1 - k] : 1.0f;
  }
  __device__ float tap(int ky, int kx) const {
    const int k = ky * x.taps + kx;
    return taps ? taps[correlate ? k : x.taps * y.taps - 1 - k] : 1.0f;
  }
  __device__ int64_t input(int64_t sample, int64_t channel) const {
    return sample * stride_n + channel * stride_c;
  }
  __device__ int64_t output(int64_t sample, int64_t channel, int64_t oy, int64_t ox) const {
    return sample * channels * x.out * y.out + channel * out_c + (oy * x.out + ox) * out_w;
  }

  Axis x, y;
  const float* taps;
  bool separable, correlate;
  float gain;
  int64_t samples, channels, stride_n, stride_c, stride_h, stride_w;
  int64_t out_w, out_c;  // strides of the output
};

// Where u reads: x itself, or d(v) of dy and its mask. Loads are relative to an element, within 32
// bits.
template <class T>
class Image {
 public:
  explicit Image(const T* x) : x_(x) {}

  static constexpr int kPlaneSteps = 4;  // as many as registers allow
  using Origin = const T*;
  __device__ Origin at(int64_t element) const { return x_ + element; }

  template <int P>
  using Input = Pack<T, P>;
  template <int P>
  __device__ Input<P> read(Origin origin, int offset) const {
    return Pack<T, P>::load(origin + offset);
  }
  template <int P>
  __device__ void value(const Input<P>& in, float (&out)[P]) const {
#pragma unroll
    for (int j = 0; j < P; ++j) out[j] = in[j];
  }

 private:
  const T* x_;
};

template <class T>
class Derivative {
 public:
  Derivative(const Branches& branches, const T* dy) : branches_(branches), dy_(dy) {}

  static constexpr int kPlaneSteps = 2;
  struct Origin {
    const T* dy;
    Branches::Origin mask;
  };
  __device__ Origin at(int64_t element) const { return {dy_ + element, branches_.at(element)}; }

  template <int P>
  struct Input {
    Pack<T, P> dy;
    unsigned bits;
  };
  template <int P>
  __device__ Input<P> read(const Origin& origin, int offset) const {
    return {Pack<T, P>::load(origin.dy + offset), branches_.bits<true>(origin.mask, offset)};
  }
  template <int P>
  __device__ void value(const Input<P>& in, float (&out)[P]) const {
    branches_.derive(in.dy, in.bits, out);
  }

 private:
  Branches branches_;
  const T* dy_;
};

// Where N values go: the elements `stride` apart from this one on, of which there are `count`.
struct Place {
  int64_t element;  // in the output
  int64_t row;      // in the image
  int64_t column;
  int count;
  int64_t stride;
  bool packed;  // and aligned
};

template <class T>
class Output {
 public:
  Output(T* y, const T* add) : y_(y), add_(add) {}

  template <bool whole, int N>
  __device__ void write(float (&values)[N], const Place& place) const {
    if (whole ? place.count == N : place.packed && place.count == N) {
      if (add_) {
        const auto add = Pack<T, N>::load(add_ + place.element);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] += add[j];
      }
      Pack<T, N>::rounded(values).store(y_ + place.element);
    } else if constexpr (!whole) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j >= place.count) break;
        const int64_t element = place.element + j * place.stride;
        round_to(add_ ? values[j] + to_float(add_[element]) : values[j], y_[element]);
      }
    }
  }

 private:
  T* y_;
  const T* add_;
};

// What becomes of u. Each finishes N values: of P = N channels of a pixel, or of N pixels of one.
template <class T>
class Plain {
 public:
  explicit Plain(const Output<T>& output) : output_(output) {}

  template <int P>
  struct Channels {};
  template <int P>
  __device__ Channels<P> channels(int64_t, int64_t, bool) const {
    return {};
  }
  template <int P, int N>
  __device__ void finish(const Channels<P>&, float (&values)[N], const Place& place) const {
    output_.template write<(P > 1)>(values, place);
  }

 private:
  Output<T> output_;
};

template <class T>
class Scaled {
 public:
  Scaled(const Output<T>& output, const float* scale, int64_t channels)
      : output_(output), scale_(scale), channels_(channels) {}

  template <int P>
  struct Channels {
    float scale[P];
  };
  template <int P>
  __device__ Channels<P> channels(int64_t sample, int64_t channel, bool is_on) const {
    Channels<P> local;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      local.scale[j] = scale_ && is_on ? scale_[sample * channels_ + channel + j] : 1.0f;
    }
    return local;
  }
  template <int P, int N>
  __device__ void finish(const Channels<P>& local, float (&values)[N], const Place& place) const {
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] *= local.scale[P == 1 ? 0 : j];
    output_.template write<(P > 1)>(values, place);
  }

 private:
  Output<T> output_;
  const float* scale_;
  int64_t channels_;
};

template <class T, class Act>
class Fused {
 public:
  Fused(const Output<T>& output, const Epilogue& e, const Act& act, uint8_t* mask, int64_t width)
      : output_(output), width_(width), parts_(e, e.geometry), act_(act),
        gain_(static_cast<float>(e.gain)), clamp_(static_cast<float>(e.clamp)), mask_(mask) {}

  template <int P>
  struct Channels {
    float scale[P], bias[P], strength;
    const float* noise;
  };
  template <int P>
  __device__ Channels<P> channels(int64_t sample, int64_t channel, bool is_on) const {
    Channels<P> local;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      local.scale[j] =
          parts_.scale && is_on ? parts_.scale[sample * parts_.channels + channel + j] : 1.0f;
      local.bias[j] = is_on ? parts_.bias_value(channel + j) : 0.0f;
    }
    local.strength = parts_.strength_value();
    local.noise = parts_.noise;
    if (local.noise && parts_.noise_per_sample) local.noise += sample * parts_.pixels.divisor();
    return local;
  }

  template <int P, int N>
  __device__ void finish(const Channels<P>& local, float (&values)[N], const Place& place) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int channel = P == 1 ? 0 : j;
      values[j] = local.scale[channel] * values[j] + local.bias[channel];
    }
    if (local.noise) {
      const float* const pixel = local.noise + place.row * width_ + place.column;
      float noise = 0.0f;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if ((P == 1 || j == 0) && j < place.count) noise = pixel[j];
        values[j] += local.strength * noise;
      }
    }
    const unsigned bits = cuda::finish(values, act_, gain_, clamp_, mask_ != nullptr);
    if (mask_) write_mask<N>(mask_, place.element, place.count ? bits : 0, place.count > 0);
    output_.template write<(P > 1)>(values, place);
  }

 private:
  Output<T> output_;
  int64_t width_;  // of the image
  Parts<T> parts_;
  Act act_;
  float gain_, clamp_;
  uint8_t* mask_;
};

// The inputs of an output along an axis: from `first` on, under every up-th tap from `tap` on.
struct Reads {
  // Of output o, where `up` divides by axis.up.
  __device__ Reads(const Axis& axis, const Divider& up, int64_t o) {
    const int64_t before = axis.pad > 0 ? up(axis.pad + axis.up - 1) : 0;  // makes it positive
    const int64_t place = o * axis.down - axis.pad + before * axis.up;
    first = up(place + axis.up - 1);
    tap = first * axis.up - place;
    first -= before;
    if (first < 0) {
      tap -= first * axis.up;
      first = 0;
    }
  }

  int64_t first, tap;
};

struct Ups {
  Divider x, y;
};

// u at one pixel, of P channels from this element of the input on.
template <int P, class Source>
__device__ inline void gather(const Fir& fir, const Ups& ups, const Source& source, int64_t from,
                              int64_t ox, int64_t oy, float (&out)[P]) {
  const Reads rx(fir.x, ups.x, ox), ry(fir.y, ups.y, oy);
  float total[P] = {};
  int64_t j = ry.first;
  for (int64_t ky = ry.tap; ky < fir.y.taps && j < fir.y.in; ky += fir.y.up, ++j) {
    float row[P] = {};
    int64_t i = rx.first;
    for (int64_t kx = rx.tap; kx < fir.x.taps && i < fir.x.in; kx += fir.x.up, ++i) {
      const float tap = fir.separable ? fir.tap(kx) : fir.tap(ky, kx);
      float value[P];
      const auto origin = source.at(from + j * fir.stride_h + i * fir.stride_w);
      source.value(source.template read<P>(origin, 0), value);
#pragma unroll
      for (int p = 0; p < P; ++p) row[p] += tap * value[p];
    }
    const float tap = fir.separable ? fir.tap(ky) : 1.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) total[p] += tap * row[p];
  }
#pragma unroll
  for (int p = 0; p < P; ++p) out[p] = fir.gain * total[p];
}

// Filters of groups * up * down taps, where up or down is 1. Outputs come in groups of `up`; each
// reads `groups` groups of `down` inputs, of which it shares all but one with the next.
template <int up_, int down_, int groups_>
struct Shape {
  static constexpr int up = up_, down = down_, groups = groups_, taps = groups * up * down;

  // The tap of output u of a group on input i.
  STYLEGAN_FAST_HD static constexpr int tap(int u, int i) { return i * up + up - 1 - u; }
};

// Along an axis group q is the outputs origin + up * q ... and reads from input base + down * q on.
struct Frame {
  explicit Frame(const Axis& a)
      : origin(a.up == 1 || (a.pad - 1) % 2 == 0 ? 0 : -1),
        base(static_cast<int>((origin - a.pad + a.up - 1) / a.up)), in(static_cast<int>(a.in)),
        out(static_cast<int>(a.out)), groups((out - origin + a.up - 1) / a.up) {}

  int origin, base, in, out, groups;
};

struct Stream {
  Frame x, y;
  // A thread's number goes through columns and channels, or channels and columns, then strips and
  // samples.
  bool columns_first, packed;
  Divider inner, outer, strips;
  int strip;  // groups of rows
};

// The filter along x and along y. A filter of two dimensions may be their product; `exact` is
// whether it is, up to rounding.
template <int N>
struct Factors {
  __device__ explicit Factors(const Fir& fir) : exact(fir.separable) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      x[k] = fir.separable ? fir.tap(k) : fir.tap(0, k) / fir.tap(0, 0);
      y[k] = fir.separable ? fir.tap(k) : fir.tap(k, 0);
    }
    if (!fir.separable) {
      exact = true;
#pragma unroll
      for (int k = 0; k < N * N; ++k) {
        const float tap = fir.tap(k / N, k % N);
        exact = exact && fabsf(x[k % N] * y[k / N] - tap) <= 0x1p-22f * fabsf(tap);
      }
    }
#pragma unroll
    for (float& tap : y) tap *= fir.gain;
  }

  float x[N], y[N];
  bool exact;
};

// P > 1: packs of P channels, dense and aligned in input and output. P = 1: one channel, any
// strides; where the tensor is NCHW and aligned, results leave in packs of columns.
template <class T, class Shape, int P, class Source, class Tail>
__global__ void __launch_bounds__(kStreamThreads, stream_blocks(Shape::taps))
    stream_kernel(const Fir fir, const Stream plan, const Source source, const Tail tail) {
  constexpr bool planes = P == 1;
  constexpr int U = Shape::up, D = Shape::down, G = Shape::groups;
  constexpr int width = planes ? kPlaneColumns : kPackColumns;
  constexpr int columns = planes ? width + U - 1 : width;  // of whole groups, as far as needed
  constexpr int reads = (columns - 1) / U * D + G * D;
  constexpr int step_bytes = D * (width * D / U) * P * static_cast<int>(sizeof(T));
  constexpr int wanted = (kStreamBytes + step_bytes - 1) / step_bytes;
  constexpr int most = (planes ? Source::kPlaneSteps : 4) / U;
  constexpr int steps = wanted < most ? wanted : most;
  using Input = typename Source::template Input<P>;

  int64_t rest = static_cast<int64_t>(blockIdx.x) * kStreamThreads + threadIdx.x;
  const auto pop = [&](const Divider& size) {
    const int64_t all = rest;
    rest = size(all);
    return all - rest * size.divisor();
  };
  const int64_t inner = pop(plan.inner), outer = pop(plan.outer);
  const int first_group = static_cast<int>(pop(plan.strips)) * plan.strip;
  const int end_group = min(first_group + plan.strip, plan.y.groups);
  const int64_t sample = rest, channel = (planes && plan.columns_first ? outer : inner) * P;
  const int column = static_cast<int>(planes && plan.columns_first ? inner : outer);
  const bool is_on = sample < fir.samples;

  const int ox = column * width + plan.x.origin;
  const int first = plan.x.base + column * (width / U) * D;
  const int first_row = plan.y.base + first_group * D;
  int64_t from = fir.input(sample, channel) + first * fir.stride_w + first_row * fir.stride_h;
  const int stride = static_cast<int>(fir.stride_w);
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < reads; ++i) {
    inside |= static_cast<unsigned>(is_on && first + i >= 0 && first + i < plan.x.in) << i;
  }
  const auto local = tail.template channels<P>(sample, channel, is_on);

  const int shift = planes && U > 1 ? -plan.x.origin : 0;
  const int64_t row_stride = plan.x.out * fir.out_w;
  unsigned outputs = 0;
#pragma unroll
  for (int c = 0; c < width; ++c) {
    const int column = ox + shift + c;
    outputs |= static_cast<unsigned>(is_on && column >= 0 && column < plan.x.out) << c;
  }
  // `element`: where the first of the thread's columns goes in this row.
  const auto write = [&](int64_t element, int oy, bool has_row, const float (&row)[columns][P]) {
    const unsigned exists = has_row && oy >= 0 && oy < plan.y.out ? outputs : 0;
    if constexpr (planes) {
      float values[width];
#pragma unroll
      for (int j = 0; j < width; ++j) values[j] = shift ? row[j + U - 1][0] : row[j][0];
      tail.template finish<P>(local, values, {element, oy, ox + shift, __popc(exists), fir.out_w,
                                              plan.packed});
    } else {
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        float values[P];
#pragma unroll
        for (int p = 0; p < P; ++p) values[p] = row[c][p];
        tail.template finish<P>(local, values, {element + c * fir.out_w, oy, ox + c,
                                                exists >> c & 1 ? P : 0, 1, true});
      }
    }
  };
  int oy = plan.y.origin + first_group * U;
  int64_t to = fir.output(sample, channel, oy, ox + shift);

  const Factors<Shape::taps> factors(fir);
  if (!factors.exact) {  // tap by tap
    for (int row = 0; row < plan.strip * U; ++row, ++oy, to += row_stride) {
      float values[columns][P] = {};
#pragma unroll 1
      for (int c = 0; c < columns; ++c) {
        float sum[P] = {};
#pragma unroll 1
        for (int k = 0; k < G * D * G * D; ++k) {
          const int j = k / (G * D), i = k % (G * D), in_row = first_row + row / U * D + j;
          const int place = c / U * D + i;
          if (in_row < 0 || in_row >= plan.y.in || !(inside >> place & 1)) continue;
          const auto origin = source.at(from + (row / U * D + j) * fir.stride_h);
          const float tap = fir.gain * fir.tap(Shape::tap(row % U, j), Shape::tap(c % U, i));
          float value[P];
          source.value(source.template read<P>(origin, place * stride), value);
#pragma unroll
          for (int p = 0; p < P; ++p) sum[p] += tap * value[p];
        }
#pragma unroll
        for (int k = 0; k < columns; ++k) {
#pragma unroll
          for (int p = 0; p < P; ++p) values[k][p] = k == c ? sum[p] : values[k][p];
        }
      }
      write(to, oy, row < (end_group - first_group) * U, values);
    }
    return;
  }

  // Where up = 1: partial sums of the G - 1 rows that are not complete yet, oldest first. Else the
  // last G - 1 rows of the input, filtered along x; they are fewer.
  float kept[G - 1][columns][P] = {};
  for (int step = 0; step < plan.strip + G - 1; step += steps) {
    Input in[steps][D][reads];
#pragma unroll
    for (int s = 0; s < steps; ++s) {
#pragma unroll
      for (int d = 0; d < D; ++d) {
        const int row = first_row + (step + s) * D + d;
        const unsigned exists = row >= 0 && row < plan.y.in ? inside : 0;
        const auto origin = source.at(from);
        from += fir.stride_h;
        const auto load = [&](int step) {
#pragma unroll
          for (int i = 0; i < reads; ++i) {
            in[s][d][i] = {};
            if (exists >> i & 1) in[s][d][i] = source.template read<P>(origin, i * step);
          }
        };
        if (planes && stride == 1) {
          load(1);
        } else {
          load(stride);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      float rows[D][columns][P] = {};
#pragma unroll
      for (int d = 0; d < D; ++d) {
#pragma unroll
        for (int i = 0; i < reads; ++i) {
          float value[P];
          source.value(in[s][d][i], value);
#pragma unroll
          for (int c = 0; c < columns; ++c) {
            const int place = i - c / U * D;
            if (place < 0 || place >= G * D) continue;
            const float tap = factors.x[Shape::tap(c % U, place)];
#pragma unroll
            for (int p = 0; p < P; ++p) rows[d][c][p] += tap * value[p];
          }
        }
      }
      float done[U][columns][P] = {};
#pragma unroll
      for (int c = 0; c < columns; ++c) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
#pragma unroll
          for (int g = 0; g < G; ++g) {
            if constexpr (U == 1) {
              float sum = g < G - 1 ? kept[g % (G - 1)][c][p] : 0.0f;
#pragma unroll
              for (int d = 0; d < D; ++d) {
                sum += factors.y[Shape::tap(0, (G - 1 - g) * D + d)] * rows[d][c][p];
              }
              (g == 0 ? done[0] : kept[(g + G - 2) % (G - 1)])[c][p] = sum;
            } else {
              const float value = g < G - 1 ? kept[g % (G - 1)][c][p] : rows[0][c][p];
#pragma unroll
              for (int u = 0; u < U; ++u) done[u][c][p] += factors.y[Shape::tap(u, g)] * value;
              if (g > 0) kept[g - 1][c][p] = value;
            }
          }
        }
      }
      if (step + s < G - 1) continue;
      const bool has_group = first_group + step + s - (G - 1) < end_group;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        write(to, oy, has_group, done[u]);
        to += row_stride;
        ++oy;
      }
    }
  }
}

// Along an axis of a tile: `phases` sorts of outputs, `outputs` of each, phases apart; `step` is
// how far apart their inputs are. The tile at 0 reads `in` inputs from `base` on.
struct TileAxis {
  // The taps of outputs phase, phase + phases, ...: `count` from `tap` on, of which the first is on
  // input `first` of the tile.
  struct Phase {
    int tap, first, count;
  };

  TileAxis(const Axis& a, int outputs)
      : up(a.up), down(a.down), taps(a.taps), phases(a.up / std::gcd(a.up, a.down)),
        outputs(outputs), step(a.down / std::gcd(a.up, a.down)),
        base(a.pad > 0 ? -(a.pad / a.up) : ceil_divide(-a.pad, a.up)),
        lead(static_cast<int>(-a.pad - base * a.up)),
        in(((phases * outputs - 1) * down + lead + taps - 1) / up + 1),
        tiles(ceil_divide(a.out, phases * outputs)) {}

  __host__ __device__ int out() const { return phases * outputs; }
  __device__ Phase phase(int phase) const {
    const int place = phase * down + lead, first = (place + up - 1) / up, tap = first * up - place;
    return {tap, first, tap < taps ? (taps - tap + up - 1) / up : 0};
  }

  int up, down, taps, phases, outputs, step;
  int64_t base;
  int lead, in;
  Divider tiles;
};

struct Tile {
  TileAxis x, y;
  int pitch_in, pitch;  // of a row, in pixels; odd, so that lanes in a column use different banks
  int rows;             // of the input at a time, a power of two
  Divider channel_groups;
};

// out[r] = sum over q of taps[q * up] * in[(q + r * step) * stride].
template <int R>
__device__ inline void slide(const float* taps, int up, int count, const float* in, int stride,
                             int step, float (&out)[R]) {
#pragma unroll
  for (float& sum : out) sum = 0.0f;
  for (int begin = 0; begin < min(step, count); ++begin) {
    const float* p = in + begin * stride;
    float window[R];
#pragma unroll
    for (int r = 0; r < R - 1; ++r) window[r] = p[r * step * stride];
#pragma unroll 4
    for (int q = begin; q < count; q += step) {
      window[R - 1] = p[(R - 1) * step * stride];
      p += step * stride;
      const float tap = taps[q * up];
#pragma unroll
      for (int r = 0; r < R; ++r) out[r] += tap * window[r];
#pragma unroll
      for (int r = 0; r < R - 1; ++r) window[r] = window[r + 1];
    }
  }
}

// A tile of C channels. Pixels are C floats in shared memory.
template <class T, int C, class Source, class Tail>
__global__ void __launch_bounds__(kThreads, 3)
    tile_kernel(const Fir fir, const Tile plan, const Source source, const Tail tail) {
  constexpr int R = kTileOutputs;
  __shared__ float taps[kTileTaps], stage[kTileStage], middle[kTileMiddle];
  int64_t rest = blockIdx.x;
  const auto pop = [&](const Divider& size) {
    const int64_t all = rest;
    rest = size(all);
    return all - rest * size.divisor();
  };
  const int64_t tile_x = pop(plan.x.tiles), tile_y = pop(plan.y.tiles);
  const int64_t first_channel = pop(plan.channel_groups) * C, sample = rest;
  const int64_t first_column = plan.x.base + tile_x * plan.x.outputs * plan.x.step;
  const int64_t first_row = plan.y.base + tile_y * plan.y.outputs * plan.y.step;

  for (int k = threadIdx.x; k < fir.x.taps; k += kThreads) taps[k] = fir.tap(k);
  for (int begin = 0; begin < plan.y.in; begin += plan.rows) {
    __syncthreads();
    const int staged = plan.rows * plan.pitch_in * C;
    for (int i = threadIdx.x; i < staged; i += kThreads) {
      const int pixel = i / C, y = pixel / plan.pitch_in;
      const int64_t channel = first_channel + i % C, row = first_row + begin + y;
      const int64_t column = first_column + pixel - y * plan.pitch_in;
      float value[1] = {0.0f};
      if (channel < fir.channels && row >= 0 && row < fir.y.in && column >= 0 &&
          column < fir.x.in) {
        const int64_t element =
            fir.input(sample, channel) + row * fir.stride_h + column * fir.stride_w;
        source.value(source.template read<1>(source.at(element), 0), value);
      }
      stage[i] = value[0];
    }
    __syncthreads();
    const int lanes = plan.rows * C, groups = plan.x.out() / R;
    for (int i = threadIdx.x; i < lanes * groups; i += kThreads) {
      const int c = i % C, group = i / lanes, y = i % lanes / C;
      const int index = group / plan.x.phases, phase_index = group - index * plan.x.phases;
      if (begin + y >= plan.y.in) continue;
      const auto phase = plan.x.phase(phase_index);
      const int from = y * plan.pitch_in + phase.first + index * R * plan.x.step;
      float values[R];
      slide(taps + phase.tap, plan.x.up, phase.count, stage + from * C + c, C, plan.x.step, values);
      const int to = (begin + y) * plan.pitch + phase_index + index * R * plan.x.phases;
#pragma unroll
      for (int r = 0; r < R; ++r) middle[(to + r * plan.x.phases) * C + c] = values[r];
    }
  }
  __syncthreads();

  const int lanes = plan.x.out() * C, items = lanes * (plan.y.out() / R);
  for (int begin = 0; begin < items; begin += kThreads) {
    const int i = begin + threadIdx.x;
    const int group = i / lanes, lane = i - group * lanes, c = lane % C, x = lane / C;
    const int index = group / plan.y.phases, phase_index = group - index * plan.y.phases;
    const int64_t channel = first_channel + c, ox = tile_x * plan.x.out() + x;
    const bool is_on = i < items && channel < fir.channels && ox < fir.x.out;
    float values[R] = {};
    if (is_on) {
      const auto phase = plan.y.phase(phase_index);
      const int from = (phase.first + index * R * plan.y.step) * plan.pitch + x;
      slide(taps + phase.tap, plan.y.up, phase.count, middle + from * C + c, plan.pitch * C,
            plan.y.step, values);
    }
    const auto local = tail.template channels<1>(sample, channel, is_on);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t oy = tile_y * plan.y.out() + phase_index + (index * R + r) * plan.y.phases;
      float value[1] = {fir.gain * values[r]};
      tail.template finish<1>(local, value,
                              {fir.output(sample, channel, oy, ox), oy, ox,
                               is_on && oy < fir.y.out, 1, false});
    }
  }
}

struct Direct {
  bool channels_first;
  Divider inner, middle, outer;  // of an element's number in memory order
  Ups ups;
};

template <class T, class Source, class Tail>
__global__ void __launch_bounds__(kThreads, 4)
    direct_kernel(const Fir fir, const Direct plan, const Source source, const Tail tail) {
  int64_t rest = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t element = rest;
  const auto pop = [&](const Divider& size) {
    const int64_t all = rest;
    rest = size(all);
    return all - rest * size.divisor();
  };
  const int64_t inner = pop(plan.inner), middle = pop(plan.middle), outer = pop(plan.outer);
  const int64_t channel = plan.channels_first ? inner : outer, sample = rest;
  const int64_t ox = plan.channels_first ? middle : inner;
  const int64_t oy = plan.channels_first ? outer : middle;
  const bool is_on = sample < fir.samples;
  float value[1] = {0.0f};
  if (is_on) gather(fir, plan.ups, source, fir.input(sample, channel), ox, oy, value);
  const auto local = tail.template channels<1>(sample, channel, is_on);
  tail.template finish<1>(local, value, {element, oy, ox, is_on, 1, false});
}

unsigned blocks_of(int64_t threads, int block) {
  const int64_t blocks = ceil_divide(threads, block);
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("upfirdn2d: the tensor is too large for the cuda backend");
  }
  return static_cast<unsigned>(blocks);
}

template <class T, class Source, class Tail>
class Launcher {
  static constexpr bool kCurved = std::is_same_v<Tail, Fused<T, AnyCurved>>;

 public:
  Launcher(const Upfirdn2d& p, const Source& source, const Tail& tail, void* stream)
      : p_(p), fir_(p), source_(source), tail_(tail), stream_(stream) {}

  void run(bool aligned_input, bool aligned_output, bool with_mask) {
    const Axis &x = fir_.x, &y = fir_.y;
    constexpr int64_t far = 1 << 28;
    const bool near = p_.stride_w < far / 16 && std::max({x.in, x.out, std::abs(x.pad), y.in, y.out,
                                                          std::abs(y.pad)}) < far;
    const bool regular = near && x.up == y.up && x.down == y.down && x.taps == y.taps;
    const auto is = [&](int up, int down, int taps) {
      return regular && x.up == up && x.down == down && x.taps == taps;
    };
    aligned_input_ = aligned_input;
    aligned_output_ = aligned_output;
    // No network resamples in front of an activation, or has a curved one behind a filter: those
    // are spared the longest kernels to compile.
    if constexpr (!kCurved) {
      if (is(1, 1, 4) && stream<Shape<1, 1, 4>>(with_mask)) return;
    }
    if constexpr (std::is_same_v<Tail, Plain<T>>) {
      if (is(2, 1, 4) && stream<Shape<2, 1, 2>>(false)) return;
      if (is(1, 2, 4) && stream<Shape<1, 2, 2>>(false)) return;
      if (fir_.separable && is(2, 1, 12)) return stream_planes<Shape<2, 1, 6>>();
      if (fir_.separable && is(1, 2, 12)) return stream_planes<Shape<1, 2, 6>>();
    }
    if constexpr (!kCurved) {
      if (near && fir_.separable && x.taps > 4) {
        const bool has_units = p_.channels_last && p_.channels >= kUnit;
        if (has_units ? tile<kUnit>() : tile<1>()) return;
      }
    }
    direct();
  }

 private:
  template <class Shape>
  bool stream(bool with_mask) {
    constexpr int kPack = kPackBytes / sizeof(T);
    const bool packs = aligned_input_ && aligned_output_ && p_.channels_last && p_.stride_c == 1 &&
                       (p_.stride_n | p_.stride_h | p_.stride_w) % kPack == 0 &&
                       p_.channels % (with_mask ? kUnit : kPack) == 0;
    if (packs) {
      const Frame x(fir_.x);
      stream<Shape, kPack>(p_.channels / kPack, ceil_divide(x.out - x.origin, kPackColumns), false);
      return true;
    }
    if (with_mask && p_.channels_last) return false;
    stream_planes<Shape>();
    return true;
  }

  template <class Shape>
  void stream_planes() {
    const int64_t columns = ceil_divide(p_.out_width, kPlaneColumns);
    if (p_.channels_last) {
      stream<Shape, 1>(p_.channels, columns, false);
    } else {
      stream<Shape, 1>(columns, p_.channels, true);
    }
  }

  template <class Shape, int P>
  void stream(int64_t inner, int64_t outer, bool columns_first) {
    const Frame x(fir_.x), y(fir_.y);
    const int64_t columns = inner * outer * p_.samples;
    const int64_t wanted = static_cast<int64_t>(multiprocessors()) * kStreamThreads *
                           stream_blocks(Shape::taps) * kStreamWaves;
    const int64_t longest = std::clamp<int64_t>(ceil_divide(columns * y.groups, wanted),
                                                kShortestStrip, kLongestStrip);
    const int64_t strips = ceil_divide(y.groups, longest);
    const bool packed = columns_first && aligned_output_ && p_.out_width % kPlaneColumns == 0;
    const Stream plan = {x, y, columns_first, packed, Divider(inner), Divider(outer),
                         Divider(strips), static_cast<int>(ceil_divide(y.groups, strips))};
    launch(stream_kernel<T, Shape, P, Source, Tail>,
           dim3(blocks_of(columns * strips, kStreamThreads)), kStreamThreads, stream_, fir_, plan,
           source_, tail_);
  }

  // False where the filter needs too much shared memory.
  template <int C>
  bool tile() {
    const int factor = std::max({p_.up_x, p_.up_y, p_.down_x, p_.down_y});
    if (fir_.x.taps > kTileTaps || factor > kTileFactor) return false;
    for (int width = 32 / (C == 1 ? 1 : 2); width >= (C == 1 ? 8 : 4); width /= 2) {
      const TileAxis x(fir_.x, width);
      if (x.out() > 32 && width > 8) continue;
      const int pitch_in = x.in | 1, pitch = x.out() | 1;
      int rows = 32;
      while (rows > 1 && rows * pitch_in * C > kTileStage) rows /= 2;
      if (rows * pitch_in * C > kTileStage) continue;
      for (int height = 128; height >= 4; height /= 2) {
        const TileAxis y(fir_.y, height);
        if (height > 4 && y.out() >= 2 * fir_.y.out) continue;
        if (y.in * pitch * C > kTileMiddle) continue;
        const int64_t groups = ceil_divide(p_.channels, C);
        const Tile plan = {x, y, pitch_in, pitch, rows, Divider(groups)};
        const int64_t tiles = ceil_divide(fir_.x.out, x.out()) * ceil_divide(fir_.y.out, y.out());
        launch(tile_kernel<T, C, Source, Tail>, dim3(blocks_of(tiles * groups * p_.samples, 1)),
               kThreads, stream_, fir_, plan, source_, tail_);
        return true;
      }
    }
    return false;
  }

  void direct() {
    const Divider channels(p_.channels), width(p_.out_width), height(p_.out_height);
    const bool last = p_.channels_last;
    const Direct plan = {last, last ? channels : width, last ? width : height,
                         last ? height : channels, ups()};
    const int64_t numel = p_.samples * p_.channels * p_.out_width * p_.out_height;
    launch(direct_kernel<T, Source, Tail>, dim3(blocks_of(numel, kThreads)), kThreads, stream_,
           fir_, plan, source_, tail_);
  }

  Ups ups() const { return {Divider(p_.up_x), Divider(p_.up_y)}; }

  const Upfirdn2d& p_;
  const Fir fir_;
  const Source source_;
  const Tail tail_;
  void* const stream_;
  bool aligned_input_ = false, aligned_output_ = false;
};

void check_mask(const uint8_t* mask, int64_t row) {
  if (mask && row % kUnit) {
    throw std::invalid_argument("upfirdn2d: a mask needs rows of a multiple of 8 elements, not " +
                                std::to_string(row));
  }
  if (!are_aligned<2>(mask)) {
    throw std::invalid_argument("upfirdn2d: the mask is at an odd address");
  }
}

bool is_empty(const Upfirdn2d& p) {
  return p.samples * p.channels * p.out_height * p.out_width == 0;
}

}  // namespace

int64_t upfirdn2d_workspace(const Upfirdn2d&, const Epilogue& epilogue) {
  return epilogue_workspace(epilogue);
}

void upfirdn2d_forward(const Upfirdn2d& p, const Epilogue* epilogue, const void* x, const void* add,
                       void* y, uint8_t* mask, void* stream) {
  check_mask(mask, p.channels_last ? p.channels : p.out_width);
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Image<T> image(static_cast<const T*>(x));
    const Output<T> output(static_cast<T*>(y), static_cast<const T*>(add));
    const auto run = [&](const auto& tail) {
      if (is_empty(p)) return;
      Launcher<T, Image<T>, std::decay_t<decltype(tail)>>(p, image, tail, stream)
          .run(are_aligned<16>(x), are_aligned<16>(y, add), mask);
    };
    if (!epilogue) return run(Plain<T>(output));
    with_functor(*epilogue, [&](const auto& act) {
      run(Fused<T, std::decay_t<decltype(act)>>(output, *epilogue, act, mask, p.out_width));
    });
  });
}

void upfirdn2d_masked(const Upfirdn2d& p, const Epilogue& epilogue, double negative_slope,
                      const void* dy, const uint8_t* mask, void* dx, void* sum, void* workspace,
                      void* stream) {
  check_mask(mask, epilogue.geometry.inner == 1 ? p.channels : p.in_width);
  if (sum) {
    Epilogue unscaled = epilogue;
    unscaled.scale = nullptr;
    epilogue_masked(unscaled, negative_slope, dy, mask, nullptr, sum, workspace, stream);
  }
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_empty(p)) return;
    const Derivative<T> derivative(Branches(epilogue, negative_slope, mask),
                                   static_cast<const T*>(dy));
    const Scaled<T> tail(Output<T>(static_cast<T*>(dx), nullptr),
                         static_cast<const float*>(epilogue.scale), p.channels);
    Launcher<T, Derivative<T>, Scaled<T>>(p, derivative, tail, stream)
        .run(are_aligned<16>(dy), are_aligned<16>(dx), false);
  });
}

}  // namespace cuda
}  // namespace stylegan_fast
