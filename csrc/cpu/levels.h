// The SIMD levels that csrc/cpu sources are compiled for, and the functions every level provides.
#pragma once

#include "../adain.h"
#include "../conv2d.h"
#include "../demodulation.h"
#include "../filtered_lrelu.h"
#include "../upfirdn2d.h"

#define STYLEGAN_FAST_DECLARE_LEVEL(level)                                                        \
  namespace stylegan_fast::cpu::level {                                                           \
  void epilogue_forward(const Epilogue&, const void* x, void* y, uint8_t* mask, int threads);     \
  void epilogue_masked(const Epilogue&, double negative_slope, const void* dy, const uint8_t* mask, \
                       void* dx, void* sum, int threads);                                         \
  void epilogue_curved(const Epilogue&, int order, const void* x, const void* dy, const void* h,  \
                       void* dx, void* sum, int threads);                                         \
  void epilogue_backward(const Epilogue&, double negative_slope, const void* dy, const void* y,   \
                         const uint8_t* mask, void* dx, void* moments, int threads);              \
  void upfirdn2d_forward(const Upfirdn2d&, const Epilogue* epilogue, const void* x,               \
                         const void* add, void* y, uint8_t* mask, int threads);                   \
  void upfirdn2d_masked(const Upfirdn2d&, const Epilogue& epilogue, double negative_slope,        \
                        const void* dy, const uint8_t* mask, void* dx, void* sum, int threads);   \
  void adain_forward(const Adain&, double eps, const void* x, void* y, void* statistics,          \
                     int threads);                                                                \
  void adain_backward(const Adain&, const void* x, const void* dy, const void* statistics,        \
                      void* dx, void* d_styles, void* sums, int threads);                         \
  void conv2d_forward(const Conv2d&, const Epilogue* epilogue, const void* x, const void* w,      \
                      const float* pre, const void* add, void* y, uint8_t* mask, int threads);    \
  void conv2d_weight_gradient(const Conv2d&, const void* x, const void* dy, const float* pre,     \
                              const float* post, void* dw, int threads);                          \
  void demodulation(const Demodulation&, const void* weight, const void* styles, void* energy,    \
                    void* d, int threads);                                                        \
  void filtered_lrelu_forward(const FilteredLrelu&, const void* x, void* y, uint8_t* signs,       \
                              int threads);                                                       \
  void filtered_lrelu_masked(const FilteredLrelu&, const void* x, const uint8_t* signs, void* y,  \
                             int threads);                                                        \
  }

STYLEGAN_FAST_DECLARE_LEVEL(baseline)
#if defined(__x86_64__) && !defined(STYLEGAN_FAST_BASELINE_ONLY)
STYLEGAN_FAST_DECLARE_LEVEL(avx2)
STYLEGAN_FAST_DECLARE_LEVEL(avx512)
#endif
