// CPU kernels of adain (csrc/adain.h), compiled once per SIMD level.
//
// A column is walked twice, of which the second time finds it in a cache: once for its sums, once to
// apply them. It is a plane of NCHW, 16 pixels a group, or 16 channels of NHWC, a pixel a group, so
// that what all pixels share is 16 numbers. Activations go to a buffer in L1, a few groups at a time.

#include "../adain.h"
#include "../activations.h"
#include "common.h"
#include "levels.h"
#include "stream.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int kGroup = 16;
constexpr int64_t kChunk = 128;  // groups; bounds the error of a float accumulator, too
constexpr int64_t kPastCache = 1 << 20;        // elements of output that caches do not keep
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

 private:
  static constexpr int kVectors = kGroup / V::lanes;

  // Groups one after the other. What is not whole is copied, so that all groups are alike.
  struct Stretch {
    int64_t first, count;
    bool whole;
  };
  template <class Number>
  struct Groups {
    Number* at;
    int64_t step;
    Number* operator()(int64_t k, int vector) const { return at + k * step + vector * V::lanes; }
  };
  template <class Number>
  struct Chunk {
    alignas(64) Number of[kChunk * kGroup];

    Groups<Number> groups() { return {of, kGroup}; }
    V operator()(int64_t k, int vector) const {
      return V::load(of + k * kGroup + vector * V::lanes);
    }
  };

  // u of a stretch of x and, where there is room for it, d(u) / d(x).
  using Values = void (*)(const Column&, const T* x, const Stretch&, A* u, A* slope);

 public:
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
    const A* const strength = static_cast<const A*>(e.strength);
    strength_ = p.strength_per_channel ? numbers(strength, channel)
                                       : Lanes<V>::equal(strength ? *strength : A(1));
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
    const bool past_cache = leaves_cache(y);
    Chunk<A> u;
    Chunk<T> copy;
    for_each_stretch([&](const Stretch& s) {
      values_(*this, x, s, u.of, nullptr);
      const Groups<T> to = s.whole ? groups(y, s) : copy.groups();
      const Lanes<V> local_mean = mean, local_factor = factor, shift = shift_;
      for (int64_t k = 0; k < s.count; ++k)
        for (int i = 0; i < kVectors; ++i)
          store(to(k, i), (u(k, i) - local_mean[i]) * local_factor[i] + shift[i], past_cache);
      if (!s.whole) scatter(copy, s, y);
    });
    if (past_cache) store_fence();
    put(mean.of, statistics + at_);
    put(rstd.of, statistics + all() + at_);
  }

  void backward(const T* x, const T* dy, const A* statistics, T* dx, A* d_styles, A* sums) const {
    x += first_;
    dy += first_;
    dx += first_;
    const Lanes<V> mean = numbers(statistics, at_), rstd = numbers(statistics, all() + at_);
    Chunk<A> u, slope, noise_copy;
    Chunk<T> copy;

    Totals<2> of_dy;  // dy * (u - mean), dy
    for_each_stretch([&](const Stretch& s) {
      values_(*this, x, s, u.of, nullptr);
      const Groups<const T> from = gather(dy, s, copy);
      const Lanes<V> local_mean = mean;
      add_up(of_dy, s.count, [&](int64_t k, int i, V (&terms)[2]) STYLEGAN_FAST_INLINE {
        const V d = load(from(k, i), V());
        terms[0] = d * (u(k, i) - local_mean[i]);
        terms[1] = d;
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
    const bool past_cache = leaves_cache(dx);
    for_each_stretch([&](const Stretch& s) {
      values_(*this, x, s, u.of, slope.of);
      const Groups<const T> from = gather(dy, s, copy);
      const Groups<const A> noise = noise_groups(s, noise_copy);
      const Groups<T> to = s.whole ? groups(dx, s) : copy.groups();
      const Lanes<V> local_mean = mean, local_factor = factor, local_mean_dy = mean_dy;
      const Lanes<V> local_along = along;
      const bool planes = planes_;
      add_up(of_dx, s.count, [&](int64_t k, int i, V (&terms)[2]) STYLEGAN_FAST_INLINE {
        const V centred = u(k, i) - local_mean[i], here = slope(k, i), zero(0.0);
        const V d = load(from(k, i), V()) - local_mean_dy[i] - centred * local_along[i];
        // A slope of zero gives zero, also for an infinite dy.
        const V dv = where(abs(here) <= zero, zero, here * (local_factor[i] * d));
        store(to(k, i), dv, past_cache);
        terms[0] = dv;
        terms[1] = dv * number(noise, planes, k, i);
      });
      if (!s.whole) scatter(copy, s, dx);
    });
    if (past_cache) store_fence();
    put(of_dy.of[0], d_styles + styles_);
    put(of_dy.of[1], d_styles + styles_ + geometry_.channels);
    put(of_dx.of[0], sums + at_);
    put(of_dx.of[1], sums + all() + at_);
  }

  template <class Act>
  static void values(const Column& column, const T* x, const Stretch& s, A* u, A* slope) {
    const Epilogue& e = column.epilogue_;
    const V alpha(e.alpha), gain(e.gain), limit(e.clamp), lower(-e.clamp), zero(0.0);
    const V below = -gain * Act::value(V(-1.0), alpha);  // the slope of a piecewise-linear one
    const Lanes<V> bias = column.bias_, strength = column.strength_;
    Chunk<T> copy;
    Chunk<A> noise_copy;
    const Groups<const T> from = column.gather(x, s, copy);
    const Groups<const A> noise = column.noise_groups(s, noise_copy);
    const bool planes = column.planes_;
    const int64_t count = s.count;
    for (int64_t k = 0; k < count; ++k) {
      for (int i = 0; i < kVectors; ++i) {
        const V v = load(from(k, i), V()) + strength[i] * number(noise, planes, k, i) + bias[i];
        const V value = gain * Act::value(v, alpha);
        const int64_t to = k * kGroup + i * V::lanes;
        where(value > limit, limit, where(value < lower, lower, value)).store(u + to);
        if (slope) {
          V here;
          if constexpr (Act::curved) {
            here = gain * Act::slope(v, alpha);
          } else {
            here = where(v <= zero, below, gain);
          }
          where(abs(value) > limit, zero, here).store(slope + to);
        }
      }
    }
    if (slope) column.fill_rest(s, slope, 0);
  }

 private:
  int64_t all() const { return geometry_.samples() * geometry_.channels; }

  bool leaves_cache(const T* column) const {
    return geometry_.numel() >= kPastCache && whole_ == groups_ && aligned(column, step_);
  }

  template <class F>
  void for_each_stretch(F&& f) const {
    for (int64_t k = 0; k < whole_; k += kChunk) f(Stretch{k, smaller(kChunk, whole_ - k), true});
    for (int64_t k = whole_; k < groups_; k += kChunk)
      f(Stretch{k, smaller(kChunk, groups_ - k), false});
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

  template <class Number>
  Groups<Number> groups(Number* column, const Stretch& s) const {
    return {column + s.first * step_, step_};
  }
  // The groups of a stretch, where all of each can be read.
  template <class Number>
  Groups<const Number> gather(const Number* column, const Stretch& s, Chunk<Number>& copy) const {
    const Groups<const Number> there = groups(column, s);
    if (s.whole) return there;
    std::memset(copy.of, 0, s.count * kGroup * sizeof(Number));
    for (int64_t k = 0; k < s.count; ++k)
      std::memcpy(copy.of + k * kGroup, there(k, 0), present_ * sizeof(Number));
    return {copy.of, kGroup};
  }
  void scatter(const Chunk<T>& copy, const Stretch& s, T* column) const {
    const Groups<T> there = groups(column, s);
    for (int64_t k = 0; k < s.count; ++k)
      std::memcpy(there(k, 0), copy.of + k * kGroup, present_ * sizeof(T));
  }

  Groups<const A> noise_groups(const Stretch& s, Chunk<A>& copy) const {
    if (!noise_) return {nullptr, 0};
    return planes_ ? gather(noise_, s, copy) : Groups<const A>{noise_ + s.first, 1};
  }
  static V number(const Groups<const A>& noise, bool planes, int64_t k, int vector) {
    if (!noise.at) return V(0.0);
    return planes ? V::load(noise(k, vector)) : V(static_cast<double>(noise.at[k]));
  }

  // terms(k, vector, terms) of some groups.
  template <int kSums, class F>
  STYLEGAN_FAST_INLINE void add_up(Totals<kSums>& totals, int64_t count, F&& terms) const {
    V sums[kSums][kVectors];
    for (auto& sum : sums)
      for (V& vector : sum) vector = V(0.0);
    for (int64_t k = 0; k < count; ++k) {
      for (int i = 0; i < kVectors; ++i) {
        V here[kSums];
        terms(k, i, here);
        for (int j = 0; j < kSums; ++j) sums[j][i] = sums[j][i] + here[j];
      }
    }
    for (int j = 0; j < kSums; ++j) {
      Lanes<V> lanes;
      for (int i = 0; i < kVectors; ++i) sums[j][i].store(lanes.of + i * V::lanes);
      for (int lane = 0; lane < kGroup; ++lane)
        totals.of[j][planes_ ? 0 : lane] += lanes.of[lane];
      for (int lane = 1; lane < kGroup && planes_; ++lane) totals.of[j][lane] = totals.of[j][0];
    }
  }

  // The lanes of a plane's last group that are not there.
  void fill_rest(const Stretch& s, A* chunk, A number) const {
    for (int lane = present_; lane < kGroup && planes_ && !s.whole; ++lane) chunk[lane] = number;
  }

  void measure(const T* x, double eps, Lanes<V>& mean, Lanes<V>& rstd) const {
    Lanes<V> pivot;
    Totals<2> moments;
    Chunk<A> u;
    for_each_stretch([&](const Stretch& s) {
      values_(*this, x, s, u.of, nullptr);
      if (s.first == 0) {
        // The mean of the first pixels, which is exact where they are equal.
        std::memcpy(pivot.of, u.of, sizeof pivot.of);
        if (planes_) pivot = Lanes<V>::equal(pivot.of[0]);
        fill_rest(s, u.of, pivot.of[0]);
        Totals<1> start;
        add_up(start, s.count, [&](int64_t k, int i, V (&terms)[1]) STYLEGAN_FAST_INLINE {
          terms[0] = u(k, i) - pivot[i];
        });
        const int64_t pixels = !planes_ ? s.count : s.whole ? s.count * kGroup : present_;
        for (int lane = 0; lane < kGroup; ++lane)
          pivot.of[lane] += static_cast<A>(start.of[0][lane] / pixels);
      }
      fill_rest(s, u.of, pivot.of[0]);
      const Lanes<V> around = pivot;
      add_up(moments, s.count, [&](int64_t k, int i, V (&terms)[2]) STYLEGAN_FAST_INLINE {
        const V d = u(k, i) - around[i];
        terms[0] = d;
        terms[1] = d * d;
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
    decltype(&C::template values<Linear>) values = nullptr;
    with_activation(p.epilogue.act, [&](auto act) { values = C::template values<decltype(act)>; });
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
