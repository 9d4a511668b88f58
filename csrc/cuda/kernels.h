// The CUDA kernels. Each csrc/cuda/<op>.cu holds an op's kernels and the function that launches them on a stream.
#pragma once

#include <string>

#include "common/ops.h"

namespace ddpm_fast {

namespace cuda {

#define OP(name, Args) void name(const Args&);
DDPM_FAST_OPS(OP)
#undef OP
std::int64_t denoising_loss_workspace(const Shape& shape);
std::int64_t group_norm_silu_workspace(DType dtype, const Shape& shape, std::int64_t groups);
std::int64_t group_norm_silu_backward_workspace(DType dtype, const Shape& shape, std::int64_t groups);

std::string why_not();  // the reason why nothing here runs on the current device; empty where it does

}  // namespace cuda

inline const Kernels& cuda_kernels() {
#define ADDRESS(name, Args) &cuda::name,
  static const Kernels kernels = {DDPM_FAST_OPS(ADDRESS) & cuda::denoising_loss_workspace,
                                  &cuda::group_norm_silu_workspace, &cuda::group_norm_silu_backward_workspace};
#undef ADDRESS
  return kernels;
}

}  // namespace ddpm_fast
