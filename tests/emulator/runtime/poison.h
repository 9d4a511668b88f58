// Tells AddressSanitizer, in a build with it, which bytes nobody may touch.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

#ifdef __SANITIZE_ADDRESS__
inline void forbid(const void* bytes, std::size_t size) { __asan_poison_memory_region(bytes, size); }
inline void allow(const void* bytes, std::size_t size) { __asan_unpoison_memory_region(bytes, size); }
#else
inline void forbid(const void*, std::size_t) {}
inline void allow(const void*, std::size_t) {}
#endif

}  // namespace emulator
