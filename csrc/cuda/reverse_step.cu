#include "common/exp.h"
#include "cuda/kernels.h"
#include "cuda/tiles.h"

namespace ddpm_fast::cuda {

namespace {

// The layout of the model's output, in elements.
struct Model {
  std::int64_t extra_sample_stride, extra_row_stride;  // beyond x_t's strides, for the variance channels
  std::int64_t variance;                               // from a prediction to its variance; 0: the variance is fixed
  std::int64_t unconditional;  // from a prediction to the one without the condition; 0: no guidance
  float guidance_scale;
};

//   x_0^    = clip(p x_t + q m)
//   x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + k4 x_0_prev2 + std z
// Without a clip this is derivation eq. 13. M is the type of the model's output, T that of everything else.
// plain: no x_0^, x_0_prev, x_0_prev2, guidance and learned variance.
template <class T, class M, bool plain>
struct ReverseStep {
  Noise<T> source;
  T *out, *x_0_out;
  const T *x_t, *x_0_prev, *x_0_prev2;
  const M *prediction, *unconditional, *variance;  // the last two may be absent
  std::int64_t extra_row_stride;
  float guidance_scale;
  bool range;  // whether `variance` interpolates between the logarithms of the plan's two
  const PlanRow* table;
  std::int64_t step;
  PlanRow row;

  template <int width>
  struct Inputs {
    Packed<T, width> x;
    Packed<M, width> m;
  };

  __device__ ReverseStep(const ReverseStepArgs& a, const Model& model, const Tile& tile)
      : source(a.noise, a.seeds, 0),
        out(static_cast<T*>(a.x_prev)),
        x_0_out(static_cast<T*>(a.x_0)),
        x_t(static_cast<const T*>(a.x_t)),
        x_0_prev(static_cast<const T*>(a.x_0_prev)),
        x_0_prev2(static_cast<const T*>(a.x_0_prev2)),
        prediction(static_cast<const M*>(a.model_output)),
        table(a.table),
        step(a.steps[tile.sample * a.step_stride]) {
    if constexpr (!plain) {
      prediction += tile.sample * model.extra_sample_stride + tile.row * model.extra_row_stride;
      unconditional = model.unconditional == 0 ? nullptr : prediction + model.unconditional;
      variance = model.variance == 0 ? nullptr : prediction + model.variance;
      extra_row_stride = model.extra_row_stride;
      guidance_scale = model.guidance_scale;
      range = a.variance == Variance::kLearnedRange;
    }
  }

  template <int width>
  __device__ Packed<M, width> load_model(const M* part, const Location& at) const {
    return cuda::load<width>(part + at.offset + (plain ? 0 : at.row * extra_row_stride));
  }

  // x += k values
  template <int width>
  static __device__ void add(float k, const T* values, float (&x)[width]) {
    float value[width];
    cuda::load(values, value);
    for (int i = 0; i < width; ++i) x[i] = fma(k, value[i], x[i]);
  }

  template <int width>
  __device__ Inputs<width> load(const Location& at) const {
    return {cuda::load<width>(x_t + at.offset), load_model<width>(prediction, at)};
  }

  __device__ Noise<T> noise() {
    row = table[step];
    source.stream = static_cast<std::uint32_t>(step);
    if (row.sigma == 0) source.given = nullptr, source.generated = false;
    if (source.given == nullptr && !source.generated) variance = nullptr;
    return source;
  }

  __device__ void start() const {}

  template <int width>
  __device__ void finish(const Location& at, const Inputs<width>& inputs, const float (&z)[width]) const {
    float x[width], m[width], x_0[width], std[width];
    widen(inputs.x, x);
    widen(inputs.m, m);
    if (!plain && unconditional != nullptr) {
      float other[width];
      widen(load_model<width>(unconditional, at), other);
      for (int i = 0; i < width; ++i) m[i] = fma(guidance_scale, m[i] - other[i], other[i]);
    }
    for (int i = 0; i < width; ++i) {
      x_0[i] = clip(fma(row.q, m[i], row.p * x[i]), row.clip);
      x[i] = fma(row.k2, m[i], fma(row.k1, x[i], row.k0 * x_0[i]));
      std[i] = row.sigma;
    }
    if constexpr (!plain) {
      // Both are read before x_0 is stored, which may be in the same memory.
      if (x_0_prev != nullptr) add(row.k3, x_0_prev + at.offset, x);
      if (x_0_prev2 != nullptr) add(row.k4, x_0_prev2 + at.offset, x);
      if (x_0_out != nullptr) store(x_0_out + at.offset, x_0);
      if (variance != nullptr) {
        float v[width];
        widen(load_model<width>(variance, at), v);
        for (int i = 0; i < width; ++i) {
          const float f = (v[i] + 1) * 0.5f;
          const float log_variance = range ? fma(f, row.log_beta, (1 - f) * row.log_beta_tilde) : v[i];
          std[i] = row.sigma * exp(0.5f * log_variance);
        }
      }
    }
    for (int i = 0; i < width; ++i) x[i] = fma(std[i], z[i], x[i]);
    store(out + at.offset, x);
  }
};

template <class T, class M, bool plain, bool staged>
__global__ void __launch_bounds__(kMostThreads)
    reverse_step_kernel(const ReverseStepArgs a, const Model model, const Tiling tiling) {
  const Tile tile = current_tile<staged>(tiling);
  if (tile.sample >= tiling.n) return;
  ReverseStep<T, M, plain> op(a, model, tile);
  run<staged, kWidth<T>>(tiling, tile, op);
}

template <class T, class M>
void run_with(const ReverseStepArgs& a) {
  constexpr int kVector = kWidth<T>;
  const bool learned = a.variance != Variance::kFixed;
  // A channels_last pixel has the channels of the prediction, and then those of the variance.
  const bool interleaved = learned && a.shape.channels_last && a.shape.hw > 1;
  const bool plain = !learned && !a.has_guidance && a.x_0 == nullptr && a.x_0_prev == nullptr && a.x_0_prev2 == nullptr;
  const bool whole = aligned<T>(a.x_prev, kVector) && aligned<T>(a.x_0, kVector) && aligned<T>(a.x_t, kVector) &&
                     aligned<M>(a.model_output, kVector) && aligned<T>(a.noise, kVector) &&
                     aligned<T>(a.x_0_prev, kVector) && aligned<T>(a.x_0_prev2, kVector);
  const bool generates = a.noise == nullptr && a.seeds != nullptr;
  const Tiling tiling(a.shape, generates || interleaved, kVector, whole, interleaved);
  const std::int64_t sample = a.shape.c * a.shape.hw;
  const Model model = {
      .extra_sample_stride = learned ? sample : 0,
      .extra_row_stride = interleaved ? tiling.cols : 0,
      .variance = !learned      ? 0
                  : interleaved ? tiling.cols
                                : sample,
      .unconditional = a.has_guidance ? a.shape.n * (learned ? 2 * sample : sample) : 0,
      .guidance_scale = static_cast<float>(a.guidance_scale),
  };
  const auto kernel = tiling.staged ? reverse_step_kernel<T, M, false, true>
                      : plain       ? reverse_step_kernel<T, M, true, false>
                                    : reverse_step_kernel<T, M, false, false>;
  launch("reverse_step", kernel, tiling.dims(), a.stream_or_threads.stream(), a, model, tiling);
}

}  // namespace

void reverse_step(const ReverseStepArgs& a) {
  if (a.shape.n * a.shape.c * a.shape.hw == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.model_output_dtype == a.dtype) return run_with<T, T>(a);
    // The state of the loop stays in float32 where the model computes in less.
    if constexpr (sizeof(T) == 4)
      a.model_output_dtype == DType::kFloat16 ? run_with<T, Float16>(a) : run_with<T, BFloat16>(a);
  });
}

}  // namespace ddpm_fast::cuda
