// This module as a file: which code and data belong to it, and the names of its kernels and __shared__ variables.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "report.h"

namespace emulator {

struct SharedVariable {
  std::size_t offset, size;  // in the module's shared memory
  std::string name;
  bool dynamic;  // `extern __shared__`: as large as the launch says
};

struct Image {
  std::string path;
  Address base;        // what an address in the file is relative to
  Address begin, end;  // the loaded module
  std::size_t shared_size;
  std::vector<SharedVariable> shared;
};

const Image& image();
char* shared_memory();  // belongs to the operating system's thread that runs
std::string function_name(const void* function);

}  // namespace emulator
