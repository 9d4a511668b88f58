// Shared memory: one block's bytes are in the module's thread-local storage, where its __shared__ variables live; those
// of the others in its cluster are kept aside. A pointer to a peer's variable points into what is kept aside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "races.h"

namespace emulator {

struct Block;

struct SharedMemory {
  std::vector<char> aside;          // the contents, while another block is resident
  std::vector<std::uint8_t> state;  // for each byte (memory.h)
  CellMap cells;                    // for each pair of bytes (races.h)
};

// Fresh memory for a block that starts: NaN everywhere, nothing written yet.
void reset_shared_memory(Block&);
// Puts the block's contents where the __shared__ variables are, and those of the block before it aside.
void make_resident(Block&);

}  // namespace emulator
