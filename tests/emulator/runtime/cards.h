// The emulated cards, and what a launch must keep to on the current one.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace emulator {

struct Card {
  int major;         // compute capability
  int shared_bytes;  // at most, for a block that asks for it
  bool clusters;
};

constexpr int kCards = 3;
const Card& current_card();
void set_current_device(int device);

// cudaSuccess, or what the runtime would say; a report explains it.
cudaError_t check_launch(const cudaLaunchConfig_t&, const dim3& cluster, const void* kernel, std::size_t call_size);

}  // namespace emulator
