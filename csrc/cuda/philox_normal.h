// Normals from Philox words, four at a time. They have the bits of csrc/common on every processor.
#pragma once

#include <cstdint>

#include "common/normal.h"
#include "common/philox.h"
#include "cuda/intrinsics.h"

namespace ddpm_fast::cuda {

using ddpm_fast::fma;  // beside the fma of Two

// Computes the normals of elements 4 block .. 4 block + 3 of a sample. The compiler computes what depends only on seed
// and stream, such as the keys of the rounds, once for all calls of a thread.
DDPM_FAST_DEVICE void philox_normal(std::uint64_t seed, std::uint32_t stream, std::uint32_t block, float* normals) {
  std::uint32_t words[] = {block, stream, 0, 0};
  std::uint32_t key_0 = static_cast<std::uint32_t>(seed), key_1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    std::uint32_t low_0, high_0, low_1, high_1;
    multiply_wide(words[0], kPhiloxM0, low_0, high_0);
    multiply_wide(words[2], kPhiloxM1, low_1, high_1);
    words[0] = high_1 ^ words[1] ^ key_0;
    words[1] = low_1;
    words[2] = high_0 ^ words[3] ^ key_1;
    words[3] = low_0;
    key_0 += kPhiloxW0;
    key_1 += kPhiloxW1;
  }
  Two exponent, mantissa, sine, cosine;
  split_uniform(words[0], exponent.low, mantissa.low);
  split_uniform(words[2], exponent.high, mantissa.high);
  Two radius = minus_square_root(twice_logarithm(exponent, mantissa));
  sine_and_cosine(Two(in_quarter_turn(words[1]), in_quarter_turn(words[3])), sine, cosine);
  constexpr std::uint32_t kHalfTurn = 0x80000000;  // corrects the sign of the radius
  turn(words[1] + kHalfTurn, cosine.low, sine.low, radius.low);
  turn(words[3] + kHalfTurn, cosine.high, sine.high, radius.high);
  const Two first = Two(cosine.low, sine.low) * radius.low, second = Two(cosine.high, sine.high) * radius.high;
  normals[0] = first.low;
  normals[1] = first.high;
  normals[2] = second.low;
  normals[3] = second.high;
}

}  // namespace ddpm_fast::cuda
