// A fiber: a stack of its own that runs until it hands over. Every emulated thread is one.
#pragma once

#include <cstddef>

namespace emulator {

constexpr std::size_t kStackSize =
#ifdef __SANITIZE_ADDRESS__
    256 << 10;
#else
    64 << 10;
#endif

struct Fiber {
  char* stack;          // kStackSize bytes
  void* stack_pointer;  // while it does not run
};

// Memory for the stacks of `count` fibers, one after the other; taken from the system when it is first touched.
char* allocate_stacks(std::size_t count);
// Makes the fiber ready to call `entry`, which must end in leave_fiber.
void prepare(Fiber&, void (*entry)());
// From the scheduler to the fiber, until it comes back by one of the two below.
void enter(Fiber&);
// From the fiber back to the scheduler. True where the stack was large enough so far.
void suspend(Fiber&);
[[noreturn]] void leave(Fiber&);
// Returns whether the fiber has ever used all of its stack.
bool overflowed(const Fiber&);

}  // namespace emulator
