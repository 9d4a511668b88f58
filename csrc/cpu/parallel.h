// Threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ddpm_fast::DDPM_FAST_ISA {

// Runs body(i) for i in [0, count) on up to `threads` threads. A thread is worth waking for `grain` items or more.
template <class Body>
inline void parallel_for(std::int64_t count, std::int64_t grain, int threads, Body body) {
#ifdef _OPENMP
  const std::int64_t useful = count / (grain < 1 ? 1 : grain);
  if (threads > useful) threads = static_cast<int>(useful);
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
