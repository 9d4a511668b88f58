#include "races.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

constexpr std::size_t cells_for(std::size_t bytes) { return bytes / Cell::kBytes + 1; }

// Returns whether the earlier access happened before anything that `now` does from here on.
bool ordered(const Access& earlier, const Thread& now, bool shared) {
  const Block& block = *now.block;
  if (earlier.launch != machine.launch_number) return true;
  // Nothing orders two clusters, but then each has shared memory of its own.
  if (earlier.block - machine.blocks.front().number >= machine.blocks.size()) return shared;
  if (earlier.cluster_arrivals < now.cluster_seen) return true;  // it arrived after that; `now` knows
  if (earlier.block != block.number) return false;
  if (earlier.thread == now.number || earlier.epoch != block.epoch) return true;  // itself; a __syncthreads between
  if (earlier.thread / kWarpSize != now.number / kWarpSize) return false;
  return now.warp_clock[earlier.thread % kWarpSize] > earlier.warp_clock;  // a __syncwarp between
}

bool same_moment(const Access& a, const Access& b) {
  return a.launch == b.launch && a.block == b.block && a.thread == b.thread && a.epoch == b.epoch &&
         a.cluster_arrivals == b.cluster_arrivals && a.warp_clock == b.warp_clock;
}

void remember(Access& slot, Access access) {
  if (same_moment(slot, access)) access.bytes |= slot.bytes;
  slot = access;
}

}  // namespace

CellMap::CellMap(std::size_t bytes) : size_(cells_for(bytes) * sizeof(Cell)) {
  void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  cells_ = static_cast<Cell*>(memory);
}
CellMap::CellMap(CellMap&& other) noexcept { *this = std::move(other); }
CellMap& CellMap::operator=(CellMap&& other) noexcept {
  std::swap(cells_, other.cells_);
  std::swap(size_, other.size_);
  return *this;
}
CellMap::~CellMap() {
  if (cells_) munmap(cells_, size_);
}
void CellMap::forget(std::size_t bytes) {
  madvise(cells_, std::min(size_, cells_for(bytes) * sizeof(Cell)), MADV_DONTNEED);
}

void check_race(CellMap& cells, std::size_t offset, std::size_t size, bool write, const Block* owner, Address pc) {
  const Thread& now = *machine.current;
  Access access{machine.launch_number,
                now.block->number,
                static_cast<std::uint32_t>(pc),
                static_cast<std::uint16_t>(now.number),
                now.block->epoch,
                now.cluster_arrivals,
                now.warp_clock[now.lane()],
                0};
  bool reported = is_known("race", pc);
  const std::size_t end = offset + size;
  for (std::size_t cell_begin = offset / Cell::kBytes * Cell::kBytes; cell_begin < end; cell_begin += Cell::kBytes) {
    Cell& cell = cells[cell_begin / Cell::kBytes];
    access.bytes = 0;
    for (std::size_t i = 0; i < Cell::kBytes; ++i) {
      if (cell_begin + i >= offset && cell_begin + i < end) access.bytes |= static_cast<std::uint8_t>(1u << i);
    }
    const auto check = [&](const Access& earlier, const char* what) {
      if (reported || !(earlier.bytes & access.bytes) || ordered(earlier, now, owner)) return;
      report("race", pc, "%s of %s conflicts with a %s by %s at %s: nothing orders the two", write ? "write" : "read",
             describe(owner, std::max(cell_begin, offset)).c_str(), what,
             name_of_thread(earlier.block, earlier.thread).c_str(), to_string(Address{earlier.pc}).c_str());
      reported = true;
    };
    check(cell.write, "write");
    if (write) {
      check(cell.reads[0], "read");
      check(cell.reads[1], "read");
      remember(cell.write, access);
    } else {
      // The slot whose access matters least: its own, or one that is ordered before this.
      const Access& first = cell.reads[0];
      const bool first_is_free = same_moment(first, access) || !first.launch || ordered(first, now, owner);
      remember(cell.reads[first_is_free ? 0 : 1], access);
    }
  }
}

}  // namespace emulator
