// What crosses from the bindings to the kernels: one struct per op, filled by position in csrc/bindings.cpp.
//
// A big tensor is dense, logically [n, c, hw]; channels_last: in memory [n, hw, c]. An absent tensor is a null pointer.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ddpm_fast {

// The stream of the noise of q_sample and denoising_loss, as in ddpm_fast/reference.py.
constexpr std::uint32_t kStreamQSample = 0xFFFFFFFE;

struct Shape {
  std::int64_t n, c, hw;
  bool channels_last;
};

// What runs an op: on the CPU a number of threads, on CUDA a stream (a cudaStream_t).
struct RunOn {
  std::intptr_t value;
  int threads() const { return static_cast<int>(value); }
  void* stream() const { return reinterpret_cast<void*>(value); }
};

// What a model predicts, and how it gives the variance of a reverse step: PREDICTIONS and VARIANCES of reference.py.
enum class Prediction : int { kEpsilon, kSample, kVelocity };
enum class Variance : int { kFixed, kLearned, kLearnedRange };

struct NoiseArgs {
  DType dtype;
  void* out;
  const std::int64_t* seeds;  // [n]
  std::uint32_t stream;
  Shape shape;
  RunOn run_on;
};

struct QSampleArgs {
  DType dtype;
  void* out;
  const void* x_0;
  DType x_0_dtype;            // dtype, or kUInt8: 0..255 stand for -1..1
  const std::int64_t* t;      // [n]
  const float* table;         // [T, 2]: sqrt(abar_t), sqrt(1 - abar_t)
  const void* noise;          // this or seeds
  const std::int64_t* seeds;  // [n]
  Shape shape;
  RunOn run_on;
};

// A row of a sampling plan's table.
struct PlanRow {
  float p, q, k0, k1, k2, k3, sigma, log_beta, log_beta_tilde, clip;
};

struct ReverseStepArgs {
  DType dtype, model_dtype;
  void* out;      // may be x_t
  void* x_0_out;  // may be absent
  const void* x_t;
  const void* model_output;   // [n * (1 + guidance), c * (1 + learned variance), hw]
  const PlanRow* table;       // [S]
  const std::int64_t* steps;  // sample i is at row steps[i * step_stride]
  std::int64_t step_stride;   // 0 or 1
  const void* noise;          // this, or seeds, or neither where every sigma is 0
  const std::int64_t* seeds;
  const void* x_0_prev;  // may be absent
  bool guidance;
  double guidance_scale;
  Variance variance;
  Shape shape;
  RunOn run_on;
};

struct DenoisingLossArgs {
  DType dtype;
  void* loss;  // [n], float64 for float64 and float32 for every other dtype
  const void* model_output;
  const void* x_0;
  const std::int64_t* t;
  const float* table;
  const void* noise;
  const std::int64_t* seeds;
  Prediction prediction;
  Shape shape;
  void* workspace;  // as many bytes as denoising_loss_workspace wants; the backward pass wants none
  RunOn run_on;
};

struct DenoisingLossBackwardArgs {
  void* grad_model_output;
  DenoisingLossArgs forward;  // with loss: the gradient of the loss, [n]
};

// One value a channel: [c] for weight and bias, [n, c] for the others.
struct ChannelInput {
  const void* data;  // may be absent
  DType dtype;
};

struct GroupNormSiluArgs {
  DType dtype;
  void* y;
  void *mean, *rstd;  // [n, groups], float64 for float64 and float32 for every other dtype; both may be absent
  const void* x;
  ChannelInput weight, bias, shift, scale, scale_shift;
  Shape shape;
  std::int64_t groups;
  double eps;
  bool silu;
  void* workspace;  // as many bytes as group_norm_silu_workspace wants
  RunOn run_on;
};

struct GroupNormSiluBackwardArgs {
  DType dtype;
  void* dx;
  // Of mean's dtype; each may be absent.
  void *dweight, *dbias;                 // [c]
  void *dshift, *dscale, *dscale_shift;  // [n, c]
  const void *dy, *x, *mean, *rstd;
  ChannelInput weight, bias, shift, scale, scale_shift;
  Shape shape;
  std::int64_t groups;
  bool silu;
  void* workspace;  // as many bytes as group_norm_silu_backward_workspace wants
  RunOn run_on;
};

}  // namespace ddpm_fast
