// csrc/cuda/intrinsics.h in plain C++, function by function.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

#define DDPM_FAST_DEVICE static inline __attribute__((always_inline, unused))

namespace ddpm_fast::cuda {

// ------------------------------------------------------------------------------------------------- approximations

// Off by as much as a card's may be, to one side or the other: what has to be exact must not depend on them.

DDPM_FAST_DEVICE float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// `exact` with a relative error up to `error`, always alike for the same argument.
DDPM_FAST_DEVICE float approximate(double exact, float argument, double error) {
  const std::uint32_t hash = __float_as_uint(argument) * 0x9E3779B9u ^ __float_as_uint(argument) >> 7;
  const double share = static_cast<double>(hash) * 0x1p-31 - 1;  // share of the error, from -1 to 1
  return flush_subnormal(static_cast<float>(exact * (1 + share * error)));
}

// The errors that the PTX manual allows.
DDPM_FAST_DEVICE float exp2_approx(float x) { return approximate(std::exp2(double{flush_subnormal(x)}), x, 0x1p-22); }
DDPM_FAST_DEVICE float reciprocal_approx(float x) { return approximate(1.0 / flush_subnormal(x), x, 0x1p-25); }
DDPM_FAST_DEVICE float rsqrt_approx(float x) {
  return approximate(1.0 / std::sqrt(double{flush_subnormal(x)}), x, 0x1.8p-23);  // 2^-22.4
}

DDPM_FAST_DEVICE float clip(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

// ---------------------------------------------------------------------------------------------- two floats at once

struct Two {
  float low, high;
  Two() = default;
  Two(float both) : low(both), high(both) {}
  Two(float low, float high) : low(low), high(high) {}
};

DDPM_FAST_DEVICE Two fma(Two a, Two b, Two c) { return {fmaf(a.low, b.low, c.low), fmaf(a.high, b.high, c.high)}; }
DDPM_FAST_DEVICE Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
DDPM_FAST_DEVICE Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }

// A card computes it the same way: exact in spite of the approximation.
DDPM_FAST_DEVICE Two minus_square_root(Two x) {
  const Two nonzero = x - 0x1p-100f;
  const Two reciprocal = {rsqrt_approx(-nonzero.low), rsqrt_approx(-nonzero.high)};
  const Two root = x * reciprocal;
  return fma(fma(root, root, x), reciprocal * 0.5f, root);
}

// ----------------------------------------------------------------------------------------------- half precision

DDPM_FAST_DEVICE std::uint32_t pack_bfloat16(float low, float high) {
  return narrow_to_bfloat16(low).bits | static_cast<std::uint32_t>(narrow_to_bfloat16(high).bits) << 16;
}

DDPM_FAST_DEVICE void unpack_bfloat16(std::uint32_t word, float& low, float& high) {
  low = widen(BFloat16{static_cast<std::uint16_t>(word)});
  high = widen(BFloat16{static_cast<std::uint16_t>(word >> 16)});
}

DDPM_FAST_DEVICE std::uint32_t pack_float16(float low, float high) {
  return narrow_to_float16(low).bits | static_cast<std::uint32_t>(narrow_to_float16(high).bits) << 16;
}

DDPM_FAST_DEVICE void unpack_float16(std::uint32_t word, float& low, float& high) {
  low = widen(Float16{static_cast<std::uint16_t>(word)});
  high = widen(Float16{static_cast<std::uint16_t>(word >> 16)});
}

// ------------------------------------------------------------------------------------------------------- integers

DDPM_FAST_DEVICE void multiply_wide(std::uint32_t a, std::uint32_t b, std::uint32_t& low, std::uint32_t& high) {
  const std::uint64_t product = std::uint64_t{a} * b;
  low = static_cast<std::uint32_t>(product);
  high = static_cast<std::uint32_t>(product >> 32);
}

DDPM_FAST_DEVICE std::uint32_t with_low_byte(std::uint32_t word, std::uint32_t bytes, int i) {
  return (word & 0xFFFFFF00u) | (bytes >> 8 * i & 0xFFu);
}

// ------------------------------------------------------------------------------------------------------ clusters
// On the emulated card without clusters a launch is always a cluster of one block.

DDPM_FAST_DEVICE void cluster_sync(EMULATOR_HERE) {
  emulator::cluster_arrive(EMULATOR_SOURCE, true);
  emulator::cluster_wait(EMULATOR_SOURCE);
}

DDPM_FAST_DEVICE void cluster_arrive(EMULATOR_HERE) { emulator::cluster_arrive(EMULATOR_SOURCE, false); }
DDPM_FAST_DEVICE void cluster_wait(EMULATOR_HERE) { emulator::cluster_wait(EMULATOR_SOURCE); }

template <class T>
DDPM_FAST_DEVICE T* in_block(T* shared, unsigned rank, EMULATOR_HERE) {
  return static_cast<T*>(emulator::map_to_rank(shared, rank, EMULATOR_SOURCE));
}

}  // namespace ddpm_fast::cuda
