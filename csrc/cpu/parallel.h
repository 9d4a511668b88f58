// A loop that runs on several threads.
#pragma once

#include <cstdint>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ddpm_fast::DDPM_FAST_ISA {

// Runs body(i) for i in [0, count) on up to `threads` threads. A thread gets at least `grain` items, because waking it
// costs time. The calling thread throws std::bad_alloc if any thread ran out of memory: an exception that left the
// parallel region would end the process.
template <class Body>
inline void parallel_for(std::int64_t count, [[maybe_unused]] std::int64_t grain, [[maybe_unused]] int threads,
                         Body body) {
#ifdef _OPENMP
  const std::int64_t useful = count / (grain < 1 ? 1 : grain);
  if (threads > useful) threads = static_cast<int>(useful);
  if (threads > 1) {
    bool no_memory = false;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t i = 0; i < count; ++i) {
      try {
        body(i);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        no_memory = true;
      }
    }
    if (no_memory) throw std::bad_alloc();
    return;
  }
#endif
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
