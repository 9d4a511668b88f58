// The CPU kernels of the instruction set in use.
//
// Each csrc/cpu/<op>.cpp is compiled once per instruction set, into the namespace ddpm_fast::DDPM_FAST_ISA.
#pragma once

#include <string>
#include <vector>

#include "common/ops.h"

namespace ddpm_fast {

const Kernels& cpu_kernels();
std::string isa_in_use();     // the best set of this processor, up to the environment variable DDPM_FAST_ISA
std::string processor_isa();  // the best set that this processor has, compiled or not
std::vector<std::string> compiled_isas();  // worst first
std::string processor();                   // vendor and number, such as "AuthenticAMD 25"; empty if it is no x86
bool processor_has_tiles();                // AMX for bfloat16
std::string tiles_refused();               // why this process may not use them; empty if it may, or did not ask

}  // namespace ddpm_fast
