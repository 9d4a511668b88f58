// Philox words to normals, four at a time: as csrc/common does it for every processor, to the last bit.
#pragma once

#include <cstdint>

#include "common/normal.h"
#include "common/philox.h"
#include "cuda/intrinsics.h"

namespace ddpm_fast::cuda {

// The normals of elements 4 block .. 4 block + 3 of a sample. What depends on the seed and the stream alone, the keys of
// the rounds for one, the compiler computes once for all calls of a thread.
DDPM_FAST_DEVICE void draw(std::uint64_t seed, std::uint32_t stream, std::uint32_t block, float* normals) {
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
  turn(square_root(squared_radius(words[0])), words[1], normals[0], normals[1]);
  turn(square_root(squared_radius(words[2])), words[3], normals[2], normals[3]);
}

}  // namespace ddpm_fast::cuda
