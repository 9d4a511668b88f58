// The ops of the native module, and the table of functions by which a device offers them.
//
// To add an op: its Args in common/args.h, its line here, its function in csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu, its
// binding in csrc/bindings.h.
#pragma once

#include <cstdint>

#include "common/args.h"

#define DDPM_FAST_OPS(OP)                                \
  OP(noise, NoiseArgs)                                   \
  OP(q_sample, QSampleArgs)                              \
  OP(reverse_step, ReverseStepArgs)                      \
  OP(denoising_loss, DenoisingLossArgs)                  \
  OP(denoising_loss_backward, DenoisingLossBackwardArgs) \
  OP(group_norm_silu, GroupNormSiluArgs)                 \
  OP(group_norm_silu_backward, GroupNormSiluBackwardArgs)

// What only the CPU has: the parts of a frozen network (ddpm_fast/nn/packed.py), and of the gradients of convolutions
// and attention (ddpm_fast/nn/conv.py, attention.py).
#define DDPM_FAST_CPU_OPS(OP)                    \
  OP(group_norm_lines, GroupNormLinesArgs)       \
  OP(conv_direct, ConvArgs)                      \
  OP(conv_winograd, ConvArgs)                    \
  OP(conv_winograd_upsampled_gradient, ConvArgs) \
  OP(attention, AttentionArgs)                   \
  OP(attention_backward, AttentionBackwardArgs)  \
  OP(pack_winograd, PackWinogradArgs)            \
  OP(conv_winograd_weights, ConvWinogradWeightsArgs)

namespace ddpm_fast {

struct Kernels {
#define OP(name, Args) void (*name)(const Args&);
  DDPM_FAST_OPS(OP)
#undef OP
  // Bytes of scratch memory that an op wants from its caller; absent: none.
  std::int64_t (*denoising_loss_workspace)(const Shape&) = nullptr;
  std::int64_t (*group_norm_silu_workspace)(DType, const Shape&, std::int64_t groups) = nullptr;
  std::int64_t (*group_norm_silu_backward_workspace)(DType, const Shape&, std::int64_t groups) = nullptr;
  // Absent on other devices than the CPU.
#define OP(name, Args) void (*name)(const Args&) = nullptr;
  DDPM_FAST_CPU_OPS(OP)
#undef OP
  std::int64_t panel = 0;  // output channels of a panel of packed weights
};

}  // namespace ddpm_fast
