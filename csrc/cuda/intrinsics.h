// Instructions that C++ has no word for: approximations, conversions of pairs of half-precision numbers, clusters.
//
// The only file with inline assembly and with conditions on the architecture. tests/emulator/include/cuda/intrinsics.h
// says the same in C++, for running the kernels on a CPU: a function added here is added there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DDPM_FAST_DEVICE static __device__ __forceinline__

namespace ddpm_fast::cuda {

// ------------------------------------------------------------------------------------------------- approximations
// Within 2 units in the last place; subnormal arguments and results are 0.

DDPM_FAST_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DDPM_FAST_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DDPM_FAST_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x between -limit and limit; NaN stays NaN.
DDPM_FAST_DEVICE float clip(float x, float limit) {
  float y;
  asm("{ .reg .f32 below; min.NaN.f32 below, %1, %2; max.NaN.f32 %0, below, %3; }"
      : "=f"(y)
      : "f"(x), "f"(limit), "f"(-limit));
  return y;
}

// ---------------------------------------------------------------------------------------------- two floats at once
// Cards of compute capability 10 have instructions for two numbers in neighbouring registers.

struct Two {
  float low, high;
  Two() = default;
  __device__ Two(float both) : low(both), high(both) {}
  __device__ Two(float low, float high) : low(low), high(high) {}
};

DDPM_FAST_DEVICE Two fma(Two a, Two b, Two c) {
  Two result;
#if __CUDA_ARCH__ >= 1000
  asm("{ .reg .b64 a, b, c; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mov.b64 c, {%6, %7};\n"
      "fma.rn.f32x2 a, a, b, c; mov.b64 {%0, %1}, a; }"
      : "=f"(result.low), "=f"(result.high)
      : "f"(a.low), "f"(a.high), "f"(b.low), "f"(b.high), "f"(c.low), "f"(c.high));
#else
  result = {fmaf(a.low, b.low, c.low), fmaf(a.high, b.high, c.high)};
#endif
  return result;
}

DDPM_FAST_DEVICE Two operator*(Two a, Two b) {
  Two result;
#if __CUDA_ARCH__ >= 1000
  asm("{ .reg .b64 a, b; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5};\n"
      "mul.rn.f32x2 a, a, b; mov.b64 {%0, %1}, a; }"
      : "=f"(result.low), "=f"(result.high)
      : "f"(a.low), "f"(a.high), "f"(b.low), "f"(b.high));
#else
  result = {a.low * b.low, a.high * b.high};
#endif
  return result;
}

DDPM_FAST_DEVICE Two operator-(Two a, Two b) {
  Two result;
#if __CUDA_ARCH__ >= 1000
  asm("{ .reg .b64 a, b; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5};\n"
      "add.rn.f32x2 a, a, b; mov.b64 {%0, %1}, a; }"
      : "=f"(result.low), "=f"(result.high)
      : "f"(a.low), "f"(a.high), "f"(-b.low), "f"(-b.high));
#else
  result = {a.low - b.low, a.high - b.high};
#endif
  return result;
}

// Minus the square root of -x, correctly rounded, where x is 0 or a number from -2^120 to -2^-70. These are the
// instructions that sqrtf compiles to for such numbers, less its question whether the argument is one of them.
DDPM_FAST_DEVICE Two minus_square_root(Two x) {
  const Two nonzero = x - 0x1p-100f;  // for a finite reciprocal of 0; the others do not change
  const Two reciprocal = {rsqrt_approx(-nonzero.low), rsqrt_approx(-nonzero.high)};
  const Two root = x * reciprocal;
  return fma(fma(root, root, x), reciprocal * 0.5f, root);
}

// ----------------------------------------------------------------------------------------------- half precision
// A word holds two numbers, the one at the lower address in its low half. Narrowing rounds to nearest, ties to even.

DDPM_FAST_DEVICE std::uint32_t pack_bfloat16(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DDPM_FAST_DEVICE void unpack_bfloat16(std::uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xFFFF0000u);
}

DDPM_FAST_DEVICE std::uint32_t pack_float16(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DDPM_FAST_DEVICE void unpack_float16(std::uint32_t word, float& low, float& high) {
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

// ------------------------------------------------------------------------------------------------------- integers

// Multiply in one instruction, which a C++ product of 64-bit numbers is not always.
DDPM_FAST_DEVICE void multiply_wide(std::uint32_t a, std::uint32_t b, std::uint32_t& low, std::uint32_t& high) {
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
}

// `word` with its lowest byte replaced by byte i of `bytes`.
DDPM_FAST_DEVICE std::uint32_t with_low_byte(std::uint32_t word, std::uint32_t bytes, int i) {
  return __byte_perm(word, bytes, 0x3214 + i);
}

// ------------------------------------------------------------------------------------------------------ clusters
// A launch without a cluster, and every launch before compute capability 9.0, is a cluster of one block.

// All threads of all blocks of the cluster meet; what they wrote before is seen after.
DDPM_FAST_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Its halves, for a meeting that no memory depends on: whoever has waited knows that the other blocks have started.
DDPM_FAST_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DDPM_FAST_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The same shared variable in another block of the cluster. That block must have started, and must not have ended.
template <class T>
DDPM_FAST_DEVICE T* in_block(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  std::uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<std::uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return shared;
#endif
}

}  // namespace ddpm_fast::cuda
