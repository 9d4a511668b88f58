// What crosses from the bindings to the kernels: one struct per op, filled by position in csrc/bindings.cpp.
//
// A big tensor is dense, logically [n, c, hw]; channels_last: in memory [n, hw, c]. An absent tensor is a null pointer.
#pragma once

#include <cstdint>

namespace ddpm_fast {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Streams of the noise, as in ddpm_fast/reference.py.
constexpr std::uint32_t kStreamQSample = 0xFFFFFFFE;
constexpr std::uint32_t kStreamSeeds = 0xFFFFFFFD;

struct Shape {
  std::int64_t n, c, hw;
  bool channels_last;
};

struct NoiseArgs {
  DType dtype;
  void* out;
  const std::int64_t* seeds;  // [n]
  std::uint32_t stream;
  Shape shape;
  int threads;
};

}  // namespace ddpm_fast
