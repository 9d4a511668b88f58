// Vectors of Philox words and normals.
//
// A block counter fills a 64-bit lane. The multiplication of Philox, 32 x 32 -> 64 bits, then leaves both halves in the
// lane. It reads the low half of a lane only, so the high halves may hold anything.
#pragma once

#include <cstdint>

#include "common/normal.h"
#include "common/philox.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

typedef std::uint64_t Lanes __attribute__((vector_size(kVectorSize)));
constexpr int kLanes = kVectorSize / 8;

// Multiplies the low halves of the lanes by `factor`.
inline Lanes multiply(Lanes lanes, std::uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(lanes), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(lanes), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(lanes), _mm_set1_epi64x(factor)));
#else
  return (lanes & 0xFFFFFFFF) * factor;
#endif
}

// Computes the words of kLanes blocks. words[0] holds the block counters on entry.
inline void philox_lanes(Lanes words[4], std::uint64_t seed, std::uint32_t stream) {
  std::uint32_t key_0 = static_cast<std::uint32_t>(seed), key_1 = static_cast<std::uint32_t>(seed >> 32);
  words[1] = Lanes{} + stream;
  words[2] = Lanes{};
  words[3] = Lanes{};
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes product_0 = multiply(words[0], kPhiloxM0), product_1 = multiply(words[2], kPhiloxM1);
    words[0] = (product_1 >> 32) ^ words[1] ^ key_0;
    words[1] = product_1;
    words[2] = (product_0 >> 32) ^ words[3] ^ key_1;
    words[3] = product_0;
    key_0 += kPhiloxW0;
    key_1 += kPhiloxW1;
  }
}

constexpr int kGroup = 2 * kLanes;  // blocks at a time: lane i of one vector is block b + 2 i, of the other b + 2 i + 1
constexpr int kMaxTile = 1024;      // largest number of elements of a philox_normal call
constexpr int kNormalsBuffer = kMaxTile + 4 + 4 * kGroup;  // elements that a philox_normal call may write

// Memory that a tile needs after its noise. philox_normal prefetches it piece by piece while it computes.
class Prefetch {
 public:
  void add(const void* first, int element_bytes) {
    next_[count_] = static_cast<const char*>(first);
    bytes_[count_++] = 4 * kGroup * element_bytes;  // as many elements as are computed at a time
  }

  void advance() {
    for (int i = 0; i < count_; ++i) {
      for (int line = 0; line < bytes_[i]; line += 64) __builtin_prefetch(next_[i] + line);
      next_[i] += bytes_[i];
    }
  }

 private:
  int count_ = 0;
  const char* next_[6];
  int bytes_[6];
};

// Writes the normals of elements first .. first + count - 1 of a sample to `buffer`. Returns the first one's address.
inline const float* philox_normal(std::uint64_t seed, std::uint32_t stream, std::int64_t first, std::int64_t count,
                                  float* buffer, Prefetch& prefetch) {
  const std::int64_t first_block = first / 4, blocks = (first + count + 3) / 4 - first_block;
  alignas(64) std::uint32_t words[4][kNormalsBuffer / 4];
  Lanes counters;
  for (int i = 0; i < kLanes; ++i) counters[i] = static_cast<std::uint64_t>(first_block + 2 * i);
  for (std::int64_t block = 0; block < blocks; block += kGroup, counters += kGroup) {
    Lanes even[4] = {counters}, odd[4] = {counters + 1};
    prefetch.advance();
    philox_lanes(even, seed, stream);
    philox_lanes(odd, seed, stream);
    for (int w = 0; w < 4; ++w) {
      const Lanes both = (even[w] & 0xFFFFFFFF) | odd[w] << 32;  // 32-bit lanes in block order
      __builtin_memcpy(&words[w][block], &both, sizeof(both));
    }
  }
  // This loop is separate, so that the square roots do not wait for the long chain of rounds above.
  for (std::int64_t block = 0; block < blocks; block += kGroup) {
    float* normals = buffer + 4 * block;
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      normal_pair(words[0][block + i], words[1][block + i], normals[4 * i], normals[4 * i + 1]);
      normal_pair(words[2][block + i], words[3][block + i], normals[4 * i + 2], normals[4 * i + 3]);
    }
  }
  return buffer + first % 4;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
