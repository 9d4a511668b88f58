// A table of kernels as functions of a Python module.
//
// Each kernel takes one positional value per field of its Args (see common/args.h): an object with data_ptr(), such as
// a tensor, or None for a pointer, and a number otherwise. The module's dict `fields` holds the names of the fields.
// Python checks shapes, dtypes and devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/fields.h"
#include "common/ops.h"
#include "cpu/team.h"

namespace ddpm_fast {

namespace py = pybind11;

using Values = std::span<PyObject* const>;

// ------------------------------------------------------------------------------------------------- values to arguments

// Reads the fields of a kernel's Args from the values of a call.
class Reader {
 public:
  Reader(const std::string& kernel, const std::vector<std::string>& fields, Values values)
      : kernel_(kernel), fields_(fields), values_(values) {
    if (values.size() != fields.size()) {
      throw py::type_error(kernel + ": expected " + std::to_string(fields.size()) + " arguments, got " +
                           std::to_string(values.size()));
    }
  }

  // Reads the next value.
  template <class Field>
  void operator()(Field& field) {
    PyObject* const value = values_[next_];
    if constexpr (std::is_pointer_v<Field>) {
      field = static_cast<Field>(address(value));
    } else if constexpr (std::is_same_v<Field, StreamOrThreads>) {
      field.value = static_cast<std::intptr_t>(integer(value, INTPTR_MIN, INTPTR_MAX));
    } else if constexpr (std::is_floating_point_v<Field>) {
      field = static_cast<Field>(real(value));
    } else if constexpr (std::is_enum_v<Field>) {
      field = static_cast<Field>(integer(value, 0, INT32_MAX));
    } else if constexpr (std::is_same_v<Field, bool>) {
      field = integer(value, 0, 1) != 0;
    } else {
      using Limits = std::numeric_limits<Field>;
      field = static_cast<Field>(integer(value, Limits::min(), Limits::max()));
    }
    ++next_;
  }

 private:
  long long integer(PyObject* value, long long smallest, long long largest) const {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred() != nullptr) refuse_number(value);
    if (number < smallest || number > largest) refuse_number(value);
    return number;
  }

  double real(PyObject* value) const {
    const double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred() != nullptr) refuse_number(value);
    return number;
  }

  void* address(PyObject* value) const {
    if (value == Py_None) return nullptr;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* const result = PyObject_CallMethodNoArgs(value, data_ptr);
    if (result == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
      PyErr_Clear();
      throw py::type_error(kernel_ + ": expected " + fields_[next_] + " to be a tensor or None, got " +
                           Py_TYPE(value)->tp_name);
    }
    void* const start = PyLong_AsVoidPtr(result);
    Py_DECREF(result);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (start == nullptr) check_empty(value);
    return start;
  }

  // An empty tensor has no memory. A tensor with elements needs some.
  void check_empty(PyObject* value) const {
    const auto elements = py::handle(value).attr("numel")().cast<std::int64_t>();
    if (elements == 0) return;
    throw py::value_error(kernel_ + ": expected " + fields_[next_] + " to have memory, got a tensor of " +
                          std::to_string(elements) +
                          " elements without (its storage was freed, or it is a zero tensor)");
  }

  [[noreturn]] void refuse_number(PyObject* value) const {
    if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_TypeError) == 0 &&
        PyErr_ExceptionMatches(PyExc_OverflowError) == 0) {
      throw py::error_already_set();  // such as KeyboardInterrupt
    }
    PyErr_Clear();
    throw py::type_error(kernel_ + ": expected " + fields_[next_] + " to be a number in range, got " +
                         py::repr(value).cast<std::string>());
  }

  const std::string& kernel_;
  const std::vector<std::string>& fields_;
  Values values_;
  std::size_t next_ = 0;
};

// ----------------------------------------------------------------------------------------------------------- functions

// A Python function of positional arguments. pybind11 would make a tuple of them, which takes longer than small
// kernels.
struct Function {
  std::string name, doc;
  std::function<py::object(Values)> body;
  PyMethodDef method;
};

inline PyObject* call_function(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  const auto* function = static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
  try {
    return function->body(Values(values, static_cast<std::size_t>(count))).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const PlanAgain& warning) {
    PyErr_SetString(PyExc_RuntimeWarning, warning.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline void def(py::module_& m, std::string name, std::string doc, std::function<py::object(Values)> body) {
  auto* function = new Function{std::move(name), std::move(doc), std::move(body), {}};
  function->method = {function->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_function)),
                      METH_FASTCALL, function->doc.c_str()};
  const py::capsule self(function, [](void* pointer) { delete static_cast<Function*>(pointer); });
  const py::object module_name = m.attr("__name__");
  m.attr(function->name.c_str()) =
      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&function->method, self.ptr(), module_name.ptr()));
}

// Adds the kernel `name`. run(args, values) runs it.
template <class Args, class Run>
void def_kernel(py::module_& m, const std::string& name, Run run) {
  const std::vector<std::string> fields = field_names<Args>();
  py::tuple names(fields.size());
  for (std::size_t i = 0; i < fields.size(); ++i) names[i] = fields[i];
  m.attr("fields")[name.c_str()] = names;
  def(m, name, "Values of its `fields`, in order.", [name, fields, run](Values values) -> py::object {
    Args args{};
    for_each_field(args, Reader(name, fields, values));
    run(args, values);
    return py::none();
  });
}

// Adds the function that returns the size of a kernel's workspace. It takes the kernel's values.
template <class Args>
void def_workspace(py::module_& m, const std::string& name, std::int64_t (*bytes)(const Args&)) {
  const std::vector<std::string> fields = field_names<Args>();
  const std::string function = name + "_workspace";
  def(m, function, "Bytes of the scratch buffer, for the values of the kernel's `fields`.",
      [name, fields, bytes](Values values) -> py::object {
        Args args{};
        for_each_field(args, Reader(name, fields, values));
        return py::int_(bytes(args));
      });
}

// -------------------------------------------------------------------------------------------------------------- kernels

// Returns a function that runs a kernel without Python's global lock.
template <class Args>
auto without_lock(void (*kernel)(const Args&)) {
  return [kernel](const Args& args, Values) {
    const py::gil_scoped_release released;
    kernel(args);
  };
}

// ------------------------------------------------------------------------------------------------------------- programs

// Calls of kernels that one team of threads runs in order. The team belongs to a run, so runs do not disturb each other.
class Program {
 public:
  Program(const Kernels& kernels, const py::sequence& calls, int threads) : threads_(threads) {
    if (threads < 1) {
      throw py::value_error("Program: expected threads to be positive, got " + std::to_string(threads));
    }
    for (const py::handle call : calls) {
      if (!py::isinstance<py::tuple>(call) || py::len(call) != 2) {
        throw py::type_error("Program: expected a call to be (name, values), got " +
                             py::repr(call).cast<std::string>());
      }
      const auto pair = py::reinterpret_borrow<py::tuple>(call);
      add(kernels, py::str(pair[0]), py::tuple(pair[1]));
    }
  }

  void run() const {
    if (threads_ == 1 || !can_start_threads()) return run_calls(nullptr);
    const auto run_member = [](void* program, TeamMember& member) {
      static_cast<const Program*>(program)->run_calls(&member);
    };
    start_team(threads_, run_member, const_cast<Program*>(this));
  }

  std::size_t size() const { return calls_.size(); }

 private:
  void add(const Kernels& kernels, const std::string& name, const py::tuple& values) {
    std::string names;
#define OP(kernel, Args)                                                                     \
  if (name == #kernel) return calls_.push_back(call_of<Args>(name, kernels.kernel, values)); \
  names += (names.empty() ? "" : ", ") + std::string(#kernel);
    DDPM_FAST_PROGRAM_OPS(OP)
#undef OP
    throw py::value_error("Program: expected a kernel to be one of " + names + ", got '" + name + "'");
  }

  template <class Args>
  std::function<void(TeamMember*)> call_of(const std::string& name, void (*kernel)(const Args&), py::tuple values) {
    const std::vector<std::string> fields = field_names<Args>();
    Args args{};
    for_each_field(args, Reader(name, fields, Values(PySequence_Fast_ITEMS(values.ptr()), values.size())));
    args.stream_or_threads.value = threads_;
    values_.push_back(std::move(values));
    return [kernel, args](TeamMember* member) {
      Args own = args;
      if (member != nullptr) own.stream_or_threads.value = -reinterpret_cast<std::intptr_t>(member);
      kernel(own);
    };
  }

  void run_calls(TeamMember* member) const {
    for (const auto& call : calls_) call(member);
  }

  int threads_;
  std::vector<std::function<void(TeamMember*)>> calls_;
  std::vector<py::tuple> values_;  // references to the tensors
};

inline void bind_program(py::module_& m, const Kernels& kernels) {
  py::class_<Program>(
      m, "Program",
      "Calls of kernels that run in one parallel region. `calls` has a name and the values of the fields "
      "for each. `threads` replaces their numbers of threads.")
      .def(py::init([&kernels](const py::sequence& calls, int threads) {
             return std::make_unique<Program>(kernels, calls, threads);
           }),
           py::arg("calls"), py::arg("threads"))
      .def("__call__", &Program::run, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &Program::size);
}

inline void bind_kernels(py::module_& m, const Kernels& kernels) {
  m.attr("fields") = py::dict();
#define OP(name, Args) \
  if (kernels.name != nullptr) def_kernel<Args>(m, #name, without_lock(kernels.name));
  DDPM_FAST_OPS(OP)
  DDPM_FAST_CPU_OPS(OP)
#undef OP
#define OP(name, Args) \
  if (kernels.name##_workspace != nullptr) def_workspace<Args>(m, #name, kernels.name##_workspace);
  DDPM_FAST_WORKSPACES(OP)
  DDPM_FAST_CPU_WORKSPACES(OP)
#undef OP
  if (kernels.panel == 0) return;
  m.attr("panel") = kernels.panel;
  bind_program(m, kernels);
}

}  // namespace ddpm_fast
