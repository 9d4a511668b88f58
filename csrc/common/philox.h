// Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ddpm_fast {

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // multipliers
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // added to the key in each round

// Computes four random words from a counter of four words and a key of two. `words` holds the counter on entry.
DDPM_FAST_FN void philox(std::uint32_t words[4], std::uint32_t key_0, std::uint32_t key_1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product_0 = std::uint64_t{kPhiloxM0} * words[0];
    const std::uint64_t product_1 = std::uint64_t{kPhiloxM1} * words[2];
    words[0] = static_cast<std::uint32_t>(product_1 >> 32) ^ words[1] ^ key_0;
    words[1] = static_cast<std::uint32_t>(product_1);
    words[2] = static_cast<std::uint32_t>(product_0 >> 32) ^ words[3] ^ key_1;
    words[3] = static_cast<std::uint32_t>(product_0);
    key_0 += kPhiloxW0;
    key_1 += kPhiloxW1;
  }
}

// Computes the four words of a block. The key is the seed of a sample.
DDPM_FAST_FN void philox_block(std::uint64_t seed, std::uint32_t stream, std::uint32_t block, std::uint32_t words[4]) {
  words[0] = block;
  words[1] = stream;
  words[2] = 0;
  words[3] = 0;
  philox(words, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

}  // namespace ddpm_fast
