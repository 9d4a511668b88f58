// A table of kernels as functions of a Python module. Tensors cross as addresses (0: absent). Python checks shapes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/ops.h"

namespace ddpm_fast {

namespace py = pybind11;

// The arguments of a call, in order. An `Arguments` converts to the next one, in the type that is wanted:
//   NoiseArgs args = {arguments, arguments, ...};
// All ops share one function type, because separate signatures of 20 arguments take longer to compile.
class Arguments {
 public:
  explicit Arguments(const py::args& all) : all_(all) {}

  template <class T>
    requires(std::is_arithmetic_v<T>)
  operator T() {
    return next<T>();
  }
  template <class T>
    requires(std::is_enum_v<T>)
  operator T() {
    return static_cast<T>(next<int>());
  }
  template <class T>
  operator T*() {
    return reinterpret_cast<T*>(next<std::uintptr_t>());
  }

  // Raises TypeError unless every argument was taken. Call it before you use them.
  void check() const {
    if (taken_ != all_.size()) refuse("expected " + std::to_string(taken_) + " arguments");
  }

 private:
  template <class T>
  T next() {
    if (taken_ == all_.size()) refuse("expected more arguments");
    try {
      return all_[taken_++].template cast<T>();
    } catch (const py::cast_error&) {
      refuse("expected argument " + std::to_string(taken_) + " to be a number in range");
    }
  }

  [[noreturn]] void refuse(const std::string& wanted) const {
    throw py::type_error(wanted + ", got " + py::repr(all_).cast<std::string>());
  }

  const py::args& all_;
  std::size_t taken_ = 0;
};

// Calls of the kernels that a network's inference form is made of, to be made again: what a graph is on a GPU.
struct Calls {
  std::vector<std::function<void()>> all;
};
inline thread_local Calls* recording = nullptr;  // where this thread's go, too

// Adds a function to a module.
inline void def(py::module_& m, const char* name, std::function<py::object(Arguments&)> function) {
  m.def(name, [function = std::move(function)](const py::args& all) {
    Arguments arguments(all);
    return function(arguments);
  });
}

// Adds a kernel that takes the arguments that `parse` makes of a call's.
template <class Args>
void def_op(py::module_& m, const char* name, void (*run)(const Args&), Args (*parse)(Arguments&),
            bool recorded = false) {
  def(m, name, [run, parse, recorded](Arguments& arguments) -> py::object {
    const Args args = parse(arguments);
    arguments.check();
    {
      const py::gil_scoped_release released;
      run(args);
    }
    if (recorded && recording != nullptr) recording->all.push_back([run, args] { run(args); });
    return py::none();
  });
}

// --------------------------------------------------------------------------------------------------------------- ops

// Binds the kernels that only the CPU has.
inline void bind_cpu_ops(py::module_& m, const Kernels& kernels) {
  m.attr("panel") = kernels.panel;
  py::class_<Calls>(m, "Calls", "Calls of kernels, as `record` returns them. A call repeats them.")
      .def(
          "__call__",
          [](const Calls& calls) {
            for (const auto& one : calls.all) one();
          },
          py::call_guard<py::gil_scoped_release>())
      .def("__len__", [](const Calls& calls) { return calls.all.size(); });
  m.def(
      "record",
      [](const py::function& function) {
        struct Recording {
          Calls calls;
          Calls* outer = std::exchange(recording, &calls);
          ~Recording() { recording = outer; }
        } now;
        function();
        return std::move(now.calls);
      },
      "Call function() and return the calls of inference kernels that it makes on this thread.");

  def_op<GroupNormLinesArgs>(
      m, "group_norm_lines", kernels.group_norm_lines,
      [](Arguments& a) {
        GroupNormLinesArgs args{};
        GroupNormSiluArgs& norm = args.norm;
        norm.dtype = a;
        args.lines = a;
        norm.x = a;
        args.skip = a;
        for (ChannelInput* input : {&norm.weight, &norm.bias, &norm.shift, &norm.scale, &norm.scale_shift}) {
          *input = ChannelInput{a, a};
        }
        norm.shape.n = a;
        norm.shape.c = a;
        args.skip_channels = a;
        norm.shape.c += args.skip_channels;
        norm.shape.hw = a;
        norm.shape.channels_last = true;
        norm.groups = a;
        norm.eps = a;
        norm.silu = a;
        norm.run_on = RunOn{a};
        return args;
      },
      true);
  const auto def_conv = [&m](const char* name, void (*run)(const ConvArgs&)) {
    def_op<ConvArgs>(
        m, name, run,
        [](Arguments& a) { return ConvArgs{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, {a}}; },
        true);
  };
  def_conv("conv_direct", kernels.conv_direct);
  def_conv("conv_winograd", kernels.conv_winograd);
  def_conv("conv_winograd_upsampled_gradient", kernels.conv_winograd_upsampled_gradient);
  def_op<AttentionArgs>(
      m, "attention", kernels.attention, [](Arguments& a) { return AttentionArgs{a, a, a, a, a, a, a, a, a, {a}}; },
      true);
  def_op<AttentionBackwardArgs>(m, "attention_backward", kernels.attention_backward, [](Arguments& a) {
    AttentionBackwardArgs args{};
    args.forward.dtype = a;
    args.dqkv = a;
    args.dy = a;
    args.forward = {args.forward.dtype, a, a, a, a, a, a, a, a, {a}};
    return args;
  });
  def_op<PackWinogradArgs>(m, "pack_winograd", kernels.pack_winograd,
                           [](Arguments& a) { return PackWinogradArgs{a, a, a, a, a, a, a, a, a, a, {a}}; });
  def_op<ConvWinogradWeightsArgs>(m, "conv_winograd_weights", kernels.conv_winograd_weights, [](Arguments& a) {
    return ConvWinogradWeightsArgs{a, a, a, a, a, a, a, a, a, a, a, {a}};
  });
}

inline void bind_ops(py::module_& m, const Kernels& kernels) {
  def_op<NoiseArgs>(m, "noise", kernels.noise, [](Arguments& a) { return NoiseArgs{a, a, a, a, {a, a, a, a}, {a}}; });
  def_op<QSampleArgs>(m, "q_sample", kernels.q_sample,
                      [](Arguments& a) { return QSampleArgs{a, a, a, a, a, a, a, a, {a, a, a, a}, {a}}; });
  def_op<ReverseStepArgs>(m, "reverse_step", kernels.reverse_step, [](Arguments& a) {
    return ReverseStepArgs{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, {a, a, a, a}, {a}};
  });
  def_op<DenoisingLossArgs>(m, "denoising_loss", kernels.denoising_loss, [](Arguments& a) {
    return DenoisingLossArgs{a, a, a, a, a, a, a, a, a, {a, a, a, a}, a, {a}};
  });
  def_op<DenoisingLossBackwardArgs>(m, "denoising_loss_backward", kernels.denoising_loss_backward, [](Arguments& a) {
    DenoisingLossBackwardArgs args{};
    args.forward.dtype = a;
    args.grad_model_output = a;
    args.forward = {args.forward.dtype, a, a, a, a, a, a, a, a, {a, a, a, a}, nullptr, {a}};
    return args;
  });
  def_op<GroupNormSiluArgs>(m, "group_norm_silu", kernels.group_norm_silu, [](Arguments& a) {
    GroupNormSiluArgs args = {a, a, a, a,       a, {a, a}, {a, a}, {a, a}, {a, a}, {a, a}, {a, a, a, false},
                              a, a, a, nullptr, {}};
    args.shape.channels_last = a;
    args.workspace = a;
    args.run_on = RunOn{a};
    return args;
  });
  def_op<GroupNormSiluBackwardArgs>(m, "group_norm_silu_backward", kernels.group_norm_silu_backward, [](Arguments& a) {
    GroupNormSiluBackwardArgs args = {
        a, a, a, a, a, a, a, a, a, a, a, {a, a}, {a, a}, {a, a}, {a, a}, {a, a}, {a, a, a, false}, a, a, nullptr, {}};
    args.shape.channels_last = a;
    args.workspace = a;
    args.run_on = RunOn{a};
    return args;
  });
  if (kernels.conv_direct != nullptr) bind_cpu_ops(m, kernels);

  const auto def_workspace = [&m](const char* name, auto* bytes, auto parse) {
    if (bytes == nullptr) return;
    def(m, name, [bytes, parse](Arguments& arguments) -> py::object { return py::int_(parse(bytes, arguments)); });
  };
  def_workspace("denoising_loss_workspace", kernels.denoising_loss_workspace, [](auto* bytes, Arguments& a) {
    const Shape shape = {a, a, a, false};
    a.check();
    return bytes(shape);
  });
  const auto of_norm = [](auto* bytes, Arguments& a) {
    const DType dtype = a;
    Shape shape = {a, a, a, false};
    const std::int64_t groups = a;
    shape.channels_last = a;
    a.check();
    return bytes(dtype, shape, groups);
  };
  def_workspace("group_norm_silu_workspace", kernels.group_norm_silu_workspace, of_norm);
  def_workspace("group_norm_silu_backward_workspace", kernels.group_norm_silu_backward_workspace, of_norm);
}

}  // namespace ddpm_fast
