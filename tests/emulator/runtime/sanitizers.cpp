// The functions that instrumented code calls: g++ -fsanitize=thread announces every load and store, and
// -fsanitize=alignment and others report what the language leaves undefined. The sanitizers' own libraries, which would
// define these, are not linked.

#include <cuda_runtime.h>

#include "image.h"
#include "machine.h"
#include "memory.h"

using namespace emulator;

namespace {

void access(const void* address, std::size_t size, bool write, void* return_address) {
  if (!machine.current || size == 0) return;  // host code
  check_access(reinterpret_cast<Address>(address), size, write,
               reinterpret_cast<Address>(return_address) - image().base);
}

}  // namespace

#define CALLER __builtin_return_address(0)

namespace emulator {

void check_read(const void* address, std::size_t size) { access(address, size, false, CALLER); }
void check_write(void* address, std::size_t size) { access(address, size, true, CALLER); }

}  // namespace emulator

extern "C" {

#define ACCESSES(size)                                                                      \
  void __tsan_read##size(void* address) { access(address, size, false, CALLER); }           \
  void __tsan_write##size(void* address) { access(address, size, true, CALLER); }           \
  void __tsan_unaligned_read##size(void* address) { access(address, size, false, CALLER); } \
  void __tsan_unaligned_write##size(void* address) { access(address, size, true, CALLER); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, std::size_t size) { access(address, size, false, CALLER); }
void __tsan_write_range(void* address, std::size_t size) { access(address, size, true, CALLER); }
// The code that launches kernels has atomics.
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
void __tsan_atomic8_store(volatile unsigned char* address, unsigned char value, int) {
  __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// ---- Undefined behaviour: each handler is given a description that begins with the place in the source.

struct Place {
  const char* file;
  std::uint32_t line, column;
};
struct Type {
  std::uint16_t kind, info;
  char name[1];
};

static std::string text(const Place& place) { return to_string(Source{place.file, static_cast<int>(place.line)}); }

void __ubsan_handle_type_mismatch_v1(void* description, void* address) {
  struct Description {
    Place place;
    const Type* type;
    unsigned char log2_alignment, kind;
  };
  const auto& what = *static_cast<Description*>(description);
  const std::size_t alignment = std::size_t{1} << what.log2_alignment;
  if (reinterpret_cast<Address>(address) % alignment != 0) {
    fail("misaligned", 0, "%s at %p, which is no multiple of %zu, at %s", what.type->name, address, alignment,
         text(what.place).c_str());
  } else {
    fail("illegal address", 0, "%s at %p, at %s", what.type->name, address, text(what.place).c_str());
  }
}

void __ubsan_handle_out_of_bounds(void* description, void* index) {
  struct Description {
    Place place;
    const Type *array, *index;
  };
  const auto& what = *static_cast<Description*>(description);
  // Not only reported: what lies behind the array may be a return address.
  fail("out of bounds", 0, "index %ld of %s, at %s", static_cast<long>(reinterpret_cast<std::intptr_t>(index)),
       what.array->name, text(what.place).c_str());
}

#define UNDEFINED(handler, how, what, ...)                                                \
  void __ubsan_handle_##handler(void* description __VA_OPT__(, ) __VA_ARGS__) {           \
    how("undefined", 0, what ", at %s", text(*static_cast<Place*>(description)).c_str()); \
  }
UNDEFINED(add_overflow, report, "signed addition overflows", void*, void*)
UNDEFINED(sub_overflow, report, "signed subtraction overflows", void*, void*)
UNDEFINED(mul_overflow, report, "signed multiplication overflows", void*, void*)
UNDEFINED(negate_overflow, report, "signed negation overflows", void*)
UNDEFINED(shift_out_of_bounds, report, "shift by a negative number or by too many bits", void*, void*)
UNDEFINED(divrem_overflow, fail, "division by zero, or one that overflows", void*, void*)

}  // extern "C"
