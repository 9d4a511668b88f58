// The arguments of the kernels: one struct per kernel.
//
// Each struct lists its fields once more in DDPM_FAST_FIELDS. The Python binding and the emulator are made from that
// list. Python passes one value per field, in the order of the list. See common/fields.h.
//
// Tensors are dense. Shape says how a tensor [n, c, hw] lies in memory. An absent tensor is a null pointer.
#pragma once

#include <cstdint>

#include "common/dtype.h"

// A tuple of the fields would take several times as long to compile.
#define DDPM_FAST_FIELDS(...)                                   \
  static constexpr const char* names() { return #__VA_ARGS__; } \
  template <class Visit>                                        \
  void visit_fields(Visit& visit) {                             \
    visit_each(visit, __VA_ARGS__);                             \
  }

namespace ddpm_fast {

template <class Visit, class... Fields>
void visit_each(Visit& visit, Fields&... fields) {
  (visit(fields), ...);
}

// The noise stream of q_sample and denoising_loss. ddpm_fast/reference.py has the same number.
constexpr std::uint32_t kStreamQSample = 0xFFFFFFFE;

// A contiguous tensor is [n, c, hw] in memory. A channels_last tensor is [n, hw, c] in memory.
struct Shape {
  std::int64_t n, c, hw;
  bool channels_last;
  DDPM_FAST_FIELDS(n, c, hw, channels_last)
};

class TeamMember;                          // cpu/team.h
int threads_of(const TeamMember& member);  // the threads of its team

// An op runs on a number of threads (CPU) or on a stream (CUDA, a cudaStream_t). Inside of a program every member of a
// team calls the kernel, each with itself as the member. Python never sets a member.
struct StreamOrThreads {
  std::intptr_t value;  // threads or a stream; minus the address of a member, because CUDA kernels take this struct too
  TeamMember* member() const { return value < 0 ? reinterpret_cast<TeamMember*>(-value) : nullptr; }
  int threads() const { return value < 0 ? threads_of(*member()) : static_cast<int>(value); }
  void* stream() const { return reinterpret_cast<void*>(value); }
};

// VARIANCES of ddpm_fast/reference.py.
enum class Variance : int { kFixed, kLearned, kLearnedRange };

struct NoiseArgs {
  DType dtype;
  void* out;
  const std::int64_t* seeds;  // [n]
  std::uint32_t stream;
  Shape shape;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, out, seeds, stream, shape, stream_or_threads)
};

struct QSampleArgs {
  DType dtype;
  void* x_t;
  const void* x_0;
  DType x_0_dtype;            // dtype, or kUInt8: 0..255 stand for -1..1
  const std::int64_t* t;      // [n]
  const float* table;         // [T, 2]: sqrt(abar_t), sqrt(1 - abar_t)
  const void* noise;          // exactly one of noise and seeds is present
  const std::int64_t* seeds;  // [n]
  Shape shape;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, x_t, x_0, x_0_dtype, t, table, noise, seeds, shape, stream_or_threads)
};

// A row of a sampling plan's table. PlanRow of ddpm_fast/reference.py has the same fields.
struct PlanRow {
  float p, q, k0, k1, k2, k3, k4, sigma, log_beta, log_beta_tilde, clip;
};

struct ReverseStepArgs {
  DType dtype, model_output_dtype;
  void* x_prev;  // may be x_t
  void* x_0;     // may be absent
  const void* x_t;
  const void* model_output;   // [n * (1 + has_guidance), c * (1 + learned variance), hw]
  const PlanRow* table;       // [S]
  const std::int64_t* steps;  // sample i is at row steps[i * step_stride]
  std::int64_t step_stride;   // 0 or 1
  const void* noise;          // noise or seeds; neither if every sigma is 0
  const std::int64_t* seeds;
  const void* x_0_prev;   // may be absent
  const void* x_0_prev2;  // may be absent
  bool has_guidance;
  double guidance_scale;
  Variance variance;
  Shape shape;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, model_output_dtype, x_prev, x_0, x_t, model_output, table, steps, step_stride, noise, seeds,
                   x_0_prev, x_0_prev2, has_guidance, guidance_scale, variance, shape, stream_or_threads)
};

// The target of a prediction is a x_0 + b epsilon.
struct DenoisingLossArgs {
  DType dtype;
  void* losses;  // [n], float64 for float64 and float32 for other dtypes
  const void* model_output;
  const void* x_0;  // absent if every a is 0
  const std::int64_t* t;
  const float* table;  // [T, 2]: a, b
  const void* noise;   // noise or seeds; neither if every b is 0
  const std::int64_t* seeds;
  Shape shape;
  void* workspace;  // denoising_loss_workspace says how many bytes
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, losses, model_output, x_0, t, table, noise, seeds, shape, workspace, stream_or_threads)
};

struct DenoisingLossBackwardArgs {
  DType dtype;
  void* grad_model_output;
  const void* grad_losses;  // [n], the dtype of losses
  const void* model_output;
  const void* x_0;
  const std::int64_t* t;
  const float* table;
  const void* noise;
  const std::int64_t* seeds;
  Shape shape;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, grad_model_output, grad_losses, model_output, x_0, t, table, noise, seeds, shape,
                   stream_or_threads)
};

// One value per channel. weight and bias are [c]. The other inputs are [n, c]. Python passes two values: the tensor
// under the name of the field, and its dtype under that name and "_dtype".
struct ChannelInput {
  const void* data;  // may be absent
  DType dtype;
  DDPM_FAST_FIELDS(data, dtype)
};

struct GroupNormSiluArgs {
  DType dtype;
  void* y;
  void *mean, *rstd;  // [n, num_groups], float64 for float64 and float32 for other dtypes; both may be absent
  const void* x;
  ChannelInput weight, bias, shift, scale, scale_shift;
  Shape shape;
  std::int64_t num_groups;
  double eps;
  bool silu;
  void* workspace;  // group_norm_silu_workspace says how many bytes
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, y, mean, rstd, x, weight, bias, shift, scale, scale_shift, shape, num_groups, eps, silu,
                   workspace, stream_or_threads)
};

struct GroupNormSiluBackwardArgs {
  DType dtype;
  void* grad_x;
  // The gradients of the small inputs have the dtype of mean. Each may be absent.
  void *grad_weight, *grad_bias;                     // [c]
  void *grad_shift, *grad_scale, *grad_scale_shift;  // [n, c]
  const void *grad_y, *x, *mean, *rstd;
  ChannelInput weight, bias, shift, scale, scale_shift;
  Shape shape;
  std::int64_t num_groups;
  bool silu;
  void* workspace;  // group_norm_silu_backward_workspace says how many bytes
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, grad_x, grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift, grad_y, x, mean,
                   rstd, weight, bias, shift, scale, scale_shift, shape, num_groups, silu, workspace, stream_or_threads)
};

// The kernels below exist on the CPU only. Feature maps are channels_last, in float32 or bfloat16. "x and skip" is the
// concatenation of x [n, hw, channels] and skip [n, hw, skip_channels] along the channels. skip may be absent.

// The affine coefficients of group_norm_silu, for a convolution that applies them to its input:
//   norm(x) = (x - center) slope + intercept
struct GroupNormAffineArgs {
  DType dtype;
  float* affine;  // [n, 3, channels + skip_channels]: center, slope, intercept
  const void *x, *skip;
  ChannelInput weight, bias, shift, scale, scale_shift;
  std::int64_t n, channels, skip_channels, hw, num_groups;
  double eps;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, affine, x, skip, weight, bias, shift, scale, scale_shift, n, channels, skip_channels, hw,
                   num_groups, eps, stream_or_threads)
};

//   y = (convolution(act(norm(x and skip))) + bias + residual) / divisor
struct ConvArgs {
  DType dtype;
  void* y;               // [n, out_height, out_width, out_channels]
  const void *x, *skip;  // [n, height, width, channels], [n, height, width, skip_channels]
  const float* affine;   // the result of group_norm_affine; if absent, there is no norm and no act
  bool silu;             // act is SiLU; it needs affine
  const float* packed;   // weights in panels: see cpu/panel_product.h; for conv_tiles in tiles: see cpu/tiles.h
  DType packed_dtype;    // that of the maps, or float32: the dtype of products
  const float* bias;     // [out_channels]; may be absent
  const void* residual;  // [n, out_height, out_width, out_channels]; may be absent
  float divisor;
  std::int64_t n, height, width, channels, skip_channels, out_height, out_width, out_channels;
  // conv_winograd needs kernel 3, stride 1 and padding 1. conv_winograd_large needs the same, upsample false and weights
  // packed in float32. conv_winograd_upsampled_gradient takes x, the gradient of an upsampled convolution's output, to
  // the gradient of the small map, y. It needs 3, 1, 1, upsample false and flipped weights, and x has twice the height
  // and width of y. conv_tiles needs maps in bfloat16.
  int kernel, stride;  // 1 or 3; 1 or 2
  int padding;         // zeros above and to the left; the size of the output decides those below and to the right
  bool upsample;       // repeat each pixel twice in both directions before the convolution
  void* workspace;     // conv_tiles_workspace says how many bytes; the others have none
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, y, x, skip, affine, silu, packed, packed_dtype, bias, residual, divisor, n, height, width,
                   channels, skip_channels, out_height, out_width, out_channels, kernel, stride, padding, upsample,
                   workspace, stream_or_threads)
};

// Nearest-neighbour upsampling by 2, or the mean of each 2x2 square of pixels:
//   y = up(act(norm(x))) or mean(act(norm(x)))
struct ResampleArgs {
  DType dtype;
  void* y;              // [n, 2 height, 2 width, channels] if up, else [n, height / 2, width / 2, channels]
  const void* x;        // [n, height, width, channels]; height and width are even unless up
  const float* affine;  // as in ConvArgs
  bool silu;
  std::int64_t n, height, width, channels;
  bool up;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, y, x, affine, silu, n, height, width, channels, up, stream_or_threads)
};

// For each head of each sample:
//   y = softmax(q k^T scale) v
struct AttentionArgs {
  DType dtype;
  void* y;          // [n, pixels, num_heads, head_dim]
  float* softmax;   // [n, num_heads, 2, pixels]: the largest score of a query, and 1 / sum of exp((score - largest)
                    // scale); may be absent
  const void* qkv;  // [n, pixels, 3, num_heads, head_dim]
  std::int64_t n, num_heads, pixels, head_dim;  // head_dim is even in bfloat16
  float scale;
  void* workspace;  // attention_workspace says how many bytes
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, y, softmax, qkv, n, num_heads, pixels, head_dim, scale, workspace, stream_or_threads)
};

struct AttentionBackwardArgs {
  DType dtype;
  void* grad_qkv;      // [n, pixels, 3, num_heads, head_dim]
  const void* grad_y;  // [n, pixels, num_heads, head_dim]
  const void* y;       // the results of the forward pass
  const float* softmax;
  const void* qkv;
  std::int64_t n, num_heads, pixels, head_dim;
  float scale;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, grad_qkv, grad_y, y, softmax, qkv, n, num_heads, pixels, head_dim, scale, stream_or_threads)
};

// The time terms of a sampling step, the same for each sample:
//   terms[b][i] = table[b][timesteps[*step]]
struct TimeTermsArgs {
  DType dtype;                    // float32
  float* terms;                   // [tables, samples, width]
  const float* table;             // [tables, num_timesteps, width]
  const std::int64_t* timesteps;  // the t of each step of a plan
  const std::int64_t* step;
  std::int64_t tables, num_timesteps, samples, width;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, terms, table, timesteps, step, tables, num_timesteps, samples, width, stream_or_threads)
};

// x_t in the network's dtype, as often as guidance needs it. Memory formats are equal.
struct NetworkInputArgs {
  DType dtype;
  void* x;          // [copies, count]
  const void* x_t;  // [count]
  DType x_t_dtype;
  std::int64_t count, copies;
  bool centered;  // 2 x - 1, rounded after each operation
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, x, x_t, x_t_dtype, count, copies, centered, stream_or_threads)
};

//   next_step = step + 1
struct CountStepArgs {
  std::int64_t* next_step;  // may be step
  const std::int64_t* step;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(next_step, step, stream_or_threads)
};

// Weights packed for conv_winograd or, if `large`, for conv_winograd_large:
//   G g G^T
struct PackWinogradArgs {
  DType dtype;          // the dtype of packed: float32 or bfloat16
  float* packed;        // panels of 16 matrices, or 36 with upsample or large: see cpu/winograd_transforms.h
  const float* weight;  // [out_channels, channels, 3, 3], with these strides in elements:
  std::int64_t out_channels, channels, out_stride, stride, row_stride, column_stride;
  bool flipped;   // pack for the gradient of the input: exchange in and out, reverse the taps
  bool upsample;  // pack for a convolution after an upsampling by 2
  bool large;     // pack for F(4x4, 3x3), without upsampling and in float32
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, packed, weight, out_channels, channels, out_stride, stride, row_stride, column_stride,
                   flipped, upsample, large, stream_or_threads)
};

// The gradients of the weights and the bias of conv_winograd.
struct ConvWinogradWeightGradientArgs {
  DType dtype;         // the dtype of x and grad_y: float32 or bfloat16
  float* grad_weight;  // [out_channels, 3, 3, channels]
  float* grad_bias;    // [out_channels]; may be absent
  const void* x;       // [n, height, width, channels]
  const void* grad_y;  // [n, height, width, out_channels]; with upsample [n, 2 height, 2 width, out_channels]
  std::int64_t n, height, width, channels, out_channels;
  bool upsample;
  StreamOrThreads stream_or_threads;
  DDPM_FAST_FIELDS(dtype, grad_weight, grad_bias, x, grad_y, n, height, width, channels, out_channels, upsample,
                   stream_or_threads)
};

}  // namespace ddpm_fast
