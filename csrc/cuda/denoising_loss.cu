#include "cuda/kernels.h"
#include "cuda/tiles.h"

namespace ddpm_fast::cuda {

namespace {

// Model output - (a x_0 + b epsilon).
template <class T>
struct Difference {
  Noise<T> source;
  const T *model_output, *x_0;  // x_0 may be absent
  const float* table;
  std::int64_t t;
  float of_x_0, of_epsilon;  // a and b of the sample's timestep

  template <int width>
  struct Inputs {
    Packed<T, width> m, x_0;
  };

  template <class Args>
  __device__ Difference(const Args& a, const Tile& tile)
      : source(a.noise, a.seeds, kStreamQSample),
        model_output(static_cast<const T*>(a.model_output)),
        x_0(static_cast<const T*>(a.x_0)),
        table(a.table),
        t(a.t[tile.sample]) {}

  template <int width>
  __device__ Inputs<width> load(const Location& at) const {
    Inputs<width> inputs;
    inputs.m = cuda::load<width>(model_output + at.offset);
    if (x_0 != nullptr) inputs.x_0 = cuda::load<width>(x_0 + at.offset);
    return inputs;
  }

  __device__ Noise<T> noise() const { return source; }

  __device__ void start() {
    of_x_0 = table[2 * t];
    of_epsilon = table[2 * t + 1];
  }

  // Without noise epsilon is 0.
  template <int width>
  __device__ void subtract(const Inputs<width>& inputs, const float (&epsilon)[width],
                           float (&difference)[width]) const {
    widen(inputs.m, difference);
    if (x_0 == nullptr) {
      for (int i = 0; i < width; ++i) difference[i] = fma(-of_epsilon, epsilon[i], difference[i]);
      return;
    }
    float x[width];
    widen(inputs.x_0, x);
    for (int i = 0; i < width; ++i) difference[i] -= fma(of_epsilon, epsilon[i], of_x_0 * x[i]);
  }
};

// --------------------------------------------------------------------------------------------------------- forward

template <class T>
struct SumOfSquares : Difference<T> {
  float sum = 0;  // over the thread's elements

  using Difference<T>::Difference;

  template <int width>
  __device__ void finish(const Location&, const typename Difference<T>::template Inputs<width>& inputs,
                         const float (&epsilon)[width]) {
    float difference[width];
    this->subtract(inputs, epsilon, difference);
    for (int i = 0; i < width; ++i) sum = fma(difference[i], difference[i], sum);
  }
};

template <class Real>
DDPM_FAST_DEVICE Real sum_of_warp(Real value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
  }
  return value;
}

// The sum of a tile's squares: of threads, warps and the block, in an order that the shape alone decides. The tiles of
// a sample go to `sums`, [n, tiles]; where it is one tile, its loss is written at once.
template <class T, bool staged>
__global__ void __launch_bounds__(kMostThreads)
    denoising_loss_kernel(const DenoisingLossArgs a, const Tiling tiling, double reciprocal_of_count) {
  const Tile tile = current_tile<staged>(tiling);
  if (tile.sample >= tiling.n) return;
  SumOfSquares<T> op(a, tile);
  run<staged, kWidth<T>>(tiling, tile, op);

  __shared__ float sums[kMostThreads / kWarp];
  const float sum_of_this_warp = sum_of_warp(op.sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum_of_this_warp;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += sums[warp];
  if (gridDim.x == 1) {
    static_cast<float*>(a.losses)[tile.sample] = static_cast<float>(sum * reciprocal_of_count);
  } else {
    static_cast<float*>(a.workspace)[std::int64_t{tile.sample} * gridDim.x + blockIdx.x] = sum;
  }
}

// The losses from the sums of the tiles, a warp for each sample.
__global__ void __launch_bounds__(kMostThreads)
    add_tiles_kernel(float* losses, const float* sums, std::int64_t n, std::int64_t tiles, double reciprocal_of_count) {
  const std::int64_t sample = std::int64_t{blockIdx.x} * (kMostThreads / kWarp) + threadIdx.x / kWarp;
  if (sample >= n) return;
  double sum = 0;
  for (std::int64_t tile = threadIdx.x % kWarp; tile < tiles; tile += kWarp) sum += sums[sample * tiles + tile];
  sum = sum_of_warp(sum);
  if (threadIdx.x % kWarp == 0) losses[sample] = static_cast<float>(sum * reciprocal_of_count);
}

// -------------------------------------------------------------------------------------------------------- backward

template <class T>
struct Gradient : Difference<T> {
  T* grad_model_output;
  const float* grad_loss;  // the sample's
  double reciprocal_of_count;
  float factor;  // 2 / count times the gradient of the loss

  __device__ Gradient(const DenoisingLossBackwardArgs& a, const Tile& tile, double reciprocal_of_count)
      : Difference<T>(a, tile),
        grad_model_output(static_cast<T*>(a.grad_model_output)),
        grad_loss(static_cast<const float*>(a.grad_losses) + tile.sample),
        reciprocal_of_count(reciprocal_of_count) {}

  __device__ void start() {
    Difference<T>::start();
    factor = static_cast<float>(2 * *grad_loss * reciprocal_of_count);
  }

  template <int width>
  __device__ void finish(const Location& at, const typename Difference<T>::template Inputs<width>& inputs,
                         const float (&epsilon)[width]) const {
    float difference[width];
    this->subtract(inputs, epsilon, difference);
    for (int i = 0; i < width; ++i) difference[i] *= factor;
    store(grad_model_output + at.offset, difference);
  }
};

template <class T, bool staged>
__global__ void __launch_bounds__(kMostThreads)
    denoising_loss_backward_kernel(const DenoisingLossBackwardArgs a, const Tiling tiling, double reciprocal_of_count) {
  const Tile tile = current_tile<staged>(tiling);
  if (tile.sample >= tiling.n) return;
  Gradient<T> op(a, tile, reciprocal_of_count);
  run<staged, kWidth<T>>(tiling, tile, op);
}

// -------------------------------------------------------------------------------------------------------- launches

double reciprocal_of_count(const Shape& shape) { return 1 / static_cast<double>(shape.c * shape.hw); }

template <class T, class Args>
Tiling tiling_of(const Args& a, const void* grad_model_output = nullptr) {
  constexpr int kVector = kWidth<T>;
  return {a.shape, a.seeds != nullptr, kVector,
          aligned<T>(a.model_output, kVector) && aligned<T>(a.x_0, kVector) && aligned<T>(a.noise, kVector) &&
              aligned<T>(grad_model_output, kVector)};
}

}  // namespace

std::int64_t denoising_loss_workspace(const DenoisingLossArgs& a) {
  if (a.shape.c * a.shape.hw == 0) return 0;
  const std::int64_t tiles = tiling_of<float>(a).tiles_per_sample();  // the same for every type
  return tiles == 1 ? 0 : a.shape.n * tiles * static_cast<std::int64_t>(sizeof(float));
}

void denoising_loss(const DenoisingLossArgs& a) {
  if (a.shape.n == 0) return;
  std::int64_t tiles = 0;
  if (a.shape.c * a.shape.hw > 0) {
    with_type(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      const Tiling tiling = tiling_of<T>(a);
      tiles = tiling.tiles_per_sample();
      launch("denoising_loss", tiling.staged ? denoising_loss_kernel<T, true> : denoising_loss_kernel<T, false>,
             tiling.dims(), a.stream_or_threads.stream(), a, tiling, reciprocal_of_count(a.shape));
    });
  }
  if (tiles == 1) return;
  constexpr std::int64_t kSamples = kMostThreads / kWarp;
  const Dims dims = {.grid = dim3(static_cast<unsigned>(divide_up(a.shape.n, kSamples))), .block = dim3(kMostThreads)};
  launch("denoising_loss", add_tiles_kernel, dims, a.stream_or_threads.stream(), static_cast<float*>(a.losses),
         static_cast<const float*>(a.workspace), a.shape.n, tiles, reciprocal_of_count(a.shape));
}

void denoising_loss_backward(const DenoisingLossBackwardArgs& a) {
  if (a.shape.n * a.shape.c * a.shape.hw == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tiling tiling = tiling_of<T>(a, a.grad_model_output);
    launch("denoising_loss_backward",
           tiling.staged ? denoising_loss_backward_kernel<T, true> : denoising_loss_backward_kernel<T, false>,
           tiling.dims(), a.stream_or_threads.stream(), a, tiling, reciprocal_of_count(a.shape));
  });
}

}  // namespace ddpm_fast::cuda
