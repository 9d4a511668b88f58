// The CPU kernels of the instruction set in use.
//
// Every csrc/cpu/<op>.cpp is compiled once per instruction set into the namespace ddpm_fast::DDPM_FAST_ISA.
#pragma once

#include <string>
#include <vector>

#include "common/ops.h"

namespace ddpm_fast {

const Kernels& cpu_kernels();
std::string isa_in_use();                  // the best set that this processor has; DDPM_FAST_ISA caps it
std::vector<std::string> compiled_isas();  // worst first
bool has_amx_bf16();                       // matrix units for bfloat16, which oneDNN uses and the kernels here do not

}  // namespace ddpm_fast
