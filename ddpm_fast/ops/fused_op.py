"""FusedOp: one declaration per op. It does dispatch, registration, autograd, transforms and checks for all ops."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import check_apart, check_choice, check_memory, check_strided
from ..dtypes import FLOATS
from ..errors import InvalidType, InvalidValue
from ..modes import PLAIN_TYPES, is_traced, is_transformed, is_transformed_tensor, runs_eagerly
from .backend import BACKENDS, KERNELS, BackendUnavailable, warn_without_cuda, why_not_native, why_not_triton

Outputs = tuple[Tensor | None, ...]
Outs = tuple[Tensor, ...]
LIBRARY: Final = torch.library.Library("ddpm_fast", "DEF")
OPS: Final[dict[str, FusedOp]] = {}  # public ops by name

_DTYPE_CODES: Final = {dtype: code for code, dtype in enumerate((*FLOATS, torch.uint8))}
_NOT_BY_KERNELS: Final = (
    "kernels have neither forward mode nor higher derivatives, which torch.func transforms and forward-mode differentiation "
    'need: leave backend out or pass "reference"'
)
_BUILD_AGAIN: Final = "build it again (pip install -e . or make build)"
_SHAPE: Final = ("dtype", "n", "c", "hw", "channels_last")  # fields that the main tensor fills
_LAUNCH: Final = ("workspace", "stream_or_threads")


class FusedOp:
    """An op, its backends and its gradient.

    A call chooses the backend and takes one of three paths:

    1. The reference is called as it is, so PyTorch differentiates and compiles it.
    2. Plain tensors in eager mode bypass the dispatcher, which takes longer than a small kernel.
    3. Every other call goes through `torch.ops.ddpm_fast.<name>`: a call that is compiled, runs in a dispatch mode, or has
       a tensor subclass or a lazily negated tensor.

    Inside torch.func transforms and forward-mode differentiation the reference computes the op, eager and compiled.

    Functions given to the constructor read arguments and results by name: `arguments.x`. The arguments end with
    `backend`, the backend that was chosen.

    Args:
        name: Name of the op, its native kernel, its Triton module and its launcher.
        schema: Arguments in torch.library's syntax. `backend` is added to them.
        outputs: Result -> function(arguments) that allocates it, or returns None if it is not wanted. The fake
            implementation calls the same functions.
        reference: Definition in plain PyTorch, of the same arguments. It returns the results, then those of `saved`
            if it has them.
        saved: Like `outputs`, for results that only the backward pass reads. A call does not return them.
        dense: The large tensors. The first one sets shape and dtype for the kernel, and the memory format of all.
            Any other tensor is made contiguous if it is neither contiguous nor channels_last.
        layout: Memory format of the large tensors. None: that of the first one.
        native: Function(results, arguments) that computes the results. None: the kernel of the op's name.
        has_triton: Whether there is a Triton launcher of the op's name.
        backward: Function(arguments, results, grads, needs) that returns gradients by argument name. `needs` says by
            name whether a gradient is needed. None: a call that needs a gradient uses the reference.
        reads: Arguments and results that `backward` reads, besides those of `saved`. None: all tensor arguments. The
            other tensors are None there.
        derived: Field of the kernel -> function(arguments) that computes it. Every other field takes the argument or
            the result of the same name. `<name>_dtype`, the sizes and the threads need no entry.
        host_only: Arguments that are not fields of the kernel.
        check: Function(arguments) that raises for values out of range. It runs before a kernel or the reference.
        unfit: Backend -> function(arguments) that returns why it cannot take them, or None.
        limits: Function(device, dtype) that returns why native kernels cannot run, or None. It adds to what all ops
            require.
        is_default: Function(arguments) that returns whether native kernels are the default for them. None: always.
        in_place: Define `<name>_out` too, which writes the first result to a given tensor.
        is_public: Add the op to `OPS`.

    Raises:
        ImportError: The fields of the kernel are not those that the schema gives.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        outputs: Mapping[str, Callable[[Any], Tensor | None]],
        reference: Callable[..., Any] | None = None,
        saved: Mapping[str, Callable[[Any], Tensor]] | None = None,
        dense: tuple[str, ...] = (),
        layout: torch.memory_format | None = None,
        native: Callable[[Any, Any], None] | None = None,
        has_triton: bool = False,
        backward: Callable[[Any, Any, Any, Any], dict[str, Tensor | None]] | None = None,
        reads: tuple[str, ...] | None = None,
        derived: Mapping[str, Callable[[Any], Any]] | None = None,
        host_only: tuple[str, ...] = (),
        check: Callable[[Any], None] | None = None,
        unfit: Mapping[str, Callable[[Any], str | None]] | None = None,
        limits: Callable[[torch.device, torch.dtype], str | None] | None = None,
        is_default: Callable[[Any], bool] | None = None,
        in_place: bool = False,
        is_public: bool = False,
    ) -> None:
        self.name, self.reference, self.backward = name, reference, backward
        self._has_triton = has_triton
        self._native, self._check, self._unfit, self._limits = native, check, unfit or {}, limits
        self._layout, self._is_default = layout, is_default
        kinds, names = zip(*(part.split() for part in schema.split(", ")), strict=True)
        _check_names(name, names, reference, (*dense, *host_only))
        saved = saved or {}
        self.Arguments, self.Results = _named("Arguments", *names, "backend"), _named("Results", *outputs, *saved)
        self._num_results, self._num_saved = len(outputs), len(saved)
        self._allocate = (*outputs.values(), *saved.values())
        self._tensors = [i for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
        self._dense = [names.index(each) for each in dense]
        self._main = (self._dense or self._tensors)[0]
        self._small = [i for i in self._tensors if i not in self._dense]
        self._dtype_argument = names.index("dtype") if "dtype" in names else None
        self._read = [i for i in self._tensors if reads is None or names[i] in reads]
        self._read_results = [i for i, result in enumerate(self.Results._fields) if result in saved or result in (reads or ())]
        if native is None:
            self._plan_launch(names, derived or {}, host_only)
        self._define(schema, in_place)
        if is_public:
            OPS[name] = self

    def __repr__(self) -> str:
        return f"FusedOp({self.name})"

    # -------------------------------------------------------------------------------------------------------- dispatch

    def __call__(self, *arguments: Any, backend: str | None = None, out: Outs = ()) -> Any:
        """Compute the op.

        Args:
            arguments: Arguments of the schema, in order.
            backend: Name of the backend. None: the first that can run.
            out: Tensors for the first results, for an op with `in_place`.

        Returns:
            The result, or a tuple if there are several. A result that is not wanted is None or has no elements.
        """
        main, dtype = self._main_and_dtype(arguments)
        compiling = torch.compiler.is_compiling()
        transformed = not compiling and is_transformed()
        chosen = self._choose(backend, main.device, dtype, arguments, transformed)
        if chosen == "reference":
            return self._by_reference(arguments, out)
        for each in () if compiling else out:
            if each.is_neg():
                raise InvalidValue(self.name, "out", "to be a tensor without lazy negation", "one: pass out.resolve_neg()")
        if compiling or transformed or is_traced():
            return self._by_dispatcher(arguments, backend, out)
        records, needs_grad = torch.is_grad_enabled(), False
        for i in self._tensors:
            tensor = arguments[i]
            if tensor is not None:
                if type(tensor) not in PLAIN_TYPES or tensor.is_neg():
                    return self._by_dispatcher(arguments, backend, out)
                needs_grad = needs_grad or (records and tensor.requires_grad)
        if needs_grad and not out:
            if self.backward is not None:
                return _Function.apply(self, None, backend, chosen, *arguments)  # type: ignore[no-untyped-call]
            if self.reference is not None:
                return self._by_reference(arguments, out)
        results = self.run(chosen, arguments, saves=False, out=out)
        return results[0] if self._num_results == 1 else results[: self._num_results]

    def _choose(
        self, backend: str | None, device: torch.device, dtype: torch.dtype, arguments: tuple[Any, ...], transformed: bool
    ) -> str:
        """Return the backend that computes the op: the one named, or the first that can run.

        Triton's interpreter is for tests, so CPU tensors use "triton" only by name.

        Raises:
            BackendUnavailable: The named backend cannot run. No other is tried.
            ValueError: The named backend is unknown.
        """
        if backend is not None:
            reason = self.why_not(backend, device, dtype, arguments)
            if reason is None and transformed and backend != "reference":
                reason = _NOT_BY_KERNELS
            if reason is not None:
                raise BackendUnavailable(f'{self.name}: backend "{backend}" cannot run: {reason}')
            return backend
        if transformed and self.reference is not None:
            return "reference"
        if (self._is_default is None or self._is_default(self.Arguments(*arguments, "native"))) and (
            self.why_not("native", device, dtype, arguments) is None
        ):
            return "native"
        if device.type == "cuda":
            warn_without_cuda(device)
            if self.why_not("triton", device, dtype, arguments) is None:
                return "triton"
        if self.reference is None:
            raise BackendUnavailable(f"{self.name}: no backend can run on {device} in {dtype}")
        return "reference"

    def why_not(
        self, backend: str, device: torch.device, dtype: torch.dtype = torch.float32, arguments: tuple[Any, ...] = ()
    ) -> str | None:
        """Return why a backend cannot compute the op, or None if it can.

        Raises:
            ValueError: The backend is unknown.
        """
        if backend == "reference":
            return None if self.reference is not None else "it has no reference"
        if backend == "native":
            reason = self._limits(device, dtype) if self._limits is not None else None
            reason = reason or why_not_native(device, dtype)
        elif backend == "triton":
            reason = why_not_triton(device, dtype) if self._has_triton else "there is no Triton kernel"
        else:
            kind = InvalidValue if isinstance(backend, str) else InvalidType
            raise kind(self.name, "backend", f"to be one of {', '.join(BACKENDS)} or None", repr(backend))
        if reason is None and arguments and backend in self._unfit:
            reason = self._unfit[backend](self.Arguments(*arguments, backend))
        return reason

    def _main_and_dtype(self, arguments: Sequence[Any]) -> tuple[Tensor, torch.dtype]:
        """Return the tensor whose device decides the backend, and the dtype that kernels compute for."""
        main: Tensor = arguments[self._main]
        return main, main.dtype if self._dtype_argument is None else arguments[self._dtype_argument]

    def _by_reference(self, arguments: tuple[Any, ...], out: Outs = ()) -> Any:
        assert self.reference is not None
        if runs_eagerly(*(arguments[i] for i in self._tensors)):
            self._check_memory(arguments)
        if self._check is not None:
            self._check(self.Arguments(*arguments, "reference"))
        results = self.reference(*arguments)
        if out:
            for each in () if torch.compiler.is_compiling() else out:
                check_memory(self.name, "out", each)
                check_apart(self.name, each, self.Arguments(*arguments, "reference")._asdict())
            results = _written(results, out)
        if isinstance(results, Tensor):
            return results
        return results[0] if self._num_results == 1 else results[: self._num_results]

    def _by_dispatcher(self, arguments: tuple[Any, ...], backend: str | None, out: Outs) -> Any:
        if out:  # `<name>_out` writes the first result in place, and those after it are copied
            return _written((out[0], *_as_tuple(self._overload_out(out[0], *arguments, backend))), out)
        results = _as_tuple(self._overload(*arguments, backend))
        return results[0] if self._num_results == 1 else results[: self._num_results]

    # ------------------------------------------------------------------------------------------------------------- run

    def run(self, backend: str | None, arguments: tuple[Any, ...], *, saves: bool = True, out: Outs = ()) -> Any:
        """Compute the op by kernels, outside autograd and the dispatcher.

        Args:
            backend: "native" or "triton".
            arguments: Arguments of the schema, in order. Tensors must be plain.
            saves: Also compute the results that the backward pass reads. Otherwise they are None.
            out: Tensors for the first results.

        Returns:
            All results, by name.
        """
        a = self._prepared(arguments, backend)
        if self._check is not None:
            self._check(a)
        results = self._allocated(a, saves, out)
        for each in out:
            if each.data_ptr() == 0:
                check_memory(self.name, "out", each)
            check_apart(self.name, each, a._asdict())
        if backend == "triton" or self._native is not None:
            self._check_memory(a)  # a kernel of the compiled module checks its fields
        if backend == "triton":
            self._launcher()(results, a)
        elif self._native is not None:
            self._native(results, a)
        else:
            main, fields = self._fields_of(results, a)
            if main.is_cpu:
                kernels = KERNELS["cpu"]
                if self._workspace is not None and hasattr(kernels, self._workspace):
                    fields = self._with_workspace(kernels, fields, main.device)
                getattr(kernels, self.name)(*fields)
            else:
                self._launch_on_gpu(fields, main.device)
        for each in out:
            torch.autograd.graph.increment_version(each)  # autograd does not see what a kernel writes
        return results

    def native_fields(self, arguments: tuple[Any, ...], out: Outs, workspace: Tensor | None = None) -> tuple[Any, ...]:
        """Return the fields of the CPU kernel for a call that writes its first results to `out`.

        Args:
            arguments: Arguments of the schema, in order. Tensors must be dense, the large ones in one memory format.
            out: Tensors for the first results. Results that only the backward pass reads are absent.
            workspace: Scratch buffer of `native_workspace` bytes.

        Raises:
            ValueError: Tensors have different memory formats.
        """
        a = self.Arguments(*arguments, "native")
        large = [a[i] for i in self._dense if a[i] is not None]
        layout = self._layout or _shared_format(self.name, [*large, *out])
        _, fields = self._fields_of(self._allocated(a, saves=False, out=out), a, layout)
        return fields if self._workspace is None else self._replaced(fields, "workspace", workspace)

    def native_workspace(self, arguments: tuple[Any, ...], out: Outs) -> int:
        """Return the size in bytes of the scratch buffer of this call on a CPU."""
        if self._workspace is None:
            return 0
        size: int = getattr(KERNELS["cpu"], self._workspace)(*self.native_fields(arguments, out))
        return size

    def _fields_of(self, results: Any, a: Any, layout: torch.memory_format | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the tensor that sets the kernel's shape, and the fields of the kernel.

        `layout` is the format of a tensor that has both, as one of a single channel has.
        """
        main = a[self._main] if self._dense else results[0]
        values = [*results, *a, dtype_code(main.dtype), *sizes(main, layout), None, torch.get_num_threads()]
        values += [0 if a[i] is None else dtype_code(a[i].dtype) for i in self._typed]
        values += [derive(a) for derive in self._derived]
        return main, self._pick(values)

    def _replaced(self, fields: tuple[Any, ...], name: str, value: Any) -> tuple[Any, ...]:
        return tuple(value if each == name else field for each, field in zip(self._fields, fields, strict=True))

    def _prepared(self, arguments: tuple[Any, ...], backend: str | None) -> Any:
        """Return the arguments by name, each tensor in a memory layout that kernels read."""
        values = [*arguments, backend]
        if self._dense:
            layout = self._layout
            if layout is None:
                main = values[self._main]
                if not is_dense(main):
                    main = values[self._main] = self._copied(self._main, main, torch.contiguous_format)
                layout = memory_format(main)
            for i in self._dense:
                if values[i] is not None and not values[i].is_contiguous(memory_format=layout):
                    values[i] = self._copied(i, values[i], layout)
        for i in self._small:
            if values[i] is not None and not is_dense(values[i]):
                values[i] = self._copied(i, values[i], torch.contiguous_format)
        return self.Arguments._make(values)

    def _check_memory(self, arguments: Sequence[Any]) -> None:
        for i in self._tensors:
            if arguments[i] is not None:
                check_memory(self.name, self.Arguments._fields[i], arguments[i])

    def _copied(self, i: int, value: Tensor, layout: torch.memory_format) -> Tensor:
        check_memory(self.name, self.Arguments._fields[i], value)
        return value.contiguous(memory_format=layout)

    def _allocated(self, arguments: Any, saves: bool = True, out: Outs = ()) -> Any:
        results: list[Tensor | None] = [*out]
        results += [allocate(arguments) for allocate in self._allocate[len(results) : None if saves else self._num_results]]
        if not saves:
            results += [None] * self._num_saved
        return self.Results._make(results)

    def _launcher(self) -> Callable[[Any, Any], None]:
        launcher: Callable[[Any, Any], None] = getattr(
            import_module(f"ddpm_fast.triton_kernels.{self.name.removesuffix('_backward')}"), self.name
        )
        return launcher

    def _plan_launch(
        self, names: tuple[str, ...], derived: Mapping[str, Callable[[Any], Any]], host_only: tuple[str, ...]
    ) -> None:
        """Find the value of each field of the kernel, in the order of the compiled module.

        Raises:
            ImportError: A field has no value, or an argument or a result has no field.
        """
        modules = [getattr(module, "fields", {}) for module in KERNELS.values()]
        fields = next((fields[self.name] for fields in modules if self.name in fields), None)
        self._derived = tuple(derived.values())
        self._typed = [i for i in self._tensors if f"{names[i]}_dtype" in (fields or ())]
        typed = (f"{names[i]}_dtype" for i in self._typed)
        given = (*self.Results._fields, *names, "backend", *_SHAPE, *_LAUNCH, *typed, *derived)
        if not modules:
            return  # there is no compiled module
        if fields is None:
            raise ImportError(f"ddpm_fast: the compiled module is older than this source and lacks {self.name}: {_BUILD_AGAIN}")
        without_value = [field for field in fields if field not in given]
        needed = {*self.Results._fields, *names, *derived, "stream_or_threads"} - {*host_only}
        without_field = [each for each in given if each in needed and each not in fields]
        if without_value or without_field:
            raise ImportError(
                f"ddpm_fast: the compiled module does not fit this source: {self.name} has fields without a value: "
                f"{without_value or 'none'}, and values without a field: {without_field or 'none'}: {_BUILD_AGAIN}"
            )
        # If a name occurs twice, the last value is taken: a derived one replaces the argument.
        self._pick = itemgetter(*(len(given) - 1 - given[::-1].index(field) for field in fields))
        self._fields = fields
        self._workspace = f"{self.name}_workspace" if "workspace" in fields else None

    def _launch_on_gpu(self, fields: tuple[Any, ...], device: torch.device) -> None:
        """Launch the kernel on the current stream of a GPU."""
        stream, kernels = torch._C._cuda_getCurrentRawStream(device.index), KERNELS["cuda"]
        fields = self._replaced(fields, "stream_or_threads", stream)
        with torch.cuda.device(device):  # kernels ask the current device for its properties
            if self._workspace is not None:
                fields = self._with_workspace(kernels, fields, device)
            getattr(kernels, self.name)(*fields)

    def _with_workspace(self, kernels: Any, fields: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
        """Return the fields with a scratch buffer of the size that the kernel asks for."""
        size = getattr(kernels, self._workspace or "")(*fields)
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        return self._replaced(fields, "workspace", workspace)

    # ---------------------------------------------------------------------------------------------------- torch.library

    def _define(self, schema: str, in_place: bool) -> None:
        """Register torch.ops.ddpm_fast.<name>.

        `Library.define` and `Library.impl` replace `custom_op`, because a call then costs a third as much.
        """
        count = len(self._allocate)
        self._register(self.name, f"({schema}, str? backend)", count, self._compute, self._fake)
        LIBRARY.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        if self.reference is not None:
            LIBRARY.impl(self.name, self._batched, "FuncTorchBatchedDecomposition")
        self._overload = getattr(torch.ops.ddpm_fast, self.name).default
        if in_place:
            name = f"{self.name}_out"
            arguments = f"(Tensor(a!) out, {schema}, str? backend)"
            self._register(name, arguments, count - 1, self._compute_out, self._fake_out)
            self._overload_out = getattr(torch.ops.ddpm_fast, name).default

    def _register(self, name: str, arguments: str, count: int, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
        returns = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        LIBRARY.define(f"{name}{arguments} -> {returns}", tags=[torch.Tag.pt2_compliant_tag])
        LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ddpm_fast::{name}", fake, lib=LIBRARY)

    def _compute(self, *values: Any) -> Any:
        *arguments, backend = values
        return _unwrapped(self._results(tuple(arguments), backend))

    def _compute_out(self, out: Tensor, *values: Any) -> Any:
        *arguments, backend = values
        return _unwrapped(self._results(tuple(arguments), backend, (out,))[1:])

    def _results(self, arguments: tuple[Any, ...], backend: str | None, out: Outs = ()) -> tuple[Tensor, ...]:
        """Return all results for the dispatcher: a tensor without elements stands for an absent one."""
        for i in self._tensors:
            if arguments[i] is not None:
                check_strided(self.name, self.Arguments._fields[i], arguments[i])
        main, dtype = self._main_and_dtype(arguments)
        chosen = self._choose(backend, main.device, dtype, arguments, is_transformed())
        if chosen == "reference":
            return self._all_by_reference(arguments, out)
        return self._present(self.run(chosen, arguments, out=out), main)

    def _all_by_reference(self, arguments: tuple[Any, ...], out: Outs = ()) -> tuple[Tensor, ...]:
        """Return the reference's results. Results that only a kernel's backward pass reads have no elements."""
        assert self.reference is not None
        if self._check is not None:
            self._check(self.Arguments(*arguments, "reference"))
        results = _as_tuple(self.reference(*arguments))
        results = _written(results, out)
        if len(self._allocate) > 1:
            wanted = self._allocated(self.Arguments(*arguments, "reference"))
            results += tuple(wanted[len(results) :])
            results = tuple(None if empty is None else result for result, empty in zip(results, wanted, strict=True))
        return self._present(results, arguments[self._tensors[0]])

    def _present(self, results: Outputs, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(0) if result is None else result for result in results)

    def _fake(self, *values: Any) -> Any:
        *arguments, backend = values
        a = self._prepared(tuple(arguments), backend)
        return _unwrapped(self._present(self._allocated(a), a[self._tensors[0]]))

    def _fake_out(self, out: Tensor, *values: Any) -> Any:
        *arguments, backend = values
        a = self._prepared(tuple(arguments), backend)
        check_apart(self.name, out, a._asdict())
        return _unwrapped(self._present(self._allocated(a, out=(out,)), a[self._tensors[0]])[1:])

    # ------------------------------------------------------------------------------------------------- differentiation

    def _autograd(self, keys: torch._C.DispatchKeySet, *values: Any) -> Any:
        """Compute the op for tensors that need a gradient or belong to a transform."""
        *arguments, backend = values
        tensors = [arguments[i] for i in self._tensors if arguments[i] is not None]
        transformed = any(is_transformed_tensor(tensor) for tensor in tensors)
        if transformed and (backend not in (None, "reference") or self.reference is None):
            raise BackendUnavailable(f'{self.name}: backend "{backend or "native"}" cannot run: {_NOT_BY_KERNELS}')
        main, dtype = self._main_and_dtype(arguments)
        chosen = self._choose(backend, main.device, dtype, tuple(arguments), False)
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        has_no_backward = needs_grad and self.backward is None and self.reference is not None
        if transformed or chosen == "reference" or has_no_backward:
            return _unwrapped(self._all_by_reference(tuple(arguments)))
        if needs_grad and self.backward is not None:
            return _Function.apply(self, keys, backend, chosen, *arguments)  # type: ignore[no-untyped-call]
        return self._below_autograd(keys, tuple(arguments), backend, chosen)

    def _below_autograd(
        self, keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...], backend: str | None, chosen: str
    ) -> Any:
        # A choice by `is_default` depends on autograd, so it is made above it. Any other is left to each call.
        name = backend if self._is_default is None else chosen
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments, name)

    def _batched(self, *values: Any) -> Any:
        """Compute the op for tensors of torch.vmap by the reference."""
        return _unwrapped(self._all_by_reference(values[:-1]))

    def _save(self, ctx: Any, arguments: tuple[Any, ...], results: Outputs) -> None:
        ctx.save_for_backward(*[arguments[i] for i in self._read], *[results[i] for i in self._read_results])
        ctx.arguments = [*arguments, ctx.backend]
        for i in self._tensors:  # autograd holds them
            ctx.arguments[i] = None

    def _saved(self, ctx: Any) -> tuple[Any, Any]:
        """Return the arguments and results that `_save` stored."""
        tensors, count = ctx.saved_tensors, len(self._read)
        arguments, results = ctx.arguments.copy(), [None] * len(self._allocate)
        for i, tensor in zip(self._read, tensors, strict=False):
            arguments[i] = tensor
        for i, tensor in zip(self._read_results, tensors[count:], strict=True):
            results[i] = tensor
        return self.Arguments._make(arguments), self.Results._make(results)


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot compute an op for this device and dtype, or None if it can.

    Raises:
        ValueError: The backend or the op is unknown.
    """
    check_choice("why_not", "op", op, OPS)
    return OPS[op].why_not(backend, device, dtype)


class _Function(torch.autograd.Function):
    """The derivative of a FusedOp for eager mode and for the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, op: FusedOp, keys: torch._C.DispatchKeySet | None, backend: str | None, chosen: str, *arguments: Any
    ) -> Any:
        """Run the op on the chosen backend, or its overload below autograd if the dispatcher calls with `keys`."""
        ctx.op, ctx.backend = op, backend  # the backward pass chooses again, because a transform may be active then
        if keys is None:
            results = op.run(chosen, arguments)
            returned = results[: op._num_results]
        else:
            results = returned = _as_tuple(op._below_autograd(keys, arguments, backend, chosen))
            ctx.mark_non_differentiable(*results[op._num_results :])
        op._save(ctx, arguments, results)
        return _unwrapped(returned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        op: FusedOp = ctx.op
        assert op.backward is not None
        arguments, results = op._saved(ctx)
        needs = op.Arguments._make((*ctx.needs_input_grad[4:], False))
        gradients = op.backward(arguments, results, grads[: op._num_results], needs)
        return (None, None, None, None, *[gradients.get(name) for name in op.Arguments._fields[:-1]])


def _check_names(op: str, names: tuple[str, ...], reference: Callable[..., Any] | None, used: tuple[str, ...]) -> None:
    """Raise an ImportError unless the reference has the arguments of the schema, in order, and all names are known."""
    unknown = [each for each in used if each not in names]
    if unknown:
        raise ImportError(f"ddpm_fast: {op} has no arguments {', '.join(unknown)} in its schema")
    parameters = () if reference is None else inspect.signature(reference).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    has_all = not any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if reference is not None and positional != (names if has_all else names[: len(positional)]):
        raise ImportError(f"ddpm_fast: the reference of {op} takes {positional}, and its schema has {names}")


def _named(kind: str, *names: str) -> Any:
    """Return a tuple type whose fields have these names."""
    return namedtuple(kind, names)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results or ())


def _written(results: Any, out: Outs) -> tuple[Any, ...]:
    """Return the results, the first ones copied to the tensors given for them."""
    results = _as_tuple(results)
    return (*(each.copy_(result) for each, result in zip(out, results[: len(out)], strict=True)), *results[len(out) :])


def _unwrapped(results: tuple[Any, ...]) -> Any:
    """Return None for no result, the result if there is one, or the tuple."""
    return results[0] if len(results) == 1 else results or None


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool] | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*inputs), differentiable if autograd records.

    Args:
        function: Function of the inputs.
        inputs: Tensors or None.
        grad: Gradient of the function's value.
        needs: Which gradients are needed. None: all.

    Returns:
        One gradient an input. It is None if the input is, or if it is not needed.
    """
    present = [i for i, value in enumerate(inputs) if value is not None]
    if torch._C._functorch.peek_interpreter_stack() is not None:  # inside a transform, where no tensor may require a gradient

        def of_present(*tensors: Tensor) -> Tensor:
            given = dict(zip(present, tensors, strict=True))
            return function(*(given.get(i) for i in range(len(inputs))))

        pullback: Any = torch.func.vjp(of_present, *(inputs[i] for i in present))[1]
        by_index = dict(zip(present, pullback(grad), strict=True))
        return tuple(by_index.get(i) for i in range(len(inputs)))
    create_graph = torch.is_grad_enabled()
    needed = [value is not None and (needs is None or needs[i]) for i, value in enumerate(inputs)]
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # One input may be a function of another. An alias has no history that would be counted a second time.
        leaves = [
            value
            if value is None or not need
            else value.view_as(value)
            if create_graph and value.requires_grad
            else value.detach().requires_grad_()
            for value, need in zip(inputs, needed, strict=True)
        ]
        result = function(*leaves)
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
        # PyTorch's backward operations have forward mode if they are recorded.
        recorded = create_graph or is_transformed()
        grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=recorded) if wanted else ())
    return tuple(next(grads) if need else None for need in needed)


# ---------------------------------------------------------------------------------------------------------------- memory


def dtype_code(dtype: torch.dtype) -> int | None:
    """Return the native module's code of a dtype, or None, which kernels refuse, if it has none."""
    return _DTYPE_CODES.get(dtype)


def is_dense(x: Tensor) -> bool:
    """Return whether x is contiguous or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _shared_format(op: str, tensors: Sequence[Tensor]) -> torch.memory_format:
    """Return the memory format that all tensors have. A tensor of one channel has both."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if all(each.is_contiguous(memory_format=layout) for each in tensors):
            return layout
    raise InvalidValue(op, "", "tensors of one memory format", f"strides {[each.stride() for each in tensors]}")


def sizes(x: Tensor, layout: torch.memory_format | None = None) -> tuple[int, int, int, int]:
    """Return n, c, hw and channels_last (0 or 1) of a dense tensor. `layout` decides where it has both formats."""
    n = x.shape[0]
    if x.is_contiguous() and layout is not torch.channels_last:
        c = x.shape[1] if x.dim() > 1 else 1
        return n, c, x.numel() // max(1, n * c), 0
    return n, x.shape[1], x.shape[2] * x.shape[3], 1
