// Finds two accesses to the same bytes, at least one a write, that nothing orders: from the order relations, not from
// the interleaving that happened, so a race is found even where the threads ran one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "report.h"

namespace emulator {

struct Block;
struct Thread;

struct Access {
  std::uint32_t launch;  // 0: no access
  std::uint32_t block, pc;
  std::uint16_t thread;
  std::uint16_t epoch, cluster_arrivals, warp_clock;  // the thread's, and its block's, when it happened
  std::uint8_t bytes;                                 // which of the cell's
};

// The record of two bytes: pairs, because a race between the halves of a 4-byte word is one too.
struct Cell {
  static constexpr std::size_t kBytes = 2;
  Access write, reads[2];
};

// Cells for `bytes` bytes of memory, from the system when they are first touched.
class CellMap {
 public:
  CellMap() = default;
  explicit CellMap(std::size_t bytes);
  CellMap(CellMap&&) noexcept;
  CellMap& operator=(CellMap&&) noexcept;
  ~CellMap();
  Cell& operator[](std::size_t index) { return cells_[index]; }
  void forget(std::size_t bytes);  // about the first `bytes` bytes of memory

 private:
  Cell* cells_ = nullptr;
  std::size_t size_ = 0;
};

// An access by the thread that runs, `owner`: whose shared memory it is, null for global memory. The first conflict
// found is reported.
void check_race(CellMap&, std::size_t offset, std::size_t size, bool write, const Block* owner, Address pc);

}  // namespace emulator
