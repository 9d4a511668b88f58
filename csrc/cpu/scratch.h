// Memory to work in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

using Index = std::int64_t;

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }
constexpr Index round_up(Index value, Index unit) { return (value + unit - 1) / unit * unit; }

// Room that a thread keeps from call to call where it is small (fresh pages would cost more than the kernel), handed
// out in pieces: one for a call, of its calling thread, and one for a slice.
enum class RoomFor { kCall, kSlice };

class Room {
 public:
  Room(RoomFor use, Index bytes) : kept_(rooms()[static_cast<int>(use)]) {
    if (kept_.bytes < bytes) {
      kept_.release();
      kept_.start = static_cast<char*>(std::aligned_alloc(kVectorSize, round_up(bytes, kVectorSize)));
      if (kept_.start == nullptr) throw std::bad_alloc();
      kept_.bytes = bytes;
    }
    next_ = kept_.start;
  }
  ~Room() {
    if (kept_.bytes > kMostKept) kept_.release();
  }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  // `count` values, and up to a whole vector.
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
  static Kept* rooms() {
    static thread_local Kept kept[2];
    return kept;
  }

  Kept& kept_;
  char* next_;
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
