// Scratch buffers.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/index.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// A thread has one buffer for a call, and one for a slice of the work.
enum class ScratchUse { kCall, kSlice };

// A scratch buffer of one thread, handed out in pieces. A small buffer is reused by later calls, because new pages
// would take longer than the kernel.
class Scratch {
 public:
  Scratch(ScratchUse use, Index bytes) : kept_(buffers()[static_cast<int>(use)]) {
    if (kept_.bytes < bytes) {
      kept_.release();
      kept_.start = static_cast<char*>(std::aligned_alloc(kVectorSize, round_up(bytes, kVectorSize)));
      if (kept_.start == nullptr) throw std::bad_alloc();
      kept_.bytes = bytes;
    }
    next_ = kept_.start;
  }
  ~Scratch() {
    if (kept_.bytes > kMostKept) kept_.release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Returns the next piece. It holds `count` values, rounded up to whole vectors.
  template <class Real>
  Real* take(Index count) {
    Real* piece = reinterpret_cast<Real*>(next_);
    next_ += bytes<Real>(count);
    return piece;
  }
  template <class Real>
  static constexpr Index bytes(Index count) {
    return round_up(count * static_cast<Index>(sizeof(Real)), kVectorSize);
  }

 private:
  static constexpr Index kMostKept = 32 << 20;

  struct Kept {
    char* start = nullptr;
    Index bytes = 0;
    void release() {
      std::free(start);
      start = nullptr;
      bytes = 0;
    }
    ~Kept() { release(); }
  };
  static Kept* buffers() {
    static thread_local Kept kept[2];
    return kept;
  }

  Kept& kept_;
  char* next_;
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
