#include "cpu/dispatch.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef DDPM_FAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ddpm_fast {

#define DECLARE(name, Args) void name(const Args&);
#define DECLARE_WORKSPACE(name, Args) std::int64_t name##_workspace(const Args&);
#define ADDRESS(name, Args) .name = &name,
#define WORKSPACE(name, Args) .name##_workspace = &name##_workspace,
#define KERNELS(isa)                                                                                              \
  namespace isa {                                                                                                 \
  extern const std::int64_t panel;                                                                                \
  DDPM_FAST_OPS(DECLARE)                                                                                          \
  DDPM_FAST_CPU_OPS(DECLARE)                                                                                      \
  DDPM_FAST_CPU_WORKSPACES(DECLARE_WORKSPACE)                                                                     \
  Kernels kernels() {                                                                                             \
    return {DDPM_FAST_OPS(ADDRESS) DDPM_FAST_CPU_OPS(ADDRESS) DDPM_FAST_CPU_WORKSPACES(WORKSPACE).panel = panel}; \
  }                                                                                                               \
  }
#define NO_KERNELS(isa)                                      \
  namespace isa {                                            \
  [[maybe_unused]] constexpr Kernels (*kernels)() = nullptr; \
  }
KERNELS(baseline)
#ifdef DDPM_FAST_HAS_avx2
KERNELS(avx2)
#else
NO_KERNELS(avx2)
#endif
#ifdef DDPM_FAST_HAS_avx512
KERNELS(avx512)
#else
NO_KERNELS(avx512)
#endif
#ifdef DDPM_FAST_HAS_avx512_bf16
KERNELS(avx512_bf16)
#else
NO_KERNELS(avx512_bf16)
#endif
#ifdef DDPM_FAST_HAS_amx
#define REPLACE(name, Args) kernels.name = &name;
namespace amx {
DDPM_FAST_TILE_OPS(DECLARE)
Kernels kernels() {
  Kernels kernels = avx512_bf16::kernels();
  DDPM_FAST_TILE_OPS(REPLACE)
  return kernels;
}
}  // namespace amx
#undef REPLACE
#else
NO_KERNELS(amx)
#endif
#undef NO_KERNELS
#undef KERNELS
#undef WORKSPACE
#undef ADDRESS
#undef DECLARE_WORKSPACE
#undef DECLARE

namespace {

struct Isa {
  const char* name;
  bool supported;        // by this processor
  Kernels (*kernels)();  // null: not compiled
};

#ifdef DDPM_FAST_X86
// Older compilers do not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_tiles() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7; older compilers have no names for these bits
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0;
}

#endif

// Returns the system's error if this process asked for tiles and may not use them, else 0.
int& refusal_of_tiles() {
  static int error = 0;
  return error;
}

// Asks Linux to let all threads of this process use tiles, whose registers are too large for threads that never asked.
bool may_use_tiles() {
#if defined(DDPM_FAST_X86) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, and the state component's number
  refusal_of_tiles() = syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
#else
  refusal_of_tiles() = ENOSYS;
#endif
  return refusal_of_tiles() == 0;
}

// Returns the instruction sets from worst to best.
std::vector<Isa> isas() {
  std::vector<Isa> sets = {{"baseline", true, baseline::kernels}};
#ifdef DDPM_FAST_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  sets.push_back({"avx2", has_avx2, avx2::kernels});
  sets.push_back({"avx512", has_avx512, avx512::kernels});
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  sets.push_back({"avx512_bf16", has_bf16, avx512_bf16::kernels});
  sets.push_back({"amx", has_bf16 && has_tiles() && refusal_of_tiles() == 0, amx::kernels});
#endif
  return sets;
}

const Isa& best() {
  static const Isa chosen = [] {
    const char* cap = std::getenv("DDPM_FAST_ISA");
    Isa best_so_far{};
    for (const Isa& isa : isas()) {
      if (isa.kernels == nullptr) continue;
      // Only who will use tiles asks for them: afterwards the system refuses small signal stacks.
      if (isa.supported && (isa.name != std::string("amx") || may_use_tiles())) best_so_far = isa;
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

bool processor_has_tiles() {
#ifdef DDPM_FAST_X86
  return has_tiles();
#else
  return false;
#endif
}

std::string tiles_refused() {
  switch (refusal_of_tiles()) {
    case 0:
      return "";
    case ENOSPC:
      return "the signal stack of a thread is too small for their registers";
    default:
      return std::string("the system refused them, as Linux before 5.16 does: ") + std::strerror(refusal_of_tiles());
  }
}

std::string processor() {
  std::string name;
#ifdef DDPM_FAST_X86
  unsigned eax, words[3], unused;
  if (__get_cpuid(0, &eax, &words[0], &words[2], &words[1]) == 0) return name;  // the vendor is in ebx, edx, ecx
  for (const unsigned word : words) {
    for (int i = 0; i < 4; ++i) name += static_cast<char>(word >> 8 * i & 0xFF);
  }
  __get_cpuid(1, &eax, &unused, &unused, &unused);
  const unsigned base = eax >> 8 & 0xF;
  name += ' ' + std::to_string(base == 0xF ? base + (eax >> 20 & 0xFF) : base);
#endif
  return name;
}

const Kernels& cpu_kernels() {
  static const Kernels kernels = best().kernels();
  return kernels;
}

std::string isa_in_use() { return best().name; }

std::string processor_isa() {
  const char* name = "";
  for (const Isa& isa : isas()) {
    if (isa.supported) name = isa.name;
  }
  return name;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.kernels != nullptr) names.push_back(isa.name);
  }
  return names;
}

}  // namespace ddpm_fast
