#include "cuda/kernels.h"
#include "cuda/tiles.h"

namespace ddpm_fast::cuda {

namespace {

template <class T>
struct Normals {
  Noise<T> source;
  T* out;

  template <int width>
  struct Inputs {};

  __device__ explicit Normals(const NoiseArgs& a) : source(nullptr, a.seeds, a.stream), out(static_cast<T*>(a.out)) {}

  template <int width>
  __device__ Inputs<width> load(const Location&) const {
    return {};
  }

  __device__ Noise<T> noise() const { return source; }
  __device__ void start() const {}

  template <int width>
  __device__ void finish(const Location& at, const Inputs<width>&, const float (&normals)[width]) {
    store(out + at.offset, normals);
  }
};

template <class T, bool staged>
__global__ void __launch_bounds__(kMostThreads) noise_kernel(const NoiseArgs a, const Tiling tiling) {
  const Tile tile = current_tile<staged>(tiling);
  if (tile.sample >= tiling.n) return;
  Normals<T> op(a);
  run<staged, kWidth<T>>(tiling, tile, op);
}

}  // namespace

void noise(const NoiseArgs& a) {
  if (a.shape.n * a.shape.c * a.shape.hw == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tiling tiling(a.shape, true, kWidth<T>, aligned<T>(a.out, kWidth<T>));
    launch("noise", tiling.staged ? noise_kernel<T, true> : noise_kernel<T, false>, tiling.dims(),
           a.stream_or_threads.stream(), a, tiling);
  });
}

}  // namespace ddpm_fast::cuda
