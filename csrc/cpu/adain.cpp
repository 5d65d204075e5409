// CPU kernels of adain (csrc/adain.h), compiled once per SIMD level.
//
// A column is walked twice, of which the second time finds it in a cache: once for its sums, once to
// apply them. It is a plane of NCHW, 16 pixels a group, or 16 channels of NHWC, a pixel a group, so
// that what all pixels share is 16 numbers. Activations go to a buffer in L1, a few groups at a time.

#include "../adain.h"
#include "../activations.h"
#include "common.h"
#include "levels.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kGroup = 16;
constexpr int64_t kChunk = 128;  // groups; bounds the error of a float accumulator, too
constexpr int64_t kElementsPerThread = 16384;  // below this a second thread costs more than it saves

// One number for each lane of a group.
template <class V>
struct Lanes {
  using A = typename V::Scalar;
  alignas(64) A of[kGroup];

  static Lanes equal(A number) {
    Lanes lanes;
    for (A& lane : lanes.of) lane = number;
    return lanes;
  }
  V operator[](int vector) const { return V::load(of + vector * V::lanes); }
};

template <int kSums>
struct Totals {
  double of[kSums][kGroup] = {};
};

template <class T>
class Column {
 public:
  using V = typename Compute<T>::Vector;
  using A = typename V::Scalar;
  // u of groups of x and, where there is room for it, d(u) / d(x).
  using Values = void (*)(const Column&, const T* x, int64_t first, int64_t count, A* u, A* slope);

  static bool planes(const Geometry& g) { return g.inner > 1; }
  static int64_t columns(const Geometry& g) {  // of a sample
    return planes(g) ? g.channels : (g.channels + kGroup - 1) / kGroup;
  }

  Column(const Adain& p, Values values, int64_t index)
      : epilogue_(p.epilogue), geometry_(epilogue_.geometry), planes_(planes(geometry_)),
        values_(values) {
    const Epilogue& e = epilogue_;
    const Geometry& g = geometry_;
    const int64_t sample = index / columns(g), column = index % columns(g);
    const int64_t channel = planes_ ? column : column * kGroup;
    channels_ = planes_ ? 1 : static_cast<int>(smaller(kGroup, g.channels - channel));
    at_ = sample * g.channels + channel;
    styles_ = at_ + sample * g.channels;
    first_ = planes_ ? at_ * g.pixels : sample * g.pixels * g.channels + channel;
    step_ = planes_ ? kGroup : g.channels;
    groups_ = planes_ ? (g.pixels + kGroup - 1) / kGroup : g.pixels;
    present_ = static_cast<int>(planes_ ? g.pixels - (groups_ - 1) * kGroup : channels_);
    whole_ = present_ == kGroup ? groups_ : planes_ ? groups_ - 1 : 0;

    bias_ = e.bias ? numbers(e.bias, channel) : Lanes<V>::equal(0);
    strength_ = Lanes<V>::equal(1);
    if (e.strength) strength_ = numbers(e.strength, p.strength_per_channel ? channel : 0);
    if (e.strength && !p.strength_per_channel) strength_ = Lanes<V>::equal(strength_.of[0]);
    noise_ = static_cast<const A*>(e.noise);
    if (e.noise_per_sample) noise_ += sample * g.pixels;
    scale_ = numbers(p.styles, styles_);
    for (A& scale : scale_.of) scale += 1;
    shift_ = numbers(p.styles, styles_ + g.channels);
  }

  void forward(double eps, const T* x, T* y, A* statistics) const {
    x += first_;
    y += first_;
    Lanes<V> mean, rstd, factor;
    measure(x, eps, mean, rstd);
    for (int lane = 0; lane < kGroup; ++lane) factor.of[lane] = scale_.of[lane] * rstd.of[lane];
    Chunk u;
    for_each_chunk([&](int64_t first, int64_t count) {
      values_(*this, x, first, count, u.of, nullptr);
      const Lanes<V> local_mean = mean, local_factor = factor, shift = shift_;
      for (int64_t k = 0; k < count; ++k) {
        T rest[kGroup];
        T* const to = write_to(y, first + k, rest);
        for (int i = 0; i < kVectors; ++i)
          store(to + i * V::lanes, (u(k, i) - local_mean[i]) * local_factor[i] + shift[i]);
        written(y, first + k, rest);
      }
    });
    put(mean.of, statistics + at_);
    put(rstd.of, statistics + all() + at_);
  }

  void backward(const T* x, const T* dy, const A* statistics, T* dx, A* d_styles, A* sums) const {
    x += first_;
    dy += first_;
    dx += first_;
    const Lanes<V> mean = numbers(statistics, at_), rstd = numbers(statistics, all() + at_);
    Chunk u, slope;

    Totals<2> of_dy;  // dy * (u - mean), dy
    for_each_chunk([&](int64_t first, int64_t count) {
      values_(*this, x, first, count, u.of, nullptr);
      add_up(of_dy, count, [&](int64_t k, V (&terms)[2][kVectors]) STYLEGAN_FAST_INLINE {
        T rest[kGroup];
        const T* const from = read_from(dy, first + k, rest);
        for (int i = 0; i < kVectors; ++i) {
          const V d = load(from + i * V::lanes, V());
          terms[0][i] = d * (u(k, i) - mean[i]);
          terms[1][i] = d;
        }
      });
    });
    Lanes<V> factor, mean_dy, along;
    for (int lane = 0; lane < kGroup; ++lane) {
      const double deviation = rstd.of[lane];
      of_dy.of[0][lane] *= deviation;
      factor.of[lane] = scale_.of[lane] * rstd.of[lane];
      mean_dy.of[lane] = static_cast<A>(of_dy.of[1][lane] / geometry_.pixels);
      along.of[lane] = static_cast<A>(of_dy.of[0][lane] * deviation / geometry_.pixels);
    }

    Totals<2> of_dx;  // dx, dx * noise
    for_each_chunk([&](int64_t first, int64_t count) {
      values_(*this, x, first, count, u.of, slope.of);
      add_up(of_dx, count, [&](int64_t k, V (&terms)[2][kVectors]) STYLEGAN_FAST_INLINE {
        T rest[kGroup];
        A noise_rest[kGroup];
        const V zero(0.0);
        V d[kVectors];
        const T* const from = read_from(dy, first + k, rest);
        for (int i = 0; i < kVectors; ++i) d[i] = load(from + i * V::lanes, V());
        const A* const noise = noise_at(first + k, noise_rest);
        T* const to = write_to(dx, first + k, rest);
        for (int i = 0; i < kVectors; ++i) {
          const V du = factor[i] * (d[i] - mean_dy[i] - (u(k, i) - mean[i]) * along[i]);
          // A slope of zero gives zero, also for an infinite dy.
          const V dv = where(abs(slope(k, i)) <= zero, zero, slope(k, i) * du);
          store(to + i * V::lanes, dv);
          terms[0][i] = dv;
          terms[1][i] = dv * V::load(noise + i * V::lanes);
        }
        written(dx, first + k, rest);
      });
    });
    put(of_dy.of[0], d_styles + styles_);
    put(of_dy.of[1], d_styles + styles_ + geometry_.channels);
    put(of_dx.of[0], sums + at_);
    put(of_dx.of[1], sums + all() + at_);
  }

  template <class Act>
  static void values(const Column& column, const T* x, int64_t first, int64_t count, A* u,
                     A* slope) {
    const Epilogue& e = column.epilogue_;
    const V alpha(e.alpha), gain(e.gain), limit(e.clamp), lower(-e.clamp), zero(0.0);
    const V below = -gain * Act::value(V(-1.0), alpha);  // the slope of a piecewise-linear one
    const Lanes<V> bias = column.bias_, strength = column.strength_;
    for (int64_t k = 0; k < count; ++k) {
      T rest[kGroup];
      A noise_rest[kGroup];
      const T* const from = column.read_from(x, first + k, rest);
      const A* const noise = column.noise_at(first + k, noise_rest);
      for (int i = 0; i < kVectors; ++i) {
        const V z = V::load(noise + i * V::lanes);
        const V v = load(from + i * V::lanes, V()) + strength[i] * z + bias[i];
        const V value = gain * Act::value(v, alpha);
        const int64_t to = k * kGroup + i * V::lanes;
        where(value > limit, limit, where(value < lower, lower, value)).store(u + to);
        if (slope) {
          V s;
          if constexpr (Act::curved) {
            s = gain * Act::slope(v, alpha);
          } else {
            s = where(v <= zero, below, gain);
          }
          where(abs(value) > limit, zero, s).store(slope + to);
        }
      }
    }
    if (slope && column.planes_ && first + count > column.whole_) {
      for (int lane = column.present_; lane < kGroup; ++lane)
        slope[(count - 1) * kGroup + lane] = 0;
    }
  }

 private:
  static constexpr int kVectors = kGroup / V::lanes;

  struct Chunk {
    alignas(64) A of[kChunk * kGroup];
    V operator()(int64_t k, int vector) const {
      return V::load(of + k * kGroup + vector * V::lanes);
    }
  };

  int64_t all() const { return geometry_.samples() * geometry_.channels; }

  template <class F>
  void for_each_chunk(F&& f) const {
    for (int64_t k = 0; k < groups_; k += kChunk) f(k, smaller(kChunk, groups_ - k));
  }

  // From a buffer of channels, and into it.
  Lanes<V> numbers(const void* buffer, int64_t at) const {
    const A* from = static_cast<const A*>(buffer) + at;
    Lanes<V> lanes = Lanes<V>::equal(*from);
    if (!planes_) std::memcpy(lanes.of, from, channels_ * sizeof(A));
    return lanes;
  }
  template <class From>
  void put(const From* lanes, A* to) const {
    for (int lane = 0; lane < channels_; ++lane) to[lane] = static_cast<A>(lanes[lane]);
  }

  // Where to read a group, and where to write it: in `rest` if not all of it is there.
  template <class From>
  const From* read_from(const From* column, int64_t k, From* rest) const {
    const From* const group = column + k * step_;
    if (k < whole_) return group;
    std::memset(rest, 0, kGroup * sizeof(From));
    std::memcpy(rest, group, present_ * sizeof(From));
    return rest;
  }
  T* write_to(T* column, int64_t k, T* rest) const {
    return k < whole_ ? column + k * step_ : rest;
  }
  void written(T* column, int64_t k, const T* rest) const {
    if (k >= whole_) std::memcpy(column + k * step_, rest, present_ * sizeof(T));
  }
  const A* noise_at(int64_t k, A* rest) const {
    if (noise_ && planes_) return read_from(noise_, k, rest);
    const A number = noise_ ? noise_[k] : A(0);
    for (int lane = 0; lane < kGroup; ++lane) rest[lane] = number;
    return rest;
  }

  // terms(k, terms) of the groups of a chunk.
  template <int kSums, class F>
  void add_up(Totals<kSums>& totals, int64_t count, F&& f) const {
    V sums[kSums][kVectors], terms[kSums][kVectors];
    for (auto& sum : sums)
      for (V& vector : sum) vector = V(0.0);
    for (int64_t k = 0; k < count; ++k) {
      f(k, terms);
      for (int j = 0; j < kSums; ++j)
        for (int i = 0; i < kVectors; ++i) sums[j][i] = sums[j][i] + terms[j][i];
    }
    for (int j = 0; j < kSums; ++j) {
      Lanes<V> lanes;
      for (int i = 0; i < kVectors; ++i) sums[j][i].store(lanes.of + i * V::lanes);
      for (int lane = 0; lane < kGroup; ++lane)
        totals.of[j][planes_ ? 0 : lane] += lanes.of[lane];
    }
    for (int j = 0; j < kSums && planes_; ++j)
      for (int lane = 1; lane < kGroup; ++lane) totals.of[j][lane] = totals.of[j][0];
  }

  // What is not there of a plane's last group does not count.
  void fill_rest(Chunk& u, int64_t first, int64_t count, A number) const {
    if (!planes_ || first + count <= whole_) return;
    for (int lane = present_; lane < kGroup; ++lane) u.of[(count - 1) * kGroup + lane] = number;
  }

  void measure(const T* x, double eps, Lanes<V>& mean, Lanes<V>& rstd) const {
    Lanes<V> pivot;
    Totals<2> moments;
    Chunk u;
    for_each_chunk([&](int64_t first, int64_t count) {
      values_(*this, x, first, count, u.of, nullptr);
      if (first == 0) {
        // The mean of the first pixels, which is exact where they are equal.
        std::memcpy(pivot.of, u.of, sizeof pivot.of);
        if (planes_) pivot = Lanes<V>::equal(pivot.of[0]);
        fill_rest(u, first, count, pivot.of[0]);
        Totals<1> start;
        add_up(start, count, [&](int64_t k, V (&terms)[1][kVectors]) STYLEGAN_FAST_INLINE {
          for (int i = 0; i < kVectors; ++i) terms[0][i] = u(k, i) - pivot[i];
        });
        const int64_t pixels = planes_ ? smaller(count * kGroup, geometry_.pixels) : count;
        for (int lane = 0; lane < kGroup; ++lane)
          pivot.of[lane] += static_cast<A>(start.of[0][lane] / pixels);
      }
      fill_rest(u, first, count, pivot.of[0]);
      add_up(moments, count, [&](int64_t k, V (&terms)[2][kVectors]) STYLEGAN_FAST_INLINE {
        for (int i = 0; i < kVectors; ++i) {
          const V d = u(k, i) - pivot[i];
          terms[0][i] = d;
          terms[1][i] = d * d;
        }
      });
    });
    for (int lane = 0; lane < kGroup; ++lane) {
      const double offset = moments.of[0][lane] / geometry_.pixels;
      const double variance = moments.of[1][lane] / geometry_.pixels - offset * offset;
      mean.of[lane] = static_cast<A>(pivot.of[lane] + offset);
      rstd.of[lane] = static_cast<A>(1 / std::sqrt((variance < 0 ? 0 : variance) + eps));
    }
  }

  const Epilogue& epilogue_;
  const Geometry& geometry_;
  const bool planes_;
  const Values values_;
  int channels_;
  int64_t at_, styles_;  // of the first channel: in all samples, and in their styles
  int64_t first_, step_, groups_, whole_;
  int present_;  // lanes of a group that is not whole
  Lanes<V> bias_, strength_, scale_, shift_;
  const A* noise_;
};

template <class F>
void for_each_column(const Adain& p, int threads, F&& f) {
  const Geometry& g = p.epilogue.geometry;
  with_dtype(p.epilogue.dtype, [&](auto zero) {
    using C = Column<decltype(zero)>;
    typename C::Values values = nullptr;
    with_activation(p.epilogue.act, [&](auto act) {
      values = C::template values<decltype(act)>;
    });
    const int64_t count = g.samples() * C::columns(g);
    const int64_t useful = smaller(count, larger(1, g.numel() / kElementsPerThread));
    const int used = static_cast<int>(smaller(larger(threads, 1), useful));
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (int64_t i = 0; i < count; ++i) f(zero, C(p, values, i));
  });
}

}  // namespace

void adain_forward(const Adain& p, double eps, const void* x, void* y, void* statistics,
                   int threads) {
  for_each_column(p, threads, [=](auto zero, const auto& column) {
    using T = decltype(zero);
    using A = typename Compute<T>::Vector::Scalar;
    column.forward(eps, static_cast<const T*>(x), static_cast<T*>(y), static_cast<A*>(statistics));
  });
}

void adain_backward(const Adain& p, const void* x, const void* dy, const void* statistics, void* dx,
                    void* d_styles, void* sums, int threads) {
  for_each_column(p, threads, [=](auto zero, const auto& column) {
    using T = decltype(zero);
    using A = typename Compute<T>::Vector::Scalar;
    column.backward(static_cast<const T*>(x), static_cast<const T*>(dy),
                    static_cast<const A*>(statistics), static_cast<T*>(dx),
                    static_cast<A*>(d_styles), static_cast<A*>(sums));
  });
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
