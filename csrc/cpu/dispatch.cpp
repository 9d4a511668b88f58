#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#ifdef DDPM_FAST_X86
#include <cpuid.h>
#endif

namespace ddpm_fast {

#define OP(name, Args) void name(const Args&);
#define KERNELS(isa)                                \
  namespace isa {                                   \
  DDPM_FAST_OPS(OP)                                 \
  const Kernels kernels = {DDPM_FAST_OPS(ADDRESS)}; \
  }
#define ADDRESS(name, Args) &name,
KERNELS(baseline)
#ifdef DDPM_FAST_X86
KERNELS(avx2)
KERNELS(avx512)
KERNELS(avx512_bf16)
#endif
#undef ADDRESS
#undef KERNELS
#undef OP

namespace {

struct Isa {
  const char* name;
  bool supported;
  const Kernels* kernels;
};

#ifdef DDPM_FAST_X86
// A name that __builtin_cpu_supports of older compilers does not know.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// Worst first.
std::vector<Isa> isas() {
  std::vector<Isa> sets = {{"baseline", true, &baseline::kernels}};
#ifdef DDPM_FAST_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  sets.push_back({"avx2", has_avx2, &avx2::kernels});
  sets.push_back({"avx512", has_avx512, &avx512::kernels});
  sets.push_back({"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), &avx512_bf16::kernels});
#endif
  return sets;
}

const Isa& best() {
  static const Isa chosen = [] {
    const char* cap = std::getenv("DDPM_FAST_ISA");
    Isa best_so_far{};
    for (const Isa& isa : isas()) {
      if (isa.supported) best_so_far = isa;
      if (cap != nullptr && isa.name == std::string(cap)) return best_so_far;
    }
    if (cap != nullptr && *cap != '\0') {
      throw std::runtime_error("DDPM_FAST_ISA: expected one of the compiled instruction sets, got '" +
                               std::string(cap) + "'");
    }
    return best_so_far;
  }();
  return chosen;
}

}  // namespace

const Kernels& cpu_kernels() { return *best().kernels; }

std::string isa_in_use() { return best().name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

}  // namespace ddpm_fast
