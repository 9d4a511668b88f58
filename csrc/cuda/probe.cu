// Check that the kernels of this library can run on the current device.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace ddpm_fast::cuda {

namespace {

__global__ void probe_kernel() {}

}  // namespace

std::array<int, 2> versions() {
  int driver = 0;
  (void)cudaDriverGetVersion(&driver);
  return {driver, CUDART_VERSION};
}

// Asks for a kernel's attributes: that needs a driver that is new enough, and machine code for the card.
std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) return "";
  (void)cudaGetLastError();  // asked and answered: not for the next call to find
  return cudaGetErrorString(status);
}

}  // namespace ddpm_fast::cuda
