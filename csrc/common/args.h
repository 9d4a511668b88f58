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

// The inference form of a network on the CPU: maps are channels_last, float32 or bfloat16, and "x and skip" are one map
// of channels + skip_channels channels.

// What a convolution then applies to its input, x -> act((x - center) slope + intercept), with the statistics of
// group_norm_silu.
struct GroupNormLinesArgs {
  float* lines;  // [n, 3, channels + skip_channels]: center, slope and intercept
  const void* skip;
  std::int64_t skip_channels;
  GroupNormSiluArgs norm;  // of x and skip: shape.c is the sum of their channels. No y, mean or rstd
};

// y = (convolution(act(x and skip)) + bias + added) / divisor, with the weights that ddpm_fast/nn/packed.py packs.
struct ConvArgs {
  DType dtype;
  void* y;               // [n, out_height, out_width, out_channels]
  const void *x, *skip;  // [n, height, width, channels], [n, height, width, skip_channels]; skip may be absent
  const float* lines;    // of group_norm_lines; absent: the input as it is
  bool silu;             // with lines
  const float* weights;  // panels: see cpu/product.h
  const float* bias;     // [out_channels]; may be absent
  const void* added;     // as y; may be absent
  float divisor;
  std::int64_t n, height, width, channels, skip_channels, out_height, out_width, out_channels;
  // conv_winograd: 3, 1 and 1. conv_winograd_upsampled_gradient: of y's gradient x, as high and wide as twice
  // out_height and out_width, to the gradient of the small map y, with flipped weights; 3, 1, 1 and false.
  int kernel, stride;  // 1 or 3; 1 or 2
  int padding;         // zeros above and to the left; below and to the right there are as many as the output asks for
  bool upsample;       // of every pixel twice in both directions, before the convolution
  RunOn run_on;
};

// y = softmax(q k^T scale) v, for each head of each sample.
struct AttentionArgs {
  DType dtype;
  void* y;                                  // [n, pixels, heads, channels]
  float* softmax;                           // [n, heads, 2, pixels]: of a query's scores the largest, and one over the
                                            // sum of exp((score - largest) scale); may be absent
  const void* qkv;                          // [n, pixels, 3, heads, channels]
  std::int64_t n, heads, pixels, channels;  // of a head, in bfloat16 an even number
  float scale;
  RunOn run_on;
};

struct AttentionBackwardArgs {
  void* dqkv;             // as qkv
  const void* dy;         // as y
  AttentionArgs forward;  // with y and softmax as it left them
};

// Weights for conv_winograd: G g G^T in panels.
struct PackWinogradArgs {
  DType dtype;           // float32 or bfloat16, of the packed ones
  float* packed;         // panels, of 16 matrices each, with upsampling 36: see cpu/winograd.h and product.h
  const float* weights;  // of output channel 0, input channel 0, and the first tap; negative strides flip a kernel
  std::int64_t out_channels, channels, out_stride, stride, row_stride, column_stride;
  bool upsample;  // before the convolution
  RunOn run_on;
};

// Gradients of the weights and bias of conv_winograd.
struct ConvWinogradWeightsArgs {
  DType dtype;     // of x and dy: float32 or bfloat16
  float* dweight;  // [out_channels, 3, 3, channels]
  float* dbias;    // [out_channels]; may be absent
  const void* x;   // [n, height, width, channels]
  const void* dy;  // [n, height, width, out_channels]; with upsampling [n, 2 height, 2 width, out_channels]
  std::int64_t n, height, width, channels, out_channels;
  bool upsample;
  RunOn run_on;
};

}  // namespace ddpm_fast
