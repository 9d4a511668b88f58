// Converts random words to normals. Every operation is that of `_normal_pair` in ddpm_fast/reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace ddpm_fast {

template <class To, class From>
DDPM_FAST_FN To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  memcpy(&bits, &value, sizeof(To));
  return bits;
}

// a * b + c, rounded once.
DDPM_FAST_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }

// Box-Muller takes the radius from the word w0 and the angle from w1. Every operation is one correctly rounded float32
// operation, so the result is the same on every processor. Contraction is off, and a fused multiply-add is written as
// such. Some values are scaled by powers of two compared to reference.py. That changes no rounding and saves
// operations.
//
// Real is float, or a type of several floats.

// Reads w0 as u in (0, 1] and computes 2^23 e and 2 (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)):
//   ln u = e ln 2 + ln(1 + f)
DDPM_FAST_FN void split_uniform(std::uint32_t w0, float& exponent, float& mantissa) {
  constexpr std::uint32_t kUnit = 1u << 23;       // one unit of a float's exponent
  const float u = static_cast<float>(w0) + 0.5f;  // 2^32 u; the half keeps it above 0
  const auto bits = bit_cast<std::uint32_t>(u);
  const std::uint32_t e = (bits - (0x3F3504F3 + 32 * kUnit)) & 0xFF800000;
  exponent = static_cast<float>(static_cast<std::int32_t>(e));
  mantissa = bit_cast<float>(bits - e - 31 * kUnit);
}

//   2 ln u = -radius^2
template <class Real>
DDPM_FAST_FN Real twice_logarithm(Real exponent, Real mantissa) {
  const Real f = mantissa - 2.0f;  // 2 f
  Real p = fma(f, 0.08700401f / 256, -0.14266932f / 128);
  p = fma(p, f, 0.14914508f / 64);
  p = fma(p, f, -0.16577652f / 32);
  p = fma(p, f, 0.199631f / 16);
  p = fma(p, f, -0.25001335f / 8);
  p = fma(p, f, 0.3333391f / 4);
  p = fma(p, f, -0.5f / 2);
  return fma(exponent, 0.6931472f * 0x1p-22f, fma(f * f, p, f));
}

// The angle in turns is w1 / 2^32. In quarter turns it is quadrant + g, with g in [-1/2, 1/2). The low 30 bits of w1
// are g as a signed number. Returns 2^32 g.
DDPM_FAST_FN float in_quarter_turn(std::uint32_t w1) { return static_cast<float>(static_cast<std::int32_t>(w1 << 2)); }

// Computes sin(pi/2 g) and cos(pi/2 g) from 2^32 g.
template <class Real>
DDPM_FAST_FN void sine_and_cosine(Real angle, Real& sine, Real& cosine) {
  const Real g = angle * 0x1p-32f, g2 = g * g;
  Real s = fma(g2, -0.004685972f, 0.079712525f);
  s = fma(s, g2, -0.64596665f);
  sine = fma(s, g2, 1.5707964f) * g;
  Real c = fma(g2, -0.02041453f, 0.2536024f);
  c = fma(c, g2, -1.2336977f);
  cosine = fma(c, g2, 1.0f);
}

// Turns the point (cosine, sine) by the quadrant. A quarter turn gives (-sine, cosine). A half turn changes both signs,
// and changes the sign of the radius instead.
DDPM_FAST_FN void turn(std::uint32_t w1, float& cosine, float& sine, float& radius) {
  const bool quarter = static_cast<std::int32_t>((w1 << 1) + 0x40000000u) < 0;
  const std::uint32_t half = (w1 + 0x20000000u) & 0x80000000u;
  const float c = cosine, s = sine;
  cosine = quarter ? -s : c;
  sine = quarter ? c : s;
  radius = bit_cast<float>(bit_cast<std::uint32_t>(radius) ^ half);
}

DDPM_FAST_FN void normal_pair(std::uint32_t w0, std::uint32_t w1, float& normal_0, float& normal_1) {
  float exponent, mantissa, sine, cosine;
  split_uniform(w0, exponent, mantissa);
  float radius = ::sqrtf(-twice_logarithm(exponent, mantissa));
  sine_and_cosine(in_quarter_turn(w1), sine, cosine);
  turn(w1, cosine, sine, radius);
  normal_0 = radius * cosine;
  normal_1 = radius * sine;
}

}  // namespace ddpm_fast
