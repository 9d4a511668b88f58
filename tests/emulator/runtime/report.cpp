#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>

#include "image.h"
#include "machine.h"

namespace emulator {
namespace {

constexpr std::size_t kEnough = 8;

std::vector<Report> found;
std::set<std::string> known;  // kinds and places, so that a bug is reported once and not by every thread
std::map<Address, std::string> known_places;

std::string file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string key(const char* kind, const std::string& place) { return std::string(kind) + ": " + place; }

void add(const char* kind, Address pc, const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  if (!known.insert(key(kind, pc ? std::to_string(pc) : text)).second) return;
  std::string message = std::string(kind) + ": " + text;
  if (pc) message += ", at " + to_string(pc);
  if (!machine.kernel.empty()) message += " [" + machine.kernel;
  if (machine.current) message += ", " + to_string(*machine.current);
  if (!machine.kernel.empty()) message += "]";
  found.push_back({kind, message});
}

}  // namespace

void report(const char* kind, Address pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (!is_known(kind, pc)) add(kind, pc, format, arguments);
  va_end(arguments);
}

void fail(const char* kind, Address pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add(kind, pc, format, arguments);
  va_end(arguments);
  machine.abandoned = true;
  if (machine.current) leave(machine.current->fiber);
}

bool is_known(const char* kind, Address pc) {
  return found.size() >= kEnough || (pc && known.count(key(kind, std::to_string(pc))));
}

const std::vector<Report>& reports() { return found; }

void clear_reports() {
  found.clear();
  known.clear();
}

std::string to_string(Source source) { return file_name(source.file) + ":" + std::to_string(source.line); }

// Asks addr2line, which comes with g++. The pc is relative to the module's base and points behind a call.
std::string to_string(Address pc) {
  std::string& places = known_places[pc];
  if (!places.empty()) return places;
  char command[1024], line[512];
  std::snprintf(command, sizeof command, "addr2line --inlines --exe='%s' 0x%lx 2>/dev/null", image().path.c_str(),
                static_cast<unsigned long>(pc - 1));
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, " \n")] = 0;  // a discriminator may follow
      const std::string place = file_name(line);
      if (place.rfind("cuda_runtime.h", 0) == 0 || place.rfind("intrinsics.h", 0) == 0) continue;
      places += (places.empty() ? "" : " in ") + place;
    }
    pclose(pipe);
  }
  if (places.empty()) places = "an unknown place";
  return places;
}

}  // namespace emulator
