// The CUDA that g++ does not know, in front of an unmodified .cu file: the words of the language, the built-in
// variables and functions, and the part of the runtime API that csrc/cuda uses. Stands in for the toolkit's header of
// the same name; what it declares is defined under runtime/.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- The language

#define __global__ __attribute__((noinline))  // never merged into the code that launches it
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// A block's shared memory is the thread-local storage of this module: one block of bytes, which the scheduler exchanges
// when another block's turn comes (runtime/shared_memory.cpp).
#define __shared__ thread_local

// One no-op in front of the kernel for each thread that it allows: a launch counts them (runtime/cudart.cpp). The zeros make
// g++ 12 evaluate a name.
#define __launch_bounds__(threads, ...) __attribute__((patchable_function_entry(0 + (threads), 0 + (threads))))

// ---- Vector types

#define EMULATOR_VECTORS(T, name, align1, align2, align4)            \
  struct alignas(align1) name##1 { T x; };                           \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 1, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 1, 2, 4)
EMULATOR_VECTORS(short, short, 2, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 2, 4, 8)
EMULATOR_VECTORS(int, int, 4, 8, 16)
EMULATOR_VECTORS(unsigned int, uint, 4, 8, 16)
EMULATOR_VECTORS(long long, longlong, 8, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
EMULATOR_VECTORS(float, float, 4, 8, 16)
EMULATOR_VECTORS(double, double, 8, 16, 16)
#undef EMULATOR_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Built-in variables and functions

#ifdef EMULATOR_RUNTIME  // which sets them
extern uint3 threadIdx, blockIdx, blockDim, gridDim;
#else
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
#endif
constexpr int warpSize = 32;

namespace emulator {

struct Source {
  const char* file;
  int line;
};
// The place where a built-in function was called: two defaulted parameters, and the argument made of them.
#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATOR_SOURCE (::emulator::Source{file, line})

enum class WarpOp { kSync, kShuffleXor };

// Which of the bugs that a test has planted in the sources is there (tests/emulator/test_emulator.py); 0: none.
extern int planted;

void block_barrier(Source);
std::uint64_t warp_op(WarpOp, unsigned mask, std::uint64_t value, int argument, Source);
void cluster_arrive(Source, bool release);  // release: what was written before is seen by who has waited
void cluster_wait(Source);
void* map_to_rank(const void* shared, unsigned rank, Source);
// A copy that the compiler would expand without calling the checks (see memcpy below).
void check_read(const void*, std::size_t);
void check_write(void*, std::size_t);

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int argument, Source source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = warp_op(op, mask, bits, argument, source);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

inline void __syncthreads(EMULATOR_HERE) { emulator::block_barrier(EMULATOR_SOURCE); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, EMULATOR_HERE) {
  emulator::warp_op(emulator::WarpOp::kSync, mask, 0, 0, EMULATOR_SOURCE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATOR_HERE) {
  return emulator::shuffle(emulator::WarpOp::kShuffleXor, mask, value, lanes, EMULATOR_SOURCE);
}

inline float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
#define EMULATOR_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

#ifndef EMULATOR_RUNTIME
// g++ expands a memcpy of a known size in place, without the calls that check memory. Up to 16 bytes it becomes plain
// loads and stores, which are checked.
inline __attribute__((always_inline)) void* emulator_memcpy(void* to, const void* from, std::size_t size) {
  if (!(__builtin_constant_p(size) && size <= 16)) {
    emulator::check_read(from, size);
    emulator::check_write(to, size);
  }
  return __builtin_memcpy(to, from, size);
}
inline __attribute__((always_inline)) void* emulator_memset(void* to, int value, std::size_t size) {
  emulator::check_write(to, size);
  return __builtin_memset(to, value, size);
}
namespace std {
using ::emulator_memcpy;
using ::emulator_memset;
}  // namespace std
#define memcpy emulator_memcpy
#define memset emulator_memset
#endif

// ---- The runtime API

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaFuncAttributes {};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

#define CUDART_VERSION 12000  // the oldest toolkit that compiles the kernels
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

namespace emulator {

// A kernel with its arguments. Every emulated thread calls its own copy, as every CUDA thread has its parameters.
template <class... P>
struct Call {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters are copied as bytes");
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void run(const void* self) {
    const auto* call = static_cast<const Call*>(self);
    std::apply(call->kernel, call->arguments);
  }
};
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, void (*run)(const void* call), const void* call,
                   std::size_t call_size);

}  // namespace emulator

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const emulator::Call<P...> call{kernel, {static_cast<P>(std::forward<A>(arguments))...}};
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel), &call.run, &call, sizeof call);
}
