// SiLU and its derivative on vectors:
//   SiLU(t) = t / (1 + exp(-t))
// The error of SiLU is below the rounding error of the storage type T.
//
// The functions take z instead of t:
//   z = -t log2(e)
// The caller folds this factor into its own multiplication. Then 2^z takes an exponent, the integer part of z, and a
// polynomial in the fractional part. The polynomials minimize the largest relative error on [0, 1) with p(0) = 1:
//   degree 3: 8.6e-5 (bfloat16, half a unit: 2.0e-3)
//   degree 4: 3.0e-6 (float16, half a unit: 2.4e-4)
//   degree 6: 6.4e-8 (float32)
// z itself is rounded once, so a longer range reduction would not make exp(-t) more accurate.
//
// Alternatives that were measured (AVX-512, one core, ns per 16 values with load and store):
//   division instead of vrcp14ps: 0.8 slower
//   adding 1.5 * 2^23 and shifting, instead of vreduceps and vscalefps: no faster
#pragma once

#include <type_traits>

#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr float kNegLog2E = -1.44269504f, kLn2 = 0.693147181f;

// 2^r for r in [0, 1].
template <class T>
DDPM_FAST_INLINE Floats exp2_fraction(Floats r) {
  Floats p;
  if constexpr (sizeof(T) == 4) {
    p = fma(r, broadcast(0.000216128785f), broadcast(0.00124678621f));
    p = fma(p, r, broadcast(0.00967544969f));
    p = fma(p, r, broadcast(0.0554852821f));
    p = fma(p, r, broadcast(0.240229309f));
    p = fma(p, r, broadcast(0.693147063f));
  } else if constexpr (std::is_same_v<T, Float16>) {
    p = fma(r, broadcast(0.0134266848f), broadcast(0.0522424728f));
    p = fma(p, r, broadcast(0.241280213f));
    p = fma(p, r, broadcast(0.693044841f));
  } else {
    p = fma(r, broadcast(0.0770670474f), broadcast(0.227644995f));
    p = fma(p, r, broadcast(0.695116758f));
  }
  return fma(p, r, broadcast(1.0f));
}

// Returns z limited to where 2^z and 1 / 2^z are normal numbers. NaN stays NaN. SiLU is constant, -2e-36, below t =
// -86.
template <class T>
DDPM_FAST_INLINE Floats limit(Floats z) {
#if defined(__AVX512F__)
  // float16 and bfloat16 need no refined reciprocal, so 1 / infinity = 0 is good enough.
  if constexpr (sizeof(T) == 4) z = _mm512_min_ps(broadcast(125.0f), z);
  return z;
#else
  return z > 125.0f ? broadcast(125.0f) : z;
#endif
}

// 2^z, for z from limit(). A subnormal result may be twice too large, or 0.
template <class T>
DDPM_FAST_INLINE Floats exp2(Floats z) {
#if defined(__AVX512DQ__)
  const Floats r = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF);  // z - floor(z)
  return _mm512_scalef_ps(exp2_fraction<T>(r), z);              // times 2^floor(z)
#else
  z = z < -125.0f ? broadcast(-125.0f) : z;
  const Floats magic = broadcast(0x1.8p23f);  // the low bits of a sum with it are the rounded integer
  const Floats shifted = (z - 0.5f) + magic;
  const Words exponent = reinterpret_cast<Words>(shifted) << 23;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(exp2_fraction<T>(z - (shifted - magic))) + exponent);
#endif
}

// 1 / d.
template <class T>
DDPM_FAST_INLINE Floats reciprocal(Floats d) {
#if defined(__AVX512F__)
  const Floats q = _mm512_rcp14_ps(d);
  if constexpr (sizeof(T) == 2) return q;
  return fma(q, fma(-d, q, broadcast(1.0f)), q);
#else
  return 1.0f / d;
#endif
}

template <class T>
DDPM_FAST_INLINE Floats silu(Floats z) {
  const Floats factor = broadcast(kNegLog2E);
  z = limit<T>(z);
  return z * reciprocal<T>(fma(exp2<T>(z), factor, factor));  // z / ((1 + 2^z) -log2(e)) = t / (1 + exp(-t))
}

// The derivative of SiLU:
//   s = 1 / (1 + exp(-t))
//   SiLU'(t) = s (1 + t (1 - s))
// It has the accuracy of float32 for every storage type, because its sums are float32.
DDPM_FAST_INLINE Floats silu_derivative(Floats z) {
  z = limit<float>(z);
  const Floats s = reciprocal<float>(exp2<float>(z) + 1.0f);
  return fma(z * s, fma(s, broadcast(kLn2), broadcast(-kLn2)), s);
}

// float64 is for gradient checks: accurate, not fast.
constexpr double kNegLog2EDouble = -1.4426950408889634;

DDPM_FAST_INLINE Doubles sigmoid(Doubles z) {
  Doubles s;
  for (int i = 0; i < kWidth<double>; ++i) s[i] = 1 / (1 + __builtin_exp2(z[i]));
  return s;
}
template <class T>
DDPM_FAST_INLINE Doubles silu(Doubles z) {
  return z / kNegLog2EDouble * sigmoid(z);
}
DDPM_FAST_INLINE Doubles silu_derivative(Doubles z) {
  const Doubles s = sigmoid(z);
  return s + z / kNegLog2EDouble * s * (1 - s);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
