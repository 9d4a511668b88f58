// The kernels of the native module, and the table of the functions of a device.
//
// To add a kernel, write its Args in common/args.h, its line here, and its function in csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cu.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/args.h"

#define DDPM_FAST_OPS(OP)                                \
  OP(noise, NoiseArgs)                                   \
  OP(q_sample, QSampleArgs)                              \
  OP(reverse_step, ReverseStepArgs)                      \
  OP(denoising_loss, DenoisingLossArgs)                  \
  OP(denoising_loss_backward, DenoisingLossBackwardArgs) \
  OP(group_norm_silu, GroupNormSiluArgs)                 \
  OP(group_norm_silu_backward, GroupNormSiluBackwardArgs)

// Kernels with a scratch buffer, which the caller allocates. <kernel>_workspace returns its size in bytes.
#define DDPM_FAST_WORKSPACES(OP)         \
  OP(denoising_loss, DenoisingLossArgs)  \
  OP(group_norm_silu, GroupNormSiluArgs) \
  OP(group_norm_silu_backward, GroupNormSiluBackwardArgs)

// Kernels of the CPU only.
#define DDPM_FAST_CPU_OPS(OP)                    \
  OP(group_norm_affine, GroupNormAffineArgs)     \
  OP(conv_direct, ConvArgs)                      \
  OP(conv_winograd, ConvArgs)                    \
  OP(conv_winograd_large, ConvArgs)              \
  OP(conv_winograd_upsampled_gradient, ConvArgs) \
  OP(conv_tiles, ConvArgs)                       \
  OP(resample, ResampleArgs)                     \
  OP(attention, AttentionArgs)                   \
  OP(attention_backward, AttentionBackwardArgs)  \
  OP(attention_tiles, AttentionArgs)             \
  OP(time_terms, TimeTermsArgs)                  \
  OP(network_input, NetworkInputArgs)            \
  OP(count_step, CountStepArgs)                  \
  OP(pack_winograd, PackWinogradArgs)            \
  OP(conv_winograd_weight_gradient, ConvWinogradWeightGradientArgs)

#define DDPM_FAST_CPU_WORKSPACES(OP) \
  OP(conv_tiles, ConvArgs)           \
  OP(attention, AttentionArgs)       \
  OP(attention_tiles, AttentionArgs)

// Kernels that use tiles (see cpu/tiles.h). The instruction set amx has its own, and all others of avx512_bf16.
#define DDPM_FAST_TILE_OPS(OP) \
  OP(conv_tiles, ConvArgs)     \
  OP(attention_tiles, AttentionArgs)

// Kernels of the CPU that a program may call. Every member of a team runs the whole function, so it may write memory only
// in the body of a parallel_for, and has no ScratchUse::kCall buffer.
#define DDPM_FAST_PROGRAM_OPS(OP)            \
  OP(time_terms, TimeTermsArgs)              \
  OP(network_input, NetworkInputArgs)        \
  OP(group_norm_affine, GroupNormAffineArgs) \
  OP(conv_direct, ConvArgs)                  \
  OP(conv_winograd, ConvArgs)                \
  OP(conv_winograd_large, ConvArgs)          \
  OP(conv_tiles, ConvArgs)                   \
  OP(resample, ResampleArgs)                 \
  OP(attention, AttentionArgs)               \
  OP(attention_tiles, AttentionArgs)         \
  OP(reverse_step, ReverseStepArgs)          \
  OP(count_step, CountStepArgs)

namespace ddpm_fast {

// A card has refused a launch. Called again, the kernel is planned in another way and asks for another workspace.
struct PlanAgain : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A function that a device does not have is null.
struct Kernels {
#define OP(name, Args) void (*name)(const Args&) = nullptr;
  DDPM_FAST_OPS(OP)
  DDPM_FAST_CPU_OPS(OP)
#undef OP
#define OP(name, Args) std::int64_t (*name##_workspace)(const Args&) = nullptr;
  DDPM_FAST_WORKSPACES(OP)
  DDPM_FAST_CPU_WORKSPACES(OP)
#undef OP
  std::int64_t panel = 0;  // output channels of a panel of packed weights
};

}  // namespace ddpm_fast
