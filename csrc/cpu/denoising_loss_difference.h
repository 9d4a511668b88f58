// The difference of a tile of the model's output from its target, for the denoising loss and its gradient.
#pragma once

#include "common/args.h"
#include "cpu/elementwise_tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

template <class A>
struct LossBuffers {
  NoiseTile<A> noise;
  alignas(64) A m[kMaxTile], x_0[kMaxTile], difference[kMaxTile];
};

//   difference = model output - (a x_0 + b epsilon)
template <class A, class Args>
void subtract_target(const Args& a, const Partition& partition, const Tile& tile, LossBuffers<A>& buffers) {
  const Location at = location(partition, tile);
  const std::int64_t count = tile.count();
  const float* weights = a.table + 2 * a.t[tile.sample];
  const A of_x_0 = weights[0], of_epsilon = weights[1];
  A* difference = buffers.difference;
  const A* epsilon = nullptr;
  if (a.noise != nullptr || a.seeds != nullptr) {
    buffers.noise.prefetch(a.model_output, a.dtype, at, tile);
    buffers.noise.prefetch(a.x_0, a.dtype, at, tile);
    epsilon = buffers.noise.given_or_generated(a.noise, a.dtype, a.seeds, kStreamQSample, partition, tile);
  }
  const A* m = load(a.model_output, a.dtype, at, tile, buffers.m);
  if (a.x_0 == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - of_epsilon * epsilon[i];
    return;
  }
  const A* x_0 = load(a.x_0, a.dtype, at, tile, buffers.x_0);
  if (epsilon == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - of_x_0 * x_0[i];
    return;
  }
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - (of_epsilon * epsilon[i] + of_x_0 * x_0[i]);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
