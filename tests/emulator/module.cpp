// The emulated kernels as a Python module. It has the functions of ddpm_fast._native.cuda, for CPU tensors.
//
// Each tensor gets a buffer of its exact size in the emulator's global memory. Inputs are copied there. Outputs hold
// poison until a kernel writes them, and are copied back afterwards. Finding is raised if the emulator found a bug.
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
#include "cuda/launch.h"
#include "runtime/cards.h"
#include "runtime/machine.h"
#include "runtime/memory.h"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

py::handle finding;  // the exception; its text has one report per line, which begins with the kind

std::mutex one_at_a_time;

// Returns the bytes of each tensor among the values of a call. Tensors are dense.
std::vector<std::int64_t> sizes_of(Values values) {
  std::vector<std::int64_t> sizes;
  for (PyObject* value : values) sizes.push_back(py::getattr(value, "nbytes", py::int_(0)).cast<std::int64_t>());
  return sizes;
}

// The bytes of a kernel's workspace.
template <class Args>
std::int64_t workspace(const Args&) {
  return 0;
}
#define OP(name, Args)                       \
  template <>                                \
  std::int64_t workspace(const Args& args) { \
    return cuda::name##_workspace(args);     \
  }
DDPM_FAST_WORKSPACES(OP)
#undef OP

// The tensors of one call, in the emulator's global memory.
class Staging {
 public:
  explicit Staging(std::string kernel) : kernel_(std::move(kernel)) {}
  ~Staging() { emulator::free_all_global(); }

  // Replaces each pointer of `args`. A pointer to const is an input. Any other pointer is an output or the workspace.
  template <class Args>
  void stage(Args& args, const std::vector<std::string>& names, const std::vector<std::int64_t>& sizes) {
    const std::int64_t scratch = workspace(args);
    // Inputs come first, because an output may be one of them.
    for (const bool outputs : {false, true}) {
      std::size_t next = 0;
      for_each_field(args, [&]<class Field>(Field& field) {
        const std::size_t i = next++;
        if constexpr (std::is_pointer_v<Field>) {
          constexpr bool is_output = !std::is_const_v<std::remove_pointer_t<Field>>;
          if (is_output != outputs || field == nullptr) return;
          if (names[i] == "workspace") {
            if (scratch > 0) field = static_cast<Field>(allocate_scratch(scratch));
          } else if constexpr (is_output) {
            field = static_cast<Field>(output(field, sizes[i], names[i]));
          } else {
            field = static_cast<Field>(input(field, sizes[i], names[i]));
          }
        }
      });
    }
  }

  // Runs the kernel and returns the reports.
  template <class Args>
  std::string run(void (*kernel)(const Args&), const Args& args) {
    std::string error;
    try {
      kernel(args);
    } catch (const PlanAgain& thrown) {
      if (emulator::reports().empty()) throw;
      error = thrown.what();
      cuda::clusters_refused = false;  // the next call may show the bug again
    } catch (const std::runtime_error& thrown) {
      error = thrown.what();
    }
    emulator::machine.kernel = kernel_.c_str();
    if (emulator::reports().empty()) finish();
    std::string text;
    for (const auto& report : emulator::reports()) text += report.text + "\n";
    emulator::clear_reports();
    if (!text.empty()) return text + error;
    if (!error.empty()) throw std::runtime_error(error);
    return "";
  }

 private:
  struct Tensor {
    void *host, *device;
    std::size_t size;
    std::string name;
    bool output = false;
  };

  static void* allocate_scratch(std::int64_t size) {
    return emulator::allocate_global(static_cast<std::size_t>(size), 0, "workspace");
  }

  void* input(const void* host, std::int64_t size, const std::string& name) {
    const Tensor& tensor = allocate(host, size, name);
    std::memcpy(tensor.device, tensor.host, tensor.size);
    emulator::set_initialised(tensor.device, tensor.size);
    return tensor.device;
  }

  void* output(void* host, std::int64_t size, const std::string& name) {
    const auto same = std::find_if(tensors_.begin(), tensors_.end(), [&](const Tensor& t) { return t.host == host; });
    Tensor& tensor = same != tensors_.end() ? *same : allocate(host, size, name);
    tensor.output = true;
    return tensor.device;
  }

  Tensor& allocate(const void* host, std::int64_t size, const std::string& name) {
    const auto bytes = static_cast<std::size_t>(size);
    // A view's address may be no multiple of a vector. The CPU's allocator returns multiples of 64.
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

  std::string kernel_;
  std::vector<Tensor> tensors_;
};

// Returns a function that runs a kernel on staged tensors.
template <class Args>
auto emulated(const std::string& name, void (*kernel)(const Args&)) {
  return [name, names = field_names<Args>(), kernel](Args& args, Values values) {
    const std::vector<std::int64_t> sizes = sizes_of(values);
    std::string reports;
    {
      const py::gil_scoped_release released;
      const std::lock_guard lock(one_at_a_time);
      Staging staging(name);
      staging.stage(args, names, sizes);
      reports = staging.run(kernel, args);
    }
    if (reports.empty()) return;
    py::set_error(finding, reports.c_str());
    throw py::error_already_set();
  };
}

void bind_emulated_kernels(py::module_& m) {
  m.attr("fields") = py::dict();
#define OP(name, Args) def_kernel<Args>(m, #name, emulated<Args>(#name, &cuda::name));
  DDPM_FAST_OPS(OP)
#undef OP
#define OP(name, Args) def_workspace<Args>(m, #name, &cuda::name##_workspace);
  DDPM_FAST_WORKSPACES(OP)
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
  m.attr("Finding") = py::reinterpret_steal<py::object>(
      PyErr_NewException((m.attr("__name__").cast<std::string>() + ".Finding").c_str(), PyExc_RuntimeError, nullptr));
  finding = m.attr("Finding").ptr();
  bind_emulated_kernels(m);
  m.def("why_not", &cuda::why_not);
  m.def("set_order", &set_order, py::arg("order") = "natural", py::arg("seed") = 0, py::arg("preempt") = 0,
        "In which order blocks and threads take turns; with preempt, an access to memory ends a turn with probability "
        "1/preempt.");
  m.def(
      "set_device",
      [](int device) {
        if (device < 0 || device >= emulator::kCards) throw std::invalid_argument("device: there are three cards");
        emulator::set_current_device(device);
        cuda::clusters_refused = false;
      },
      "0: like sm_80. 1: like sm_90, with clusters. 2: like a part of sm_90, which refuses them.");
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
