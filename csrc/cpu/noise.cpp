#include "common/args.h"
#include "common/normal.h"
#include "common/philox.h"

namespace ddpm_fast::DDPM_FAST_ISA {

void noise(const NoiseArgs& a) {
  auto* out = static_cast<float*>(a.out);
  const std::int64_t numel = a.shape.c * a.shape.hw;
  for (std::int64_t n = 0; n < a.shape.n; ++n) {
    for (std::int64_t k = 0; k < numel; ++k) {
      std::uint32_t words[4];
      philox_block(a.seeds[n], a.stream, static_cast<std::uint32_t>(k / 4), words);
      float pair[2];
      normal_pair(words[k % 4 / 2 * 2], words[k % 4 / 2 * 2 + 1], pair[0], pair[1]);
      out[n * numel + k] = pair[k % 2];
    }
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
