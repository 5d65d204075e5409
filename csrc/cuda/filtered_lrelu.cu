// CUDA kernels of filtered_lrelu (csrc/filtered_lrelu.h). What lies between the filters is never in
// global memory:
//
//   planes     the filters of StyleGAN3, NCHW: a block walks down a strip of an image, a batch of
//              rows at a time. It filters them along x into shared memory; then each thread takes a
//              column through the filter along y, the activation and the other filter along y, all
//              in registers; what comes out is filtered along x.
//   pixels     the same of NHWC: a thread takes columns of a channel through the first three of
//              the four
//   general    everything else: a block takes a tile through shared memory, filter by filter
//   pointwise  no filters

#include "../filtered_lrelu.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "epilogue.cuh"

namespace stylegan_fast {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kStripWaves = 2;      // of blocks, as far as strips stay long enough
constexpr int kShortestStrip = 64;  // rows of the output
constexpr int kTileFloats = 12160;  // 47.5 KiB
constexpr int kTileSide = 32;       // outputs, at most

struct Axis {
  int in, out, pad;
  int signs, sign_from;  // u[0] lies at signs[sign_from]
};

struct Filter {
  Filter(const FilteredLreluFilter& f, bool correlate)
      : taps(static_cast<const float*>(f.taps)), taps_x(taps ? f.taps_x : 1),
        taps_y(taps ? f.taps_y : 1), separable(!taps || f.separable), correlate(correlate) {}

  // Of a separable filter.
  __device__ float tap(int k) const {
    return taps ? taps[correlate ? k : taps_x - 1 - k] : 1.0f;
  }
  __device__ float tap(int ky, int kx) const {
    const int k = ky * taps_x + kx;
    return taps[correlate ? k : taps_x * taps_y - 1 - k];
  }

  const float* taps;
  int taps_x, taps_y;
  bool separable, correlate;
};

int as_int(int64_t value) {
  if (std::abs(value) >= 1 << 28) {
    throw std::invalid_argument("filtered_lrelu: " + std::to_string(value) +
                                " is too large for the cuda backend");
  }
  return static_cast<int>(value);
}

// The call without its tensors.
struct Call {
  explicit Call(const FilteredLrelu& p)
      : x{as_int(p.in_width), as_int(p.out_width), as_int(p.pad_x), as_int(p.sign_width),
          as_int(p.sign_x)},
        y{as_int(p.in_height), as_int(p.out_height), as_int(p.pad_y), as_int(p.sign_height),
          as_int(p.sign_y)},
        samples(as_int(p.samples)), channels(as_int(p.channels)),
        channels_last(p.channels_last), up(p.up), down(p.down), fu(p.fu, p.correlate),
        fd(p.fd, p.correlate),
        gain(static_cast<float>(p.gain)), slope(static_cast<float>(p.slope)),
        clamp(static_cast<float>(p.clamp)),
        sign_units(((channels_last ? channels : x.signs) + kUnit - 1) / kUnit) {}

  // Between neighbours in a row of the image.
  __device__ int step() const { return channels_last ? channels : 1; }
  __device__ int64_t input(int64_t sample, int64_t channel) const {
    return plane(sample, channel, static_cast<int64_t>(x.in) * y.in);
  }
  __device__ int64_t output(int64_t sample, int64_t channel) const {
    return plane(sample, channel, static_cast<int64_t>(x.out) * y.out);
  }
  // The unit of signs of a pixel that has some.
  __device__ int64_t sign_unit(int64_t sample, int64_t channel, int row, int column) const {
    if (channels_last) {
      return ((sample * y.signs + row) * x.signs + column) * sign_units + channel / kUnit;
    }
    return ((sample * channels + channel) * y.signs + row) * sign_units + column / kUnit;
  }

  __device__ bool clamps() const { return clamp != INFINITY; }
  // `clamped` only holds where it clamps.
  __device__ float activate(float u, bool& negative, bool& clamped) const {
    negative = u <= 0.0f;
    if (negative) u *= slope;
    clamped = !(fabsf(u) <= clamp);
    return fabsf(u) > clamp ? copysignf(clamp, u) : u;
  }
  __device__ float mask(float u, bool negative, bool clamped) const {
    if (negative) u = slope == 0.0f ? 0.0f : slope * u;
    return clamped ? 0.0f : u;
  }

  Axis x, y;
  int samples, channels;
  bool channels_last;
  int up, down;
  Filter fu, fd;
  float gain, slope, clamp;
  int64_t sign_units;  // of a row

 private:
  __device__ int64_t plane(int64_t sample, int64_t channel, int64_t pixels) const {
    return sample * channels * pixels + channel * (channels_last ? 1 : pixels);
  }
};

template <class T>
struct Tensors {
  const T *x, *bias;
  T* y;
  uint16_t* signs;  // of u, read where it is masked, else written where there are any

  __device__ float bias_value(int64_t channel) const {
    return bias ? to_float(bias[channel]) : 0.0f;
  }
};

unsigned grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("filtered_lrelu: the tensor is too large for the cuda backend");
  }
  return static_cast<unsigned>(blocks);
}

// Takes digits off a number.
class Digits {
 public:
  __device__ explicit Digits(int64_t number) : rest_(number) {}
  __device__ int64_t pop(const Divider& size) {
    const int64_t all = rest_;
    rest_ = size(all);
    return all - rest_ * size.divisor();
  }
  __device__ int64_t rest() const { return rest_; }

 private:
  int64_t rest_;
};

// Filters of 6 * up and 6 * down taps. Input i is the last that u[i * up + pad - taps + 1] and the
// up - 1 after it read: a group. A strip begins at a row and a column of u that are multiples of up
// and down and `lead` after the begin of a group.
template <int up_, int down_, int lead_>
struct Shape {
  static constexpr int up = up_, down = down_, lead = lead_, groups = 6;
  static constexpr int taps_u = groups * up, taps_d = groups * down;
  // What comes out before row 0, while the registers fill.
  static constexpr int mid_ahead = (groups - 1) * up + lead;
  static constexpr int out_ahead = (mid_ahead + taps_d - 1) / down;

  static bool takes(const Call& call) {
    const auto fits = [](const Axis& axis) {
      return ((taps_u - 1 - lead - axis.pad) % up + up) % up == 0;
    };
    return call.up == up && call.down == down && fits(call.x) && fits(call.y) &&
           call.fu.separable && call.fu.taps_x == taps_u && call.fd.separable &&
           call.fd.taps_x == taps_d;
  }
  // The first input of a strip that begins at this u.
  __device__ static int first_input(const Axis& axis, int begin) {
    return (begin - mid_ahead - axis.pad + taps_u - 1) / up;
  }
};

// NCHW: a thread has a column of u.
template <class S>
struct Planes {
  static constexpr int threads = 128, blocks = 6, channels = 1;
  // Of a batch; of u as many as a word has bits.
  static constexpr int mid_rows = 32, in_rows = mid_rows / S::up, out_rows = mid_rows / S::down;
  // Of a strip: outputs, u that they read, those that a thread makes at once, inputs of all these.
  static constexpr int width = S::down == 2 ? 56 : 24;
  static constexpr int columns = width * S::down + S::taps_d - S::down;
  static constexpr int mids = 8, quota = (S::lead + columns + mids - 1) / mids;
  static constexpr int in_columns = quota * mids / S::up + S::groups - 1;
  static constexpr int side = mids / S::down;  // outputs of a thread, which are neighbours
};

// NHWC: a thread has four columns of u of a channel.
template <class S>
struct Pixels {
  static constexpr int threads = 256, blocks = 2, channels = kUnit;
  static constexpr int mids = 4, columns = threads / channels * mids;
  static constexpr int mid_rows = 8, in_rows = mid_rows / S::up, out_rows = mid_rows / S::down;
  // Outputs of a thread, which are neighbours, and how far apart they begin in u.
  static constexpr int span = 8, side = span / S::down;
  static constexpr int width = (columns - S::lead - S::taps_d + S::down) / span * side;
};

enum class Mode { plain, signs, masked };

struct Strip {
  Divider tiles, strips, channel_groups;
  int rows;  // of the output
  int pack;  // outputs that may be stored together
};

// Rows of which 8 below each other begin in different banks, of 16 bytes each.
STYLEGAN_FAST_HD constexpr int pitch_of(int columns) { return ((columns + 3) / 4 | 1) * 4; }

template <class S>
struct Taps {
  __device__ explicit Taps(const Call& call) {
#pragma unroll
    for (int k = 0; k < S::taps_u; ++k) u[k] = call.fu.tap(k);
#pragma unroll
    for (int k = 0; k < S::taps_d; ++k) d[k] = call.fd.tap(k);
  }

  // Element m of u from the group on that the first of these inputs belongs to.
  template <int N>
  __device__ float up(const float (&inputs)[N], int m) const {
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < S::groups; ++g) {
      sum += u[g * S::up + S::up - 1 - m % S::up] * inputs[m / S::up + g];
    }
    return sum;
  }
  template <int N>
  __device__ float down(const float (&v)[N], int i) const {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < S::taps_d; ++k) sum += d[k] * v[i * S::down + k];
    return sum;
  }

  float u[S::taps_u], d[S::taps_d];
};

// What the filters along y need to go on with a column.
template <class S>
class Column {
 public:
  __device__ void push(float input) {
#pragma unroll
    for (int g = 0; g < S::groups - 1; ++g) inputs_[g] = inputs_[g + 1];
    inputs_[S::groups - 1] = input;
  }
  // Row p of the group that the last input completes.
  __device__ float u(const Taps<S>& taps, int p) const { return taps.up(inputs_, p); }

  // Takes a row of v. True where it completes an output; `r` counts as `mid_ahead` does.
  __device__ bool add(const Taps<S>& taps, int r, float v, float& output) {
    const int phase = (r + S::mid_ahead * (S::down - 1)) % S::down;
#pragma unroll
    for (int g = 0; g < S::groups; ++g) {
      sums_[g] += taps.d[(S::groups - 1 - g) * S::down + phase] * v;
    }
    if (phase < S::down - 1) return false;
    output = sums_[0];
#pragma unroll
    for (int g = 0; g < S::groups - 1; ++g) sums_[g] = sums_[g + 1];
    sums_[S::groups - 1] = 0.0f;
    return true;
  }

 private:
  float inputs_[S::groups] = {};
  float sums_[S::groups] = {};  // of the outputs that are not complete yet, oldest first
};

// 32 signs of a thread.
class Signs {
 public:
  Signs() = default;
  __device__ Signs(unsigned negative, unsigned clamped) : negative_(negative), clamped_(clamped) {}

  __device__ void add_unit(int k, unsigned bits) {
    negative_ |= (bits & 0xff) << k * kUnit;
    clamped_ |= bits >> kUnit << k * kUnit;
  }
  __device__ uint16_t unit(int k) const {
    return static_cast<uint16_t>((negative_ >> k * kUnit & 0xff) |
                                 (clamped_ >> k * kUnit & 0xff) << kUnit);
  }
  __device__ void clamp_negative() { clamped_ |= negative_; }
  __device__ void clamp_none() { clamped_ = 0; }

  // Sign j of lane i becomes sign i of lane j.
  __device__ void transpose(int lane) {
    negative_ = transpose(negative_, lane);
    clamped_ = transpose(clamped_, lane);
  }

  __device__ void rotate(int signs) {
    negative_ = negative_ >> signs | negative_ << (kWarp - signs);
    clamped_ = clamped_ >> signs | clamped_ << (kWarp - signs);
  }

  template <Mode mode>
  __device__ float v(const Call& call, float u, int i) {
    if constexpr (mode == Mode::masked) {
      if (negative_ >> i & 1) u *= call.slope;
      return clamped_ >> i & 1 ? 0.0f : u;
    } else {
      bool is_negative, is_clamped;
      u = call.activate(u, is_negative, is_clamped);
      if (mode == Mode::signs && is_negative) negative_ |= 1u << i;
      if (mode == Mode::signs && is_clamped) clamped_ |= 1u << i;
      return u;
    }
  }

 private:
  __device__ static unsigned transpose(unsigned word, int lane) {
    unsigned low = 0x0000ffff;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const unsigned other = __shfl_xor_sync(~0u, word, distance);
      word = lane & distance ? (word & ~low) | (other >> distance & low)
                             : (word & low) | (other << distance & ~low);
      low ^= low << distance / 2;
    }
    return word;
  }

  unsigned negative_ = 0, clamped_ = 0;
};

template <int P, int N>
__device__ inline void load_packs(const float* p, float (&out)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += P) {
    const auto pack = Pack<float, P>::load(p + j);
#pragma unroll
    for (int k = 0; k < P; ++k) out[j + k] = pack[k];
  }
}

// `count` is a multiple of `pack`, where positive.
template <class T, int N>
__device__ inline void store_outputs(const float (&values)[N], T* p, int count, int pack) {
  if (pack == N) {
    if (count > 0) Pack<T, N>::rounded(values).store(p);
  } else if (pack == 2) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const float pair[] = {values[j], values[j + 1]};
      if (count > j) Pack<T, 2>::rounded(pair).store(p + j);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (count > j) round_to(values[j], p[j]);
    }
  }
}

template <class T, class S, Mode mode>
__global__ void __launch_bounds__(Planes<S>::threads, Planes<S>::blocks)
    planes_kernel(const Call call, const Strip plan, const Tensors<T> tensors) {
  using L = Planes<S>;
  constexpr int U = S::up, D = S::down, G = S::groups;
  constexpr int reads = L::mids / U, in_pitch = pitch_of(L::in_columns + reads - 1);
  constexpr int mid_pitch = pitch_of(L::threads), units = L::threads / kUnit;
  constexpr int warps = L::threads / kWarp;
  alignas(16) __shared__ float in[L::in_rows][in_pitch];
  alignas(16) __shared__ float mid[L::in_rows][mid_pitch];   // after a filter along x
  alignas(16) __shared__ float out[L::out_rows][mid_pitch];  // before the other
  __shared__ uint16_t signs[L::mid_rows][units + 2];         // of an odd number of words

  Digits digits(blockIdx.x);
  const int ox = static_cast<int>(digits.pop(plan.tiles)) * L::width;
  const int oy = static_cast<int>(digits.pop(plan.strips)) * plan.rows;
  const int64_t channel = digits.pop(plan.channel_groups), sample = digits.rest();
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int rows = min(plan.rows, call.y.out - oy);
  const bool is_last_x = ox + L::width >= call.x.out, is_last_y = oy + plan.rows >= call.y.out;
  const int column = S::first_input(call.x, ox * D), row = S::first_input(call.y, oy * D);

  const T* x = tensors.x + call.input(sample, channel) +
               static_cast<int64_t>(row + warp) * call.x.in + column + lane;
  T* const y = tensors.y + call.output(sample, channel) + ox;
  constexpr int parts = (L::in_columns + kWarp - 1) / kWarp;
  bool has_column[parts];
#pragma unroll
  for (int k = 0; k < parts; ++k) {
    const int i = column + k * kWarp + lane;
    has_column[k] = i >= 0 && i < call.x.in;
  }
  const float bias = tensors.bias_value(channel);
  const Taps<S> taps(call);
  uint16_t* const sign_plane =
      tensors.signs + (sample * call.channels + channel) * call.y.signs * call.sign_units;
  const int sign_column = ox * D + call.x.sign_from;  // of those that are read
  Column<S> state;

  for (int batch = 0; batch * L::out_rows < rows + S::out_ahead; ++batch) {
    T loaded[L::in_rows / warps][parts];
    unsigned has_row = 0;
#pragma unroll
    for (int k = 0; k < L::in_rows / warps; ++k) {
      const int in_row = row + batch * L::in_rows + k * warps + warp;
      has_row |= static_cast<unsigned>(in_row >= 0 && in_row < call.y.in) << k;
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        if (has_row >> k & 1 && has_column[part]) loaded[k][part] = x[part * kWarp];
      }
      x += static_cast<int64_t>(warps) * call.x.in;
    }
#pragma unroll
    for (int k = 0; k < L::in_rows / warps; ++k) {
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const int i = part * kWarp + lane;
        const float value = has_row >> k & 1 && has_column[part]
                                ? call.gain * (to_float(loaded[k][part]) + bias)
                                : 0.0f;
        if (i < L::in_columns) in[k * warps + warp][i] = value;
      }
    }
    const int mid_row = oy * D + batch * L::mid_rows - S::mid_ahead;  // of u
    if constexpr (mode == Mode::masked) {
      const auto read = [&](int r, int k) {
        const int sign_row = mid_row + r + call.y.sign_from, unit = (sign_column >> 3) + k;
        unsigned bits = 0xff00;
        if (sign_row >= 0 && sign_row < call.y.signs && unit >= 0 && unit < call.sign_units) {
          bits = sign_plane[sign_row * call.sign_units + unit];
          bits |= 0xff00u << min(call.x.signs - unit * kUnit, kUnit) & 0xff00;
        }
        signs[r][k] = static_cast<uint16_t>(bits);
      };
#pragma unroll
      for (int r = 0; r < L::mid_rows; r += L::threads / units) {
        read(r + thread / units, thread % units);
      }
      if (thread < L::mid_rows) read(thread, units);
    }
    __syncthreads();

#pragma unroll 1
    for (int i = thread; i < L::in_rows * L::quota; i += L::threads) {
      const int j = i / 8 / L::quota * 8 + i % 8, part = i / 8 % L::quota;
      float window[(reads + G - 1 + reads - 1) / reads * reads], values[L::mids];
      load_packs<reads>(in[j] + part * reads, window);
#pragma unroll
      for (int m = 0; m < L::mids; ++m) values[m] = taps.up(window, m);
#pragma unroll
      for (int m = 0; m < L::mids; m += 4) {
        const float quad[] = {values[m], values[m + 1], values[m + 2], values[m + 3]};
        Pack<float, 4>::rounded(quad).store(mid[j] + part * L::mids + m);
      }
    }
    __syncthreads();

    Signs own;  // of the rows of this batch
    if constexpr (mode == Mode::masked) {
      uint64_t low = 0, high = 0;
#pragma unroll
      for (int k = 0; k < kWarp / kUnit + 1; ++k) {
        const uint64_t unit = signs[lane][warp * (kWarp / kUnit) + k];
        low |= (unit & 0xff) << k * kUnit;
        high |= unit >> kUnit << k * kUnit;
      }
      const int shift = sign_column & (kUnit - 1);
      own = Signs(static_cast<unsigned>(low >> shift), static_cast<unsigned>(high >> shift));
      if (call.slope == 0.0f) own.clamp_negative();
      own.transpose(lane);
    }
    const int at = min(thread, L::columns - 1) + S::lead;
#pragma unroll
    for (int j = 0; j < L::in_rows; ++j) {
      state.push(mid[j][at]);
#pragma unroll
      for (int p = 0; p < U; ++p) {
        const int r = j * U + p;
        const float v = own.template v<mode>(call, state.u(taps, p), r);
        float output;
        if (state.add(taps, r, v, output)) out[r / D][thread] = output;
      }
    }
    if constexpr (mode == Mode::signs) {
      if (!call.clamps()) own.clamp_none();
      own.transpose(lane);
#pragma unroll
      for (int k = 0; k < kWarp / kUnit; ++k) {
        signs[lane][warp * (kWarp / kUnit) + k] = own.unit(k);
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int i = thread; i < L::out_rows * (L::width / L::side); i += L::threads) {
      constexpr int parts = L::width / L::side;
      const int j = i / 8 / parts * 8 + i % 8, o = i / 8 % parts * L::side;
      float window[(L::mids - D + S::taps_d + 3) / 4 * 4], values[L::side];
      load_packs<4>(out[j] + o * D, window);
#pragma unroll
      for (int k = 0; k < L::side; ++k) values[k] = taps.down(window, k);
      const int out_row = batch * L::out_rows + j - S::out_ahead;
      if (out_row >= 0 && out_row < rows) {
        store_outputs(values, y + static_cast<int64_t>(oy + out_row) * call.x.out + o,
                      call.x.out - ox - o, plan.pack);
      }
    }
    if constexpr (mode == Mode::signs) {
      const int unit = thread % units, first = ox * D + unit * kUnit;
      const bool is_owned = unit * kUnit < L::columns &&
                            (is_last_x || unit * kUnit < L::width * D) &&
                            first < call.x.signs;
#pragma unroll
      for (int k = 0; k < L::mid_rows; k += L::threads / units) {
        const int r = k + thread / units, sign_row = mid_row + r;
        if (is_owned && sign_row >= oy * D && sign_row < call.y.signs &&
            (is_last_y || sign_row < (oy + plan.rows) * D)) {
          sign_plane[sign_row * call.sign_units + first / kUnit] = signs[r][unit];
        }
      }
    }
  }
}

template <class T, class S, Mode mode>
__global__ void __launch_bounds__(Pixels<S>::threads, Pixels<S>::blocks)
    pixels_kernel(const Call call, const Strip plan, const Tensors<T> tensors) {
  using L = Pixels<S>;
  constexpr int U = S::up, D = S::down, G = S::groups, C = L::channels, M = L::mids;
  constexpr int reads = M / U + G - 1;
  // Rows of inputs, as many as registers allow.
  constexpr int at_once = D > U || (U == 2 && mode != Mode::signs) ? 2 : 1;
  // Before the other filter along x. After every four columns one is left out, so that neighbours
  // use different banks.
  constexpr int pitch = L::columns / M * (M + 1) * C;
  __shared__ float out[2][L::out_rows][pitch];

  Digits digits(blockIdx.x);
  const int ox = static_cast<int>(digits.pop(plan.tiles)) * L::width;
  const int oy = static_cast<int>(digits.pop(plan.strips)) * plan.rows;
  const int first_channel = static_cast<int>(digits.pop(plan.channel_groups)) * C;
  const int sample = static_cast<int>(digits.rest());
  const int thread = threadIdx.x, lane = thread % kWarp, group = thread / C;
  const int channel = first_channel + thread % C;
  const bool has_channel = channel < call.channels;
  const int rows = min(plan.rows, call.y.out - oy);
  const bool is_last_x = ox + L::width >= call.x.out, is_last_y = oy + plan.rows >= call.y.out;
  const int column = S::first_input(call.x, ox * D) + group * (M / U);
  const int row = S::first_input(call.y, oy * D);

  const int step = call.channels;
  const int64_t line = static_cast<int64_t>(step) * call.x.in;
  const T* x = tensors.x + call.input(sample, channel) + row * line +
               static_cast<int64_t>(column) * step;
  unsigned has_column = 0;
#pragma unroll
  for (int i = 0; i < reads; ++i) {
    has_column |= static_cast<unsigned>(has_channel && column + i >= 0 && column + i < call.x.in)
                  << i;
  }
  const float bias = has_channel ? tensors.bias_value(channel) : 0.0f;
  const Taps<S> taps(call);
  Column<S> state[M];

  for (int batch = 0; batch * L::out_rows < rows + S::out_ahead; ++batch) {
    // Sign r * M + m is of row r of this batch in column m of this thread. Lane r * M + m reads and
    // writes it for the whole warp: unit k is of its k-th C threads.
    Signs own;
    const auto each_unit = [&](auto&& f) {
      const int mid_row = oy * D + batch * L::mid_rows - S::mid_ahead + lane / M;
      const int mid_column = ox * D - S::lead + (thread - lane) / C * M + lane % M;
#pragma unroll
      for (int k = 0; k < kWarp / kUnit; ++k) f(k, mid_row, mid_column + k * M);
    };
    if constexpr (mode == Mode::masked) {
      each_unit([&](int k, int mid_row, int mid_column) {
        const int sign_row = mid_row + call.y.sign_from;
        const int sign_column = mid_column + call.x.sign_from;
        unsigned bits = 0xff00;
        if (sign_row >= 0 && sign_row < call.y.signs && sign_column >= 0 &&
            sign_column < call.x.signs) {
          bits = tensors.signs[call.sign_unit(sample, first_channel, sign_row, sign_column)];
        }
        own.add_unit(k, bits);
      });
      if (call.slope == 0.0f) own.clamp_negative();
      own.transpose(lane);
    }

    float* to = out[batch % 2][0] + group * (M + 1) * C + thread % C;
#pragma unroll 1
    for (int begin = 0; begin < L::in_rows; begin += at_once) {
#pragma unroll
      for (int j = 0; j < at_once; ++j) {
        const int in_row = row + batch * L::in_rows + begin + j;
        const unsigned exists = in_row >= 0 && in_row < call.y.in ? has_column : 0;
        const T* pixel = x;
        float window[reads];
#pragma unroll
        for (int i = 0; i < reads; ++i, pixel += step) {
          window[i] = exists >> i & 1 ? call.gain * (to_float(*pixel) + bias) : 0.0f;
        }
        x += line;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          state[m].push(taps.up(window, m));
#pragma unroll
          for (int p = 0; p < U; ++p) {
            const int r = j * U + p;
            const float v = own.template v<mode>(call, state[m].u(taps, p), r * M + m);
            float output;
            if (state[m].add(taps, r, v, output)) to[r / D * pitch + m * C] = output;
          }
        }
      }
      to += at_once * U / D * pitch;
      own.rotate(at_once * U * M);
    }
    if constexpr (mode == Mode::signs) {
      if (!call.clamps()) own.clamp_none();
      own.transpose(lane);
      each_unit([&](int k, int mid_row, int mid_column) {
        if (mid_row >= oy * D && mid_row < call.y.signs && mid_column >= ox * D &&
            mid_column < call.x.signs && (is_last_y || mid_row < (oy + plan.rows) * D) &&
            (is_last_x || mid_column < (ox + L::width) * D)) {
          tensors.signs[call.sign_unit(sample, first_channel, mid_row, mid_column)] = own.unit(k);
        }
      });
    }
    __syncthreads();

#pragma unroll 1
    for (int i = thread; i < L::out_rows * (L::width / L::side) * C; i += L::threads) {
      constexpr int parts = L::width / L::side;
      const int j = i / C / parts, part = i / C % parts, c = i % C;
      const int out_row = batch * L::out_rows + j - S::out_ahead, o = ox + part * L::side;
      if (out_row < 0 || out_row >= rows || first_channel + c >= call.channels) continue;
      const float* const from = out[batch % 2][j] + part * (L::span / M * (M + 1) * C) + c;
      float window[L::span - D + S::taps_d];
#pragma unroll
      for (int k = 0; k < L::span - D + S::taps_d; ++k) {
        window[k] = from[((k + S::lead) / M * (M + 1) + (k + S::lead) % M) * C];
      }
      T* to = tensors.y + call.output(sample, first_channel + c) +
              (static_cast<int64_t>(oy + out_row) * call.x.out + o) * step;
#pragma unroll
      for (int k = 0; k < L::side; ++k, to += step) {
        if (o + k < call.x.out) round_to(taps.down(window, k), *to);
      }
    }
  }
}

struct TileAxis {
  TileAxis(const Call& call, int out, int taps_u, int taps_d)
      : out(out), mid((out - 1) * call.down + taps_d),
        in((mid - 1 + taps_u - 1) / call.up + 1) {}

  int out, mid, in;  // of a tile
};

struct Tile {
  Tile(const Call& call, int width, int height)
      : x(call, width, call.fu.taps_x, call.fd.taps_x),
        y(call, height, call.fu.taps_y, call.fd.taps_y),
        tiles_x(ceil_divide(call.x.out, width)), tiles_y(ceil_divide(call.y.out, height)),
        channel_groups(ceil_divide(call.channels, call.channels_last ? kUnit : 1)),
        blocks(ceil_divide(call.x.out, width) * ceil_divide(call.y.out, height) * call.samples *
               ceil_divide(call.channels, call.channels_last ? kUnit : 1)) {
    int sizes[2] = {x.in * y.in, 0}, turn = 0;
    const auto pass = [&](int floats) { turn ^= 1, sizes[turn] = std::max(sizes[turn], floats); };
    if (call.fu.separable) pass(y.in * x.mid);
    pass(y.mid * x.mid);
    if (call.fd.separable) pass(y.mid * x.out);
    second = sizes[0];
    floats = sizes[0] + sizes[1];
  }

  TileAxis x, y;
  Divider tiles_x, tiles_y, channel_groups;
  int64_t blocks;
  int second, floats;
};

// Which inputs the u of a tile read: u[begin + m] has tap i * up + lead - m on input first + i.
struct TileReads {
  __device__ TileReads(const Axis& axis, int up, int begin) {
    const int place = begin - axis.pad;
    first = place > 0 ? (place + up - 1) / up : -(-place / up);
    lead = first * up - place;
  }
  __device__ int input(int m, int up) const { return (m - lead + up - 1) / up; }

  int first, lead;
};

// Signs of NCHW: a tile begins at a whole unit. Those of its halo are its neighbour's.
template <class T, bool masked>
__global__ void __launch_bounds__(kThreads, 4)
    general_kernel(const Call call, const Tile plan, const Tensors<T> tensors) {
  __shared__ float buffer[kTileFloats];
  Digits digits(blockIdx.x);
  const int tile_x = static_cast<int>(digits.pop(plan.tiles_x));
  const int tile_y = static_cast<int>(digits.pop(plan.tiles_y));
  const int group = call.channels_last ? kUnit : 1;
  const int64_t first_channel = digits.pop(plan.channel_groups) * group, sample = digits.rest();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int up = call.up, down = call.down, mid_width = plan.x.mid;
  const Filter &fu = call.fu, &fd = call.fd;
  const int ox = tile_x * plan.x.out, oy = tile_y * plan.y.out;
  const int first_column = ox * down, first_row = oy * down;
  const bool is_last_x = ox + plan.x.out >= call.x.out, is_last_y = oy + plan.y.out >= call.y.out;
  const TileReads reads_x(call.x, up, first_column), reads_y(call.y, up, first_row);

  for (int c = 0; c < group && first_channel + c < call.channels; ++c) {
    const int64_t channel = first_channel + c;
    float *from = buffer, *to = buffer + plan.second;
    const auto next = [&] {
      __syncthreads();
      float* const written = to;
      to = from;
      from = written;
    };

    __syncthreads();
    const T* const x = tensors.x + call.input(sample, channel);
    const float bias = tensors.bias_value(channel);
    for (int j = warp; j < plan.y.in; j += kWarps) {
      const int row = reads_y.first + j;
      for (int i = lane; i < plan.x.in; i += kWarp) {
        const int column = reads_x.first + i;
        float value = 0.0f;
        if (row >= 0 && row < call.y.in && column >= 0 && column < call.x.in) {
          value = to_float(x[(static_cast<int64_t>(row) * call.x.in + column) * call.step()]);
          value = call.gain * (value + bias);
        }
        from[j * plan.x.in + i] = value;
      }
    }
    __syncthreads();

    if (fu.separable) {
      for (int m = lane; m < mid_width; m += kWarp) {
        const int first = reads_x.input(m, up), tap = first * up + reads_x.lead - m;
        for (int j = warp; j < plan.y.in; j += kWarps) {
          float sum = 0.0f;
          const float* in = from + j * plan.x.in + first;
          for (int k = tap; k < fu.taps_x; k += up) sum += fu.tap(k) * *in++;
          to[j * mid_width + m] = sum;
        }
      }
      next();
    }

    for (int r = warp; r < plan.y.mid; r += kWarps) {
      const int first = reads_y.input(r, up), tap_y = first * up + reads_y.lead - r;
      const int row = first_row + r;
      for (int begin = 0; begin < mid_width; begin += kWarp) {
        const int m = begin + lane, column = first_column + m;
        float u = 0.0f;
        if (m < mid_width && fu.separable) {
          const float* in = from + first * mid_width + m;
          for (int k = tap_y; k < fu.taps_y; k += up, in += mid_width) u += fu.tap(k) * *in;
        } else if (m < mid_width) {
          const int first_x = reads_x.input(m, up), tap_x = first_x * up + reads_x.lead - m;
          const float* line = from + first * plan.x.in + first_x;
          for (int ky = tap_y; ky < fu.taps_y; ky += up, line += plan.x.in) {
            const float* in = line;
            for (int kx = tap_x; kx < fu.taps_x; kx += up) u += fu.tap(ky, kx) * *in++;
          }
        }
        const int place = static_cast<int>(call.channels_last ? channel % kUnit : column % kUnit);
        if constexpr (masked) {
          const int sign_y = row + call.y.sign_from, sign_x = column + call.x.sign_from;
          bool negative = false, clamped = true;
          if (m < mid_width && sign_y >= 0 && sign_y < call.y.signs && sign_x >= 0 &&
              sign_x < call.x.signs) {
            const unsigned unit = tensors.signs[call.sign_unit(sample, channel, sign_y, sign_x)];
            const unsigned bits = unit >> (call.channels_last ? place : sign_x % kUnit);
            negative = bits & 1;
            clamped = bits >> kUnit & 1;
          }
          u = call.mask(u, negative, clamped);
        } else {
          bool negative, clamped;
          u = call.activate(u, negative, clamped);
          if (tensors.signs) {
            unsigned bits = (negative | (clamped && call.clamps()) << kUnit) << place;
            const bool is_on = m < mid_width && row < call.y.signs && column < call.x.signs &&
                               (is_last_y || r < plan.y.out * down) &&
                               (is_last_x || m < plan.x.out * down);
            if (!call.channels_last) {
#pragma unroll
              for (int lanes = 1; lanes < kUnit; lanes *= 2) {
                bits |= __shfl_xor_sync(~0u, bits, lanes);
              }
            }
            if (is_on && (call.channels_last || place == 0)) {
              uint16_t* const unit =
                  tensors.signs + call.sign_unit(sample, channel, row, column);
              if (call.channels_last && c > 0) bits |= *unit;
              *unit = static_cast<uint16_t>(bits);
            }
          }
        }
        if (m < mid_width) to[r * mid_width + m] = u;
      }
    }
    next();

    if (fd.separable) {
      for (int r = warp; r < plan.y.mid; r += kWarps) {
        for (int i = lane; i < plan.x.out; i += kWarp) {
          float sum = 0.0f;
          const float* const in = from + r * mid_width + i * down;
          for (int k = 0; k < fd.taps_x; ++k) sum += fd.tap(k) * in[k];
          to[r * plan.x.out + i] = sum;
        }
      }
      next();
    }

    T* const y = tensors.y + call.output(sample, channel);
    for (int j = warp; j < plan.y.out; j += kWarps) {
      for (int i = lane; i < plan.x.out; i += kWarp) {
        if (ox + i >= call.x.out || oy + j >= call.y.out) continue;
        float sum = 0.0f;
        if (fd.separable) {
          const float* in = from + j * down * plan.x.out + i;
          for (int k = 0; k < fd.taps_y; ++k, in += plan.x.out) sum += fd.tap(k) * *in;
        } else {
          const float* line = from + j * down * mid_width + i * down;
          for (int ky = 0; ky < fd.taps_y; ++ky, line += mid_width) {
            for (int kx = 0; kx < fd.taps_x; ++kx) sum += fd.tap(ky, kx) * line[kx];
          }
        }
        round_to(sum, y[(static_cast<int64_t>(oy + j) * call.x.out + ox + i) * call.step()]);
      }
    }
  }
}

struct Pointwise {
  Divider units, columns, rows;  // of a row of signs, of the image
  Divider planes;                // of a sample
  bool packed;
};

// No filters: a thread a unit of signs.
template <class T, bool masked>
__global__ void __launch_bounds__(kThreads, 4)
    pointwise_kernel(const Call call, const Pointwise plan, const Tensors<T> tensors) {
  constexpr int kPack = 16 / sizeof(T);
  const bool last = call.channels_last;
  Digits digits(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  const int64_t first = digits.pop(plan.units) * kUnit;
  const int column = static_cast<int>(last ? digits.pop(plan.columns) : first);
  const int row = static_cast<int>(digits.pop(plan.rows));
  const int64_t channel = last ? first : digits.pop(plan.planes), sample = digits.rest();
  if (sample >= call.samples) return;
  const int count = static_cast<int>(
      min(static_cast<int64_t>(kUnit), last ? call.channels - first : call.x.out - first));

  const int in_row = row - call.y.pad, in_column = column - call.x.pad;
  const T* const x = tensors.x + call.input(sample, channel) +
                     (static_cast<int64_t>(in_row) * call.x.in + in_column) * call.step();
  T* const y = tensors.y + call.output(sample, channel) +
               (static_cast<int64_t>(row) * call.x.out + column) * call.step();
  float values[kUnit];
  if (plan.packed) {
#pragma unroll
    for (int j = 0; j < kUnit; j += kPack) {
      const auto pack = Pack<T, kPack>::load(x + j);
#pragma unroll
      for (int k = 0; k < kPack; ++k) values[j + k] = pack[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const int at = in_column + (last ? 0 : j);
      const bool exists = j < count && in_row >= 0 && in_row < call.y.in && at >= 0 &&
                          at < call.x.in;
      values[j] = exists ? to_float(x[j]) : 0.0f;
    }
  }

  float bias = 0.0f;
  unsigned bits = 0;
  if (masked && plan.packed) bits = tensors.signs[call.sign_unit(sample, channel, row, column)];
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const int along = last ? 0 : j;
    if constexpr (masked) {
      bool negative = bits >> j & 1, clamped = bits >> (kUnit + j) & 1;
      if (!plan.packed) {
        const int sign_y = row + call.y.sign_from, sign_x = column + along + call.x.sign_from;
        negative = false, clamped = true;
        if (j < count && sign_y >= 0 && sign_y < call.y.signs && sign_x >= 0 &&
            sign_x < call.x.signs) {
          const unsigned unit = tensors.signs[call.sign_unit(sample, channel, sign_y, sign_x)] >>
                                (last ? j : sign_x % kUnit);
          negative = unit & 1;
          clamped = unit >> kUnit & 1;
        }
      }
      values[j] = call.mask(call.gain * values[j], negative, clamped);
    } else {
      const int at = in_column + along;
      const bool exists = in_row >= 0 && in_row < call.y.in && at >= 0 && at < call.x.in;
      if (j < count && (j == 0 || last)) bias = tensors.bias_value(channel + j);
      const float u = exists ? call.gain * (values[j] + bias) : 0.0f;
      bool negative, clamped;
      values[j] = call.activate(u, negative, clamped);
      bits |= (negative | (clamped && call.clamps()) << kUnit) << j;
    }
  }
  if (!masked && tensors.signs) {
    tensors.signs[call.sign_unit(sample, channel, row, column)] = static_cast<uint16_t>(bits);
  }
  if (plan.packed) {
#pragma unroll
    for (int j = 0; j < kUnit; j += kPack) {
      float some[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) some[k] = values[j + k];
      Pack<T, kPack>::rounded(some).store(y + j);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (j < count) round_to(values[j], y[j]);
    }
  }
}

template <class L, class T, class Kernel>
void run_strips(Kernel kernel, const Call& call, const Tensors<T>& tensors, void* stream) {
  const int64_t tiles = ceil_divide(call.x.out, L::width);
  const int64_t groups = ceil_divide(call.channels, L::channels);
  const int64_t columns = tiles * groups * call.samples;
  const int64_t wanted = static_cast<int64_t>(multiprocessors()) * L::blocks * kStripWaves;
  const int64_t most = ceil_divide(call.y.out, kShortestStrip);
  const int64_t batches = ceil_divide(call.y.out, L::out_rows);
  const int64_t rows =
      ceil_divide(batches, std::min(ceil_divide(wanted, columns), most)) * L::out_rows;
  const int64_t strips = ceil_divide(call.y.out, rows);
  int pack = L::side;
  while (call.x.out % pack || reinterpret_cast<uintptr_t>(tensors.y) % (pack * sizeof(T))) {
    pack /= 2;
  }
  const Strip plan = {Divider(tiles), Divider(strips), Divider(groups), static_cast<int>(rows),
                      pack};
  launch(kernel, dim3(grid_of(columns * strips)), L::threads, stream, call, plan, tensors);
}

template <class T, class S, Mode mode>
bool run_strips(const Call& call, const Tensors<T>& tensors, void* stream) {
  if (!S::takes(call)) return false;
  if (call.channels_last) {
    run_strips<Pixels<S>>(pixels_kernel<T, S, mode>, call, tensors, stream);
  } else {
    run_strips<Planes<S>>(planes_kernel<T, S, mode>, call, tensors, stream);
  }
  return true;
}

template <class T, bool masked>
void run(const Call& call, const Tensors<T>& tensors, void* stream) {
  const Axis &x = call.x, &y = call.y;
  if constexpr (masked) {
    if (run_strips<T, Shape<2, 2, 0>, Mode::masked>(call, tensors, stream)) return;
    if (run_strips<T, Shape<2, 4, 1>, Mode::masked>(call, tensors, stream)) return;
  } else if (tensors.signs) {
    if (run_strips<T, Shape<2, 2, 0>, Mode::signs>(call, tensors, stream)) return;
    if (run_strips<T, Shape<4, 2, 1>, Mode::signs>(call, tensors, stream)) return;
  } else {
    if (run_strips<T, Shape<2, 2, 0>, Mode::plain>(call, tensors, stream)) return;
    if (run_strips<T, Shape<4, 2, 1>, Mode::plain>(call, tensors, stream)) return;
  }
  if (!call.fu.taps && !call.fd.taps && call.up == 1 && call.down == 1) {
    const bool same = x.in == x.out && y.in == y.out && x.pad == 0 && y.pad == 0 &&
                      x.signs == x.out && y.signs == y.out && x.sign_from == 0 && y.sign_from == 0;
    const int64_t row = call.channels_last ? call.channels : x.out;
    const bool packed = same && row % kUnit == 0 && are_aligned<16>(tensors.x, tensors.y);
    const int64_t units = ceil_divide(row, kUnit), planes = call.channels_last ? 1 : call.channels;
    const int64_t columns = call.channels_last ? x.out : 1;
    const Pointwise plan = {Divider(units), Divider(columns), Divider(y.out), Divider(planes),
                            packed};
    const int64_t threads = units * columns * y.out * planes * call.samples;
    return launch(pointwise_kernel<T, masked>, dim3(grid_of(ceil_divide(threads, kThreads))),
                  kThreads, stream, call, plan, tensors);
  }
  // Widths are powers of two, and of whole units of signs.
  const int narrowest = kUnit / std::gcd(kUnit, call.down);
  int width = kTileSide, height = kTileSide;
  while (width > narrowest && width / 2 >= x.out) width /= 2;
  while (height > 1 && height / 2 >= y.out) height /= 2;
  while (Tile(call, width, height).floats > kTileFloats) {
    if (height >= width || width == narrowest) {
      if ((height /= 2) == 0) {
        throw std::invalid_argument("filtered_lrelu: the filters are too large for the cuda "
                                    "backend");
      }
    } else {
      width /= 2;
    }
  }
  const Tile plan(call, width, height);
  launch(general_kernel<T, masked>, dim3(grid_of(plan.blocks)), kThreads, stream, call, plan,
         tensors);
}

template <bool masked>
void run(const FilteredLrelu& p, const void* x, void* y, uint8_t* signs, void* stream) {
  if (!are_aligned<2>(signs)) {
    throw std::invalid_argument("filtered_lrelu: the signs are at an odd address");
  }
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Call call(p);
    if (p.samples * p.channels * p.out_height * p.out_width == 0) return;
    const T* const bias = masked ? nullptr : static_cast<const T*>(p.bias);
    run<T, masked>(call,
                   {static_cast<const T*>(x), bias, static_cast<T*>(y),
                    reinterpret_cast<uint16_t*>(signs)},
                   stream);
  });
}

}  // namespace

void filtered_lrelu_forward(const FilteredLrelu& p, const void* x, void* y, uint8_t* signs,
                            void* stream) {
  run<false>(p, x, y, signs, stream);
}

void filtered_lrelu_masked(const FilteredLrelu& p, const void* x, const uint8_t* signs, void* y,
                           void* stream) {
  run<true>(p, x, y, const_cast<uint8_t*>(signs), stream);  // which is not written
}

}  // namespace cuda
}  // namespace stylegan_fast
