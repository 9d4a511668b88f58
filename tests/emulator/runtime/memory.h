// Memory that a kernel may touch: global memory with fences around each buffer, shared
// memory, the thread's own stack. Everything else is not memory that a kernel may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "report.h"

namespace emulator {

struct Block;

// The state of a byte: a set of these.
enum ByteState : std::uint8_t {
  kInside = 1,       // part of a buffer or variable
  kInitialised = 2,  // a thread has written it
  kWritten = 4,      // a kernel has
};

// True if accesses are announced: not in a build with AddressSanitizer.
extern const bool kStatesAreKept;

constexpr unsigned char kPoison = 0xFF;  // what memory holds before it is written: NaN in every floating type

// A new buffer in global memory, at an address that is `phase` modulo 512. Its name is for reports.
void* allocate_global(std::size_t size, std::size_t phase, std::string name);
void free_all_global();
const std::uint8_t* states(const void* global);  // states of the buffer's bytes, from there on
void set_initialised(void* global, std::size_t size);

// An access by the thread that runs.
void check_access(Address address, std::size_t size, bool write, Address pc);

// "x_0 (120 bytes), byte 4": of the owner's shared memory, or of global memory where it is null.
std::string describe(const Block* owner, std::size_t offset);

}  // namespace emulator
