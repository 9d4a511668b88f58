// The small kernels of a sampling step. A program calls them before the network and after reverse_step.
#include "common/args.h"
#include "cpu/elementwise_tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

void time_terms(const TimeTermsArgs& a) {
  const std::int64_t grain = kMaxTile / (a.width < 1 ? 1 : a.width);
  parallel_for(a.tables * a.samples, grain, a.stream_or_threads, [&](std::int64_t item) {
    const float* row = a.table + (item / a.samples * a.num_timesteps + a.timesteps[*a.step]) * a.width;
    memcpy(a.terms + item * a.width, row, a.width * sizeof(float));
  });
}

void network_input(const NetworkInputArgs& a) {
  const std::int64_t tiles = (a.count + kMaxTile - 1) / kMaxTile;
  parallel_for(tiles, 64, a.stream_or_threads, [&](std::int64_t index) {
    alignas(64) float read[kMaxTile], centered[kMaxTile];
    const std::int64_t first = index * kMaxTile;
    const Tile tile = {0, first, smaller(kMaxTile, a.count - first), 0, 1};
    const float* x = load(a.x_t, a.x_t_dtype, {first, 1}, tile, read);
    if (a.centered) {
      store(x, a.x, a.dtype, {first, 1}, tile);
      x = load(a.x, a.dtype, {first, 1}, tile, read);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.count(); ++i) centered[i] = 2 * x[i] - 1;  // 2 x is exact
      x = centered;
    }
    for (std::int64_t copy = 0; copy < a.copies; ++copy) store(x, a.x, a.dtype, {copy * a.count + first, 1}, tile);
  });
}

void count_step(const CountStepArgs& a) {
  parallel_for(1, 1, a.stream_or_threads, [&](std::int64_t) { *a.next_step = *a.step + 1; });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
