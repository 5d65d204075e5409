// CUDA kernels of the epilogue (csrc/epilogue.h).
//
// A tensor in memory order is a matrix whose rows repeat the channels: a sample of NCHW, one or a
// few pixels of NHWC. A thread keeps to one pack of columns (16 bytes) and walks down the rows, or
// along a plane that is larger than a block, so its channels stay in registers, their sums gather
// there too, and nothing is divided on the way. Where that would split packs between channels
// (Layout), or buffers are not aligned, the forward map walks mask units one by one and the
// derivatives take one element at a time.

#include "epilogue.cuh"

#include <algorithm>
#include <numeric>
#include <type_traits>

namespace stylegan_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 4;  // blocks of a multiprocessor, which bounds their registers to 64
constexpr int kWaves = 4;     // of blocks, which evens out their ends

enum class Layout {
  planes,   // every pack is inside one plane
  columns,  // inner is 1 and every pack is inside one pixel
  ragged,   // inner is 1, a row is the pixels that make whole mask units, the last may be cut short
};

struct Plan {
  int64_t rows, row_packs;   // the matrix
  int width, height;         // of the packs that a block takes side by side
  int64_t block_packs;       // of a row, from one column of blocks to the next
  int block_channels, span;  // planes: channels of a block, and packs of one of them side by side
  // A thread's packs form lines of `length` packs, `stride` apart: down the rows, or along a plane
  // that is larger than a block. A step is a chunk of `unroll` packs of a line.
  int length, chunks;
  int64_t line_packs, stride;  // from one line to the next, from one pack of a line to the next
  int tile_step, row_step;     // the stride again, as packs along the plane or as rows
  int steps, slices;           // a slice is a row of blocks and takes every slices-th step
  int step_chunks, step_lines;
  int64_t step_packs, wrap_packs;
  int64_t column_blocks, sums;  // sums that each slice leaves

  dim3 grid() const { return dim3(static_cast<unsigned>(column_blocks), slices); }
  int64_t most_slices(int64_t blocks) const {
    return std::clamp<int64_t>(blocks / column_blocks, 1, steps);
  }
};

Plan make_plan(const Geometry& g, int pack, bool planes, int unroll, int64_t blocks) {
  const auto smaller = [](int64_t a, int64_t b) { return static_cast<int>(std::min(a, b)); };
  Plan plan = {};
  if (planes) {
    const int64_t plane_packs = g.inner / pack;
    plan.rows = g.outer;
    plan.row_packs = g.channels * plane_packs;
    plan.span = smaller(plane_packs, kThreads);
    plan.block_channels = smaller(kThreads / plan.span, g.channels);
    plan.block_packs = plan.block_channels * plane_packs;
    plan.width = plan.block_channels * plan.span;
    plan.sums = g.channels;
  } else {
    plan.sums = std::lcm(g.channels, kUnit);
    plan.rows = ceil_divide(g.outer, plan.sums / g.channels);
    plan.row_packs = plan.sums / pack;
    plan.width = smaller(plan.row_packs, kThreads);
    plan.block_packs = plan.width;
  }
  plan.column_blocks = ceil_divide(plan.row_packs, plan.block_packs);
  plan.height = kThreads / plan.width;

  const bool along_plane = plan.block_packs > plan.width;
  plan.tile_step = along_plane ? plan.width : 0;
  plan.row_step = along_plane ? 0 : plan.height;
  plan.stride = along_plane ? plan.width : plan.height * plan.row_packs;
  plan.line_packs = plan.row_packs;
  const int64_t lines = along_plane ? plan.rows : 1;
  const int64_t length = along_plane ? ceil_divide(plan.block_packs, plan.width)
                                     : ceil_divide(plan.rows, plan.height);
  const int64_t chunks = ceil_divide(length, unroll), steps = lines * chunks;
  if (lines * length > INT32_MAX / 2 || plan.column_blocks > INT32_MAX) {
    throw std::invalid_argument("epilogue: the tensor is too large for the cuda backend");
  }
  plan.length = static_cast<int>(length);
  plan.chunks = static_cast<int>(chunks);
  plan.steps = static_cast<int>(steps);

  plan.slices = static_cast<int>(ceil_divide(steps, ceil_divide(steps, plan.most_slices(blocks))));
  plan.step_chunks = plan.slices % plan.chunks;
  plan.step_lines = plan.slices / plan.chunks;
  const int64_t chunk_packs = unroll * plan.stride;
  plan.step_packs = plan.step_lines * plan.line_packs + plan.step_chunks * chunk_packs;
  plan.wrap_packs = plan.line_packs - plan.chunks * chunk_packs;
  return plan;
}

// A thread's way through its packs, a chunk at a time.
template <Layout layout, int unroll>
class Path {
  static constexpr bool kLines = layout == Layout::planes;  // otherwise there is one

 public:
  __device__ explicit Path(const Plan& plan)
      : x(threadIdx.x % plan.width), y(threadIdx.x / plan.width), plan_(plan), step_(blockIdx.y),
        line_(kLines ? step_ / plan.chunks : 0), chunk_(step_ - line_ * plan.chunks),
        pack_(y * plan.row_packs + column() + line_ * plan.line_packs +
              chunk_ * unroll * plan.stride) {
    const int64_t left = min(plan.block_packs - x, plan.row_packs - column());
    const auto is_inside = [&](int64_t place) {
      return place * plan.tile_step < left && y + place * plan.row_step < plan.rows;
    };
    const bool is_used = y < plan.height && is_inside(0);
    length_ = is_used ? plan.length - !is_inside(plan.length - 1) : 0;
  }

  __device__ int64_t column() const { return blockIdx.x * plan_.block_packs + x; }  // in its row
  __device__ bool owns_columns() const { return length_ > 0; }
  __device__ bool is_over() const { return step_ >= plan_.steps; }

  // Of the packs of this chunk, u = 0 ... unroll - 1:
  __device__ bool has(int u) const { return place(u) < length_; }
  __device__ int64_t pack(int u) const { return pack_ + u * plan_.stride; }
  __device__ int64_t row(int u) const {
    return y + line_ + static_cast<int64_t>(place(u)) * plan_.row_step;
  }
  __device__ int64_t tile_packs(int u) const {
    return static_cast<int64_t>(place(u)) * plan_.tile_step;
  }

  __device__ void step() {
    step_ += plan_.slices;
    pack_ += plan_.step_packs;
    if constexpr (!kLines) {
      chunk_ += plan_.slices;
    } else {
      chunk_ += plan_.step_chunks;
      line_ += plan_.step_lines;
      if (chunk_ >= plan_.chunks) {
        chunk_ -= plan_.chunks;
        line_ += 1;
        pack_ += plan_.wrap_packs;
      }
    }
  }

  const int x, y;

 private:
  __device__ int place(int u) const { return chunk_ * unroll + u; }

  const Plan& plan_;
  int step_, line_, chunk_;
  int64_t pack_;
  int length_;  // of the lines as far as this thread has packs
};

// The numbers of Parts for a thread's packs.
template <class T, int P, Layout layout>
class Operands {
  static constexpr bool kPlanes = layout == Layout::planes;

 public:
  static constexpr int kChannels = kPlanes ? 1 : P;

  template <class Path>
  __device__ Operands(const Parts<T>& parts, const Plan& plan, const Path& path)
      : parts_(parts), strength_(parts.strength_value()) {
    if constexpr (kPlanes) {
      channel_ = static_cast<int64_t>(blockIdx.x) * plan.block_channels + path.x / plan.span;
      plane_pack_ = path.x % plan.span;
    } else {
      channel_ = path.column() * P;
      if constexpr (layout == Layout::ragged) channel_ %= parts.channels;
    }
    int64_t channel = channel_;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      bias_[j] = path.owns_columns() ? parts.bias_value(channel) : 0.0f;
      ++channel;
      if constexpr (layout == Layout::ragged) channel = channel == parts.channels ? 0 : channel;
    }
  }

  // The parts of v at one pack, of which scale and noise change on the way.
  struct Local {
    __device__ float affine(float x, int j) const {
      return scale(j) * x + noise[kPlanes ? j : 0] + bias[kPlanes ? 0 : j];
    }
    __device__ float scale(int j) const { return scales[kPlanes ? 0 : j]; }

    float scales[kChannels], noise[kPlanes ? P : 1];
    const float (&bias)[kChannels];
  };

  template <class Path>
  __device__ Local at(const Path& path, int u) const {
    Local local = {{}, {}, bias_};
    int64_t pixel = path.row(u), sample = 0;
    if constexpr (kPlanes) pixel = pixel * parts_.inner + (path.tile_packs(u) + plane_pack_) * P;
    if (parts_.scale || (parts_.noise && !parts_.noise_per_sample)) sample = parts_.pixels(pixel);
    if (parts_.scale) {
      load_floats(parts_.scale + sample * parts_.channels + channel_, local.scales);
    } else {
#pragma unroll
      for (float& s : local.scales) s = 1.0f;
    }
    if (parts_.noise) {
      if (!parts_.noise_per_sample) pixel -= sample * parts_.pixels.divisor();
      load_floats(parts_.noise + pixel, local.noise);
#pragma unroll
      for (float& z : local.noise) z *= strength_;
    }
    return local;
  }

  __device__ int64_t channel() const { return channel_; }
  __device__ float bias(int j) const { return bias_[kPlanes ? 0 : j]; }

 private:
  const Parts<T>& parts_;
  const float strength_;
  int64_t channel_;  // of the first element of a pack
  int plane_pack_;
  float bias_[kChannels];
};

// The elements of a pack that are inside the tensor: all, save at the end of a ragged one.
template <Layout layout, int P>
class Reach {
 public:
  __device__ Reach(int64_t pack, int64_t numel) {
    if constexpr (layout == Layout::ragged) {
      count_ = static_cast<int>(max(int64_t(0), min(int64_t(P), numel - pack * P)));
    }
  }

  __device__ bool has(int j) const { return layout != Layout::ragged || j < count_; }
  __device__ unsigned mask() const {  // of both bytes of a mask unit
    return ((1u << count_) - 1) * (1 | 1 << kUnit);
  }

  template <class T>
  __device__ Pack<T, P> read(const T* p, int64_t pack) const {
    p += pack * P;
    return has(P - 1) ? Pack<T, P>::load(p) : Pack<T, P>::load_some(p, count_);
  }
  template <class T>
  __device__ void write(T* p, int64_t pack, const Pack<T, P>& values) const {
    p += pack * P;
    has(P - 1) ? values.store(p) : values.store_some(p, count_);
  }

 private:
  int count_ = P;
};

template <class T, int P, Layout layout, bool affine, class Act>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(const Plan plan, const Parts<T> parts, const Act act, float gain, float clamp,
                   int64_t numel, const T* x, T* y, uint8_t* mask) {
  constexpr int U = Act::kUnroll;
  Path<layout, U> path(plan);
  Operands<T, P, layout> operands(parts, plan, path);
  for (; !path.is_over(); path.step()) {
    Pack<T, P> in[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Reach<layout, P> reach(path.pack(u), numel);
      if (path.has(u) && reach.has(0)) in[u] = reach.read(x, path.pack(u));
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t pack = path.pack(u);
      const Reach<layout, P> reach(pack, numel);
      const bool is_on = path.has(u) && reach.has(0);
      unsigned bits = 0;
      if (is_on) {
        float values[P];
        if constexpr (affine) {
          const auto local = operands.at(path, u);
#pragma unroll
          for (int j = 0; j < P; ++j) values[j] = local.affine(in[u][j], j);
        } else {
#pragma unroll
          for (int j = 0; j < P; ++j) values[j] = in[u][j] + operands.bias(j);
        }
        bits = finish(values, act, gain, clamp, mask != nullptr) & reach.mask();
        reach.write(y, pack, Pack<T, P>::rounded(values));
      }
      if (mask) write_mask<P>(mask, pack * P, bits, is_on);
    }
  }
}

// Any geometry and alignment: a thread takes whole mask units and follows their channels.
template <class T, class Act>
__global__ void __launch_bounds__(kThreads)
    forward_units_kernel(const Parts<T> parts, const Divider inner, const Divider channels,
                         bool aligned, const Act act, float gain, float clamp, int64_t numel,
                         const T* x, T* y, uint8_t* mask) {
  constexpr int P = 16 / sizeof(T);
  const float strength = parts.strength_value();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       unit * kUnit < numel; unit += stride) {
    const int64_t first = unit * kUnit;
    const int count = static_cast<int>(min(int64_t(kUnit), numel - first));
    const bool whole = aligned && count == kUnit;
    int64_t plane = inner(first);
    int64_t place = first - plane * parts.inner;
    int64_t outer = channels(plane);
    int64_t channel = plane - outer * parts.channels;
    unsigned bits = 0;
#pragma unroll
    for (int half = 0; half < kUnit; half += P) {
      const int left = count - half;
      const T* from = x + first + half;
      T* to = y + first + half;
      const Pack<T, P> in =
          whole ? Pack<T, P>::load(from) : Pack<T, P>::load_some(from, left);
      float values[P] = {};
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (j >= left) break;
        float v = in[j];
        if (parts.scale || parts.noise) {
          const int64_t pixel = outer * parts.inner + place;
          const int64_t sample = parts.pixels(pixel);
          if (parts.scale) v *= parts.scale[sample * parts.channels + channel];
          if (parts.noise) {
            const int64_t shared = pixel - sample * parts.pixels.divisor();
            v += strength * parts.noise[parts.noise_per_sample ? pixel : shared];
          }
        }
        values[j] = v + parts.bias_value(channel);
        if (++place == parts.inner) {
          place = 0;
          if (++channel == parts.channels) channel = 0, ++outer;
        }
      }
      bits |= finish(values, act, gain, clamp, mask != nullptr) << half;
      const auto out = Pack<T, P>::rounded(values);
      whole ? out.store(to) : out.store_some(to, left);
    }
    if (mask) {
      bits &= ((1u << count) - 1) * (1 | 1 << kUnit);
      mask[2 * unit] = static_cast<uint8_t>(bits);
      mask[2 * unit + 1] = static_cast<uint8_t>(bits >> kUnit);
    }
  }
}

// d(v) of a piecewise-linear activation, from the mask.
template <class T>
class Masked {
 public:
  static constexpr int kUnroll = 4;
  static constexpr int kResident = cuda::kResident;

  Masked(const Branches& branches, const T* dy) : branches_(branches), dy_(dy) {}

  template <int P>
  struct Input {
    Pack<T, P> dy;
    unsigned bits;
  };

  template <int P, class Reach>
  __device__ Input<P> read(int64_t pack, const Reach& reach) const {
    return {reach.read(dy_, pack), branches_.bits<(P > 1)>(branches_.at(pack * P), 0)};
  }

  template <int P, class Operands>
  __device__ void derive(const Input<P>& in, const Operands&, float (&dv)[P]) const {
    branches_.derive(in.dy, in.bits, dv);
  }

 private:
  Branches branches_;
  const T* dy_;
};

// d(v) of a curved activation, from the input.
template <class T>
class Curved {
 public:
  static constexpr int kUnroll = 1;  // of two or three inputs
  static constexpr int kResident = sizeof(T) == 2 ? 3 : cuda::kResident;

  Curved(const Epilogue& e, int order, const void* x, const void* dy, const void* h)
      : act_(e), order_(order), gain_(static_cast<float>(e.gain)),
        clamp_(static_cast<float>(e.clamp)), x_(static_cast<const T*>(x)),
        dy_(static_cast<const T*>(dy)), h_(static_cast<const T*>(h)) {}

  template <int P>
  struct Input {
    Pack<T, P> x, dy, h;
  };

  template <int P, class Reach>
  __device__ Input<P> read(int64_t pack, const Reach& reach) const {
    Input<P> in;
    in.x = reach.read(x_, pack);
    in.dy = reach.read(dy_, pack);
    if (order_ == 2) in.h = reach.read(h_, pack);
    return in;
  }

  template <int P, class Operands>
  __device__ void derive(const Input<P>& in, const Operands& operands, float (&dv)[P]) const {
    const auto local = operands();
#pragma unroll
    for (int j = 0; j < P; ++j) dv[j] = local.affine(in.x[j], j);
    const unsigned kept = act_.differentiate(order_, gain_, clamp_, dv);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      float d = gain_ * in.dy[j];
      if (order_ == 2) d *= in.h[j];
      dv[j] = kept >> j & 1 ? d * dv[j] : 0.0f;
    }
  }

 private:
  AnyCurved act_;
  int order_;
  float gain_, clamp_;
  const T *x_, *dy_, *h_;
};

// Adds up entries that are `stride` threads apart; the one at place 0 gets the sum of `count`.
template <int N>
__device__ inline void tree_sum(float (&entries)[N][kThreads], int place, int count, int stride) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (half >= count) continue;
    __syncthreads();
    if (place < half && place + half < count) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        entries[j][threadIdx.x] += entries[j][threadIdx.x + half * stride];
      }
    }
  }
}

template <class Map, Layout layout>
constexpr int unroll = layout == Layout::ragged ? Map::kUnroll / 2 : Map::kUnroll;

// Without dx it only adds up, for upfirdn2d_masked.
template <class T, int P, Layout layout, bool with_sum, class Map>
__global__ void __launch_bounds__(kThreads, Map::kResident)
    derivative_kernel(const Plan plan, const Parts<T> parts, const Map map, int64_t numel, T* dx,
                      float* sums) {
  constexpr int U = unroll<Map, layout>;
  constexpr int K = Operands<T, P, layout>::kChannels;
  Path<layout, U> path(plan);
  Operands<T, P, layout> operands(parts, plan, path);
  float sum[K] = {};
  for (; !path.is_over(); path.step()) {
    typename Map::template Input<P> in[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Reach<layout, P> reach(path.pack(u), numel);
      if (path.has(u) && reach.has(0)) in[u] = map.template read<P>(path.pack(u), reach);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Reach<layout, P> reach(path.pack(u), numel);
      if (!path.has(u) || !reach.has(0)) continue;
      float d[P];
      map.template derive<P>(in[u], [&] { return operands.at(path, u); }, d);
      if constexpr (with_sum) {
#pragma unroll
        for (int j = 0; j < P; ++j) sum[K == 1 ? 0 : j] += reach.has(j) ? d[j] : 0.0f;
      }
      if (parts.scale) {
        const auto local = operands.at(path, u);
#pragma unroll
        for (int j = 0; j < P; ++j) d[j] *= local.scale(j);
      }
      if (dx) reach.write(dx, path.pack(u), Pack<T, P>::rounded(d));
    }
  }

  if constexpr (with_sum) {
    __shared__ float entries[K][kThreads];
#pragma unroll
    for (int j = 0; j < K; ++j) entries[j][threadIdx.x] = sum[j];
    tree_sum(entries, path.y, plan.height, plan.width);
    if constexpr (layout == Layout::planes) {
      tree_sum(entries, path.y == 0 ? path.x % plan.span : kThreads, plan.span, 1);
    }
    const bool owns_sum = layout != Layout::planes || path.x % plan.span == 0;
    if (sums && path.y == 0 && owns_sum && path.owns_columns()) {
      float* out = sums + blockIdx.y * plan.sums;
      out += layout == Layout::planes ? operands.channel() : path.column() * P;
#pragma unroll
      for (int j = 0; j < K; ++j) out[j] = entries[j][threadIdx.x];
    }
  }
}

// The tensors of `backward`, and how its sums lie: [slices, 3, count] or the moments themselves.
template <class T>
struct Moments {
  const T *dy, *y;
  T* dx;
  float* sums;
  int64_t count;           // of the sums of one term: samples * channels
  int64_t sample_numel;    // from one sample to the next along the grid, of elements
  int64_t sample_pixels;   // and of pixels
  Divider plane_channels;  // NCHW is one sample whose channels are all planes
};

constexpr int kMomentsTerms = 3;
constexpr int kMomentsUnroll = 2;  // of two inputs
template <class T>
constexpr int kMomentsResident = sizeof(T) == 2 ? 2 : 3;  // a column of 16 bits has up to 24 sums

// The map `backward`. Blocks of one blockIdx.z keep to a sample, and all that a thread adds up
// belongs to the same sums.
template <class T, int P, Layout layout>
__global__ void __launch_bounds__(kThreads, kMomentsResident<T>)
    moments_kernel(const Plan plan, const Parts<T> all_parts, const Branches branches,
                   const Moments<T> m) {
  constexpr int U = kMomentsUnroll;
  constexpr int K = Operands<T, P, layout>::kChannels;
  constexpr int N = kMomentsTerms * K;
  Path<layout, U> path(plan);
  const int64_t sample = blockIdx.z, start = sample * m.sample_numel;
  const int64_t first_sum = sample * all_parts.channels;
  Parts<T> parts = all_parts;
  if (parts.scale) parts.scale += first_sum;
  if (parts.noise && parts.noise_per_sample) {
    const int64_t plane = Operands<T, P, layout>(parts, plan, path).channel();
    const int64_t noise_sample = layout == Layout::planes ? m.plane_channels(plane) : 0;
    parts.noise += (sample + noise_sample) * m.sample_pixels;
    parts.noise_per_sample = false;
  }
  Operands<T, P, layout> operands(parts, plan, path);

  float sums[N] = {};
  for (; !path.is_over(); path.step()) {
    Pack<T, P> dy[U], y[U];
    unsigned bits[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!path.has(u)) continue;
      const int64_t element = start + path.pack(u) * P;
      dy[u] = Pack<T, P>::load(m.dy + element);
      if (m.y) y[u] = Pack<T, P>::load(m.y + element);
      bits[u] = branches.bits<(P > 1)>(branches.at(element), 0);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!path.has(u)) continue;
      float d[P];
      branches.derive(dy[u], bits[u], d);
      const unsigned zeros = branches.zeros(bits[u]);
      const auto local = operands.at(path, u);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        float* const sum = sums + (K == 1 ? 0 : j) * kMomentsTerms;
        sum[0] += d[j];
        if (m.y) sum[1] += zeros >> j & 1 ? 0.0f : dy[u][j] * y[u][j];
        if (parts.noise) sum[2] += d[j] * local.noise[layout == Layout::planes ? j : 0];
      }
      if (m.dx) {
#pragma unroll
        for (int j = 0; j < P; ++j) d[j] *= local.scale(j);
        Pack<T, P>::rounded(d).store(m.dx + start + path.pack(u) * P);
      }
    }
  }

  if (!m.sums) return;
  __shared__ float entries[N][kThreads];
#pragma unroll
  for (int j = 0; j < N; ++j) entries[j][threadIdx.x] = sums[j];
  tree_sum(entries, path.y, plan.height, plan.width);
  if constexpr (layout == Layout::planes) {
    tree_sum(entries, path.y == 0 ? path.x % plan.span : kThreads, plan.span, 1);
  }
  const bool owns_sum = layout != Layout::planes || path.x % plan.span == 0;
  if (path.y == 0 && owns_sum && path.owns_columns()) {
    float* out = m.sums + blockIdx.y * kMomentsTerms * m.count + first_sum + operands.channel();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int term = j % kMomentsTerms;
      const bool is_wanted = term == 0 || (term == 1 ? m.y != nullptr : parts.noise != nullptr);
      if (is_wanted) out[term * m.count + j / kMomentsTerms] = entries[j][threadIdx.x];
    }
  }
}

constexpr int kSumChannels = 8;  // a 32-byte sector of the partial sums

// sum[c] = the partial sums [rows, channels] added up over the rows, always in the same order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* partial, int64_t rows, int64_t row_stride, int64_t channels,
               float* sum) {
  constexpr int height = kThreads / kSumChannels;
  const int y = threadIdx.x / kSumChannels;
  const int64_t channel =
      static_cast<int64_t>(blockIdx.x) * kSumChannels + threadIdx.x % kSumChannels;
  __shared__ float entries[1][kThreads];
  float total = 0.0f;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t row = y; row < rows; row += height) total += partial[row * row_stride + channel];
  }
  entries[0][threadIdx.x] = total;
  tree_sum(entries, y, height, kSumChannels);
  if (y == 0 && channel < channels) sum[channel] = entries[0][threadIdx.x];
}

// Where nothing depends on the channel, any geometry is pixels of one channel, or of 8.
Geometry simplified(const Epilogue& e, const void* sum) {
  const Geometry& g = e.geometry;
  if (e.scale || e.noise || e.bias || sum) return g;
  const int64_t numel = g.numel(), channels = numel % kUnit ? 1 : kUnit;
  return {numel / channels, channels, 1, numel / channels};
}

// Whether packs keep to one channel each or, ragged, to the same ones in every row.
bool has_packs(const Epilogue& e, const Geometry& g, bool ragged) {
  const bool per_sample = e.scale || e.noise;
  if (g.inner > 1) return g.inner % kUnit == 0 && !(per_sample && g.pixels % kUnit);
  return g.channels % kUnit == 0 || (ragged && !per_sample);
}

template <Layout layout>
using LayoutConstant = std::integral_constant<Layout, layout>;

template <bool ragged, class F>
void with_layout(const Geometry& g, F&& f) {
  if (g.inner > 1) {
    f(LayoutConstant<Layout::planes>());
  } else if (!ragged || g.channels % kUnit == 0) {
    f(LayoutConstant<Layout::columns>());
  } else if constexpr (ragged) {
    f(LayoutConstant<Layout::ragged>());
  }
}

// In columns a block leaves sums for all its channels: fewer blocks are cheaper then.
int64_t most_blocks(int resident, bool planes, bool with_sum) {
  return static_cast<int64_t>(multiprocessors()) * resident * (planes || !with_sum ? kWaves : 1);
}

template <class T, class Act>
void forward(const Epilogue& e, const Act& act, const T* x, T* y, uint8_t* mask, void* stream) {
  constexpr int P = 16 / sizeof(T);
  constexpr bool linear = std::is_same_v<Act, PiecewiseLinear>;
  const Geometry g = simplified(e, nullptr);
  const Parts<T> parts(e, g);
  const int64_t numel = g.numel();
  const float gain = static_cast<float>(e.gain), clamp = static_cast<float>(e.clamp);
  const bool aligned = are_aligned<16>(x, y);
  const int64_t blocks = most_blocks(kResident, false, false);

  if (aligned && are_aligned<16>(e.scale, e.noise) && are_aligned<2>(mask) &&
      has_packs(e, g, linear)) {
    with_layout<linear>(g, [&](auto constant) {
      constexpr Layout layout = decltype(constant)::value;
      const Plan plan = make_plan(g, P, layout == Layout::planes, Act::kUnroll, blocks);
      const auto run = [&](auto kernel) {
        launch(kernel, plan.grid(), kThreads, stream, plan, parts, act, gain, clamp, numel, x, y,
               mask);
      };
      if constexpr (layout == Layout::ragged) {
        run(forward_kernel<T, P, layout, false, Act>);
      } else if (!linear || e.scale || e.noise) {
        run(forward_kernel<T, P, layout, true, Act>);
      } else if constexpr (linear) {
        run(forward_kernel<T, P, layout, false, Act>);
      }
    });
  } else {
    const int64_t wanted = ceil_divide(ceil_divide(numel, kUnit), kThreads);
    const dim3 grid(static_cast<unsigned>(std::min(wanted, blocks)));
    launch(forward_units_kernel<T, Act>, grid, kThreads, stream, parts, Divider(g.inner),
           Divider(g.channels), aligned, act, gain, clamp, numel, x, y, mask);
  }
}

void add_up(const float* partial, int64_t rows, int64_t row_stride, int64_t channels, float* sum,
            void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_divide(channels, kSumChannels)));
  launch(sum_kernel, grid, kThreads, stream, partial, rows, row_stride, channels, sum);
}

template <class T, int P, Layout layout, bool with_sum, class Map>
void derivative(const Geometry& g, const Parts<T>& parts, const Map& map, T* dx, float* sum,
                float* workspace, void* stream) {
  constexpr bool planes = layout == Layout::planes;
  const Plan plan = make_plan(g, P, planes, unroll<Map, layout>,
                              most_blocks(Map::kResident, planes, sum));
  const int64_t rows = plan.slices * plan.sums / g.channels;
  const bool has_stages = sum && rows > 1;
  launch(derivative_kernel<T, P, layout, with_sum, Map>, plan.grid(), kThreads, stream, plan,
         parts, map, g.numel(), dx, has_stages ? workspace : sum);
  if (has_stages) add_up(workspace, rows, g.channels, g.channels, sum, stream);
}

template <bool with_sum, bool ragged, class T, class Map>
void derivative(const Epilogue& e, bool aligned, const Map& map, T* dx, float* sum,
                float* workspace, void* stream) {
  const Geometry g = simplified(e, sum);
  const Parts<T> parts(e, g);
  if (aligned && are_aligned<16>(dx, e.scale, e.noise) && has_packs(e, g, ragged)) {
    with_layout<ragged>(g, [&](auto layout) {
      derivative<T, 16 / sizeof(T), decltype(layout)::value, with_sum>(g, parts, map, dx, sum,
                                                                       workspace, stream);
    });
  } else {
    derivative<T, 1, Layout::planes, with_sum>(g, parts, map, dx, sum, workspace, stream);
  }
}

// What a column of blocks of moments_kernel walks, and how many there are: NHWC sample by sample,
// NCHW as planes that are all channels of one sample.
struct BySample {
  explicit BySample(const Geometry& all)
      : samples(all.inner > 1 ? 1 : all.samples()),
        g(all.inner > 1 ? Geometry{1, all.outer * all.channels, all.inner, all.inner}
                        : Geometry{all.pixels, all.channels, 1, all.pixels}) {
    if (samples > UINT16_MAX) {
      throw std::invalid_argument("epilogue_backward: " + std::to_string(samples) +
                                  " samples are too many for the cuda backend");
    }
  }

  int64_t blocks(bool planes) const {
    return ceil_divide(most_blocks(kResident, planes, true), samples);
  }
  Plan plan(int pack, bool planes, int unroll) const {
    return make_plan(g, pack, planes, unroll, blocks(planes));
  }

  int64_t samples;
  Geometry g;
};

template <class T, int P, Layout layout>
void backward(const Epilogue& e, const BySample& by_sample, const Branches& branches, Moments<T> m,
              float* moments, float* workspace, void* stream) {
  const Plan plan = by_sample.plan(P, layout == Layout::planes, kMomentsUnroll);
  const bool has_stages = moments && plan.slices > 1;
  m.sums = has_stages ? workspace : moments;
  dim3 grid = plan.grid();
  grid.z = static_cast<unsigned>(by_sample.samples);
  const Parts<T> parts(e, by_sample.g);
  launch(moments_kernel<T, P, layout>, grid, kThreads, stream, plan, parts, branches, m);
  if (!has_stages) return;
  const auto add_up_terms = [&](int first, int terms) {
    const int64_t offset = first * m.count;
    add_up(workspace + offset, plan.slices, kMomentsTerms * m.count, terms * m.count,
           moments + offset, stream);
  };
  add_up_terms(0, !m.y ? 1 : e.noise ? 3 : 2);
  if (!m.y && e.noise) add_up_terms(2, 1);
}

// True where there is nothing to launch.
bool is_empty(const Geometry& g, void* sum, void* stream) {
  if (g.numel() > 0) return false;
  if (sum && g.channels > 0) {
    check(cudaMemsetAsync(sum, 0, g.channels * sizeof(float), static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
  }
  return true;
}

}  // namespace

int64_t epilogue_workspace(const Epilogue& e) {
  const Geometry& g = e.geometry;
  if (g.numel() == 0) return 0;
  const auto partial_sums = [&](int pack, bool planes) {
    const int64_t blocks = most_blocks(kResident, planes, true);
    const Plan plan = make_plan(g, pack, planes, 1, blocks);
    return plan.most_slices(blocks) * plan.sums;
  };
  const int64_t one_by_one = partial_sums(1, true);
  if (g.inner > 1 && g.inner % kUnit != 0) return one_by_one;
  return std::max(one_by_one, partial_sums(e.dtype == DType::float32 ? 4 : 8, g.inner > 1));
}

void epilogue_forward(const Epilogue& e, const void* x, void* y, uint8_t* mask, void* stream) {
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_empty(e.geometry, nullptr, stream)) return;
    with_functor(e, [&](const auto& act) {
      forward(e, act, static_cast<const T*>(x), static_cast<T*>(y), mask, stream);
    });
  });
}

void epilogue_masked(const Epilogue& e, double negative_slope, const void* dy, const uint8_t* mask,
                     void* dx, void* sum, void* workspace, void* stream) {
  Epilogue used = e;
  used.noise = used.strength = used.bias = nullptr;
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_empty(e.geometry, sum, stream)) return;
    const Masked<T> map(Branches(e, negative_slope, mask), static_cast<const T*>(dy));
    const auto run = [&](auto with_sum) {
      const bool aligned = are_aligned<16>(dy) && are_aligned<2>(mask);
      derivative<with_sum(), true>(used, aligned, map, static_cast<T*>(dx),
                                   static_cast<float*>(sum), static_cast<float*>(workspace),
                                   stream);
    };
    sum ? run(std::true_type()) : run(std::false_type());
  });
}

void epilogue_curved(const Epilogue& e, int order, const void* x, const void* dy, const void* h,
                     void* dx, void* sum, void* workspace, void* stream) {
  if (order != 1 && order != 2) {
    throw std::invalid_argument("epilogue_curved: order must be 1 or 2, not " +
                                std::to_string(order));
  }
  bool is_curved = false;
  with_activation(e.act, [&](auto act) { is_curved = decltype(act)::curved; });
  if (!is_curved) throw_unknown(e.act);
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_empty(e.geometry, sum, stream)) return;
    const Curved<T> map(e, order, x, dy, h);
    derivative<true, false>(e, are_aligned<16>(x, dy, h), map, static_cast<T*>(dx),
                            static_cast<float*>(sum), static_cast<float*>(workspace), stream);
  });
}

int64_t epilogue_moments_workspace(const Epilogue& e) {
  if (e.geometry.numel() == 0) return 0;
  const BySample by_sample(e.geometry);
  const auto slices = [&](int pack, bool planes) {
    return by_sample.plan(pack, planes, 1).most_slices(by_sample.blocks(planes));
  };
  const bool planes = e.geometry.inner > 1;
  int64_t most = slices(1, true);
  if ((planes ? e.geometry.inner : e.geometry.channels) % kUnit == 0) {
    most = std::max(most, slices(e.dtype == DType::float32 ? 4 : 8, planes));
  }
  return most * kMomentsTerms * e.geometry.samples() * e.geometry.channels;
}

void epilogue_backward(const Epilogue& e, double negative_slope, const void* dy, const void* y,
                       const uint8_t* mask, void* dx, void* moments, void* workspace,
                       void* stream) {
  Epilogue used = e;
  used.strength = used.bias = nullptr;
  with_dtype(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Geometry& all = e.geometry;
    if (all.numel() == 0 || !(dx || moments)) return;
    const BySample by_sample(all);
    const Branches branches(e, negative_slope, mask);
    const Moments<T> m = {static_cast<const T*>(dy), moments ? static_cast<const T*>(y) : nullptr,
                          static_cast<T*>(dx), nullptr, all.samples() * all.channels,
                          by_sample.g.numel(), all.pixels, Divider(all.channels)};
    const auto run = [&](auto pack, auto layout) {
      backward<T, pack(), layout()>(used, by_sample, branches, m, static_cast<float*>(moments),
                                    static_cast<float*>(workspace), stream);
    };
    constexpr std::integral_constant<int, 16 / sizeof(T)> wide = {};
    const bool aligned = are_aligned<16>(dy, y, dx, e.scale, e.noise) && are_aligned<2>(mask);
    if (!aligned || !has_packs(used, all, false)) {
      run(std::integral_constant<int, 1>(), LayoutConstant<Layout::planes>());
    } else if (all.inner > 1) {
      run(wide, LayoutConstant<Layout::planes>());
    } else {
      run(wide, LayoutConstant<Layout::columns>());
    }
  });
}

}  // namespace cuda
}  // namespace stylegan_fast
