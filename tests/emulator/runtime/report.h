// Findings of the emulator. A report has a kind, by which tests look for it, and a text for people.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Source;

struct Report {
  std::string kind, text;
};

using Address = std::uintptr_t;

// Adds a report, and says who (the thread that runs) and, for a code address `pc` that is not 0, where. The first of
// several alike is kept.
__attribute__((format(printf, 3, 4))) void report(const char* kind, Address pc, const char* format, ...);
// The same, and the launch ends here: within an emulated thread it does not return.
__attribute__((format(printf, 3, 4))) void fail(const char* kind, Address pc, const char* format, ...);

bool is_known(const char* kind, Address pc);  // whether another report would add anything

const std::vector<Report>& reports();
void clear_reports();

std::string to_string(Source);
std::string to_string(Address pc);  // file:line, with the calls that were inlined there

}  // namespace emulator
