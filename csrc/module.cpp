// Python bindings: buffers come as addresses, so one binary serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "adain.h"
#include "conv2d.h"
#include "cpu/dispatch.h"
#include "cpu/pages.h"
#include "demodulation.h"
#include "epilogue.h"
#include "filtered_lrelu.h"
#include "upfirdn2d.h"

#if __has_include("build_info.h")
#include "build_info.h"
#else
#define STYLEGAN_FAST_BUILD_INFO "{}"
#endif

namespace py = pybind11;
using namespace stylegan_fast;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Epilogue epilogue(int dtype, int64_t outer, int64_t channels, int64_t inner, int64_t pixels, int act,
                  double alpha, double gain, double clamp, uintptr_t scale, uintptr_t noise,
                  bool noise_per_sample, uintptr_t strength, uintptr_t bias) {
  return {static_cast<DType>(dtype), {outer, channels, inner, pixels}, act, alpha, gain, clamp,
          pointer<void>(scale), pointer<void>(noise), noise_per_sample, pointer<void>(strength),
          pointer<void>(bias)};
}

Upfirdn2d upfirdn2d(int dtype, std::array<int64_t, 6> sizes, std::array<int64_t, 4> strides,
                    bool channels_last, std::array<int, 4> factors, int64_t pad_x, int64_t pad_y,
                    uintptr_t taps, int taps_x, int taps_y, bool separable, bool correlate,
                    double gain) {
  const auto [samples, channels, in_height, in_width, out_height, out_width] = sizes;
  const auto [stride_n, stride_c, stride_h, stride_w] = strides;
  const auto [up_x, up_y, down_x, down_y] = factors;
  return {static_cast<DType>(dtype), samples, channels, in_height, in_width, out_height, out_width,
          stride_n, stride_c, stride_h, stride_w, channels_last, up_x, up_y, down_x, down_y,
          pad_x, pad_y, pointer<void>(taps), taps_x, taps_y, separable, correlate, gain};
}

Conv2d conv2d(int dtype, std::array<int64_t, 7> sizes, bool in_channels_last,
              bool out_channels_last, int up, int down, int64_t pad_x, int64_t pad_y, int kernel_x,
              int kernel_y, std::array<int64_t, 4> strides, bool correlate) {
  const auto [samples, in_channels, out_channels, in_height, in_width, out_height, out_width] = sizes;
  const auto [stride_o, stride_i, stride_y, stride_x] = strides;
  return {static_cast<DType>(dtype), samples, in_channels, out_channels, in_height, in_width,
          out_height, out_width, in_channels_last, out_channels_last, up, down, pad_x, pad_y,
          kernel_x, kernel_y, stride_o, stride_i, stride_y, stride_x, correlate};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of stylegan_fast; call them through stylegan_fast.ops.";
  m.attr("build_info") = STYLEGAN_FAST_BUILD_INFO;
#ifdef STYLEGAN_FAST_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  m.def("simd_levels", &cpu::simd_levels);
  m.def("simd_level", &cpu::simd_level);
  m.def("set_simd_level", &cpu::set_simd_level);
  m.def("want_huge_pages", [](uintptr_t data, size_t bytes) {
    cpu::want_huge_pages(pointer<void>(data), bytes);
  });

  py::class_<Epilogue>(m, "Epilogue").def(py::init(&epilogue));
  py::class_<Upfirdn2d>(m, "Upfirdn2d").def(py::init(&upfirdn2d));
  py::class_<Conv2d>(m, "Conv2d").def(py::init(&conv2d));

  py::class_<Adain>(m, "Adain")
      .def(py::init([](const Epilogue& e, bool strength_per_channel, uintptr_t styles) {
        return Adain{e, strength_per_channel, pointer<void>(styles)};
      }));

  py::class_<Demodulation>(m, "Demodulation")
      .def(py::init([](int dtype, std::array<int64_t, 4> sizes, bool channels_last, double eps) {
        const auto [samples, out_channels, in_channels, taps] = sizes;
        return Demodulation{static_cast<DType>(dtype), samples, out_channels, in_channels, taps,
                            channels_last, eps};
      }));

  py::class_<FilteredLrelu>(m, "FilteredLrelu")
      .def(py::init([](int dtype, std::array<int64_t, 8> sizes, std::array<int64_t, 2> sign_offset,
                       bool channels_last, int up, int down, std::array<int64_t, 2> pad,
                       std::array<uintptr_t, 2> taps, std::array<int, 2> up_size,
                       std::array<int, 2> down_size, std::array<bool, 2> separable, bool correlate,
                       double gain, double slope, double clamp, uintptr_t bias) {
        const auto [samples, channels, in_height, in_width, out_height, out_width, sign_height,
                    sign_width] = sizes;
        return FilteredLrelu{static_cast<DType>(dtype), samples, channels, in_height, in_width,
                             out_height, out_width, sign_height, sign_width, sign_offset[0],
                             sign_offset[1], channels_last, up, down, pad[0], pad[1],
                             {pointer<void>(taps[0]), up_size[0], up_size[1], separable[0]},
                             {pointer<void>(taps[1]), down_size[0], down_size[1], separable[1]},
                             correlate, gain, slope, clamp, pointer<void>(bias)};
      }));

  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "cpu_epilogue_forward",
      [](const Epilogue& e, uintptr_t x, uintptr_t y, uintptr_t mask, int threads) {
        cpu::epilogue_forward(e, pointer<void>(x), pointer<void>(y), pointer<uint8_t>(mask), threads);
      },
      without_gil);
  m.def(
      "cpu_epilogue_masked",
      [](const Epilogue& e, double negative_slope, uintptr_t dy, uintptr_t mask, uintptr_t dx,
         uintptr_t sum, int threads) {
        cpu::epilogue_masked(e, negative_slope, pointer<void>(dy), pointer<uint8_t>(mask),
                             pointer<void>(dx), pointer<void>(sum), threads);
      },
      without_gil);
  m.def(
      "cpu_epilogue_curved",
      [](const Epilogue& e, int order, uintptr_t x, uintptr_t dy, uintptr_t h, uintptr_t dx,
         uintptr_t sum, int threads) {
        cpu::epilogue_curved(e, order, pointer<void>(x), pointer<void>(dy), pointer<void>(h),
                             pointer<void>(dx), pointer<void>(sum), threads);
      },
      without_gil);
  m.def(
      "cpu_epilogue_backward",
      [](const Epilogue& e, double negative_slope, uintptr_t dy, uintptr_t y, uintptr_t mask,
         uintptr_t dx, uintptr_t moments, int threads) {
        cpu::epilogue_backward(e, negative_slope, pointer<void>(dy), pointer<void>(y),
                               pointer<uint8_t>(mask), pointer<void>(dx), pointer<void>(moments),
                               threads);
      },
      without_gil);
  m.def(
      "cpu_upfirdn2d_forward",
      [](const Upfirdn2d& p, const Epilogue* e, uintptr_t x, uintptr_t add, uintptr_t y,
         uintptr_t mask, int threads) {
        cpu::upfirdn2d_forward(p, e, pointer<void>(x), pointer<void>(add), pointer<void>(y),
                               pointer<uint8_t>(mask), threads);
      },
      without_gil);
  m.def(
      "cpu_upfirdn2d_masked",
      [](const Upfirdn2d& p, const Epilogue& e, double negative_slope, uintptr_t dy, uintptr_t mask,
         uintptr_t dx, uintptr_t sum, int threads) {
        cpu::upfirdn2d_masked(p, e, negative_slope, pointer<void>(dy), pointer<uint8_t>(mask),
                              pointer<void>(dx), pointer<void>(sum), threads);
      },
      without_gil);
  m.def(
      "cpu_adain_forward",
      [](const Adain& p, double eps, uintptr_t x, uintptr_t y, uintptr_t statistics, int threads) {
        cpu::adain_forward(p, eps, pointer<void>(x), pointer<void>(y), pointer<void>(statistics),
                           threads);
      },
      without_gil);
  m.def(
      "cpu_adain_backward",
      [](const Adain& p, uintptr_t x, uintptr_t dy, uintptr_t statistics, uintptr_t dx,
         uintptr_t d_styles, uintptr_t sums, int threads) {
        cpu::adain_backward(p, pointer<void>(x), pointer<void>(dy), pointer<void>(statistics),
                            pointer<void>(dx), pointer<void>(d_styles), pointer<void>(sums),
                            threads);
      },
      without_gil);
  m.def(
      "cpu_conv2d_forward",
      [](const Conv2d& p, const Epilogue* e, uintptr_t x, uintptr_t w, uintptr_t pre, uintptr_t add,
         uintptr_t y, uintptr_t mask, int threads) {
        cpu::conv2d_forward(p, e, pointer<void>(x), pointer<void>(w), pointer<float>(pre),
                            pointer<void>(add), pointer<void>(y), pointer<uint8_t>(mask), threads);
      },
      without_gil);
  m.def(
      "cpu_conv2d_weight_gradient",
      [](const Conv2d& p, uintptr_t x, uintptr_t dy, uintptr_t pre, uintptr_t post, uintptr_t dw,
         int threads) {
        cpu::conv2d_weight_gradient(p, pointer<void>(x), pointer<void>(dy), pointer<float>(pre),
                                    pointer<float>(post), pointer<void>(dw), threads);
      },
      without_gil);
  m.def(
      "cpu_demodulation",
      [](const Demodulation& p, uintptr_t weight, uintptr_t styles, uintptr_t energy, uintptr_t d,
         int threads) {
        cpu::demodulation(p, pointer<void>(weight), pointer<void>(styles), pointer<void>(energy),
                          pointer<void>(d), threads);
      },
      without_gil);
  m.def(
      "cpu_filtered_lrelu_forward",
      [](const FilteredLrelu& p, uintptr_t x, uintptr_t y, uintptr_t signs, int threads) {
        cpu::filtered_lrelu_forward(p, pointer<void>(x), pointer<void>(y), pointer<uint8_t>(signs),
                                    threads);
      },
      without_gil);
  m.def(
      "cpu_filtered_lrelu_masked",
      [](const FilteredLrelu& p, uintptr_t x, uintptr_t signs, uintptr_t y, int threads) {
        cpu::filtered_lrelu_masked(p, pointer<void>(x), pointer<uint8_t>(signs), pointer<void>(y),
                                   threads);
      },
      without_gil);

#ifdef STYLEGAN_FAST_WITH_CUDA
  m.def("cuda_epilogue_workspace", &cuda::epilogue_workspace);
  m.def(
      "cuda_epilogue_forward",
      [](const Epilogue& e, uintptr_t x, uintptr_t y, uintptr_t mask, uintptr_t stream) {
        cuda::epilogue_forward(e, pointer<void>(x), pointer<void>(y), pointer<uint8_t>(mask),
                               pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_epilogue_masked",
      [](const Epilogue& e, double negative_slope, uintptr_t dy, uintptr_t mask, uintptr_t dx,
         uintptr_t sum, uintptr_t workspace, uintptr_t stream) {
        cuda::epilogue_masked(e, negative_slope, pointer<void>(dy), pointer<uint8_t>(mask),
                              pointer<void>(dx), pointer<void>(sum), pointer<void>(workspace),
                              pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_epilogue_curved",
      [](const Epilogue& e, int order, uintptr_t x, uintptr_t dy, uintptr_t h, uintptr_t dx,
         uintptr_t sum, uintptr_t workspace, uintptr_t stream) {
        cuda::epilogue_curved(e, order, pointer<void>(x), pointer<void>(dy), pointer<void>(h),
                              pointer<void>(dx), pointer<void>(sum), pointer<void>(workspace),
                              pointer<void>(stream));
      },
      without_gil);
  m.def("cuda_epilogue_moments_workspace", &cuda::epilogue_moments_workspace);
  m.def(
      "cuda_epilogue_backward",
      [](const Epilogue& e, double negative_slope, uintptr_t dy, uintptr_t y, uintptr_t mask,
         uintptr_t dx, uintptr_t moments, uintptr_t workspace, uintptr_t stream) {
        cuda::epilogue_backward(e, negative_slope, pointer<void>(dy), pointer<void>(y),
                                pointer<uint8_t>(mask), pointer<void>(dx), pointer<void>(moments),
                                pointer<void>(workspace), pointer<void>(stream));
      },
      without_gil);
  m.def("cuda_adain_parts", &cuda::adain_parts);
  m.def(
      "cuda_adain_forward",
      [](const Adain& p, double eps, uintptr_t x, uintptr_t y, uintptr_t statistics,
         uintptr_t workspace, uintptr_t stream) {
        cuda::adain_forward(p, eps, pointer<void>(x), pointer<void>(y), pointer<void>(statistics),
                            pointer<void>(workspace), pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_adain_backward",
      [](const Adain& p, uintptr_t x, uintptr_t dy, uintptr_t statistics, uintptr_t dx,
         uintptr_t d_styles, uintptr_t partial, uintptr_t workspace, uintptr_t stream) {
        return cuda::adain_backward(p, pointer<void>(x), pointer<void>(dy),
                                    pointer<void>(statistics), pointer<void>(dx),
                                    pointer<void>(d_styles), pointer<void>(partial),
                                    pointer<void>(workspace), pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_demodulation",
      [](const Demodulation& p, uintptr_t weight, uintptr_t styles, uintptr_t energy, uintptr_t d,
         uintptr_t stream) {
        cuda::demodulation(p, pointer<void>(weight), pointer<void>(styles), pointer<void>(energy),
                           pointer<void>(d), pointer<void>(stream));
      },
      without_gil);
  m.def("cuda_upfirdn2d_workspace", &cuda::upfirdn2d_workspace);
  m.def(
      "cuda_upfirdn2d_forward",
      [](const Upfirdn2d& p, const Epilogue* e, uintptr_t x, uintptr_t add, uintptr_t y,
         uintptr_t mask, uintptr_t stream) {
        cuda::upfirdn2d_forward(p, e, pointer<void>(x), pointer<void>(add), pointer<void>(y),
                                pointer<uint8_t>(mask), pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_upfirdn2d_masked",
      [](const Upfirdn2d& p, const Epilogue& e, double negative_slope, uintptr_t dy, uintptr_t mask,
         uintptr_t dx, uintptr_t sum, uintptr_t workspace, uintptr_t stream) {
        cuda::upfirdn2d_masked(p, e, negative_slope, pointer<void>(dy), pointer<uint8_t>(mask),
                               pointer<void>(dx), pointer<void>(sum), pointer<void>(workspace),
                               pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_filtered_lrelu_forward",
      [](const FilteredLrelu& p, uintptr_t x, uintptr_t y, uintptr_t signs, uintptr_t stream) {
        cuda::filtered_lrelu_forward(p, pointer<void>(x), pointer<void>(y), pointer<uint8_t>(signs),
                                    pointer<void>(stream));
      },
      without_gil);
  m.def(
      "cuda_filtered_lrelu_masked",
      [](const FilteredLrelu& p, uintptr_t x, uintptr_t signs, uintptr_t y, uintptr_t stream) {
        cuda::filtered_lrelu_masked(p, pointer<void>(x), pointer<uint8_t>(signs), pointer<void>(y),
                                   pointer<void>(stream));
      },
      without_gil);
#endif
}
