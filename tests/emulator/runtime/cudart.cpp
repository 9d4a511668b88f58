// The part of the CUDA runtime that csrc/cuda calls, for the emulated cards.

#include <map>
#include <string>
#include <utility>

#include "cards.h"
#include "image.h"
#include "machine.h"

extern "C" {
// Addresses of the no-ops of __launch_bounds__, one address a kernel.
extern const emulator::Address __start___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
extern const emulator::Address __stop___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
}

namespace emulator {
namespace {

constexpr Card kCardList[kCards] = {
    {8, 163 << 10, false},
    {9, 227 << 10, true},
    {9, 227 << 10, false},
};
constexpr int kDefaultShared = 48 << 10;  // dynamic shared memory that needs no asking
constexpr unsigned kPortableCluster = 8;

int device_in_use = 0;
cudaError_t last_error = cudaSuccess;

// Values that cudaFuncSetAttribute has set, which holds for one device.
using Attribute = std::pair<int, const void*>;
std::map<Attribute, int> shared_allowed, large_cluster_allowed;

// The threads that the kernel's __launch_bounds__ allow; 0 where it has none.
unsigned launch_bounds(const void* kernel) {
  const auto begin = reinterpret_cast<Address>(kernel);
  Address first = 0;
  for (const Address* entry = __start___patchable_function_entries; entry != __stop___patchable_function_entries;
       ++entry) {
    if (*entry <= begin && *entry > first) first = *entry;
  }
  constexpr unsigned char kNop = 0x90;
  for (Address at = first; at < begin; ++at) {
    if (*reinterpret_cast<const unsigned char*>(at) != kNop) return 0;  // another function's
  }
  return first == 0 ? 0 : static_cast<unsigned>(begin - first);
}

cudaError_t reject(cudaError_t status, const std::string& why) {
  report("launch", 0, "%s: %s", machine.kernel.c_str(), why.c_str());
  return last_error = status;
}

}  // namespace

const Card& current_card() { return kCardList[device_in_use]; }
void set_current_device(int device) { device_in_use = device; }

cudaError_t check_launch(const cudaLaunchConfig_t& config, const dim3& cluster, const void* kernel,
                         std::size_t call_size) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const Attribute key{device_in_use, kernel};
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxBlockSize || block.z > 64) {
    return reject(cudaErrorInvalidConfiguration, "a block of " + std::to_string(threads) + " threads");
  }
  if (const unsigned bound = launch_bounds(kernel); bound != 0 && threads > bound) {
    return reject(cudaErrorInvalidValue,
                  "a block of " + std::to_string(threads) + " threads, __launch_bounds__ say " + std::to_string(bound));
  }
  if (blocks == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) {
    return reject(cudaErrorInvalidConfiguration, "a grid of " + std::to_string(grid.x) + " x " +
                                                     std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                                                     " blocks");
  }
  if (config.dynamicSmemBytes > static_cast<std::size_t>(current_card().shared_bytes)) {
    return reject(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of shared memory on a card with " +
                                             std::to_string(current_card().shared_bytes));
  }
  if (config.dynamicSmemBytes > kDefaultShared && shared_allowed[key] < static_cast<int>(config.dynamicSmemBytes)) {
    return reject(cudaErrorInvalidValue, "more than 48 KB of shared memory without asking for it on this device");
  }
  const std::uint64_t ranks = std::uint64_t{cluster.x} * cluster.y * cluster.z;
  if (ranks != 1) {
    if (!current_card().clusters && current_card().major >= 9) return last_error = cudaErrorInvalidClusterSize;
    if (!current_card().clusters) return reject(cudaErrorInvalidClusterSize, "clusters on a card that has none");
    if (ranks == 0 || ranks > kMaxClusterSize || (ranks > kPortableCluster && !large_cluster_allowed[key])) {
      return reject(cudaErrorInvalidClusterSize, "a cluster of " + std::to_string(ranks) + " blocks");
    }
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
      return reject(cudaErrorInvalidClusterSize, "a grid that is no whole number of clusters");
    }
  }
  if (call_size > 4096) return reject(cudaErrorInvalidValue, "more than 4096 bytes of parameters");
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = device_in_use;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Card& asked = kCardList[device];
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? asked.major : asked.shared_bytes;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const Attribute key{device_in_use, kernel};
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > current_card().shared_bytes) return last_error = cudaErrorInvalidValue;
    shared_allowed[key] = value;
  } else {
    if (current_card().major < 9) return last_error = cudaErrorInvalidValue;
    large_cluster_allowed[key] = value;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
  }
  return "unknown error";
}
