// A table of kernels as functions of a Python module. Tensors cross as addresses (0: absent); Python checks shapes.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/ops.h"

namespace ddpm_fast {

using Address = std::uintptr_t;

// An address as the pointer that the struct's field wants.
struct Pointer {
  Address address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

// Calls of the kernels that a network's inference form is made of, to be made again: what a graph is on a GPU.
struct Calls {
  std::vector<std::function<void()>> all;
};
inline thread_local Calls* recording = nullptr;  // where this thread's go, too

template <class Args>
void call(void (*run)(const Args&), const std::type_identity_t<Args>& args) {
  run(args);
  if (recording != nullptr) recording->all.push_back([run, args] { run(args); });
}

// What only the CPU has.
inline void bind_cpu_ops(pybind11::module_& m, const Kernels& kernels) {
  const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();

  m.attr("panel") = kernels.panel;
  pybind11::class_<Calls>(m, "Calls", "Calls of kernels, as `record` returns them; to call is to make them again.")
      .def(
          "__call__",
          [](const Calls& calls) {
            for (const auto& one : calls.all) one();
          },
          nogil)
      .def("__len__", [](const Calls& calls) { return calls.all.size(); });
  m.def(
      "record",
      [](const std::function<void()>& function) {
        struct Recording {
          Calls calls;
          Calls* outer = std::exchange(recording, &calls);
          ~Recording() { recording = outer; }
        } now;
        function();
        return std::move(now.calls);
      },
      "Calls function(), and returns the calls of inference kernels that it makes on this thread.");
  m.def(
      "group_norm_lines",
      [run = kernels.group_norm_lines](
          int dtype, Address lines, Address x, Address skip, Address weight, int weight_dtype, Address bias,
          int bias_dtype, Address shift, int shift_dtype, Address scale, int scale_dtype, Address scale_shift,
          int scale_shift_dtype, std::int64_t n, std::int64_t channels, std::int64_t skip_channels, std::int64_t hw,
          std::int64_t groups, double eps, bool silu, std::intptr_t run_on) {
        call(run, {Pointer{lines},
                   Pointer{skip},
                   skip_channels,
                   {DType{dtype},
                    nullptr,
                    nullptr,
                    nullptr,
                    Pointer{x},
                    {Pointer{weight}, DType{weight_dtype}},
                    {Pointer{bias}, DType{bias_dtype}},
                    {Pointer{shift}, DType{shift_dtype}},
                    {Pointer{scale}, DType{scale_dtype}},
                    {Pointer{scale_shift}, DType{scale_shift_dtype}},
                    {n, channels + skip_channels, hw, true},
                    groups,
                    eps,
                    silu,
                    nullptr,
                    {run_on}}});
      },
      nogil);
  const auto def_conv = [&](const char* name, void (*run)(const ConvArgs&)) {
    m.def(
        name,
        [run](int dtype, Address y, Address x, Address skip, Address lines, bool silu, Address weights, Address bias,
              Address added, float divisor, std::int64_t n, std::int64_t height, std::int64_t width,
              std::int64_t channels, std::int64_t skip_channels, std::int64_t out_height, std::int64_t out_width,
              std::int64_t out_channels, int kernel, int stride, int padding, bool upsample, std::intptr_t run_on) {
          call(run, {DType{dtype},
                     Pointer{y},
                     Pointer{x},
                     Pointer{skip},
                     Pointer{lines},
                     silu,
                     Pointer{weights},
                     Pointer{bias},
                     Pointer{added},
                     divisor,
                     n,
                     height,
                     width,
                     channels,
                     skip_channels,
                     out_height,
                     out_width,
                     out_channels,
                     kernel,
                     stride,
                     padding,
                     upsample,
                     {run_on}});
        },
        nogil);
  };
  def_conv("conv_direct", kernels.conv_direct);
  def_conv("conv_winograd", kernels.conv_winograd);
  def_conv("conv_winograd_upsampled_gradient", kernels.conv_winograd_upsampled_gradient);
  m.def(
      "attention",
      [run = kernels.attention](int dtype, Address y, Address softmax, Address qkv, std::int64_t n, std::int64_t heads,
                                std::int64_t pixels, std::int64_t channels, float scale, std::intptr_t run_on) {
        call(run,
             {DType{dtype}, Pointer{y}, Pointer{softmax}, Pointer{qkv}, n, heads, pixels, channels, scale, {run_on}});
      },
      nogil);
  m.def(
      "attention_backward",
      [run = kernels.attention_backward](int dtype, Address dqkv, Address dy, Address y, Address softmax, Address qkv,
                                         std::int64_t n, std::int64_t heads, std::int64_t pixels, std::int64_t channels,
                                         float scale, std::intptr_t run_on) {
        run({Pointer{dqkv},
             Pointer{dy},
             {DType{dtype}, Pointer{y}, Pointer{softmax}, Pointer{qkv}, n, heads, pixels, channels, scale, {run_on}}});
      },
      nogil);
  m.def(
      "pack_winograd",
      [run = kernels.pack_winograd](int dtype, Address packed, Address weights, std::int64_t out_channels,
                                    std::int64_t channels, std::int64_t out_stride, std::int64_t stride,
                                    std::int64_t row_stride, std::int64_t column_stride, bool upsample,
                                    std::intptr_t run_on) {
        run({DType{dtype},
             Pointer{packed},
             Pointer{weights},
             out_channels,
             channels,
             out_stride,
             stride,
             row_stride,
             column_stride,
             upsample,
             {run_on}});
      },
      nogil);
  m.def(
      "conv_winograd_weights",
      [run = kernels.conv_winograd_weights](
          int dtype, Address dweight, Address dbias, Address x, Address dy, std::int64_t n, std::int64_t height,
          std::int64_t width, std::int64_t channels, std::int64_t out_channels, bool upsample, std::intptr_t run_on) {
        run({DType{dtype},
             Pointer{dweight},
             Pointer{dbias},
             Pointer{x},
             Pointer{dy},
             n,
             height,
             width,
             channels,
             out_channels,
             upsample,
             {run_on}});
      },
      nogil);
}

inline void bind_ops(pybind11::module_& m, const Kernels& kernels) {
  const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();

  m.def(
      "noise",
      [run = kernels.noise](int dtype, Address out, Address seeds, std::uint32_t stream, std::int64_t n, std::int64_t c,
                            std::int64_t hw, bool channels_last, std::intptr_t run_on) {
        run({DType{dtype}, Pointer{out}, Pointer{seeds}, stream, {n, c, hw, channels_last}, {run_on}});
      },
      nogil);
  m.def(
      "q_sample",
      [run = kernels.q_sample](int dtype, Address out, Address x_0, int x_0_dtype, Address t, Address table,
                               Address noise, Address seeds, std::int64_t n, std::int64_t c, std::int64_t hw,
                               bool channels_last, std::intptr_t run_on) {
        run({DType{dtype},
             Pointer{out},
             Pointer{x_0},
             DType{x_0_dtype},
             Pointer{t},
             Pointer{table},
             Pointer{noise},
             Pointer{seeds},
             {n, c, hw, channels_last},
             {run_on}});
      },
      nogil);
  m.def(
      "reverse_step",
      [run = kernels.reverse_step](int dtype, int model_dtype, Address out, Address x_0_out, Address x_t,
                                   Address model_output, Address table, Address steps, std::int64_t step_stride,
                                   Address noise, Address seeds, Address x_0_prev, bool guidance, double guidance_scale,
                                   int variance, std::int64_t n, std::int64_t c, std::int64_t hw, bool channels_last,
                                   std::intptr_t run_on) {
        run({DType{dtype},
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
             {run_on}});
      },
      nogil);
  m.def(
      "denoising_loss",
      [run = kernels.denoising_loss](int dtype, Address loss, Address model_output, Address x_0, Address t,
                                     Address table, Address noise, Address seeds, int prediction, std::int64_t n,
                                     std::int64_t c, std::int64_t hw, bool channels_last, Address workspace,
                                     std::intptr_t run_on) {
        run({DType{dtype},
             Pointer{loss},
             Pointer{model_output},
             Pointer{x_0},
             Pointer{t},
             Pointer{table},
             Pointer{noise},
             Pointer{seeds},
             Prediction{prediction},
             {n, c, hw, channels_last},
             Pointer{workspace},
             {run_on}});
      },
      nogil);
  m.def(
      "denoising_loss_backward",
      [run = kernels.denoising_loss_backward](
          int dtype, Address grad_model_output, Address grad_loss, Address model_output, Address x_0, Address t,
          Address table, Address noise, Address seeds, int prediction, std::int64_t n, std::int64_t c, std::int64_t hw,
          bool channels_last, std::intptr_t run_on) {
        run({Pointer{grad_model_output},
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
              nullptr,
              {run_on}}});
      },
      nogil);
  m.def(
      "group_norm_silu",
      [run = kernels.group_norm_silu](int dtype, Address y, Address mean, Address rstd, Address x, Address weight,
                                      int weight_dtype, Address bias, int bias_dtype, Address shift, int shift_dtype,
                                      Address scale, int scale_dtype, Address scale_shift, int scale_shift_dtype,
                                      std::int64_t n, std::int64_t c, std::int64_t hw, std::int64_t groups, double eps,
                                      bool silu, bool channels_last, Address workspace, std::intptr_t run_on) {
        run({DType{dtype},
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
             Pointer{workspace},
             {run_on}});
      },
      nogil);
  m.def(
      "group_norm_silu_backward",
      [run = kernels.group_norm_silu_backward](
          int dtype, Address dx, Address dweight, Address dbias, Address dshift, Address dscale, Address dscale_shift,
          Address dy, Address x, Address mean, Address rstd, Address weight, int weight_dtype, Address bias,
          int bias_dtype, Address shift, int shift_dtype, Address scale, int scale_dtype, Address scale_shift,
          int scale_shift_dtype, std::int64_t n, std::int64_t c, std::int64_t hw, std::int64_t groups, bool silu,
          bool channels_last, Address workspace, std::intptr_t run_on) {
        run({DType{dtype},
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
             Pointer{workspace},
             {run_on}});
      },
      nogil);
  if (kernels.conv_direct != nullptr) bind_cpu_ops(m, kernels);
  if (kernels.denoising_loss_workspace != nullptr) {
    m.def("denoising_loss_workspace",
          [bytes = kernels.denoising_loss_workspace](std::int64_t n, std::int64_t c, std::int64_t hw) {
            return bytes({n, c, hw, false});
          });
  }
  const auto def_workspace = [&m](const char* name, std::int64_t (*bytes)(DType, const Shape&, std::int64_t)) {
    if (bytes == nullptr) return;
    m.def(name, [bytes](int dtype, std::int64_t n, std::int64_t c, std::int64_t hw, std::int64_t groups,
                        bool channels_last) { return bytes(DType{dtype}, {n, c, hw, channels_last}, groups); });
  };
  def_workspace("group_norm_silu_workspace", kernels.group_norm_silu_workspace);
  def_workspace("group_norm_silu_backward_workspace", kernels.group_norm_silu_backward_workspace);
}

}  // namespace ddpm_fast
