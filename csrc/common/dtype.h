// Storage types. Conversions to 16 bits round to nearest, ties to even.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/normal.h"

namespace ddpm_fast {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8 };

constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2;
}

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

DDPM_FAST_FN float widen(BFloat16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

DDPM_FAST_FN BFloat16 narrow_to_bfloat16(float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return {static_cast<std::uint16_t>(value != value ? 0x7FC0 : rounded)};
}

DDPM_FAST_FN float widen(Float16 value) {
  // After the shift, the exponent is 112 less than float32 needs. The multiplication adds 112, also for subnormals.
  const std::uint32_t magnitude = (value.bits & 0x7FFFu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude >= 0x7C00u << 13 ? 0x7F800000u : 0;  // infinity and NaN
  return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special |
                         static_cast<std::uint32_t>(value.bits & 0x8000u) << 16);
}

DDPM_FAST_FN Float16 narrow_to_float16(float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // A normal result is rounded by an integer addition. For a subnormal result, adding 1/2 makes the float32 addition
  // round at its last bit.
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  std::uint32_t result = magnitude < 113u << 23 ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // rounds to 65536 or more
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return {static_cast<std::uint16_t>(result | (bits >> 16 & 0x8000u))};
}

}  // namespace ddpm_fast
