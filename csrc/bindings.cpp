// The pybind11 module. Only this file and bindings.h use Python.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "common/philox.h"
#include "cpu/dispatch.h"
#ifdef DDPM_FAST_CUDA
#include "cuda/kernels.h"
#endif

namespace ddpm_fast {

extern const char* const build_sources;

}  // namespace ddpm_fast

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DDPM_FAST_VERSION;
#ifdef __clang__
  info["compiler"] = __VERSION__;  // it begins with the name of the compiler
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["sources"] = build_sources;  // their digest: csrc/digest.py
  info["isa"] = isa_in_use();
  info["isas"] = compiled_isas();
  info["processor_isa"] = processor_isa();
  info["processor"] = processor();
  info["tiles"] = processor_has_tiles();
  info["tiles_refused"] = tiles_refused();
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

  isa_in_use();  // raises at import if DDPM_FAST_ISA is wrong
  m.def("build_info", &build_info);
  m.def("philox4x32", &philox4x32);
  m.def(
      "philox",
      [](std::int64_t seed, std::uint32_t stream, std::uint32_t first_block, std::int64_t n_blocks,
         std::uintptr_t out) {
        auto* words = reinterpret_cast<std::uint32_t*>(out);
        for (std::int64_t i = 0; i < n_blocks; ++i) {
          philox_block(static_cast<std::uint64_t>(seed), stream, static_cast<std::uint32_t>(first_block + i),
                       words + 4 * i);
        }
      },
      nogil);

  py::module_ cpu = m.def_submodule("cpu", "The ops on CPU tensors.");
  bind_kernels(cpu, cpu_kernels());
#ifdef DDPM_FAST_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The ops on CUDA tensors.");
  bind_kernels(cuda, cuda_kernels());
  cuda.def("why_not", &cuda::why_not);
  cuda.def("versions", &cuda::versions);
#endif
}
