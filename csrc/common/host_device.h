// DDPM_FAST_FN marks a function that both the CPU and the CUDA sources use.
//
// It is always inlined. CPU sources are compiled once per instruction set, and the linker would keep one out-of-line
// copy for all sets: a processor without AVX-512 could run AVX-512 code.
#pragma once

#ifdef __CUDACC__
#define DDPM_FAST_FN static __host__ __device__ __forceinline__
#else
#define DDPM_FAST_FN static inline __attribute__((always_inline))
#endif
