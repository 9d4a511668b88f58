// A table of kernels as functions of a Python module. Tensors cross as addresses (0: absent). Python checks shapes.
//
// This uses Python's C interface alone. pybind11 would take most of the time that the CPU kernels take to compile.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/ops.h"

namespace ddpm_fast {

// -------------------------------------------------------------------------------------------------------- exceptions

// An exception that Python sees as one of the given type.
struct PythonError : std::runtime_error {
  PythonError(PyObject* python_type, const std::string& what) : std::runtime_error(what), type(python_type) {}
  PyObject* type;
};

// Python's error indicator is set.
struct ErrorIsSet {};

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw ErrorIsSet();
  return object;
}

// Turns the C++ exception that is being handled into a Python exception.
inline PyObject* raise() {
  try {
    throw;
  } catch (const ErrorIsSet&) {
  } catch (const PythonError& error) {
    PyErr_SetString(error.type, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// --------------------------------------------------------------------------------------------------------- functions

// The arguments of a call, in order. An `Arguments` converts to the next one, in the type that is wanted:
//   NoiseArgs args = {arguments, arguments, ...};
class Arguments {
 public:
  Arguments(PyObject* const* first, Py_ssize_t count) : next_(first), count_(count) {}

  template <class T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
  operator T() {
    PyObject* object = next();
    if (object == nullptr) return T{};
    if constexpr (std::is_same_v<T, bool>) {
      return PyObject_IsTrue(object) > 0;
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(PyFloat_AsDouble(object));
    } else {
      const long long value = PyLong_AsLongLong(object);
      const T converted = static_cast<T>(value);
      if (static_cast<long long>(converted) != value) {
        PyErr_Format(PyExc_OverflowError, "argument %zd: %lld is out of range", taken_, value);
      }
      return converted;
    }
  }
  template <class T>
  operator T*() {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(*this));
  }

  PyObject* object() { return next(); }

  // To be called before the arguments are used: were there as many as were taken, and were they numbers?
  void check() const {
    if (taken_ != count_ && !PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", taken_, count_);
    }
    if (PyErr_Occurred()) throw ErrorIsSet();
  }

 private:
  PyObject* next() {
    ++taken_;
    return taken_ <= count_ && !PyErr_Occurred() ? next_[taken_ - 1] : nullptr;
  }

  PyObject* const* next_;
  Py_ssize_t count_, taken_ = 0;
};

using Function = std::function<PyObject*(Arguments&)>;

// Adds a function to a module.
inline void def(PyObject* m, const char* name, Function function, const char* doc = nullptr) {
  struct Bound {
    PyMethodDef method;
    Function function;

    static PyObject* call(PyObject* self, PyObject* const* first, Py_ssize_t count) {
      try {
        Arguments arguments(first, count);
        return static_cast<Bound*>(PyCapsule_GetPointer(self, nullptr))->function(arguments);
      } catch (...) {
        return raise();
      }
    }
    static void free(PyObject* self) { delete static_cast<Bound*>(PyCapsule_GetPointer(self, nullptr)); }
  };
  auto* bound = new Bound{{name, nullptr, METH_FASTCALL, doc}, std::move(function)};
  bound->method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&Bound::call));
  PyObject* self = checked(PyCapsule_New(bound, nullptr, &Bound::free));
  PyObject* made = PyCFunction_NewEx(&bound->method, self, nullptr);
  Py_DECREF(self);
  const int failed = PyModule_AddObjectRef(m, name, checked(made));
  Py_DECREF(made);
  if (failed) throw ErrorIsSet();
}

inline PyObject* none() { return Py_NewRef(Py_None); }

// Lets other Python threads run.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Calls of the kernels that a network's inference form is made of, to be made again: what a graph is on a GPU.
using Calls = std::vector<std::function<void()>>;
inline thread_local Calls* recording = nullptr;  // where this thread's go, too

// A kernel that takes the arguments that `parse` makes of a call's.
template <class Args>
void def_op(PyObject* m, const char* name, void (*run)(const Args&), Args (*parse)(Arguments&), bool recorded = false) {
  def(m, name, [run, parse, recorded](Arguments& arguments) {
    const Args args = parse(arguments);
    arguments.check();
    {
      const WithoutGil released;
      run(args);
    }
    if (recorded && recording != nullptr) recording->push_back([run, args] { run(args); });
    return none();
  });
}

// --------------------------------------------------------------------------------------------------------- recordings

struct CallsObject {
  PyObject_HEAD Calls* calls;

  static CallsObject* of(PyObject* self) { return reinterpret_cast<CallsObject*>(self); }
  static void free(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete of(self)->calls;
    type->tp_free(self);
    Py_DECREF(type);
  }
  static Py_ssize_t size(PyObject* self) { return static_cast<Py_ssize_t>(of(self)->calls->size()); }
  static PyObject* call(PyObject* self, PyObject*, PyObject*) {
    try {
      const WithoutGil released;
      for (const auto& one : *of(self)->calls) one();
    } catch (...) {
      return raise();
    }
    return none();
  }
};

inline PyObject* make_calls_type() {
  static char doc[] = "Calls of kernels, as `record` returns them. A call repeats them.";
  static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&CallsObject::free)},
                                {Py_tp_call, reinterpret_cast<void*>(&CallsObject::call)},
                                {Py_sq_length, reinterpret_cast<void*>(&CallsObject::size)},
                                {Py_tp_doc, doc},
                                {0, nullptr}};
  static PyType_Spec spec = {"ddpm_fast._native.cpu.Calls", sizeof(CallsObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  return checked(PyType_FromSpec(&spec));
}

inline PyObject* record(PyTypeObject* type, PyObject* function) {
  struct Recording {
    Calls calls;
    Calls* outer = std::exchange(recording, &calls);
    ~Recording() { recording = outer; }
  } now;
  Py_DECREF(checked(PyObject_CallNoArgs(function)));
  PyObject* made = checked(type->tp_alloc(type, 0));
  CallsObject::of(made)->calls = new Calls(std::move(now.calls));
  return made;
}

// --------------------------------------------------------------------------------------------------------------- ops

// What only the CPU has.
inline void bind_cpu_ops(PyObject* m, const Kernels& kernels) {
  if (PyModule_AddIntConstant(m, "panel", static_cast<long>(kernels.panel)) != 0) throw ErrorIsSet();
  PyObject* type = make_calls_type();
  if (PyModule_AddObjectRef(m, "Calls", type) != 0) throw ErrorIsSet();
  def(
      m, "record",
      [type](Arguments& arguments) {  // which keeps the type
        PyObject* function = arguments.object();
        arguments.check();
        return record(reinterpret_cast<PyTypeObject*>(type), function);
      },
      "Call function() and return the calls of inference kernels that it makes on this thread.");

  def_op<GroupNormLinesArgs>(
      m, "group_norm_lines", kernels.group_norm_lines,
      [](Arguments& a) {
        GroupNormLinesArgs args{};
        GroupNormSiluArgs& norm = args.norm;
        norm.dtype = a;
        args.lines = a;
        norm.x = a;
        args.skip = a;
        for (ChannelInput* input : {&norm.weight, &norm.bias, &norm.shift, &norm.scale, &norm.scale_shift}) {
          *input = ChannelInput{a, a};
        }
        norm.shape.n = a;
        norm.shape.c = a;
        args.skip_channels = a;
        norm.shape.c += args.skip_channels;
        norm.shape.hw = a;
        norm.shape.channels_last = true;
        norm.groups = a;
        norm.eps = a;
        norm.silu = a;
        norm.run_on = RunOn{a};
        return args;
      },
      true);
  const auto def_conv = [m](const char* name, void (*run)(const ConvArgs&)) {
    def_op<ConvArgs>(
        m, name, run,
        [](Arguments& a) { return ConvArgs{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, {a}}; },
        true);
  };
  def_conv("conv_direct", kernels.conv_direct);
  def_conv("conv_winograd", kernels.conv_winograd);
  def_conv("conv_winograd_upsampled_gradient", kernels.conv_winograd_upsampled_gradient);
  def_op<AttentionArgs>(
      m, "attention", kernels.attention, [](Arguments& a) { return AttentionArgs{a, a, a, a, a, a, a, a, a, {a}}; },
      true);
  def_op<AttentionBackwardArgs>(m, "attention_backward", kernels.attention_backward, [](Arguments& a) {
    AttentionBackwardArgs args{};
    args.forward.dtype = a;
    args.dqkv = a;
    args.dy = a;
    args.forward = {args.forward.dtype, a, a, a, a, a, a, a, a, {a}};
    return args;
  });
  def_op<PackWinogradArgs>(m, "pack_winograd", kernels.pack_winograd,
                           [](Arguments& a) { return PackWinogradArgs{a, a, a, a, a, a, a, a, a, a, {a}}; });
  def_op<ConvWinogradWeightsArgs>(m, "conv_winograd_weights", kernels.conv_winograd_weights, [](Arguments& a) {
    return ConvWinogradWeightsArgs{a, a, a, a, a, a, a, a, a, a, a, {a}};
  });
}

inline void bind_ops(PyObject* m, const Kernels& kernels) {
  def_op<NoiseArgs>(m, "noise", kernels.noise, [](Arguments& a) { return NoiseArgs{a, a, a, a, {a, a, a, a}, {a}}; });
  def_op<QSampleArgs>(m, "q_sample", kernels.q_sample,
                      [](Arguments& a) { return QSampleArgs{a, a, a, a, a, a, a, a, {a, a, a, a}, {a}}; });
  def_op<ReverseStepArgs>(m, "reverse_step", kernels.reverse_step, [](Arguments& a) {
    return ReverseStepArgs{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, {a, a, a, a}, {a}};
  });
  def_op<DenoisingLossArgs>(m, "denoising_loss", kernels.denoising_loss, [](Arguments& a) {
    return DenoisingLossArgs{a, a, a, a, a, a, a, a, a, {a, a, a, a}, a, {a}};
  });
  def_op<DenoisingLossBackwardArgs>(m, "denoising_loss_backward", kernels.denoising_loss_backward, [](Arguments& a) {
    DenoisingLossBackwardArgs args{};
    args.forward.dtype = a;
    args.grad_model_output = a;
    args.forward = {args.forward.dtype, a, a, a, a, a, a, a, a, {a, a, a, a}, nullptr, {a}};
    return args;
  });
  def_op<GroupNormSiluArgs>(m, "group_norm_silu", kernels.group_norm_silu, [](Arguments& a) {
    GroupNormSiluArgs args = {a, a, a, a,       a, {a, a}, {a, a}, {a, a}, {a, a}, {a, a}, {a, a, a, false},
                              a, a, a, nullptr, {}};
    args.shape.channels_last = a;
    args.workspace = a;
    args.run_on = RunOn{a};
    return args;
  });
  def_op<GroupNormSiluBackwardArgs>(m, "group_norm_silu_backward", kernels.group_norm_silu_backward, [](Arguments& a) {
    GroupNormSiluBackwardArgs args = {
        a, a, a, a, a, a, a, a, a, a, a, {a, a}, {a, a}, {a, a}, {a, a}, {a, a}, {a, a, a, false}, a, a, nullptr, {}};
    args.shape.channels_last = a;
    args.workspace = a;
    args.run_on = RunOn{a};
    return args;
  });
  if (kernels.conv_direct != nullptr) bind_cpu_ops(m, kernels);

  const auto def_workspace = [m](const char* name, auto* bytes, auto parse) {
    if (bytes == nullptr) return;
    def(m, name, [bytes, parse](Arguments& arguments) {
      const std::int64_t wanted = parse(bytes, arguments);
      return checked(PyLong_FromLongLong(wanted));
    });
  };
  def_workspace("denoising_loss_workspace", kernels.denoising_loss_workspace, [](auto* bytes, Arguments& a) {
    const Shape shape = {a, a, a, false};
    a.check();
    return bytes(shape);
  });
  const auto of_norm = [](auto* bytes, Arguments& a) {
    const DType dtype = a;
    Shape shape = {a, a, a, false};
    const std::int64_t groups = a;
    shape.channels_last = a;
    a.check();
    return bytes(dtype, shape, groups);
  };
  def_workspace("group_norm_silu_workspace", kernels.group_norm_silu_workspace, of_norm);
  def_workspace("group_norm_silu_backward_workspace", kernels.group_norm_silu_backward_workspace, of_norm);
}

}  // namespace ddpm_fast
