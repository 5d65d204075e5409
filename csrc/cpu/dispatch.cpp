// Chooses the SIMD level of the CPU kernels once, from what the processor has.
#include "dispatch.h"

#include <stdexcept>

#include "levels.h"
#include "pages.h"

namespace stylegan_fast::cpu {
namespace {

struct Level {
  const char* name;
  bool (*supported)();
  decltype(&baseline::epilogue_forward) epilogue_forward;
  decltype(&baseline::epilogue_masked) epilogue_masked;
  decltype(&baseline::epilogue_curved) epilogue_curved;
  decltype(&baseline::epilogue_backward) epilogue_backward;
  decltype(&baseline::upfirdn2d_forward) upfirdn2d_forward;
  decltype(&baseline::upfirdn2d_masked) upfirdn2d_masked;
  decltype(&baseline::adain_forward) adain_forward;
  decltype(&baseline::adain_backward) adain_backward;
  decltype(&baseline::conv2d_forward) conv2d_forward;
  decltype(&baseline::conv2d_weight_gradient) conv2d_weight_gradient;
  decltype(&baseline::demodulation) demodulation;
  decltype(&baseline::filtered_lrelu_forward) filtered_lrelu_forward;
  decltype(&baseline::filtered_lrelu_masked) filtered_lrelu_masked;
};

#define STYLEGAN_FAST_LEVEL(level, supported)                          \
  {#level, supported, level::epilogue_forward, level::epilogue_masked, \
   level::epilogue_curved, level::epilogue_backward,                   \
   level::upfirdn2d_forward, level::upfirdn2d_masked, level::adain_forward, \
   level::adain_backward, level::conv2d_forward, level::conv2d_weight_gradient, \
   level::demodulation, level::filtered_lrelu_forward, level::filtered_lrelu_masked}

// Widest first.
const Level kLevels[] = {
#if defined(__x86_64__) && !defined(STYLEGAN_FAST_BASELINE_ONLY)
    STYLEGAN_FAST_LEVEL(avx512,
                        [] {
                          return __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl");
                        }),
    STYLEGAN_FAST_LEVEL(avx2,
                        [] {
                          return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                 __builtin_cpu_supports("f16c");
                        }),
#endif
    STYLEGAN_FAST_LEVEL(baseline, [] { return true; }),
};

const Level* widest() {
  for (const Level& level : kLevels)
    if (level.supported()) return &level;
  return nullptr;
}

const Level* current = widest();

// A mask unit is 8 elements of one row.
void check_mask(const uint8_t* mask, const Geometry& g, int64_t width) {
  const int64_t row = g.inner == 1 ? g.channels : width;
  if (mask && row % 8 != 0) {
    throw std::invalid_argument("a mask needs rows of a multiple of 8 elements, got " +
                                std::to_string(row));
  }
}

void check_conv2d(const Conv2d& p) {
  const bool strides = p.up >= 1 && p.down >= 1 && p.up * p.down <= 2;
  const bool even = p.up == 1 || (p.pad_y % 2 == 0 && p.pad_x % 2 == 0);
  if (p.dtype != DType::float32 || !strides || !even || p.kernel_y > 3 || p.kernel_x > 3) {
    throw std::invalid_argument(
        "conv2d takes float32, up to 3x3 taps, and up=2, with an even padding, or down=2; got a "
        "kernel of " + std::to_string(p.kernel_y) + "x" + std::to_string(p.kernel_x) +
        " with up=" + std::to_string(p.up) + " and down=" + std::to_string(p.down) +
        ", padded by " + std::to_string(p.pad_y) + " and " + std::to_string(p.pad_x));
  }
}

size_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// What a kernel is about to write, and its mask. What it reads as well is mapped already.
void fresh(void* result, int64_t numel, DType dtype, uint8_t* mask = nullptr) {
  if (result) want_huge_pages(result, numel * element_size(dtype));
  if (mask) want_huge_pages(mask, numel / 4);
}

template <class Problem>
int64_t outputs(const Problem& p) {
  return p.samples * p.channels * p.out_height * p.out_width;
}

}  // namespace

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (level.supported()) names.push_back(level.name);
  return names;
}

std::string simd_level() { return current->name; }

void set_simd_level(const std::string& name) {
  std::string known;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (name == level.name) {
      current = &level;
      return;
    }
    known += known.empty() ? level.name : std::string(", ") + level.name;
  }
  throw std::invalid_argument("SIMD level '" + name + "' cannot run here; choose one of " + known);
}

void epilogue_forward(const Epilogue& e, const void* x, void* y, uint8_t* mask, int threads) {
  fresh(y == x ? nullptr : y, e.geometry.numel(), e.dtype, mask);
  current->epilogue_forward(e, x, y, mask, threads);
}

void epilogue_masked(const Epilogue& e, double negative_slope, const void* dy, const uint8_t* mask,
                     void* dx, void* sum, int threads) {
  fresh(dx == dy ? nullptr : dx, e.geometry.numel(), e.dtype);
  current->epilogue_masked(e, negative_slope, dy, mask, dx, sum, threads);
}

void epilogue_curved(const Epilogue& e, int order, const void* x, const void* dy, const void* h,
                     void* dx, void* sum, int threads) {
  fresh(dx, e.geometry.numel(), e.dtype);
  current->epilogue_curved(e, order, x, dy, h, dx, sum, threads);
}

void epilogue_backward(const Epilogue& e, double negative_slope, const void* dy, const void* y,
                       const uint8_t* mask, void* dx, void* moments, int threads) {
  fresh(dx == dy ? nullptr : dx, e.geometry.numel(), e.dtype);
  current->epilogue_backward(e, negative_slope, dy, y, mask, dx, moments, threads);
}

void upfirdn2d_forward(const Upfirdn2d& p, const Epilogue* epilogue, const void* x, const void* add,
                       void* y, uint8_t* mask, int threads) {
  if (epilogue) check_mask(mask, epilogue->geometry, p.out_width);
  fresh(y, outputs(p), p.dtype, mask);
  current->upfirdn2d_forward(p, epilogue, x, add, y, mask, threads);
}

void upfirdn2d_masked(const Upfirdn2d& p, const Epilogue& epilogue, double negative_slope,
                      const void* dy, const uint8_t* mask, void* dx, void* sum, int threads) {
  check_mask(mask, epilogue.geometry, p.in_width);
  fresh(dx, outputs(p), p.dtype);
  current->upfirdn2d_masked(p, epilogue, negative_slope, dy, mask, dx, sum, threads);
}

void adain_forward(const Adain& p, double eps, const void* x, void* y, void* statistics,
                   int threads) {
  fresh(y, p.epilogue.geometry.numel(), p.epilogue.dtype);
  current->adain_forward(p, eps, x, y, statistics, threads);
}

void adain_backward(const Adain& p, const void* x, const void* dy, const void* statistics, void* dx,
                    void* d_styles, void* sums, int threads) {
  fresh(dx, p.epilogue.geometry.numel(), p.epilogue.dtype);
  current->adain_backward(p, x, dy, statistics, dx, d_styles, sums, threads);
}

void conv2d_forward(const Conv2d& p, const Epilogue* epilogue, const void* x, const void* w,
                    const float* pre, const void* add, void* y, uint8_t* mask, int threads) {
  check_conv2d(p);
  if (epilogue) check_mask(mask, epilogue->geometry, p.out_width);
  fresh(y, p.samples * p.out_channels * p.out_height * p.out_width, p.dtype, mask);
  current->conv2d_forward(p, epilogue, x, w, pre, add, y, mask, threads);
}

void conv2d_weight_gradient(const Conv2d& p, const void* x, const void* dy, const float* pre,
                            const float* post, void* dw, int threads) {
  check_conv2d(p);
  if (p.up != 1) throw std::invalid_argument("the gradient of conv2d's weight is for up=1");
  current->conv2d_weight_gradient(p, x, dy, pre, post, dw, threads);
}

void demodulation(const Demodulation& p, const void* weight, const void* styles, void* energy,
                  void* d, int threads) {
  if (p.dtype != DType::float64 && p.dtype != DType::float32) {
    throw std::invalid_argument("demodulation takes float64 and float32, not dtype code " +
                                std::to_string(static_cast<int>(p.dtype)));
  }
  current->demodulation(p, weight, styles, energy, d, threads);
}

void filtered_lrelu_forward(const FilteredLrelu& p, const void* x, void* y, uint8_t* signs,
                            int threads) {
  fresh(y, outputs(p), p.dtype);
  if (signs) want_huge_pages(signs, signs_size(p));
  current->filtered_lrelu_forward(p, x, y, signs, threads);
}

void filtered_lrelu_masked(const FilteredLrelu& p, const void* x, const uint8_t* signs, void* y,
                           int threads) {
  fresh(y, outputs(p), p.dtype);
  current->filtered_lrelu_masked(p, x, signs, y, threads);
}

}  // namespace stylegan_fast::cpu
