// The emulated kernels as a Python module, with the ops and arguments of ddpm_fast._native.cuda, for tensors of the
// CPU.
//
// Every tensor is copied into a buffer of exactly its size in the emulator's global memory; an output's holds poison.
// After the kernels have run, outputs are copied back. What was found on the way raises Finding.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cuda/kernels.h"
#include "runtime/cards.h"
#include "runtime/machine.h"
#include "runtime/memory.h"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

// One report a line, each beginning with its kind.
struct Finding : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::mutex one_at_a_time;

class Staging {
 public:
  explicit Staging(const char* op) : op_(op) {}
  ~Staging() { emulator::free_all_global(); }

  template <class T>
  void input(T*& pointer, std::int64_t size, const char* name) {
    if (pointer == nullptr) return;
    Tensor& tensor = place(pointer, size, name);
    std::memcpy(tensor.device, tensor.host, tensor.size);
    emulator::set_initialised(tensor.device, tensor.size);
    pointer = static_cast<T*>(tensor.device);
  }

  // After the inputs: it may be one of them.
  template <class T>
  void output(T*& pointer, std::int64_t size, const char* name) {
    if (pointer == nullptr) return;
    const auto same =
        std::find_if(tensors_.begin(), tensors_.end(), [&](const Tensor& t) { return t.host == pointer; });
    Tensor& tensor = same != tensors_.end() ? *same : place(pointer, size, name);
    tensor.output = true;
    pointer = static_cast<T*>(tensor.device);
  }

  void scratch(void*& pointer, std::int64_t size) {
    if (size == 0 || pointer == nullptr) return;
    pointer = emulator::allocate_global(static_cast<std::size_t>(size), 0, "workspace");
  }

  template <class Args>
  void run(void (*kernels)(const Args&), const Args& args) {
    std::string error;
    try {
      kernels(args);
    } catch (const std::runtime_error& thrown) {
      error = thrown.what();
    }
    emulator::machine.kernel = op_;
    if (emulator::reports().empty()) finish();
    std::string text;
    for (const auto& report : emulator::reports()) text += report.text + "\n";
    emulator::clear_reports();
    if (!text.empty()) throw Finding(text + error);
    if (!error.empty()) throw std::runtime_error(error);
  }

 private:
  struct Tensor {
    void *host, *device;
    std::size_t size;
    std::string name;
    bool output = false;
  };

  Tensor& place(const void* host, std::int64_t size, const char* name) {
    const auto bytes = static_cast<std::size_t>(size);
    // A view's address may be no multiple of a vector; the CPU's allocator gives multiples of 64.
    const std::size_t phase = reinterpret_cast<std::uintptr_t>(host) % 64;
    void* device = emulator::allocate_global(bytes, phase, name);
    return tensors_.emplace_back(Tensor{const_cast<void*>(host), device, bytes, name});
  }

  void finish() {
    for (const Tensor& tensor : tensors_) {
      const std::uint8_t* states = emulator::states(tensor.device);
      const auto* end = states + tensor.size;
      const auto* odd = std::find_if(states, end, [&](std::uint8_t state) {
        return static_cast<bool>(state & emulator::kWritten) != tensor.output;
      });
      if (emulator::kStatesAreKept && odd != end) {
        emulator::report(tensor.output ? "unwritten" : "input written", 0, "byte %td of %s (%zu bytes)", odd - states,
                         tensor.name.c_str(), tensor.size);
      }
      if (tensor.output) std::memcpy(tensor.host, tensor.device, tensor.size);
    }
  }

  const char* op_;
  std::vector<Tensor> tensors_;
};

std::int64_t elements(const Shape& shape) { return shape.n * shape.c * shape.hw; }

std::int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kUInt8:
      return 1;
  }
  throw std::invalid_argument("no such dtype");
}

std::int64_t bytes_of(DType dtype, const Shape& shape) { return bytes_of(dtype) * elements(shape); }

// Rows of a table up to the last that is used.
std::int64_t rows(const std::int64_t* indices, std::int64_t count) {
  return count == 0 ? 0 : *std::max_element(indices, indices + count) + 1;
}

constexpr std::int64_t kIndexBytes = sizeof(std::int64_t);

void noise(const NoiseArgs& host) {
  NoiseArgs args = host;
  Staging staging("noise");
  staging.input(args.seeds, args.shape.n * kIndexBytes, "seeds");
  staging.output(args.out, bytes_of(args.dtype, args.shape), "out");
  staging.run(cuda_kernels().noise, args);
}

void q_sample(const QSampleArgs& host) {
  QSampleArgs args = host;
  Staging staging("q_sample");
  staging.input(args.x_0, bytes_of(args.x_0_dtype, args.shape), "x_0");
  staging.input(args.t, args.shape.n * kIndexBytes, "t");
  staging.input(args.table, rows(host.t, args.shape.n) * 2 * sizeof(float), "table");
  staging.input(args.noise, bytes_of(args.dtype, args.shape), "noise");
  staging.input(args.seeds, args.shape.n * kIndexBytes, "seeds");
  staging.output(args.out, bytes_of(args.dtype, args.shape), "out");
  staging.run(cuda_kernels().q_sample, args);
}

void reverse_step(const ReverseStepArgs& host) {
  ReverseStepArgs args = host;
  Staging staging("reverse_step");
  const std::int64_t size = bytes_of(args.dtype, args.shape), n = args.shape.n;
  const std::int64_t steps = args.step_stride == 0 ? std::min<std::int64_t>(n, 1) : n;
  const std::int64_t halves = (args.guidance ? 2 : 1) * (args.variance == Variance::kFixed ? 1 : 2);
  staging.input(args.x_t, size, "x_t");
  staging.input(args.model_output, bytes_of(args.model_dtype, args.shape) * halves, "model_output");
  staging.input(args.table, rows(host.steps, steps) * static_cast<std::int64_t>(sizeof(PlanRow)), "table");
  staging.input(args.steps, steps * kIndexBytes, "steps");
  staging.input(args.noise, size, "noise");
  staging.input(args.seeds, n * kIndexBytes, "seeds");
  staging.input(args.x_0_prev, size, "x_0_prev");
  staging.output(args.out, size, "out");
  staging.output(args.x_0_out, size, "x_0_out");
  staging.run(cuda_kernels().reverse_step, args);
}

void stage_loss_inputs(Staging& staging, DenoisingLossArgs& args) {
  const std::int64_t size = bytes_of(args.dtype, args.shape), n = args.shape.n;
  staging.input(args.model_output, size, "model_output");
  staging.input(args.x_0, size, "x_0");
  staging.input(args.table, rows(args.t, n) * 2 * static_cast<std::int64_t>(sizeof(float)), "table");
  staging.input(args.t, n * kIndexBytes, "t");
  staging.input(args.noise, size, "noise");
  staging.input(args.seeds, n * kIndexBytes, "seeds");
}

void denoising_loss(const DenoisingLossArgs& host) {
  DenoisingLossArgs args = host;
  Staging staging("denoising_loss");
  stage_loss_inputs(staging, args);
  staging.output(args.loss, args.shape.n * static_cast<std::int64_t>(sizeof(float)), "loss");
  staging.scratch(args.workspace, cuda::denoising_loss_workspace(args.shape));
  staging.run(cuda_kernels().denoising_loss, args);
}

void denoising_loss_backward(const DenoisingLossBackwardArgs& host) {
  DenoisingLossBackwardArgs args = host;
  Staging staging("denoising_loss_backward");
  stage_loss_inputs(staging, args.forward);
  staging.input(args.forward.loss, args.forward.shape.n * static_cast<std::int64_t>(sizeof(float)), "grad_loss");
  staging.output(args.grad_model_output, bytes_of(args.forward.dtype, args.forward.shape), "grad_model_output");
  staging.run(cuda_kernels().denoising_loss_backward, args);
}

template <class Args>
void stage_channel_inputs(Staging& staging, Args& args) {
  const std::int64_t c = args.shape.c, nc = args.shape.n * args.shape.c;
  staging.input(args.weight.data, c * bytes_of(args.weight.dtype), "weight");
  staging.input(args.bias.data, c * bytes_of(args.bias.dtype), "bias");
  staging.input(args.shift.data, nc * bytes_of(args.shift.dtype), "shift");
  staging.input(args.scale.data, nc * bytes_of(args.scale.dtype), "scale");
  staging.input(args.scale_shift.data, nc * bytes_of(args.scale_shift.dtype), "scale_shift");
}

void group_norm_silu(const GroupNormSiluArgs& host) {
  GroupNormSiluArgs args = host;
  Staging staging("group_norm_silu");
  const std::int64_t size = bytes_of(args.dtype, args.shape);
  const std::int64_t statistics = args.shape.n * args.groups * static_cast<std::int64_t>(sizeof(float));
  staging.input(args.x, size, "x");
  stage_channel_inputs(staging, args);
  staging.output(args.y, size, "y");
  staging.output(args.mean, statistics, "mean");
  staging.output(args.rstd, statistics, "rstd");
  staging.scratch(args.workspace, cuda::group_norm_silu_workspace(args.dtype, args.shape, args.groups));
  staging.run(cuda_kernels().group_norm_silu, args);
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& host) {
  GroupNormSiluBackwardArgs args = host;
  Staging staging("group_norm_silu_backward");
  const auto number = static_cast<std::int64_t>(sizeof(float));
  const std::int64_t size = bytes_of(args.dtype, args.shape), c = args.shape.c * number, nc = args.shape.n * c;
  const std::int64_t statistics = args.shape.n * args.groups * number;
  staging.input(args.dy, size, "dy");
  staging.input(args.x, size, "x");
  staging.input(args.mean, statistics, "mean");
  staging.input(args.rstd, statistics, "rstd");
  stage_channel_inputs(staging, args);
  staging.output(args.dx, size, "dx");
  staging.output(args.dweight, c, "dweight");
  staging.output(args.dbias, c, "dbias");
  staging.output(args.dshift, nc, "dshift");
  staging.output(args.dscale, nc, "dscale");
  staging.output(args.dscale_shift, nc, "dscale_shift");
  staging.scratch(args.workspace, cuda::group_norm_silu_backward_workspace(args.dtype, args.shape, args.groups));
  staging.run(cuda_kernels().group_norm_silu_backward, args);
}

// The same op for whoever calls it, one at a time.
template <auto op, class Args>
void locked(const Args& args) {
  const std::lock_guard lock(one_at_a_time);
  op(args);
}

Kernels emulated_kernels() {
#define OP(name, Args) &locked<&name, Args>,
  return {DDPM_FAST_OPS(OP) & cuda::denoising_loss_workspace, &cuda::group_norm_silu_workspace,
          &cuda::group_norm_silu_backward_workspace};
#undef OP
}

void set_order(const std::string& order, std::uint64_t seed, unsigned preempt) {
  auto& machine = emulator::machine;
  if (order == "natural") {
    machine.order = emulator::Order::kNatural;
  } else if (order == "reversed") {
    machine.order = emulator::Order::kReversed;
  } else if (order == "shuffled") {
    machine.order = emulator::Order::kShuffled;
  } else {
    throw std::invalid_argument("order: expected natural, reversed or shuffled, got " + order);
  }
  machine.seed = seed;
  machine.preempt = preempt;
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  py::register_local_exception<Finding>(m, "Finding", PyExc_RuntimeError);
  bind_ops(m, emulated_kernels());
  m.def("why_not", &cuda::why_not);
  m.def("set_order", &set_order, py::arg("order") = "natural", py::arg("seed") = 0, py::arg("preempt") = 0,
        "In which order blocks and threads take turns; with preempt, an access to memory ends a turn with probability "
        "1/preempt.");
  m.def(
      "set_device",
      [](int device) {
        if (device < 0 || device >= emulator::kCards) throw std::invalid_argument("device: there are two cards");
        emulator::set_current_device(device);
      },
      "0: like sm_80. 1: like sm_90, with clusters.");
  m.def("set_planted", [](int bug) { emulator::planted = bug; }, "Which planted bug is there; 0: none.");
  m.def(
      "take_launches",
      [] {
        py::list launches;
        for (const auto& launch : std::exchange(emulator::machine.log, {})) {
          launches.append(py::dict(py::arg("kernel") = launch.kernel, py::arg("blocks") = launch.blocks,
                                   py::arg("threads") = launch.threads, py::arg("cluster") = launch.cluster,
                                   py::arg("dynamic_shared") = launch.dynamic_shared));
        }
        return launches;
      },
      "The launches since this was called last.");
  m.def(
      "counters",
      [] {
        const auto& machine = emulator::machine;
        py::dict counters;
        counters["launches"] = machine.launches;
        counters["blocks"] = machine.blocks_run;
        counters["accesses"] = machine.accesses;
        return counters;
      },
      "What has run since the module was loaded.");
}
