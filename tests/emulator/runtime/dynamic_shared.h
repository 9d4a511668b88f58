// The thread-local variables that build.py puts around the kernels' own. Every `extern __shared__` array is an alias of
// one more, as large as a block may have.
#pragma once

#include <cstddef>

constexpr std::size_t kDynamicSharedBytes = 232448;  // build.py says the same

extern "C" {
extern thread_local char emulator_shared_begin[];
extern thread_local char emulator_shared_end[];
}
