// exp without branches, so that loops over it are vectorized. The error is at most 1 unit in the last place.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/normal.h"

namespace ddpm_fast {

DDPM_FAST_FN float exp(float x) {
  x = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;         // beyond, the result is 0 or infinite; NaN stays NaN
  const float n = x * 1.442695041f + 0x1.8p23f - 0x1.8p23f;  // rounded to the nearest integer
  const float r = fma(n, -1.428606820e-6f, fma(n, -0.693145751953125f, x));  // x - n ln 2
  float p = fma(r, 1.9875691500e-4f, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  p = fma(p, r, 5.0000001201e-1f);
  p = fma(p, r * r, r) + 1.0f;
  // Multiply by 2^n in two steps, because 2^n alone may be out of range.
  const auto whole = static_cast<std::int32_t>(n), half = whole >> 1;
  return p * bit_cast<float>((half + 127) << 23) * bit_cast<float>((whole - half + 127) << 23);
}

DDPM_FAST_FN double exp(double x) { return ::exp(x); }

}  // namespace ddpm_fast
