// The inner loop of convolutions and matrix products: a few rows of inputs times a panel of packed weights.
//
// A panel holds the weights of kPanel output channels. It has kPanelVectors vectors for each input channel in turn.
// Inputs are broadcast from memory. Sums stay in registers. There are kRows x kPanelVectors sums, as many as the
// registers hold. So multiply-adds do not wait for each other, and each loaded weight is used kRows times.
//
// A multiply-add takes two input channels in bfloat16: for each output channel, a weight vector holds two neighbours in
// depth. Without AVX512_BF16 the same sums are computed in float32.
#pragma once

#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // 32 registers: 24 sums, 4 weights, an input
#else
constexpr int kPanelVectors = 2;  // 16 registers: 12 sums, 2 weights, an input
#endif
constexpr int kPanel = kPanelVectors * kWidth<float>;

// Steps by which weights are prefetched. At batch 1 they come from memory, and the hardware does not prefetch across
// pages.
constexpr Index kAhead = 64;

// Input channels of a multiply-add.
template <class T>
constexpr int kStep = std::is_same_v<T, BFloat16> ? 2 : 1;

// Input channels whose products are summed one after the other. Longer sums are sums of these, because the rounding
// error grows with the number of terms. In float32, 64 halve the error of F(4x4, 3x3) and take 2% of the time. The
// error of bfloat16 products is mostly that of their inputs.
template <class T>
constexpr Index kChain = std::is_same_v<T, BFloat16> ? 256 : 64;

// The type in which attention multiplies T: T if the instruction set does, and float32 otherwise. The weights of
// convolutions have their type where they are packed.
#if defined(__AVX512BF16__)
template <class T>
using ProductType = T;
#else
template <class T>
using ProductType = float;
#endif

// Sums of `rows` rows for the first vectors of a panel.
template <int rows, int vectors = kPanelVectors>
struct Sums {
  Floats of[rows][vectors];
};

// Returns sum + a b, summed over the channels of a step. `a` points to the row's channels; all lanes use the same.
DDPM_FAST_INLINE Floats multiply_add(const float* a, Floats b, Floats sum) { return fma(broadcast(*a), b, sum); }
DDPM_FAST_INLINE Floats multiply_add(const BFloat16* a, Floats b, Floats sum) {
  std::uint32_t pair;
  std::memcpy(&pair, a, sizeof(pair));
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))),
                          reinterpret_cast<__m512bh>(b));
#else
  // Products of two bfloat16 are exact in float32. The instruction adds the odd channel first, and so does this.
  const auto high = [](Words words) { return reinterpret_cast<Floats>(words & 0xFFFF0000); };
  const auto low = [](Words words) { return reinterpret_cast<Floats>(words << 16); };
  const Words pairs = Words{} + pair, weights = reinterpret_cast<Words>(b);
  return fma(low(pairs), low(weights), fma(high(pairs), high(weights), sum));
#endif
}

//   sums += inputs * panel
// Prefetches `lines` vectors from `ahead` on in each step.
//
// depth: input channels, a multiple of kStep<T>.
template <int lines, class T, int rows, int vectors>
DDPM_FAST_INLINE void multiply(Sums<rows, vectors>& sums, const T* const (&inputs)[rows], const float* panel,
                               Index depth, const float* ahead) {
  for (Index first = 0; first < depth; first += kChain<T>) {
    Sums<rows, vectors> local{};  // in registers
    for (Index k = first; k < smaller(depth, first + kChain<T>); k += kStep<T>, panel += kPanel) {
      Floats weights[vectors];
      for (int line = 0; line < lines; ++line, ahead += kWidth<float>) __builtin_prefetch(ahead, 0, 2);
      for (int v = 0; v < vectors; ++v) weights[v] = load(panel + v * kWidth<float>);
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) local.of[r][v] = multiply_add(inputs[r] + k, weights[v], local.of[r][v]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < vectors; ++v) sums.of[r][v] += local.of[r][v];
    }
  }
}
template <class T, int rows, int vectors>
DDPM_FAST_INLINE void multiply(Sums<rows, vectors>& sums, const T* const (&inputs)[rows], const float* panel,
                               Index depth) {
  multiply<kPanelVectors>(sums, inputs, panel, depth, panel + kAhead * kPanel);
}

// Calls body(integral_constant<int, vectors>). `vectors` is 1 if `outs` output channels fit one vector, and all vectors
// of a panel otherwise.
template <class Body>
DDPM_FAST_INLINE void with_vectors(Index outs, Body body) {
  if (outs <= kWidth<float>) return body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, kPanelVectors>{});
}

// Calls body(row, integral_constant<int, rows>) for rows row .. count - 1, up to kRows at a time.
template <int rows = kRows, class Body>
DDPM_FAST_INLINE void over_rows(Index row, Index count, Body body) {
  for (; row + rows <= count; row += rows) body(row, std::integral_constant<int, rows>{});
  if constexpr (rows > 1) over_rows<rows - 1>(row, count, body);
}

// The number of floats (32-bit words) of a panel.
template <class T>
constexpr Index panel_size(Index depth) {
  return round_up(depth, kStep<T>) / kStep<T> * kPanel;
}

// Stores vector v of a step of a panel. A step has one input channel, or a pair in bfloat16.
DDPM_FAST_INLINE void store_step(float* to, int v, const Floats (&values)[1]) {
  store(to + v * kWidth<float>, values[0]);
}
DDPM_FAST_INLINE void store_step(float* to, int v, const Floats (&values)[2]) {
  const Words pairs = pairs_of(values[0], values[1]);
  std::memcpy(to + v * kWidth<float>, &pairs, sizeof(pairs));
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
