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

}  // namespace ddpm_fast
