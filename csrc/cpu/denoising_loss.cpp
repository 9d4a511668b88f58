#include "common/args.h"
#include "cpu/room.h"
#include "cpu/tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

template <class A>
struct Buffers {
  NoiseTile<A> noise;
  alignas(64) A m[kMaxDraw], x_0[kMaxDraw], difference[kMaxDraw];
};

//   difference = model output - target
// The target is epsilon, x_0, or v:
//   v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0
template <class A, class Args>
void subtract_target(const Args& a, const Tiling& tiling, const Tile& tile, Buffers<A>& buffers) {
  const Place at = place(tiling, tile);
  const std::int64_t count = tile.count();
  A* difference = buffers.difference;
  if (a.prediction == Prediction::kSample) {
    const A* m = load(a.model_output, a.dtype, at, tile, buffers.m);
    const A* x_0 = load(a.x_0, a.dtype, at, tile, buffers.x_0);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) difference[i] = m[i] - x_0[i];
    return;
  }
  const bool velocity = a.prediction == Prediction::kVelocity;
  buffers.noise.prefetch(a.model_output, a.dtype, at, tile);
  if (velocity) buffers.noise.prefetch(a.x_0, a.dtype, at, tile);
  const A* epsilon = buffers.noise.given_or_drawn(a.noise, a.dtype, a.seeds, kStreamQSample, tiling, tile);
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

// The sum of the squares of a tile's differences, halves added pairwise: one order for every processor.
template <class A>
A sum_of_squares(A* difference, std::int64_t count) {
  for (std::int64_t i = count; i < kMaxDraw; ++i) difference[i] = 0;
#pragma omp simd
  for (int i = 0; i < kMaxDraw; ++i) difference[i] *= difference[i];
  for (int half = kMaxDraw / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int i = 0; i < half; ++i) difference[i] += difference[half + i];
  }
  return difference[0];
}

template <class Args>
bool draws(const Args& a) {
  return a.noise == nullptr && a.prediction != Prediction::kSample;
}

template <class A>
void forward(const DenoisingLossArgs& a) {
  const Tiling tiling(a.shape);
  const std::int64_t tiles = tiling.tiles_per_sample();
  Room room(RoomFor::kCall, Room::bytes<double>(a.shape.n * tiles));
  double* sums = room.take<double>(a.shape.n * tiles);  // a tile each, so that threads do not matter
  for_each_tile(tiling, a.shape.n, draws(a), a.stream_or_threads.threads(), [&](std::int64_t index, const Tile& tile) {
    Buffers<A> buffers;
    subtract_target(a, tiling, tile, buffers);
    sums[index] = sum_of_squares(buffers.difference, tile.count());
  });
  for (std::int64_t n = 0; n < a.shape.n; ++n) {
    double sum = 0;
    for (std::int64_t i = 0; i < tiles; ++i) sum += sums[n * tiles + i];
    static_cast<A*>(a.losses)[n] = static_cast<A>(sum / static_cast<double>(tiling.numel()));
  }
}

template <class A>
void backward(const DenoisingLossBackwardArgs& a) {
  const Tiling tiling(a.shape);
  for_each_tile(tiling, a.shape.n, draws(a), a.stream_or_threads.threads(), [&](std::int64_t, const Tile& tile) {
    Buffers<A> buffers;
    const Place at = place(tiling, tile);
    buffers.noise.prefetch(a.grad_model_output, a.dtype, at, tile);
    subtract_target(a, tiling, tile, buffers);
    const A factor = 2 * static_cast<const A*>(a.grad_losses)[tile.sample] / static_cast<A>(tiling.numel());
#pragma omp simd
    for (std::int64_t i = 0; i < tile.count(); ++i) buffers.difference[i] *= factor;
    store(buffers.difference, a.grad_model_output, a.dtype, at, tile);
  });
}

}  // namespace

void denoising_loss(const DenoisingLossArgs& a) { a.dtype == DType::kFloat64 ? forward<double>(a) : forward<float>(a); }

void denoising_loss_backward(const DenoisingLossBackwardArgs& a) {
  a.dtype == DType::kFloat64 ? backward<double>(a) : backward<float>(a);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
