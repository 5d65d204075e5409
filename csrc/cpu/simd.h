// Vectors of floats of the widest kind this translation unit is compiled for, one-lane doubles, and
// the functions that csrc/activations.h calls on them. Everything lives in a namespace named after
// the SIMD level, so that code compiled for different levels never merges at link time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers read a deliberately uninitialised variable.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#ifndef STYLEGAN_FAST_SIMD
#define STYLEGAN_FAST_SIMD baseline
#endif

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct Float {
  using Scalar = float;
  static constexpr int lanes = kLanes;
  typedef float Native __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

  Native v;

  Float() = default;
  Float(Native native) : v(native) {}
  explicit Float(double scalar) : v(Native{} + static_cast<float>(scalar)) {}

  static Float load(const float* p) {
    Float r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  float sum() const {
    float total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += v[lane];
    return total;
  }
};

// Without the addition that Float(a) is: a zero may lose its sign there.
inline Float broadcast(float a, Float) { return a - Float::Native{}; }

inline Float operator+(Float a, Float b) { return a.v + b.v; }
inline Float operator-(Float a, Float b) { return a.v - b.v; }
inline Float operator*(Float a, Float b) { return a.v * b.v; }
inline Float operator/(Float a, Float b) { return a.v / b.v; }
inline Float operator-(Float a) { return -a.v; }
inline Float abs(Float a) { return (Float::Native)((Float::Integers)a.v & 0x7fffffff); }

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
};

#define STYLEGAN_FAST_COMPARE(op, predicate) \
  inline Mask operator op(Float a, Float b) { \
    return {_mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, predicate)}; \
  }
STYLEGAN_FAST_COMPARE(<, _CMP_LT_OQ)
STYLEGAN_FAST_COMPARE(>, _CMP_GT_OQ)
STYLEGAN_FAST_COMPARE(<=, _CMP_LE_OQ)
STYLEGAN_FAST_COMPARE(==, _CMP_EQ_OQ)
#undef STYLEGAN_FAST_COMPARE

inline Float where(Mask condition, Float a, Float b) {
  return (Float::Native)_mm512_mask_blend_ps(condition.m, (__m512)b.v, (__m512)a.v);
}
inline uint32_t bits(Mask mask) { return mask.m; }
inline Mask mask_from_bits(uint32_t packed, Float) { return {static_cast<__mmask16>(packed)}; }
// Bits 0 to 7 and 16 to 23.
inline Mask mask_from_bytes(uint32_t packed, Float) {
  const __m512i lane_bit =
      _mm512_setr_epi32(1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 16,
                        1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 23);
  return {_mm512_test_epi32_mask(_mm512_set1_epi32(static_cast<int>(packed)), lane_bit)};
}

#else

using Mask = Float::Integers;

inline Mask operator<(Float a, Float b) { return a.v < b.v; }
inline Mask operator>(Float a, Float b) { return a.v > b.v; }
inline Mask operator<=(Float a, Float b) { return a.v <= b.v; }
inline Mask operator==(Float a, Float b) { return a.v == b.v; }
inline Float where(Mask condition, Float a, Float b) { return condition ? a.v : b.v; }

// One bit a lane.
inline uint32_t bits(Mask mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t packed = 0;
  for (int lane = 0; lane < kLanes; ++lane) packed |= (mask[lane] & 1u) << lane;
  return packed;
#endif
}

inline Mask mask_from_bits(uint32_t packed, Float) {
  Mask lane_bit;
  for (int lane = 0; lane < kLanes; ++lane) lane_bit[lane] = 1 << lane;
  return ((Mask{} + static_cast<int32_t>(packed)) & lane_bit) != 0;
}

#endif

// Lanes of a, then of b, chosen by constants.
template <int... lane>
inline Float shuffle(Float a, Float b) {
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, lane...);
#else
  return __builtin_shuffle(a.v, b.v, Float::Integers{lane...});
#endif
}
using Lanes = std::make_integer_sequence<int, kLanes>;

template <int first, int step, int... lane>
inline Float strided(Float a, Float b, std::integer_sequence<int, lane...>) {
  return shuffle<first + step * lane...>(a, b);
}
template <int first, int... lane>
inline Float interleaved(Float a, Float b, std::integer_sequence<int, lane...>) {
  return shuffle<first + lane / 2 + lane % 2 * kLanes...>(a, b);
}

// Lanes k, k + 1, ... of a and b side by side.
template <int k>
inline Float shifted(Float a, Float b) {
  return strided<k, 1>(a, b, Lanes());
}
inline Float evens(Float a, Float b) { return strided<0, 2>(a, b, Lanes()); }
inline Float odds(Float a, Float b) { return strided<1, 2>(a, b, Lanes()); }

// a0 b0 a1 b1 ...
inline void interleave(Float a, Float b, Float& low, Float& high) {
  low = interleaved<0>(a, b, Lanes());
  high = interleaved<kLanes / 2>(a, b, Lanes());
}

// To an aligned address, without reading the cache line first or keeping it; other processors see it
// after store_fence().
inline void store_past_cache(float* p, Float a) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)a.v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)a.v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)a.v);
#else
  a.store(p);
#endif
}
inline void store_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Lanes [first, last) of what is at p, 0 in the others, whose memory is not touched.
inline Float load_lanes(const float* p, int first, int last) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << last) - (1u << first));
  return (Float::Native)_mm512_maskz_loadu_ps(mask, p);
#else
  float lanes[kLanes] = {};
  for (int lane = first; lane < last; ++lane) lanes[lane] = p[lane];
  return Float::load(lanes);
#endif
}
// The same of two-byte numbers.
template <class T>
inline Float load_lanes(const T* p, int first, int last) {
  T lanes[kLanes] = {};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>((1u << last) - (1u << first));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, p));
#else
  std::memcpy(lanes + first, p + first, (last - first) * sizeof(T));
#endif
  return load(lanes, Float());
}

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t word;
  if (magnitude >= 0x7c00u) {
    word = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else {
    // 2^112 moves the exponent from half's bias to float's and normalises subnormals on the way.
    const uint32_t shifted = magnitude << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 5.192296858534828e33f;
    std::memcpy(&word, &value, 4);
    word |= sign;
  }
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}

inline uint16_t float_to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((word >> 16) & 0x8000u);
  word &= 0x7fffffffu;
  if (word > 0x7f800000u) return sign | 0x7e00u;
  if (word >= 0x477ff000u) return sign | 0x7c00u;
  if (word < 0x38800000u) {
    // Adding 1/2 leaves the subnormal's bits, rounded to even, at the bottom of the word.
    float magnitude;
    std::memcpy(&magnitude, &word, 4);
    magnitude += 0.5f;
    std::memcpy(&word, &magnitude, 4);
    return sign | static_cast<uint16_t>(word - 0x3f000000u);
  }
  word += 0xfffu + ((word >> 13) & 1u);
  return sign | static_cast<uint16_t>((word - 0x38000000u) >> 13);
}

inline Float load(const float* p, Float) { return Float::load(p); }
inline void store(float* p, Float a) { a.store(p); }

inline Float load(const float16* p, Float) {
#if defined(__AVX512F__)
  return (Float::Native)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Float::Native)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Float r;
  for (int lane = 0; lane < kLanes; ++lane) r.v[lane] = half_to_float(p[lane].bits);
  return r;
#endif
}

inline void store(float16* p, Float a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane].bits = float_to_half(a.v[lane]);
#endif
}

inline Float load(const bfloat16* p, Float) {
  Float::Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Float::Native)(__builtin_convertvector(halves, Float::Words) << 16);
}

inline void store(bfloat16* p, Float a) {
  const Float::Words word = (Float::Words)a.v;
  const Float::Words rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const Float::Words quiet = (word >> 16) | 0x40u;
  const Float::Integers finite_or_infinite = a.v == a.v;
  const Float::Words result = finite_or_infinite ? rounded : quiet;
  const Float::Halves halves = __builtin_convertvector(result, Float::Halves);
  std::memcpy(p, &halves, sizeof halves);
}

struct Double {
  using Scalar = double;
  static constexpr int lanes = 1;

  double v;

  Double() = default;
  explicit Double(double scalar) : v(scalar) {}
  static Double load(const double* p) { return Double(*p); }
  void store(double* p) const { *p = v; }
  double sum() const { return v; }
};

inline Double operator+(Double a, Double b) { return Double(a.v + b.v); }
inline Double operator-(Double a, Double b) { return Double(a.v - b.v); }
inline Double operator*(Double a, Double b) { return Double(a.v * b.v); }
inline Double operator/(Double a, Double b) { return Double(a.v / b.v); }
inline Double operator-(Double a) { return Double(-a.v); }
inline bool operator<(Double a, Double b) { return a.v < b.v; }
inline bool operator>(Double a, Double b) { return a.v > b.v; }
inline bool operator<=(Double a, Double b) { return a.v <= b.v; }
inline Double where(bool condition, Double a, Double b) { return condition ? a : b; }
inline Double abs(Double a) { return Double(std::fabs(a.v)); }
inline uint32_t bits(bool mask) { return mask; }
inline bool mask_from_bits(uint32_t packed, Double) { return packed & 1u; }
inline Double load(const double* p, Double) { return Double(*p); }
inline void store(double* p, Double a) { *p = a.v; }

inline Double exp(Double a) { return Double(std::exp(a.v)); }
inline Double expm1(Double a) { return Double(std::expm1(a.v)); }
inline Double log1p(Double a) { return Double(std::log1p(a.v)); }
inline Double tanh(Double a) { return Double(std::tanh(a.v)); }

namespace detail {

inline Float power_of_two(Float::Integers exponent) {
  return (Float::Native)((exponent + 127) << 23);
}

// a = n ln2 + r with |r| <= ln2 / 2; returns e^r - 1 and 2^n as a product of two factors, each of
// them a normal number wherever e^a is finite.
struct Exponential {
  Float minus_one, low, high;
};

inline Exponential exponential(Float a) {
  const Float bounded = where(a > Float(89.0), Float(89.0), where(a < Float(-104.0), Float(-104.0), a));
  const Float magic(12582912.0);  // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = bounded * Float(1.44269504088896341) + magic;
  const Float n = shifted - magic;
  const Float r = (bounded - n * Float(0.693359375)) + n * Float(2.12194440e-4);
  Float p(1.0 / 5040);
  p = p * r + Float(1.0 / 720);
  p = p * r + Float(1.0 / 120);
  p = p * r + Float(1.0 / 24);
  p = p * r + Float(1.0 / 6);
  p = p * r + Float(0.5);
  const Float::Integers exponent = (Float::Integers)shifted.v - (Float::Integers)magic.v;
  const Float::Integers low = exponent >> 1;
  return {r + r * r * p, power_of_two(low), power_of_two(exponent - low)};
}

}  // namespace detail

inline Float exp(Float a) {
  const detail::Exponential e = detail::exponential(a);
  return where(a == a, (Float(1.0) + e.minus_one) * e.low * e.high, a);
}

inline Float expm1(Float a) {
  const detail::Exponential e = detail::exponential(a);
  const Float scale = e.low * e.high;
  const Float result = where(scale == Float(std::numeric_limits<float>::infinity()), scale,
                             e.minus_one * scale + (scale - Float(1.0)));
  return where(a == a, result, a);
}

// a > 0 and finite; the activations call log only through log1p(exp(v)).
inline Float log(Float a) {
  const Float::Integers word = (Float::Integers)a.v;
  const Float::Integers exponent = ((word >> 23) & 0xff) - 127;
  Float m = (Float::Native)((word & 0x7fffff) | 0x3f800000);
  Float n = __builtin_convertvector(exponent, Float::Native);
  const Mask upper = m > Float(1.41421356237);
  m = where(upper, m * Float(0.5), m);
  n = where(upper, n + Float(1.0), n);
  // atanh series: log m = 2 (s + s^3/3 + s^5/5 + ...), s = (m-1)/(m+1), |s| < 0.172
  const Float s = (m - Float(1.0)) / (m + Float(1.0));
  const Float s2 = s * s;
  Float p(1.0 / 11);
  p = p * s2 + Float(1.0 / 9);
  p = p * s2 + Float(1.0 / 7);
  p = p * s2 + Float(1.0 / 5);
  p = p * s2 + Float(1.0 / 3);
  const Float series = s + s * s2 * p;
  return n * Float(0.693359375) + (series + series - n * Float(2.12194440e-4));
}

// log(1+a) a / ((1+a) - 1) cancels the rounding of 1+a.
inline Float log1p(Float a) {
  const Float u = a + Float(1.0);
  const Float rounded = u - Float(1.0);
  return where(rounded == Float(0.0), a, where(a < Float(1e30), log(u) * (a / rounded), a));
}

inline Float tanh(Float a) {
  const Float t = expm1(Float(-2.0) * abs(a));
  const Float magnitude = -t / (Float(2.0) + t);
  return where(a < Float(0.0), -magnitude, magnitude);
}

template <class T>
inline T sigmoid(T a) {
  return T(1.0) / (T(1.0) + exp(-a));
}

template <class T>
inline T square(T a) {
  return a * a;
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
