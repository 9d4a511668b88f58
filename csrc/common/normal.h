// Random words to normals: `_normal_pair` of ddpm_fast/reference.py, operation by operation.
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

// Box-Muller. Every operation is one correctly rounded float32 operation, so the result is the same on every processor;
// contraction is off, and a fused multiply-add is written as one. Next to reference.py some values are scaled by powers
// of two, which changes no rounding and saves operations.

// -2 ln u, the square of the radius, with u in (0, 1] from the 32 random bits of w0.
DDPM_FAST_FN float squared_radius(std::uint32_t w0) {
  const float u = static_cast<float>(w0) + 0.5f;  // 2^32 u; the half step keeps it off 0
  // ln u = e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  constexpr std::uint32_t kExponents = 0xFF800000, kUnit = 1u << 23;
  const auto bits = bit_cast<std::uint32_t>(u);
  const std::uint32_t e = (bits - (0x3F3504F3 + 32 * kUnit)) & kExponents;  // 2^23 e
  const float f = bit_cast<float>(bits - e - 31 * kUnit) - 2.0f;            // 2 f
  float p = fma(f, 0.08700401f / 256, -0.14266932f / 128);
  p = fma(p, f, 0.14914508f / 64);
  p = fma(p, f, -0.16577652f / 32);
  p = fma(p, f, 0.199631f / 16);
  p = fma(p, f, -0.25001335f / 8);
  p = fma(p, f, 0.3333391f / 4);
  p = fma(p, f, -0.5f / 2);
  return -fma(static_cast<float>(static_cast<std::int32_t>(e)), 0.6931472f * 0x1p-22f, fma(f * f, p, f));
}

// The point at that radius whose angle is w1 / 2^32 of a turn.
DDPM_FAST_FN void turn(float radius, std::uint32_t w1, float& normal_0, float& normal_1) {
  // Angle = (quadrant + g) quarter turns with g in [-1/2, 1/2): the low 30 bits are g, as a signed number.
  const float g = static_cast<float>(static_cast<std::int32_t>(w1 << 2)) * 0x1p-32f;
  const float g2 = g * g;
  float s = fma(g2, -0.004685972f, 0.079712525f);
  s = fma(s, g2, -0.64596665f);
  s = fma(s, g2, 1.5707964f) * g;  // sin(pi/2 g)
  float c = fma(g2, -0.02041453f, 0.2536024f);
  c = fma(c, g2, -1.2336977f);
  c = fma(c, g2, 1.0f);  // cos(pi/2 g)
  // A quarter turn takes (c, s) to (-s, c), a half turn changes both signs.
  const bool quarter = static_cast<std::int32_t>((w1 << 1) + 0x40000000u) < 0;
  const std::uint32_t half = (w1 + 0x20000000u) & 0x80000000u;
  const float signed_radius = bit_cast<float>(bit_cast<std::uint32_t>(radius) ^ half);
  normal_0 = signed_radius * (quarter ? -s : c);
  normal_1 = signed_radius * (quarter ? c : s);
}

DDPM_FAST_FN void normal_pair(std::uint32_t w0, std::uint32_t w1, float& normal_0, float& normal_1) {
  turn(::sqrtf(squared_radius(w0)), w1, normal_0, normal_1);
}

}  // namespace ddpm_fast
