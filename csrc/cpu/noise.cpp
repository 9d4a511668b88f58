#include "common/args.h"
#include "cpu/elementwise_tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

template <class A>
void run(const NoiseArgs& a) {
  const Partition partition(a.shape);
  for_each_tile(partition, a.shape.n, true, a.stream_or_threads, [&](std::int64_t, const Tile& tile) {
    NoiseTile<A> noise;
    const Location at = location(partition, tile);
    noise.prefetch(a.out, a.dtype, at, tile);
    store(noise.generate(a.seeds[tile.sample], a.stream, partition, tile), a.out, a.dtype, at, tile);
  });
}

}  // namespace

void noise(const NoiseArgs& a) { a.dtype == DType::kFloat64 ? run<double>(a) : run<float>(a); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
