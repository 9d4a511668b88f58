#include "cpu/denoising_loss_difference.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

template <class A>
void backward(const DenoisingLossBackwardArgs& a) {
  const Partition partition(a.shape);
  for_each_tile(partition, a.shape.n, a.seeds != nullptr, a.stream_or_threads, [&](std::int64_t, const Tile& tile) {
    LossBuffers<A> buffers;
    const Location at = location(partition, tile);
    buffers.noise.prefetch(a.grad_model_output, a.dtype, at, tile);
    subtract_target(a, partition, tile, buffers);
    const A factor = 2 * static_cast<const A*>(a.grad_losses)[tile.sample] / static_cast<A>(partition.numel());
#pragma omp simd
    for (std::int64_t i = 0; i < tile.count(); ++i) buffers.difference[i] *= factor;
    store(buffers.difference, a.grad_model_output, a.dtype, at, tile);
  });
}

}  // namespace

void denoising_loss_backward(const DenoisingLossBackwardArgs& a) {
  a.dtype == DType::kFloat64 ? backward<double>(a) : backward<float>(a);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
