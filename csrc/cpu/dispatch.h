// The CPU kernels of the instruction set in use.
//
// Every csrc/cpu/<op>.cpp is compiled once per instruction set into the namespace ddpm_fast::DDPM_FAST_ISA. To add an
// op: its Args in common/args.h, its line here, its function in csrc/cpu/<op>.cpp, its binding in csrc/bindings.cpp.
#pragma once

#include <string>
#include <vector>

#include "common/args.h"

#define DDPM_FAST_CPU_OPS(OP)                            \
  OP(noise, NoiseArgs)                                   \
  OP(q_sample, QSampleArgs)                              \
  OP(reverse_step, ReverseStepArgs)                      \
  OP(denoising_loss, DenoisingLossArgs)                  \
  OP(denoising_loss_backward, DenoisingLossBackwardArgs) \
  OP(group_norm_silu, GroupNormSiluArgs)                 \
  OP(group_norm_silu_backward, GroupNormSiluBackwardArgs)

namespace ddpm_fast {

struct CpuKernels {
#define OP(name, Args) void (*name)(const Args&);
  DDPM_FAST_CPU_OPS(OP)
#undef OP
};

const CpuKernels& cpu_kernels();
std::string isa_in_use();                  // the best set that this processor has; DDPM_FAST_ISA caps it
std::vector<std::string> compiled_isas();  // worst first

}  // namespace ddpm_fast
