// How a kernel is launched: `launch("noise", kernel, {.grid = ..., .block = ...}, stream, arguments...)`.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/ops.h"

namespace ddpm_fast::cuda {

constexpr int kWarp = 32;

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit; }
constexpr std::int64_t round_up(std::int64_t value, std::int64_t unit) { return divide_up(value, unit) * unit; }

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// Return an attribute of the current device.
inline int attribute(const char* op, cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// True if a card has refused a cluster. A part of a card may have too few multiprocessors side by side.
inline std::atomic<bool> clusters_refused = false;

// Return the most blocks of a cluster: 1 after a refusal and before compute capability 9.0. Blocks of a cluster read each
// other's shared memory. No other property of a card decides the partition, above all not its number of
// multiprocessors, as results must not depend on it.
inline int largest_cluster(const char* op) {
  const int major = attribute(op, cudaDevAttrComputeCapabilityMajor);
  // 8 is what every card with clusters has; 9 and 10 are the large chips, and have 16.
  return major < 9 || clusters_refused ? 1 : major <= 10 ? 16 : 8;
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
    // All that there is, and not what this launch needs: another thread may be launching the kernel with more.
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin)));
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
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  // Other errors may be those of earlier launches.
  const bool refused = status == cudaErrorInvalidClusterSize || status == cudaErrorLaunchOutOfResources;
  if (refused && dims.cluster > 1) {
    (void)cudaGetLastError();  // not for the next call to find
    clusters_refused = true;
    throw PlanAgain(std::string(op) + ": CUDA refused a cluster of blocks (" + cudaGetErrorString(status) +
                    "). From now on it is computed in two passes, which take longer and round differently.");
  }
  check(op, status);
}

// Calls body with a zero of the type that the code stands for.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(Float16{});
    case DType::kBFloat16:
      return body(BFloat16{});
    default:
      return body(float{});
  }
}

}  // namespace ddpm_fast::cuda
