// Indices, and what is computed with them.
#pragma once

#include <cstdint>

namespace ddpm_fast::DDPM_FAST_ISA {

using Index = std::int64_t;

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }
constexpr Index round_up(Index value, Index unit) { return (value + unit - 1) / unit * unit; }

}  // namespace ddpm_fast::DDPM_FAST_ISA
