#include "common/args.h"
#include "common/exp.h"
#include "cpu/elementwise_tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// The locations of a tile of the model's output: the prediction and the variance.
struct ModelLocations {
  ModelLocations(const Partition& partition, const Tile& tile, std::int64_t sample, bool channels_last, bool learned) {
    const std::int64_t channels = learned ? 2 : 1;  // per channel of x_t
    const std::int64_t stride = channels_last ? partition.cols() * channels : 1;
    prediction = {sample * partition.numel() * channels + tile.row * stride + tile.col, stride};
    variance = {prediction.offset + (channels_last ? partition.cols() : partition.numel()), stride};
  }
  Location prediction, variance;
};

// Without clipping this is derivation eq. 13:
//   x_0^    = clip(p x_t + q m)
//   x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + k4 x_0_prev2 + std z
// The terms are added in the order of reference.py.
template <class A>
void run(const ReverseStepArgs& a) {
  const Partition partition(a.shape);
  const bool learned = a.variance != Variance::kFixed;
  const bool generates = a.noise == nullptr && a.seeds != nullptr;
  for_each_tile(partition, a.shape.n, generates, a.stream_or_threads, [&](std::int64_t, const Tile& tile) {
    alignas(64) A x_buffer[kMaxTile], m_buffer[kMaxTile], guided[kMaxTile], x_0[kMaxTile], x_prev[kMaxTile];
    const std::int64_t count = tile.count(), step = a.steps[tile.sample * a.step_stride];
    const PlanRow row = a.table[step];
    const Location at = location(partition, tile);
    const ModelLocations model(partition, tile, tile.sample, a.shape.channels_last, learned);

    NoiseTile<A> noise;
    const A* z = nullptr;
    if (row.sigma != 0 && (a.noise != nullptr || a.seeds != nullptr)) {
      noise.prefetch(a.x_t, a.dtype, at, tile);
      noise.prefetch(a.model_output, a.model_output_dtype, model.prediction, tile);
      noise.prefetch(a.x_prev, a.dtype, at, tile);
      noise.prefetch(a.x_0_prev, a.dtype, at, tile);
      noise.prefetch(a.x_0_prev2, a.dtype, at, tile);
      noise.prefetch(a.x_0, a.dtype, at, tile);
      z = noise.given_or_generated(a.noise, a.dtype, a.seeds, static_cast<std::uint32_t>(step), partition, tile);
    }
    const A* x = load(a.x_t, a.dtype, at, tile, x_buffer);
    const A* m = load(a.model_output, a.model_output_dtype, model.prediction, tile, m_buffer);
    if (a.has_guidance) {
      const ModelLocations second(partition, tile, a.shape.n + tile.sample, a.shape.channels_last, learned);
      const A* unconditional = load(a.model_output, a.model_output_dtype, second.prediction, tile, guided);
      const A scale = static_cast<A>(a.guidance_scale);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) guided[i] = unconditional[i] + scale * (m[i] - unconditional[i]);
      m = guided;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const A unclipped = row.p * x[i] + row.q * m[i];
      const A above = unclipped < -row.clip ? -row.clip : unclipped;  // NaN stays NaN
      x_0[i] = above > row.clip ? row.clip : above;
      x_prev[i] = row.k0 * x_0[i] + row.k1 * x[i] + row.k2 * m[i];
    }
    if (a.x_0_prev != nullptr) {
      const A* x_0_prev = load(a.x_0_prev, a.dtype, at, tile, x_buffer);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) x_prev[i] += row.k3 * x_0_prev[i];
    }
    if (a.x_0_prev2 != nullptr) {
      const A* x_0_prev2 = load(a.x_0_prev2, a.dtype, at, tile, x_buffer);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) x_prev[i] += row.k4 * x_0_prev2[i];
    }
    if (z != nullptr && learned) {
      const A* v = load(a.model_output, a.model_output_dtype, model.variance, tile, m_buffer);
      const bool range = a.variance == Variance::kLearnedRange;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        const A f = (v[i] + 1) / 2;
        const A log_variance = range ? f * row.log_beta + (1 - f) * row.log_beta_tilde : v[i];
        x_prev[i] += row.sigma * exp(A(0.5) * log_variance) * z[i];
      }
    } else if (z != nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) x_prev[i] += row.sigma * z[i];
    }
    store(x_prev, a.x_prev, a.dtype, at, tile);
    if (a.x_0 != nullptr) store(x_0, a.x_0, a.dtype, at, tile);
  });
}

}  // namespace

void reverse_step(const ReverseStepArgs& a) { a.dtype == DType::kFloat64 ? run<double>(a) : run<float>(a); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
