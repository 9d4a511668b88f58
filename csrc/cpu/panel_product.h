// The inner loop of convolutions and matrix products: a few rows of inputs times a panel of packed weights.
//
// A panel holds the weights of kPanel output channels, for each input channel in turn as kPanelVectors vectors. Inputs
// are broadcast from memory, sums stay in registers: kRows x kPanelVectors of them, as many as the instruction set has
// room for, so that a multiply-add waits for no other and a loaded weight serves kRows of them.
//
// bfloat16 goes by pairs of input channels, as the instruction for it does: a weight vector has, for every output
// channel, two neighbours in depth. Without that instruction the same is computed in float32.
#pragma once

#include <type_traits>

#include "cpu/room.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // of 32 registers: 24 sums, 4 weights, an input
#else
constexpr int kPanelVectors = 2;  // of 16 registers: 12 sums, 2 weights, an input
#endif
constexpr int kPanel = kPanelVectors * kWidth<float>;

// Steps by which weights are asked for ahead of their use: at batch 1 they come from memory, by pages that the
// processor does not look beyond by itself.
constexpr Index kAhead = 64;

// Input channels that a multiply-add takes.
template <class T>
constexpr int kStep = std::is_same_v<T, BFloat16> ? 2 : 1;

// Sums of `rows` rows, for a panel or its first vectors.
template <int rows, int vectors = kPanelVectors>
struct Sums {
  Floats of[rows][vectors];
};

// sum + a b over the step's channels: `a` is where the row's are, in every lane the same.
DDPM_FAST_INLINE Floats multiply_add(const float* a, Floats b, Floats sum) { return fma(broadcast(*a), b, sum); }
DDPM_FAST_INLINE Floats multiply_add(const BFloat16* a, Floats b, Floats sum) {
  std::uint32_t pair;
  std::memcpy(&pair, a, sizeof(pair));
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))),
                          reinterpret_cast<__m512bh>(b));
#else
  // Products of two bfloat16 are exact in float32; the odd channel is added first, as that instruction does it.
  const auto high = [](Words words) { return reinterpret_cast<Floats>(words & 0xFFFF0000); };
  const auto low = [](Words words) { return reinterpret_cast<Floats>(words << 16); };
  const Words pairs = Words{} + pair, weights = reinterpret_cast<Words>(b);
  return fma(low(pairs), low(weights), fma(high(pairs), high(weights), sum));
#endif
}

// sums += rows of inputs times a panel of weights. depth: input channels, a multiple of kStep<T>.
template <class T, int rows, int vectors>
DDPM_FAST_INLINE void multiply(Sums<rows, vectors>& sums, const T* const (&inputs)[rows], const float* panel,
                               Index depth) {
  Sums<rows, vectors> local = sums;  // in registers
  for (Index k = 0; k < depth; k += kStep<T>, panel += kPanel) {
    Floats weights[vectors];
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(panel + kAhead * kPanel + v * kWidth<float>);
      weights[v] = load(panel + v * kWidth<float>);
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < vectors; ++v) local.of[r][v] = multiply_add(inputs[r] + k, weights[v], local.of[r][v]);
    }
  }
  sums = local;
}

// Calls body(integral_constant<int, vectors>): one vector of a panel if `outs` output channels need no more, else all.
template <class Body>
DDPM_FAST_INLINE void with_vectors(Index outs, Body body) {
  if (outs <= kWidth<float>) return body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, kPanelVectors>{});
}

// Calls body(row, integral_constant<int, rows>) for all of `count` rows, as many as kRows at a time.
template <int rows = kRows, class Body>
DDPM_FAST_INLINE void over_rows(Index row, Index count, Body body) {
  for (; row + rows <= count; row += rows) body(row, std::integral_constant<int, rows>{});
  if constexpr (rows > 1) over_rows<rows - 1>(row, count, body);
}

// Floats (32-bit words) of a panel of this depth.
template <class T>
constexpr Index panel_size(Index depth) {
  return round_up(depth, kStep<T>) / kStep<T> * kPanel;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
