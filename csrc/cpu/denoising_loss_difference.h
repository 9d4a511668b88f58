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

//   difference = model output - target
// The target is epsilon, x_0 or v:
//   v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0
template <class A, class Args>
void subtract_target(const Args& a, const Partition& partition, const Tile& tile, LossBuffers<A>& buffers) {
  const Location at = location(partition, tile);
  const std::int64_t count = tile.count();
  A* difference = buffers.difference;
  if (a.prediction == Prediction::kSample) {
    const A* m = load(a.model_output, a.dtype, at, tile, buffers.m);
    const A* x_0 = load(a.x_0, a.dtype, at, tile, buffers.x_0);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - x_0[i];
    return;
  }
  const bool velocity = a.prediction == Prediction::kVPrediction;
  buffers.noise.prefetch(a.model_output, a.dtype, at, tile);
  if (velocity) buffers.noise.prefetch(a.x_0, a.dtype, at, tile);
  const A* epsilon = buffers.noise.given_or_generated(a.noise, a.dtype, a.seeds, kStreamQSample, partition, tile);
  const A* m = load(a.model_output, a.dtype, at, tile, buffers.m);
  if (!velocity) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - epsilon[i];
    return;
  }
  const float* coefficients = a.table + 2 * a.t[tile.sample];
  const A signal = coefficients[0], sigma = coefficients[1];
  const A* x_0 = load(a.x_0, a.dtype, at, tile, buffers.x_0);
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - (signal * epsilon[i] - sigma * x_0[i]);
}

template <class Args>
bool generates_noise(const Args& a) {
  return a.noise == nullptr && a.prediction != Prediction::kSample;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
