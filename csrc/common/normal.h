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

// Box-Muller: the radius from w0, the angle from w1. Every operation is one correctly rounded float32 operation, so the
// result is the same on every processor; contraction is off, and a fused multiply-add is written as one.
DDPM_FAST_FN void normal_pair(std::uint32_t w0, std::uint32_t w1, float& normal_0, float& normal_1) {
  // u in (0, 1]: 32 random bits; the half step keeps it off 0.
  const float u = fma(static_cast<float>(w0), 0x1p-32f, 0x1p-33f);
  // ln u = e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const std::int32_t bits = bit_cast<std::int32_t>(u);
  const std::int32_t e = (bits - 0x3F3504F3) >> 23;
  const float f = bit_cast<float>(bits - e * (1 << 23)) - 1.0f;
  float p = fma(f, 0.08700401f, -0.14266932f);
  p = fma(p, f, 0.14914508f);
  p = fma(p, f, -0.16577652f);
  p = fma(p, f, 0.199631f);
  p = fma(p, f, -0.25001335f);
  p = fma(p, f, 0.3333391f);
  p = fma(p, f, -0.5f);
  const float ln_u = fma(static_cast<float>(e), 0.6931472f, fma(f * f, p, f));
  const float radius = ::sqrtf(-2.0f * ln_u);
  // Angle = (quadrant + g) quarter turns with g in [-1/2, 1/2).
  const std::uint32_t quadrant = (w1 + 0x20000000u) >> 30;
  const float g = static_cast<float>(static_cast<std::int32_t>(w1 - (quadrant << 30))) * 0x1p-30f;
  const float g2 = g * g;
  float s = fma(g2, -0.004685972f, 0.079712525f);
  s = fma(s, g2, -0.64596665f);
  s = fma(s, g2, 1.5707964f) * g;  // sin(pi/2 g)
  float c = fma(g2, -0.02041453f, 0.2536024f);
  c = fma(c, g2, -1.2336977f);
  c = fma(c, g2, 1.0f);  // cos(pi/2 g)
  // Quadrants 1 and 3 swap the two; the cosine is negative in 1 and 2, the sine in 2 and 3. Signs are flipped by bits.
  const bool odd = quadrant & 1;
  const std::uint32_t cosine = bit_cast<std::uint32_t>(odd ? s : c) ^ ((quadrant + 1) >> 1 << 31);
  const std::uint32_t sine = bit_cast<std::uint32_t>(odd ? c : s) ^ (quadrant >> 1 << 31);
  normal_0 = radius * bit_cast<float>(cosine);
  normal_1 = radius * bit_cast<float>(sine);
}

}  // namespace ddpm_fast
