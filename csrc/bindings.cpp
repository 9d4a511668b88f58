// The Python module: this file and bindings.h alone know Python.
#include "bindings.h"

#include <cstdint>
#include <string>
#include <vector>

#include "common/philox.h"
#include "cpu/dispatch.h"
#ifdef DDPM_FAST_CUDA
#include "cuda/kernels.h"
#endif

using namespace ddpm_fast;

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;  // names itself
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif
#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

PyObject* build_info(Arguments& arguments) {
  arguments.check();
  PyObject* isas = checked(PyList_New(0));
  for (const std::string& name : compiled_isas()) {
    PyObject* isa = checked(PyUnicode_FromString(name.c_str()));
    if (PyList_Append(isas, isa) != 0) throw ErrorIsSet();
    Py_DECREF(isa);
  }
  PyObject* archs = checked(PyUnicode_FromString(DDPM_FAST_CUDA_ARCHS));
  PyObject* info = Py_BuildValue("{s:s, s:s, s:s, s:N, s:N, s:N, s:s, s:N}", "version", DDPM_FAST_VERSION, "compiler",
                                 kCompiler, "isa", isa_in_use().c_str(), "isas", isas, "amx_bf16",
                                 PyBool_FromLong(has_amx_bf16()), "cuda_archs", PyUnicode_Split(archs, nullptr, -1),
                                 "cuda_why_not", DDPM_FAST_CUDA_WHY_NOT, "openmp", PyBool_FromLong(kOpenMP));
  Py_DECREF(archs);
  return checked(info);
}

// `count` words of a sequence of as many numbers.
void read_words(PyObject* sequence, std::uint32_t* words, Py_ssize_t count) {
  PyObject* numbers = checked(PySequence_Tuple(sequence));
  std::vector<PyObject*> items;
  for (Py_ssize_t i = 0; i < PyTuple_Size(numbers); ++i) items.push_back(PyTuple_GetItem(numbers, i));
  Arguments arguments(items.data(), static_cast<Py_ssize_t>(items.size()));
  for (Py_ssize_t i = 0; i < count; ++i) words[i] = arguments;
  Py_DECREF(numbers);
  arguments.check();
}

PyObject* philox4x32(Arguments& arguments) {
  PyObject *counter = arguments.object(), *key = arguments.object();
  arguments.check();
  std::uint32_t words[4], key_words[2];
  read_words(counter, words, 4);
  read_words(key, key_words, 2);
  philox(words, key_words[0], key_words[1]);
  return checked(Py_BuildValue("[IIII]", words[0], words[1], words[2], words[3]));
}

PyObject* philox_blocks(Arguments& arguments) {
  const std::int64_t seed = arguments;
  const std::uint32_t stream = arguments, first_block = arguments;
  const std::int64_t n_blocks = arguments;
  std::uint32_t* words = arguments;
  arguments.check();
  for (std::int64_t i = 0; i < n_blocks; ++i) {
    philox_block(static_cast<std::uint64_t>(seed), stream, static_cast<std::uint32_t>(first_block + i), words + 4 * i);
  }
  return none();
}

// Adds an empty module to `m`.
PyObject* add_module(PyObject* m, const char* name, const char* doc) {
  PyObject* made = checked(PyModule_New((std::string("ddpm_fast._native.") + name).c_str()));
  const bool failed = PyModule_SetDocString(made, doc) != 0 || PyModule_AddObjectRef(m, name, made) != 0;
  Py_DECREF(made);
  if (failed) throw ErrorIsSet();
  return made;  // m holds it
}

int fill(PyObject* m) {
  try {
    isa_in_use();  // reports a wrong DDPM_FAST_ISA at import
    def(m, "build_info", build_info);
    def(m, "philox4x32", philox4x32);
    def(m, "philox", philox_blocks);
    bind_ops(add_module(m, "cpu", "The ops on CPU tensors."), cpu_kernels());
#ifdef DDPM_FAST_CUDA
    PyObject* cuda = add_module(m, "cuda", "The ops on CUDA tensors.");
    bind_ops(cuda, cuda_kernels());
    def(cuda, "why_not", [](Arguments& arguments) {
      arguments.check();
      return checked(PyUnicode_FromString(cuda::why_not().c_str()));
    });
#endif
    return 0;
  } catch (...) {
    raise();
    return -1;
  }
}

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(&fill)},
#ifdef Py_mod_gil
                                     {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                     {0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
