// The CUDA kernels. Each csrc/cuda/<op>.cu holds the kernels of an op and the function that launches them on a stream.
#pragma once

#include <array>
#include <string>

#include "common/ops.h"

namespace ddpm_fast {

namespace cuda {

#define OP(name, Args) void name(const Args&);
DDPM_FAST_OPS(OP)
#undef OP
#define OP(name, Args) std::int64_t name##_workspace(const Args&);
DDPM_FAST_WORKSPACES(OP)
#undef OP

// CUDA's versions, as in 12080: the driver's, or 0 without one, and that of the toolkit that compiled this.
std::array<int, 2> versions();
std::string why_not();  // why the kernels cannot run on the current device; empty if they can

}  // namespace cuda

inline const Kernels& cuda_kernels() {
#define ADDRESS(name, Args) .name = &cuda::name,
#define WORKSPACE(name, Args) .name##_workspace = &cuda::name##_workspace,
  static const Kernels kernels = {DDPM_FAST_OPS(ADDRESS) DDPM_FAST_WORKSPACES(WORKSPACE)};
#undef WORKSPACE
#undef ADDRESS
  return kernels;
}

}  // namespace ddpm_fast
