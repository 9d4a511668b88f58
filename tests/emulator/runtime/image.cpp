#include "image.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

#include "dynamic_shared.h"

namespace emulator {
namespace {

std::map<Address, std::string> functions;  // by address in the file

std::string demangled(const char* symbol) {
  int status;
  char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string result = name ? name : symbol;
  std::free(name);
  return result;
}

// The name without what is the same for all: return type, our namespaces, parameters.
std::string shortened(std::string name) {
  for (const char* common : {"ddpm_fast::", "(anonymous namespace)::", "void "}) {
    for (std::size_t at; (at = name.find(common)) != std::string::npos;) name.erase(at, std::strlen(common));
  }
  // A variable of a function reads f<T>(parameters)::variable.
  for (std::size_t open; (open = name.find('(')) != std::string::npos;) {
    std::size_t close = open;
    for (int depth = 0; close < name.size(); ++close) {
      depth += name[close] == '(' ? 1 : name[close] == ')' ? -1 : 0;
      if (depth == 0) break;
    }
    name.erase(open, close - open + 1);
  }
  return name;
}

std::vector<char> contents(const std::string& path) {
  std::vector<char> bytes;
  if (FILE* file = std::fopen(path.c_str(), "rb")) {
    std::fseek(file, 0, SEEK_END);
    bytes.resize(static_cast<std::size_t>(std::ftell(file)));
    std::rewind(file);
    if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) bytes.clear();
    std::fclose(file);
  }
  return bytes;
}

int find_module(dl_phdr_info* info, std::size_t, void* result) {
  Image found{};
  found.begin = ~Address{0};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const Address begin = info->dlpi_addr + segment.p_vaddr;
    found.begin = begin < found.begin ? begin : found.begin;
    found.end = begin + segment.p_memsz > found.end ? begin + segment.p_memsz : found.end;
  }
  const auto here = reinterpret_cast<Address>(&find_module);
  if (here < found.begin || here >= found.end) return 0;
  found.base = info->dlpi_addr;
  found.path = info->dlpi_name;
  *static_cast<Image*>(result) = found;
  return 1;
}

Image read_image() {
  Image image{};
  dl_iterate_phdr(find_module, &image);
  const std::vector<char> file = contents(image.path);
  if (file.empty()) throw std::runtime_error("emulator: cannot read its own file, " + image.path);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  struct ThreadLocal {
    std::size_t offset, size;
    const char* symbol;
  };
  std::vector<ThreadLocal> thread_local_symbols;
  std::size_t shared_begin = 0;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    for (std::size_t k = 0; k < sections[i].sh_size / sizeof *symbols; ++k) {
      const auto& symbol = symbols[k];
      const char* name = names + symbol.st_name;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) functions[symbol.st_value] = name;
      if (ELF64_ST_TYPE(symbol.st_info) != STT_TLS || symbol.st_shndx == SHN_UNDEF) continue;
      if (!std::strcmp(name, "emulator_shared_begin")) shared_begin = symbol.st_value;
      if (!std::strcmp(name, "emulator_shared_end")) image.shared_size = symbol.st_value;
      thread_local_symbols.push_back({symbol.st_value, symbol.st_size, name});
    }
  }
  image.shared_size -= shared_begin;
  // Only what lies between the markers is shared memory: the bindings have thread-local variables too.
  for (const auto& variable : thread_local_symbols) {
    const std::size_t offset = variable.offset - shared_begin;
    if (offset >= image.shared_size || variable.size == 0) continue;
    const bool dynamic = variable.size == kDynamicSharedBytes;
    image.shared.push_back(
        {offset, variable.size, dynamic ? "dynamic shared memory" : shortened(demangled(variable.symbol)), dynamic});
  }
  return image;
}

}  // namespace

const Image& image() {
  static const Image image = read_image();
  return image;
}

char* shared_memory() { return emulator_shared_begin; }

std::string function_name(const void* function) {
  const auto found = functions.find(reinterpret_cast<Address>(function) - image().base);
  return found == functions.end() ? "kernel" : shortened(demangled(found->second.c_str()));
}

}  // namespace emulator
