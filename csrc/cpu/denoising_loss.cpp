#include "cpu/denoising_loss_difference.h"
#include "cpu/scratch.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// Returns the sum of squares of a tile. Halves are added pairwise, in the same order on every processor.
template <class A>
A sum_of_squares(A* difference, std::int64_t count) {
  for (std::int64_t i = count; i < kMaxTile; ++i) difference[i] = 0;
#pragma omp simd
  for (int i = 0; i < kMaxTile; ++i) difference[i] *= difference[i];
  for (int half = kMaxTile / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int i = 0; i < half; ++i) difference[i] += difference[half + i];
  }
  return difference[0];
}

template <class A>
void forward(const DenoisingLossArgs& a) {
  const Partition partition(a.shape);
  const std::int64_t tiles = partition.tiles_per_sample();
  Scratch scratch(ScratchUse::kCall, Scratch::bytes<double>(a.shape.n * tiles));
  double* sums =
      scratch.take<double>(a.shape.n * tiles);  // one per tile, so that the result does not depend on threads
  for_each_tile(partition, a.shape.n, a.seeds != nullptr, a.stream_or_threads,
                [&](std::int64_t index, const Tile& tile) {
                  LossBuffers<A> buffers;
                  subtract_target(a, partition, tile, buffers);
                  sums[index] = sum_of_squares(buffers.difference, tile.count());
                });
  for (std::int64_t n = 0; n < a.shape.n; ++n) {
    double sum = 0;
    for (std::int64_t i = 0; i < tiles; ++i) sum += sums[n * tiles + i];
    static_cast<A*>(a.losses)[n] = static_cast<A>(sum / static_cast<double>(partition.numel()));
  }
}

}  // namespace

void denoising_loss(const DenoisingLossArgs& a) { a.dtype == DType::kFloat64 ? forward<double>(a) : forward<float>(a); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
