// DDPM_FAST_FN marks a function that both the CPU and the CUDA sources use.
//
// It is forced inline because CPU sources are compiled once per instruction set: an out-of-line copy would be shared
// between the sets by the linker, and a processor without AVX-512 could then run AVX-512 code.
#pragma once

#ifdef __CUDACC__
#define DDPM_FAST_FN static __host__ __device__ __forceinline__
#else
#define DDPM_FAST_FN static inline __attribute__((always_inline))
#endif
