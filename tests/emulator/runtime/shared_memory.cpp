#include "shared_memory.h"

#include <cstring>

#include "image.h"
#include "machine.h"
#include "memory.h"
#include "poison.h"

namespace emulator {
namespace {

std::size_t size_now(const SharedVariable& variable) {
  return variable.dynamic ? machine.dynamic_shared : variable.size;
}

// AddressSanitizer puts no fences around thread-local variables. We put them there: build.py leaves space behind each variable.
void fence_variables(char* bytes) {
  forbid(bytes, image().shared_size);
  for (const auto& variable : image().shared) allow(bytes + variable.offset, size_now(variable));
}

void copy_variables(char* to, const char* from) {
  for (const auto& variable : image().shared)
    std::memcpy(to + variable.offset, from + variable.offset, size_now(variable));
}

}  // namespace

void reset_shared_memory(Block& block) {
  SharedMemory& shared = block.shared;
  const std::size_t size = image().shared_size;
  if (shared.state.empty()) {
    shared.aside.resize(size);
    shared.state.resize(size);
    shared.cells = CellMap(size);
  }
  fence_variables(shared.aside.data());
  for (const auto& variable : image().shared) {
    std::memset(shared.aside.data() + variable.offset, kPoison, size_now(variable));
    std::memset(shared.state.data() + variable.offset, 0, variable.size);
    std::memset(shared.state.data() + variable.offset, kInside, size_now(variable));
  }
}

void make_resident(Block& block) {
  if (machine.resident == &block) return;
  if (machine.resident) {
    copy_variables(machine.resident->shared.aside.data(), shared_memory());
  } else {
    fence_variables(shared_memory());
  }
  copy_variables(shared_memory(), block.shared.aside.data());
  machine.resident = &block;
}

}  // namespace emulator
