// CUDA kernels of adain (csrc/adain.h), two an order: the first sums over the pixels of each sample
// and channel, the second applies the sums; both compute u.
//
// A thread takes packs of 16 bytes, or of 8, of NCHW a few pixels of a channel, of NHWC a few channels of a
// pixel. `lanes` threads share the pixels of the same channels, and where that makes too few blocks,
// so do several blocks, the parts of a channel. Sums are merged in an order that does not depend on
// chance.

#include "../adain.h"

#include <algorithm>

#include "epilogue.cuh"

namespace stylegan_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWaves = 4;        // of blocks, which evens out their ends
constexpr int kMaxParts = 32;    // so that they are quick to merge
constexpr int kStatistics = 4;   // numbers of a part: pixels, mean, squared deviations, pivot

struct Walk {
  int64_t samples, channels, pixels;
  int64_t column_packs;  // packs of pixels (NCHW) or pixels (NHWC) of a channel
  int64_t groups;        // channels (NCHW) or packs of channels (NHWC)
  int64_t group_blocks;
  int lanes, side;       // threads of a group, groups side by side
  int parts, steps;

  dim3 grid() const { return dim3(static_cast<unsigned>(samples * group_blocks), parts); }
};

int power_of_two(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

Walk make_walk(const Geometry& g, bool planes, int pack) {
  Walk w = {};
  w.samples = g.samples();
  w.channels = g.channels;
  w.pixels = g.pixels;
  w.column_packs = planes ? std::max<int64_t>(1, g.pixels / pack) : g.pixels;
  w.groups = planes ? g.channels : std::max<int64_t>(1, g.channels / pack);
  if (planes) {
    w.lanes = power_of_two(w.column_packs, kThreads);
    w.side = kThreads / w.lanes;
  } else {
    w.side = power_of_two(w.groups, 32);
    w.lanes = kThreads / w.side;
  }
  w.group_blocks = ceil_divide(w.groups, w.side);
  const int64_t blocks = w.samples * w.group_blocks, steps = ceil_divide(w.column_packs, w.lanes);
  const int64_t wanted = std::clamp<int64_t>(kWaves * multiprocessors() / blocks, 1, kMaxParts);
  if (blocks > INT32_MAX || steps > INT32_MAX) {
    throw std::invalid_argument("adain: the tensor is too large for the cuda backend");
  }
  w.steps = static_cast<int>(ceil_divide(steps, wanted));
  w.parts = static_cast<int>(ceil_divide(steps, w.steps));
  return w;
}

// The operands in the accumulation type.
struct Operands {
  explicit Operands(const Adain& p)
      : noise(static_cast<const float*>(p.epilogue.noise)),
        strength(static_cast<const float*>(p.epilogue.strength)),
        bias(static_cast<const float*>(p.epilogue.bias)),
        noise_per_sample(p.epilogue.noise_per_sample),
        strength_per_channel(p.strength_per_channel), gain(static_cast<float>(p.epilogue.gain)),
        clamp(static_cast<float>(p.epilogue.clamp)) {}

  const float *noise, *strength, *bias;
  bool noise_per_sample, strength_per_channel;
  float gain, clamp;
};

class Linear : public PiecewiseLinear {
 public:
  template <class A>
  Linear(A act, const Epilogue& e)
      : PiecewiseLinear(act, e), negative_slope_(-A::value(-1.0f, static_cast<float>(e.alpha))) {}

  // Puts the derivative in place of v.
  template <int P>
  __device__ void differentiate(float gain, float clamp, float (&v)[P]) const {
    float value[P];
    apply(v, value);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float slope = gain * (v[j] <= 0.0f ? negative_slope_ : 1.0f);
      v[j] = fabsf(gain * value[j]) > clamp ? 0.0f : slope;
    }
  }

 private:
  float negative_slope_;
};

class Curved : public AnyCurved {
 public:
  template <class A>
  Curved(A, const Epilogue& e) : AnyCurved(e) {}

  template <int P>
  __device__ void differentiate(float gain, float clamp, float (&v)[P]) const {
    const unsigned kept = AnyCurved::differentiate(1, gain, clamp, v);
#pragma unroll
    for (int j = 0; j < P; ++j) v[j] = kept >> j & 1 ? gain * v[j] : 0.0f;
  }
};

// What a thread works on: P elements at a time, of 1 channel or P.
template <class T, int P, bool planes, class Act>
class Thread {
 public:
  static constexpr int kChannels = planes ? 1 : P;

  __device__ Thread(const Walk& w, const Operands& o, const Act& act)
      : walk_(w), operands_(o), act_(act), sample_(blockIdx.x / w.group_blocks),
        lane_(planes ? threadIdx.x % w.lanes : threadIdx.x / w.side) {
    const int place = planes ? threadIdx.x / w.lanes : threadIdx.x % w.side;
    const int64_t group = blockIdx.x % w.group_blocks * w.side + place;
    is_on_ = group < w.groups;
    channel_ = is_on_ ? group * kChannels : 0;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int64_t c = channel_ + j;
      bias_[j] = o.bias ? o.bias[c] : 0.0f;
      strength_[j] = o.strength ? o.strength[o.strength_per_channel ? c : 0] : 1.0f;
    }
  }

  __device__ bool is_on() const { return is_on_; }
  __device__ int lane() const { return lane_; }
  __device__ int64_t at() const { return sample_ * walk_.channels + channel_; }
  __device__ int64_t styles_at() const { return at() + sample_ * walk_.channels; }

  // The number of this thread's first pack, and the end of those of its part.
  __device__ int64_t first() const {
    return static_cast<int64_t>(blockIdx.y) * walk_.steps * walk_.lanes + lane_;
  }
  __device__ int64_t end() const {
    const int64_t last = (static_cast<int64_t>(blockIdx.y) + 1) * walk_.steps * walk_.lanes;
    return is_on_ ? min(last, walk_.column_packs) : 0;
  }

  __device__ int64_t element(int64_t pack) const {
    return planes ? at() * walk_.pixels + pack * P
                  : (sample_ * walk_.pixels + pack) * walk_.channels + channel_;
  }

  __device__ void noise(int64_t pack, float (&z)[P]) const {
    const int64_t base = operands_.noise_per_sample ? sample_ * walk_.pixels : 0;
    if (!operands_.noise) {
#pragma unroll
      for (float& number : z) number = 0.0f;
    } else if constexpr (planes) {
      load_floats(operands_.noise + base + pack * P, z);
    } else {
      const float number = operands_.noise[base + pack];
#pragma unroll
      for (float& lane : z) lane = number;
    }
  }

  __device__ void preactivation(const Pack<T, P>& x, const float (&z)[P], float (&v)[P]) const {
#pragma unroll
    for (int j = 0; j < P; ++j) v[j] = x[j] + strength(j) * z[j] + bias_[planes ? 0 : j];
  }
  __device__ void value(float (&v)[P]) const {
    finish(v, act_, operands_.gain, operands_.clamp, false);
  }
  __device__ void slope(float (&v)[P]) const {
    act_.differentiate(operands_.gain, operands_.clamp, v);
  }
  __device__ void read(const T* x, int64_t pack, float (&u)[P]) const {
    float z[P];
    noise(pack, z);
    preactivation(Pack<T, P>::load(x + element(pack)), z, u);
    value(u);
  }

 private:
  __device__ float strength(int j) const { return strength_[planes ? 0 : j]; }

  const Walk& walk_;
  const Operands& operands_;
  const Act& act_;
  const int64_t sample_;
  const int lane_;
  bool is_on_;
  int64_t channel_;
  float bias_[kChannels], strength_[kChannels];
};

// Merges `numbers` of each thread with those of the other lanes, merge(mine, other's), which the
// first lane then has.
template <int N, class Merge>
__device__ inline void merge_lanes(float (&numbers)[N], int lanes, int lane, bool planes,
                                   const Merge& merge) {
  __shared__ float shared[N][kThreads];
  const int stride = planes ? 1 : kThreads / lanes;
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int j = 0; j < N; ++j) shared[j][threadIdx.x] = numbers[j];
    __syncthreads();
    if (lane < apart) {
      float others[N];
#pragma unroll
      for (int j = 0; j < N; ++j) others[j] = shared[j][threadIdx.x + apart * stride];
      merge(numbers, others);
    }
    __syncthreads();
  }
}

__device__ inline void merge_moments(float& count, float& mean, float& squares, float other_count,
                                     float other_mean, float other_squares) {
  if (other_count == 0.0f) return;
  const float total = count + other_count, share = other_count / total;
  const float difference = other_mean - mean;
  mean += difference * share;
  squares += other_squares + difference * difference * count * share;
  count = total;
}

template <class T, int P, bool planes, class Act>
__global__ void __launch_bounds__(kThreads, 2)
    adain_statistics_kernel(const Walk walk, const Operands operands, const Act act, const T* x,
                      float* workspace) {
  constexpr int C = planes ? 1 : P;
  const Thread<T, P, planes, Act> thread(walk, operands, act);
  // Beside the value of the first pixel: the mean of equal numbers would be rounded.
  float pivot[P], mean[P] = {}, squares[P] = {};
  thread.read(x, 0, pivot);
  if (planes) {
#pragma unroll
    for (float& lane : pivot) lane = pivot[0];
  }
  float count = 0.0f;
  for (int64_t pack = thread.first(); pack < thread.end(); pack += walk.lanes) {
    float u[P];
    thread.read(x, pack, u);
    count += 1.0f;
    const float share = 1.0f / count;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float d = u[j] - pivot[j], difference = d - mean[j];
      mean[j] += difference * share;
      squares[j] += difference * (d - mean[j]);
    }
  }
  float moments[1 + 2 * C];
  moments[0] = count;
#pragma unroll
  for (int j = 0; j < P; ++j) {
    if (j < C) {
      moments[1 + j] = mean[j];
      moments[1 + C + j] = squares[j];
    } else {
      merge_moments(moments[0], moments[1], moments[2], count, mean[j], squares[j]);
    }
  }
  merge_lanes(moments, walk.lanes, thread.lane(), planes,
              [](float (&mine)[1 + 2 * C], const float (&other)[1 + 2 * C]) {
                const float before = mine[0];
#pragma unroll
                for (int j = 0; j < C; ++j) {
                  mine[0] = before;
                  merge_moments(mine[0], mine[1 + j], mine[1 + C + j], other[0], other[1 + j],
                                other[1 + C + j]);
                }
              });
  if (thread.lane() > 0 || !thread.is_on()) return;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    float* const part = workspace + ((thread.at() + j) * walk.parts + blockIdx.y) * kStatistics;
    part[0] = moments[0];
    part[1] = moments[1 + j];
    part[2] = moments[1 + C + j];
    part[3] = pivot[j];
  }
}

template <class T, int P, bool planes, class Act>
__global__ void __launch_bounds__(kThreads, 2)
    adain_forward_kernel(const Walk walk, const Operands operands, const Act act, const float* styles,
                   float eps, const float* workspace, const T* x, T* y, float* statistics) {
  constexpr int C = planes ? 1 : P;
  const Thread<T, P, planes, Act> thread(walk, operands, act);
  const int64_t all = walk.samples * walk.channels;
  float mean[C], factor[C], shift[C];
#pragma unroll
  for (int j = 0; j < C; ++j) {
    const float* const parts = workspace + (thread.at() + j) * walk.parts * kStatistics;
    float count = 0.0f, offset = 0.0f, squares = 0.0f;
    for (int i = 0; i < walk.parts; ++i) {
      const float* const part = parts + i * kStatistics;
      merge_moments(count, offset, squares, part[0], part[1], part[2]);
    }
    mean[j] = parts[3] + offset;
    const float rstd = 1.0f / sqrtf(squares / walk.pixels + eps);
    factor[j] = (styles[thread.styles_at() + j] + 1.0f) * rstd;
    shift[j] = styles[thread.styles_at() + walk.channels + j];
    if (blockIdx.y == 0 && thread.lane() == 0 && thread.is_on()) {
      statistics[thread.at() + j] = mean[j];
      statistics[all + thread.at() + j] = rstd;
    }
  }
  for (int64_t pack = thread.first(); pack < thread.end(); pack += walk.lanes) {
    float u[P];
    thread.read(x, pack, u);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int c = planes ? 0 : j;
      u[j] = (u[j] - mean[c]) * factor[c] + shift[c];
    }
    Pack<T, P>::rounded(u).store(y + thread.element(pack));
  }
}

// Adds up P numbers of each of two kinds over the lanes, of planes over the pack too.
template <int P, bool planes>
__device__ inline void merge_sums(float (&a)[P], float (&b)[P], const Walk& walk, int lane,
                                  float (&sums)[planes ? 2 : 2 * P]) {
  constexpr int C = planes ? 1 : P;
#pragma unroll
  for (int j = 0; j < 2 * C; ++j) sums[j] = 0.0f;
#pragma unroll
  for (int j = 0; j < P; ++j) {
    sums[planes ? 0 : j] += a[j];
    sums[planes ? 1 : C + j] += b[j];
  }
  merge_lanes(sums, walk.lanes, lane, planes,
              [](float (&mine)[2 * C], const float (&other)[2 * C]) {
#pragma unroll
                for (int j = 0; j < 2 * C; ++j) mine[j] += other[j];
              });
}

template <class T, int P, bool planes, class Act>
__global__ void __launch_bounds__(kThreads, 2)
    adain_sums_kernel(const Walk walk, const Operands operands, const Act act, const float* statistics,
                const T* x, const T* dy, float* workspace) {
  constexpr int C = planes ? 1 : P;
  const Thread<T, P, planes, Act> thread(walk, operands, act);
  float mean[C], products[P] = {}, gradients[P] = {};
#pragma unroll
  for (int j = 0; j < C; ++j) mean[j] = statistics[thread.at() + j];
  for (int64_t pack = thread.first(); pack < thread.end(); pack += walk.lanes) {
    const auto d = Pack<T, P>::load(dy + thread.element(pack));
    float u[P];
    thread.read(x, pack, u);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      products[j] += d[j] * (u[j] - mean[planes ? 0 : j]);
      gradients[j] += d[j];
    }
  }
  float sums[2 * C];
  merge_sums<P, planes>(products, gradients, walk, thread.lane(), sums);
  if (thread.lane() > 0 || !thread.is_on()) return;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    float* const part = workspace + ((thread.at() + j) * walk.parts + blockIdx.y) * 2;
    part[0] = sums[j];
    part[1] = sums[C + j];
  }
}

template <class T, int P, bool planes, class Act>
__global__ void __launch_bounds__(kThreads, 2)
    adain_backward_kernel(const Walk walk, const Operands operands, const Act act, const float* styles,
                    const float* statistics, const float* workspace, const T* x, const T* dy,
                    T* dx, float* d_styles, float* partial) {
  constexpr int C = planes ? 1 : P;
  const Thread<T, P, planes, Act> thread(walk, operands, act);
  const int64_t all = walk.samples * walk.channels;
  float mean[C], factor[C], along[C], mean_dy[C];
#pragma unroll
  for (int j = 0; j < C; ++j) {
    const float* const parts = workspace + (thread.at() + j) * walk.parts * 2;
    float product = 0.0f, total = 0.0f;
    for (int i = 0; i < walk.parts; ++i) product += parts[2 * i], total += parts[2 * i + 1];
    const float rstd = statistics[all + thread.at() + j];
    product *= rstd;
    if (blockIdx.y == 0 && thread.lane() == 0 && thread.is_on()) {
      d_styles[thread.styles_at() + j] = product;
      d_styles[thread.styles_at() + walk.channels + j] = total;
    }
    mean[j] = statistics[thread.at() + j];
    factor[j] = (styles[thread.styles_at() + j] + 1.0f) * rstd;
    along[j] = product * rstd / walk.pixels;
    mean_dy[j] = total / walk.pixels;
  }
  float of_dx[P] = {}, of_noise[P] = {};
  for (int64_t pack = thread.first(); pack < thread.end(); pack += walk.lanes) {
    const int64_t element = thread.element(pack);
    const auto d = Pack<T, P>::load(dy + element);
    float z[P], u[P], slope[P];
    thread.noise(pack, z);
    thread.preactivation(Pack<T, P>::load(x + element), z, slope);
#pragma unroll
    for (int j = 0; j < P; ++j) u[j] = slope[j];
    thread.value(u);
    thread.slope(slope);
    float dv[P];
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int c = planes ? 0 : j;
      const float du = factor[c] * (d[j] - mean_dy[c] - (u[j] - mean[c]) * along[c]);
      // A slope of zero gives zero, also for an infinite dy.
      dv[j] = slope[j] == 0.0f ? 0.0f : slope[j] * du;
      of_dx[j] += dv[j];
      of_noise[j] += dv[j] * z[j];
    }
    Pack<T, P>::rounded(dv).store(dx + element);
  }
  float sums[2 * C];
  merge_sums<P, planes>(of_dx, of_noise, walk, thread.lane(), sums);
  if (thread.lane() > 0 || !thread.is_on()) return;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    float* const part = partial + (thread.at() + j) * walk.parts + blockIdx.y;
    part[0] = sums[j];
    part[all * walk.parts] = sums[C + j];
  }
}

// Whether all can be moved in packs.
template <class T, class... Pointers>
bool in_packs(const Adain& p, const Pointers*... pointers) {
  const Geometry& g = p.epilogue.geometry;
  const int64_t row = g.inner == 1 ? g.channels : g.inner;
  const void* const noise = g.inner == 1 ? nullptr : p.epilogue.noise;
  return row % (16 / sizeof(T)) == 0 && are_aligned<16>(pointers..., noise);
}

template <class T, class F>
void with_layout(const Adain& p, bool packs, F&& f) {
  using Single = std::integral_constant<int, 1>;
  const bool planes = p.epilogue.geometry.inner > 1;
  const bool known = with_activation(p.epilogue.act, [&](auto a) {
    // Of a curved activation 8 elements at a time take too many registers.
    using Packed = std::integral_constant<int, decltype(a)::curved ? 4 : 16 / sizeof(T)>;
    const auto run = [&](const auto& act) {
      if (planes) {
        packs ? f(Packed(), std::true_type(), act) : f(Single(), std::true_type(), act);
      } else {
        packs ? f(Packed(), std::false_type(), act) : f(Single(), std::false_type(), act);
      }
    };
    if constexpr (decltype(a)::curved) {
      run(Curved(a, p.epilogue));
    } else {
      run(Linear(a, p.epilogue));
    }
  });
  if (!known) throw_unknown(p.epilogue.act);
}

}  // namespace

int adain_parts(const Adain& p) {
  const Geometry& g = p.epilogue.geometry;
  int parts = 1;
  for (int pack : {1, 4, 8}) parts = std::max(parts, make_walk(g, g.inner > 1, pack).parts);
  return parts;
}

void adain_forward(const Adain& p, double eps, const void* x, void* y, void* statistics,
                   void* workspace, void* stream) {
  with_dtype(p.epilogue.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto* const from = static_cast<const T*>(x);
    auto* const to = static_cast<T*>(y);
    auto* const parts = static_cast<float*>(workspace);
    const Operands operands(p);
    with_layout<T>(p, in_packs<T>(p, from, to), [&](auto pack, auto planes, const auto& act) {
      constexpr int P = decltype(pack)::value;
      constexpr bool kPlanes = decltype(planes)::value;
      using Act = std::decay_t<decltype(act)>;
      const Walk walk = make_walk(p.epilogue.geometry, kPlanes, P);
      launch(adain_statistics_kernel<T, P, kPlanes, Act>, walk.grid(), kThreads, stream, walk, operands,
             act, from, parts);
      launch(adain_forward_kernel<T, P, kPlanes, Act>, walk.grid(), kThreads, stream, walk, operands,
             act, static_cast<const float*>(p.styles), static_cast<float>(eps),
             static_cast<const float*>(parts), from, to, static_cast<float*>(statistics));
    });
  });
}

int adain_backward(const Adain& p, const void* x, const void* dy, const void* statistics, void* dx,
                   void* d_styles, void* partial, void* workspace, void* stream) {
  int used = 0;
  with_dtype(p.epilogue.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto *const from = static_cast<const T*>(x), *const gradient = static_cast<const T*>(dy);
    auto* const to = static_cast<T*>(dx);
    auto* const parts = static_cast<float*>(workspace);
    const auto* const moments = static_cast<const float*>(statistics);
    const Operands operands(p);
    const bool packs = in_packs<T>(p, from, gradient, to);
    with_layout<T>(p, packs, [&](auto pack, auto planes, const auto& act) {
      constexpr int P = decltype(pack)::value;
      constexpr bool kPlanes = decltype(planes)::value;
      using Act = std::decay_t<decltype(act)>;
      const Walk walk = make_walk(p.epilogue.geometry, kPlanes, P);
      launch(adain_sums_kernel<T, P, kPlanes, Act>, walk.grid(), kThreads, stream, walk, operands, act,
             moments, from, gradient, parts);
      launch(adain_backward_kernel<T, P, kPlanes, Act>, walk.grid(), kThreads, stream, walk, operands,
             act, static_cast<const float*>(p.styles), moments, static_cast<const float*>(parts),
             from, gradient, to, static_cast<float*>(d_styles), static_cast<float*>(partial));
      used = walk.parts;
    });
  });
  return used;
}

}  // namespace cuda
}  // namespace stylegan_fast
