// How a kernel is launched: `launch("noise", kernel, {.grid = ..., .block = ...}, stream, arguments...)`.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <stdexcept>
#include <string>

namespace ddpm_fast::cuda {

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// What the launchers have to know of a card. Not its number of multiprocessors: results must not depend on that.
struct Card {
  int cluster;       // blocks of a cluster, which share their shared memory, at most; 1 before compute capability 9.0
  int shared_bytes;  // at most, for a block that asks for it
};

// The current device's.
inline const Card& card(const char* op) {
  constexpr int kMaxDevices = 64;
  static std::array<Card, kMaxDevices> cards;  // shared_bytes == 0: not asked yet
  int device = 0;
  check(op, cudaGetDevice(&device));
  if (device >= kMaxDevices) throw std::runtime_error(std::string(op) + ": CUDA: more than 64 devices");
  Card& known = cards[device];
  if (known.shared_bytes == 0) {
    int major = 0, shared_bytes = 0;
    check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(op, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    // 8 is what every card with clusters has; 9 and 10 are the large chips, and have 16.
    known = {major < 9 ? 1 : major <= 10 ? 16 : 8, shared_bytes};
  }
  return known;
}

struct Dims {
  dim3 grid, block;
  unsigned cluster = 1;          // blocks that share their shared memory, along x
  std::size_t shared_bytes = 0;  // dynamic
};

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Dims& dims, void* stream, Arguments&&... arguments) {
  constexpr unsigned kPortableCluster = 8;
  constexpr std::size_t kDefaultShared = 48 * 1024;
  if (dims.cluster > kPortableCluster) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  if (dims.shared_bytes > kDefaultShared) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(dims.shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dims.grid;
  config.blockDim = dims.block;
  config.dynamicSmemBytes = dims.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = dims.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = dims.cluster > 1 ? 1 : 0;
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace ddpm_fast::cuda
