// The pybind11 module: the only C++ file that knows Python. Tensors cross as addresses (0: absent); Python checks
// shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "common/args.h"
#include "common/philox.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

using Address = std::uintptr_t;

// An address as the pointer that the struct's field wants.
struct Pointer {
  Address address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

py::dict build_info() {
  py::dict info;
  info["version"] = DDPM_FAST_VERSION;
  info["compiler"] = __VERSION__;
  info["isa"] = isa_in_use();
  info["isas"] = compiled_isas();
  info["cuda_archs"] = py::str(DDPM_FAST_CUDA_ARCHS).attr("split")();
  info["cuda_why_not"] = DDPM_FAST_CUDA_WHY_NOT;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  philox(counter.data(), key[0], key[1]);
  return counter;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  isa_in_use();  // reports a wrong DDPM_FAST_ISA at import
  m.def("build_info", &build_info);
  m.def("philox4x32", &philox4x32);
  m.def(
      "philox",
      [](std::int64_t seed, std::uint32_t stream, std::uint32_t first_block, std::int64_t n_blocks, Address out) {
        auto* words = reinterpret_cast<std::uint32_t*>(out);
        for (std::int64_t i = 0; i < n_blocks; ++i) {
          philox_block(static_cast<std::uint64_t>(seed), stream, static_cast<std::uint32_t>(first_block + i),
                       words + 4 * i);
        }
      },
      nogil);
  m.def(
      "noise",
      [](int dtype, Address out, Address seeds, std::uint32_t stream, std::int64_t n, std::int64_t c, std::int64_t hw,
         bool channels_last, int threads) {
        cpu_kernels().noise({DType{dtype}, Pointer{out}, Pointer{seeds}, stream, {n, c, hw, channels_last}, threads});
      },
      nogil);
  m.def(
      "q_sample",
      [](int dtype, Address out, Address x_0, Address t, Address table, Address noise, Address seeds, std::int64_t n,
         std::int64_t c, std::int64_t hw, bool channels_last, int threads) {
        cpu_kernels().q_sample({DType{dtype},
                                Pointer{out},
                                Pointer{x_0},
                                Pointer{t},
                                Pointer{table},
                                Pointer{noise},
                                Pointer{seeds},
                                {n, c, hw, channels_last},
                                threads});
      },
      nogil);
  m.def(
      "reverse_step",
      [](int dtype, int model_dtype, Address out, Address x_0_out, Address x_t, Address model_output, Address table,
         Address steps, std::int64_t step_stride, Address noise, Address seeds, Address x_0_prev, bool guidance,
         double guidance_scale, int variance, std::int64_t n, std::int64_t c, std::int64_t hw, bool channels_last,
         int threads) {
        cpu_kernels().reverse_step({DType{dtype},
                                    DType{model_dtype},
                                    Pointer{out},
                                    Pointer{x_0_out},
                                    Pointer{x_t},
                                    Pointer{model_output},
                                    Pointer{table},
                                    Pointer{steps},
                                    step_stride,
                                    Pointer{noise},
                                    Pointer{seeds},
                                    Pointer{x_0_prev},
                                    guidance,
                                    guidance_scale,
                                    Variance{variance},
                                    {n, c, hw, channels_last},
                                    threads});
      },
      nogil);
  m.def(
      "denoising_loss",
      [](int dtype, Address loss, Address model_output, Address x_0, Address t, Address table, Address noise,
         Address seeds, int prediction, std::int64_t n, std::int64_t c, std::int64_t hw, bool channels_last,
         int threads) {
        cpu_kernels().denoising_loss({DType{dtype},
                                      Pointer{loss},
                                      Pointer{model_output},
                                      Pointer{x_0},
                                      Pointer{t},
                                      Pointer{table},
                                      Pointer{noise},
                                      Pointer{seeds},
                                      Prediction{prediction},
                                      {n, c, hw, channels_last},
                                      threads});
      },
      nogil);
  m.def(
      "denoising_loss_backward",
      [](int dtype, Address grad_model_output, Address grad_loss, Address model_output, Address x_0, Address t,
         Address table, Address noise, Address seeds, int prediction, std::int64_t n, std::int64_t c, std::int64_t hw,
         bool channels_last, int threads) {
        cpu_kernels().denoising_loss_backward({Pointer{grad_model_output},
                                               {DType{dtype},
                                                Pointer{grad_loss},
                                                Pointer{model_output},
                                                Pointer{x_0},
                                                Pointer{t},
                                                Pointer{table},
                                                Pointer{noise},
                                                Pointer{seeds},
                                                Prediction{prediction},
                                                {n, c, hw, channels_last},
                                                threads}});
      },
      nogil);
  m.def(
      "group_norm_silu",
      [](int dtype, Address y, Address mean, Address rstd, Address x, Address weight, int weight_dtype, Address bias,
         int bias_dtype, Address shift, int shift_dtype, Address scale, int scale_dtype, Address scale_shift,
         int scale_shift_dtype, std::int64_t n, std::int64_t c, std::int64_t hw, std::int64_t groups, double eps,
         bool silu, bool channels_last, int threads) {
        cpu_kernels().group_norm_silu({DType{dtype},
                                       Pointer{y},
                                       Pointer{mean},
                                       Pointer{rstd},
                                       Pointer{x},
                                       {Pointer{weight}, DType{weight_dtype}},
                                       {Pointer{bias}, DType{bias_dtype}},
                                       {Pointer{shift}, DType{shift_dtype}},
                                       {Pointer{scale}, DType{scale_dtype}},
                                       {Pointer{scale_shift}, DType{scale_shift_dtype}},
                                       {n, c, hw, channels_last},
                                       groups,
                                       eps,
                                       silu,
                                       threads});
      },
      nogil);
  m.def(
      "group_norm_silu_backward",
      [](int dtype, Address dx, Address dweight, Address dbias, Address dshift, Address dscale, Address dscale_shift,
         Address dy, Address x, Address mean, Address rstd, Address weight, int weight_dtype, Address bias,
         int bias_dtype, Address shift, int shift_dtype, Address scale, int scale_dtype, Address scale_shift,
         int scale_shift_dtype, std::int64_t n, std::int64_t c, std::int64_t hw, std::int64_t groups, bool silu,
         bool channels_last, int threads) {
        cpu_kernels().group_norm_silu_backward({DType{dtype},
                                                Pointer{dx},
                                                Pointer{dweight},
                                                Pointer{dbias},
                                                Pointer{dshift},
                                                Pointer{dscale},
                                                Pointer{dscale_shift},
                                                Pointer{dy},
                                                Pointer{x},
                                                Pointer{mean},
                                                Pointer{rstd},
                                                {Pointer{weight}, DType{weight_dtype}},
                                                {Pointer{bias}, DType{bias_dtype}},
                                                {Pointer{shift}, DType{shift_dtype}},
                                                {Pointer{scale}, DType{scale_dtype}},
                                                {Pointer{scale_shift}, DType{scale_shift_dtype}},
                                                {n, c, hw, channels_last},
                                                groups,
                                                silu,
                                                threads});
      },
      nogil);
}
