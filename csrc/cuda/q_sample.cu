#include "cuda/kernels.h"
#include "cuda/tiles.h"

namespace ddpm_fast::cuda {

namespace {

// Derivation eq. 3, with x_0 of type X and everything else of type T:
//   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon
template <class T, class X>
struct QSample {
  Noise<T> source;
  T* out;
  const X* x_0;
  const float* table;
  std::int64_t t;
  float signal, sigma;

  template <int width>
  using Inputs = Packed<X, width>;

  __device__ QSample(const QSampleArgs& a, const Tile& tile)
      : source(a.noise, a.seeds, kStreamQSample),
        out(static_cast<T*>(a.x_t)),
        x_0(static_cast<const X*>(a.x_0)),
        table(a.table),
        t(a.t[tile.sample]) {}

  template <int width>
  __device__ Inputs<width> load(const Location& at) const {
    return cuda::load<width>(x_0 + at.offset);
  }

  __device__ Noise<T> noise() const { return source; }

  __device__ void start() {
    signal = table[2 * t];
    sigma = table[2 * t + 1];
  }

  template <int width>
  __device__ void finish(const Location& at, const Inputs<width>& input, const float (&epsilon)[width]) const {
    float x[width];
    widen(input, x);
    for (int i = 0; i < width; ++i) x[i] = fma(sigma, epsilon[i], signal * x[i]);
    store(out + at.offset, x);
  }
};

template <class T, class X, bool staged>
__global__ void __launch_bounds__(kMostThreads) q_sample_kernel(const QSampleArgs a, const Tiling tiling) {
  const Tile tile = current_tile<staged>(tiling);
  if (tile.sample >= tiling.n) return;
  QSample<T, X> op(a, tile);
  run<staged, kWidth<T>>(tiling, tile, op);
}

template <class T, class X>
void run_with(const QSampleArgs& a) {
  constexpr int kVector = kWidth<T>;
  const bool whole = aligned<T>(a.x_t, kVector) && aligned<X>(a.x_0, kVector) && aligned<T>(a.noise, kVector);
  const Tiling tiling(a.shape, a.noise == nullptr, kVector, whole);
  launch("q_sample", tiling.staged ? q_sample_kernel<T, X, true> : q_sample_kernel<T, X, false>, tiling.dims(),
         a.stream_or_threads.stream(), a, tiling);
}

}  // namespace

void q_sample(const QSampleArgs& a) {
  if (a.shape.n * a.shape.c * a.shape.hw == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.x_0_dtype == DType::kUInt8 ? run_with<T, std::uint8_t>(a) : run_with<T, T>(a);
  });
}

}  // namespace ddpm_fast::cuda
