#include "common/args.h"
#include "cpu/elementwise_tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// Derivation eq. 3:
//   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon
template <class A>
void run(const QSampleArgs& a) {
  const Partition partition(a.shape);
  for_each_tile(partition, a.shape.n, a.noise == nullptr, a.stream_or_threads, [&](std::int64_t, const Tile& tile) {
    NoiseTile<A> noise;
    alignas(64) A x_0_buffer[kMaxTile], x_t[kMaxTile];
    const float* coefficients = a.table + 2 * a.t[tile.sample];
    const A signal = coefficients[0], sigma = coefficients[1];
    const Location at = location(partition, tile);
    noise.prefetch(a.x_0, a.x_0_dtype, at, tile);
    noise.prefetch(a.x_t, a.dtype, at, tile);
    const A* epsilon = noise.given_or_generated(a.noise, a.dtype, a.seeds, kStreamQSample, partition, tile);
    const A* x_0 = load(a.x_0, a.x_0_dtype, at, tile, x_0_buffer);
#pragma omp simd
    for (std::int64_t i = 0; i < tile.count(); ++i) x_t[i] = signal * x_0[i] + sigma * epsilon[i];
    store(x_t, a.x_t, a.dtype, at, tile);
  });
}

}  // namespace

void q_sample(const QSampleArgs& a) { a.dtype == DType::kFloat64 ? run<double>(a) : run<float>(a); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
