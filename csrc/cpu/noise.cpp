#include "common/args.h"
#include "cpu/tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

template <class A>
void run(const NoiseArgs& a) {
  const Tiling tiling(a.shape);
  for_each_tile(tiling, a.shape.n, true, a.threads, [&](std::int64_t, const Tile& tile) {
    NoiseBuffers<A> buffers;
    const A* normals = noise_tile(nullptr, a.dtype, a.seeds, a.stream, tiling, tile, buffers);
    store(normals, a.out, a.dtype, place(tiling, tile), tile);
  });
}

}  // namespace

void noise(const NoiseArgs& a) { a.dtype == DType::kFloat64 ? run<double>(a) : run<float>(a); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
