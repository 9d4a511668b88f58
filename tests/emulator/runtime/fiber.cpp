#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "poison.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call has to preserve (System V ABI, x86-64) on the stack that runs, and goes on with another one: some
// 8 ns, where swapcontext makes two system calls.
extern "C" void emulator_switch_stack(void** save, void* resume);
asm(R"(
.text
.hidden emulator_switch_stack
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");

namespace emulator {
namespace {

void* scheduler_stack_pointer;
constexpr std::uint64_t kCanary = 0x0DDBA11C0FFEE123;

std::uint64_t* canary(const Fiber& fiber) { return reinterpret_cast<std::uint64_t*>(fiber.stack); }

// AddressSanitizer wants to hear of every change of stacks; elsewhere these are nothing.
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
std::size_t scheduler_stack_size;
void* scheduler_fake_stack;
void announce_fiber(const Fiber& fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackSize);
}
void announce_scheduler(void** fake_stack) {
  __sanitizer_start_switch_fiber(fake_stack, scheduler_stack, scheduler_stack_size);
}
void arrived_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void arrived_in_fiber(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_size);
}
#else
void announce_fiber(const Fiber&) {}
void announce_scheduler(void**) {}
void arrived_in_scheduler() {}
void arrived_in_fiber(void*) {}
#endif

void (*entry_of_fibers)();

void start() {
  arrived_in_fiber(nullptr);
  entry_of_fibers();
  std::abort();
}

}  // namespace

char* allocate_stacks(std::size_t count) {
  // One more, below the first: what overflows it ends there.
  void* memory = mmap(nullptr, (count + 1) * kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory) + kStackSize;
}

void prepare(Fiber& fiber, void (*entry)()) {
  allow(fiber.stack, kStackSize);  // a launch that was abandoned has left frames here
  entry_of_fibers = entry;
  *canary(fiber) = kCanary;
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackSize - 64);
  *--top = nullptr;  // start's return address, which also aligns the stack as after a call
  *--top = reinterpret_cast<void*>(&start);
  for (int saved_registers = 0; saved_registers < 6; ++saved_registers) *--top = nullptr;
  fiber.stack_pointer = top;
}

void enter(Fiber& fiber) {
  announce_fiber(fiber);
  emulator_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
  arrived_in_scheduler();
}

void suspend(Fiber& fiber) {
  void* fake_stack = nullptr;
  announce_scheduler(&fake_stack);
  emulator_switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
  arrived_in_fiber(fake_stack);
}

void leave(Fiber& fiber) {
  announce_scheduler(nullptr);
  emulator_switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
  std::abort();
}

bool overflowed(const Fiber& fiber) { return *canary(fiber) != kCanary; }

}  // namespace emulator
