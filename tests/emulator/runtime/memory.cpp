#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "image.h"
#include "machine.h"
#include "poison.h"

namespace emulator {
namespace {

// Address space, not memory: the system gives a page when it is first touched.
constexpr std::size_t kGlobalSize = std::size_t{1} << 30;
constexpr std::size_t kFence = std::size_t{1} << 20;  // before and after each buffer
constexpr std::size_t kPhases = 512;                  // the alignment that cudaMalloc gives

struct Buffer {
  std::size_t offset, size;
  std::string name;
};

class GlobalMemory {
 public:
  char* bytes = reserve();
  std::uint8_t* state = reinterpret_cast<std::uint8_t*>(reserve());
  CellMap cells{kGlobalSize};
  std::vector<Buffer> buffers;
  std::size_t used = kFence;

 private:
  static char* reserve() {
    void* memory =
        mmap(nullptr, kGlobalSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }
};

GlobalMemory& global() {
  static GlobalMemory memory;
  static const bool fenced = (forbid(memory.bytes, kGlobalSize), true);
  static_cast<void>(fenced);
  return memory;
}

std::size_t global_offset(Address address) { return address - reinterpret_cast<Address>(global().bytes); }

// The place of an address: null `state`, if it is in no memory that has one.
struct Place {
  std::uint8_t* state;
  CellMap* cells;
  std::size_t offset;
  Block* owner;
};

Place place_of(Address address) {
  if (const std::size_t offset = global_offset(address); offset < kGlobalSize) {
    return {global().state + offset, &global().cells, offset, nullptr};
  }
  const std::size_t shared_size = image().shared_size;
  for (Block& block : machine.blocks) {
    const char* bytes = &block == machine.resident ? shared_memory() : block.shared.aside.data();
    if (const std::size_t offset = address - reinterpret_cast<Address>(bytes); offset < shared_size) {
      return {block.shared.state.data() + offset, &block.shared.cells, offset, &block};
    }
  }
  return {};
}

void check_other_memory(Address address, std::size_t size, bool write, Address pc) {
  const char* verb = write ? "write" : "read";
  // If this function's own variables are below the stack, the kernel's are too.
  if (reinterpret_cast<Address>(&size) < reinterpret_cast<Address>(machine.current->fiber.stack)) {
    fail("stack", pc, "local variables need more than the %zu bytes of an emulated thread", kStackSize);
  }
  const bool constant = !write && address >= image().begin && address < image().end;
  if (constant) return;  // tables of constants are compiled into the module
  for (Block& block : machine.blocks) {
    for (Thread& thread : block.threads) {
      if (address - reinterpret_cast<Address>(thread.fiber.stack) < kStackSize) {
        fail("local memory", pc, "%s of a local variable of another thread, %s", verb, to_string(thread).c_str());
      }
    }
  }
  fail("illegal address", pc, "%s of %zu bytes at %p: a null, host or wild pointer", verb, size,
       reinterpret_cast<void*>(address));
}

// The rules of distributed shared memory, whatever the interleaving that happened.
void check_peer(Block& peer, bool write, Address pc) {
  Thread& thread = *machine.current;
  const char* verb = write ? "write to" : "read of";
  if (peer.live == 0) {
    fail("cluster", pc, "%s the shared memory of rank %u, which has exited", verb, peer.rank);
  }
  if (thread.cluster_waits == 0) {
    report("cluster", pc, "%s the shared memory of rank %u before the first cluster barrier: it may not have started",
           verb, peer.rank);
  }
  thread.touched_peer = true;
  peer.needed_until =
      std::max<std::uint16_t>(peer.needed_until, static_cast<std::uint16_t>(thread.cluster_arrivals + 1));
}

}  // namespace

#ifdef __SANITIZE_ADDRESS__
const bool kStatesAreKept = false;
#else
const bool kStatesAreKept = true;
#endif

void* allocate_global(std::size_t size, std::size_t phase, std::string name) {
  GlobalMemory& memory = global();
  const std::size_t offset = (memory.used + kPhases - 1) / kPhases * kPhases + phase % kPhases;
  if (offset + size + kFence > kGlobalSize) throw std::bad_alloc();
  memory.used = offset + size + kFence;
  memory.buffers.push_back({offset, size, std::move(name)});
  allow(memory.bytes + offset, size);
  std::memset(memory.bytes + offset, kPoison, size);
  std::memset(memory.state + offset, kInside, size);
  return memory.bytes + offset;
}

void free_all_global() {
  GlobalMemory& memory = global();
  for (const Buffer& buffer : memory.buffers) forbid(memory.bytes + buffer.offset, buffer.size);
  madvise(memory.state, memory.used, MADV_DONTNEED);  // which makes it zeros: outside everything
  memory.cells.forget(memory.used);
  memory.buffers.clear();
  memory.used = kFence;
}

const std::uint8_t* states(const void* bytes) {
  return global().state + global_offset(reinterpret_cast<Address>(bytes));
}

void set_initialised(void* bytes, std::size_t size) {
  std::memset(global().state + global_offset(reinterpret_cast<Address>(bytes)), kInside | kInitialised, size);
}

void check_access(Address address, std::size_t size, bool write, Address pc) {
  Thread& thread = *machine.current;
  ++machine.accesses;
  maybe_preempt();
  if (address - reinterpret_cast<Address>(thread.fiber.stack) < kStackSize) return;  // a variable of its own
  const Place place = place_of(address);
  if (!place.state) return check_other_memory(address, size, write, pc);
  if (place.owner && place.owner != thread.block) check_peer(*place.owner, write, pc);
  const char* verb = write ? "write" : "read";
  for (std::size_t i = 0; i < size; ++i) {
    std::uint8_t& state = place.state[i];
    if (!(state & kInside)) {
      report("out of bounds", pc, "%s of %zu bytes reaches %s", verb, size,
             describe(place.owner, place.offset + i).c_str());
      return;
    }
    if (write) {
      state |= kInitialised | kWritten;
    } else if (!(state & kInitialised)) {
      report("uninitialised", pc, "read of %s, which nobody has written",
             describe(place.owner, place.offset + i).c_str());
      state |= kInitialised;  // once is enough
    }
  }
  check_race(*place.cells, place.offset, size, write, place.owner, pc);
}

std::string describe(const Block* owner, std::size_t offset) {
  // The variable that the offset lies in, else the one whose end it is nearest behind, else the one it is before.
  std::string name, variable;
  std::size_t begin = 0, size = 0, distance = ~std::size_t{0};
  const auto consider = [&](std::size_t from, std::size_t bytes, const std::string& called) {
    const std::size_t away = offset < from ? from - offset : offset >= from + bytes ? offset - from - bytes + 1 : 0;
    if (away >= distance) return;
    distance = away, begin = from, size = bytes, variable = called;
  };
  if (!owner) {
    for (const auto& buffer : global().buffers) consider(buffer.offset, buffer.size, buffer.name);
  } else {
    name = machine.current && owner == machine.current->block ? "shared "
                                                              : "rank " + std::to_string(owner->rank) + "'s shared ";
    for (const auto& shared : image().shared) {
      consider(shared.offset, shared.dynamic ? machine.dynamic_shared : shared.size, shared.name);
    }
  }
  const auto byte = static_cast<std::int64_t>(offset) - static_cast<std::int64_t>(begin);
  return name + variable + " (" + std::to_string(size) + " bytes), byte " + std::to_string(byte);
}

}  // namespace emulator
