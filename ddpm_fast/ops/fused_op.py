"""FusedOp: one declaration per op, the choice of its backend, and its path in eager mode."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import check_storage
from ..errors import InvalidType, InvalidValue
from .arguments import check_apart
from .backend import BACKENDS, BackendUnavailable, warn_without_cuda, why_not_native, why_not_triton
from .compiled_kernel import CompiledKernel, is_dense, memory_format, shared_format
from .derivative import Derivative
from .modes import PLAIN_TYPES, is_traced, is_transformed, runs_eagerly
from .registration import NOT_BY_KERNELS, Registration

Outs = tuple[Tensor, ...]

_KINDS: Final = {"torch.dtype": "ScalarType", "Sequence[int]": "SymInt[]"}  # annotations that torch.library names otherwise


def schema_of(function: Callable[..., Any]) -> str:
    """Return the arguments of a function in torch.library's syntax, such as "Map x_t, Map? noise, int variance".

    The function's module must have `from __future__ import annotations`, which keeps annotations as text.
    """
    parts = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, optional, _ = parameter.annotation.partition(" | None")
        parts.append(f"{_KINDS.get(kind, kind)}{'?' if optional else ''} {name}")
    return ", ".join(parts)


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
        reference: Definition in plain PyTorch. It returns the results, then those of `saved` if it has them.
        schema: Arguments in torch.library's syntax, with `Map` for a large tensor. None: those that the reference
            declares. The first map sets shape and dtype for the kernel, and the memory format of all maps. Any other
            tensor is made contiguous if it is neither contiguous nor channels_last.
        outputs: Result -> function(arguments) that allocates it. All but the first may return None, if the result is
            not wanted. The fake implementation calls the same functions.
        saved: Like `outputs`, for results that only the backward pass reads. A call does not return them.
        layout: Memory format of the maps. None: that of the first one.
        native: Function(results, arguments) that computes the results. None: the kernel of the op's name.
        has_triton: Whether there is a Triton launcher of the op's name.
        backward: Function(arguments, results, grads, needs) that returns gradients by argument name. `needs` says by
            name whether a gradient is needed. None: a call that needs a gradient uses the reference.
        reads: Arguments and results that `backward` reads, besides those of `saved`. None: all tensor arguments. The
            other tensors are None there.
        derived: Field of the kernel -> function(arguments) that computes it, see `CompiledKernel`.
        host_only: Arguments that are not fields of the kernel.
        check: Function(arguments) that raises for values out of range. It runs before a kernel or the reference.
        unfit: Backend -> function(arguments) that returns why it cannot take them, or None.
        unsupported: Function(device, dtype) that returns why native kernels cannot run, or None. It adds to what all ops
            require.
        is_default: Function(arguments) that returns whether native kernels are the default for them. None: always.

    Raises:
        ImportError: The fields of the kernel are not those that the schema gives.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any] | None = None,
        *,
        schema: str | None = None,
        outputs: Mapping[str, Callable[[Any], Tensor | None]],
        saved: Mapping[str, Callable[[Any], Tensor]] | None = None,
        layout: torch.memory_format | None = None,
        native: Callable[[Any, Any], None] | None = None,
        has_triton: bool = False,
        backward: Callable[[Any, Any, Any, Any], dict[str, Tensor | None]] | None = None,
        reads: tuple[str, ...] | None = None,
        derived: Mapping[str, Callable[[Any], Any]] | None = None,
        host_only: tuple[str, ...] = (),
        check: Callable[[Any], None] | None = None,
        unfit: Mapping[str, Callable[[Any], str | None]] | None = None,
        unsupported: Callable[[torch.device, torch.dtype], str | None] | None = None,
        is_default: Callable[[Any], bool] | None = None,
    ) -> None:
        self.name, self.reference, self.backward = name, reference, backward
        self._has_triton, self._layout, self.is_default = has_triton, layout, is_default
        self._native, self._check, self._unfit, self._unsupported = native, check, unfit or {}, unsupported
        if schema is None:
            assert reference is not None
            schema = schema_of(reference)
        kinds, names = zip(*(part.split() for part in schema.split(", ")), strict=True)
        saved = saved or {}
        self.Arguments, self.Results = _named("Arguments", *names, "backend"), _named("Results", *outputs, *saved)
        self.num_results, self._num_saved = len(outputs), len(saved)
        self._allocate = (*outputs.values(), *saved.values())
        self.tensors = [i for i, kind in enumerate(kinds) if kind.startswith(("Tensor", "Map"))]
        self._maps = [i for i in self.tensors if kinds[i].startswith("Map")]
        self._small = [i for i in self.tensors if i not in self._maps]
        self._main = (self._maps or self.tensors)[0]
        self._dtype_argument = names.index("dtype") if "dtype" in names else None
        if unknown := {*(reads or ()), *host_only} - {*names, *outputs}:
            raise ImportError(f"ddpm_fast: {name} has no argument or result {', '.join(sorted(unknown))}")
        self.read = [i for i in self.tensors if reads is None or names[i] in reads]
        self.read_results = [i for i, result in enumerate(self.Results._fields) if result in saved or result in (reads or ())]
        self.kernel: Any = None  # CompiledKernel, without `native`
        if native is None:
            self.kernel = CompiledKernel(
                *(name, names, self.Results._fields),
                tensors=self.tensors,
                main=self._main if self._maps else None,
                derived=derived or {},
                host_only=host_only,
            )
        self._registration = Registration(self, schema.replace("Map", "Tensor"))

    def __repr__(self) -> str:
        return f"FusedOp({self.name})"

    # -------------------------------------------------------------------------------------------------------- dispatch

    def __call__(self, *arguments: Any, backend: str | None = None, out: Outs = ()) -> Any:
        """Compute the op.

        Args:
            arguments: Arguments of the schema, in order.
            backend: Name of the backend. None: the first that can run.
            out: Tensors for the first results, not lazily negated. The dispatcher computes others and copies them.

        Returns:
            The result, or a tuple if there are several. A result that is not wanted is None.
        """
        compiling = torch.compiler.is_compiling()
        transformed = not compiling and is_transformed()
        chosen = self.choose(backend, arguments, transformed)
        if chosen == "reference":
            return self._by_reference(arguments, out)
        if compiling or transformed or is_traced():
            return self._wanted(_written(self._registration(arguments, backend), out))
        records, needs_grad = torch.is_grad_enabled(), False
        for i in self.tensors:
            tensor = arguments[i]
            if tensor is not None:
                if type(tensor) not in PLAIN_TYPES or tensor.is_neg():
                    return self._wanted(_written(self._registration(arguments, backend), out))
                needs_grad = needs_grad or (records and tensor.requires_grad)
        if needs_grad and not out:
            if self.backward is not None:
                compute = partial(self.run, chosen)
                return self._wanted(Derivative.apply(self, compute, False, backend, *arguments))  # type: ignore[no-untyped-call]
            if self.reference is not None:
                return self._by_reference(arguments, out)
        results = self.run(chosen, arguments, saves=False, out=out)
        return results[0] if self.num_results == 1 else results[: self.num_results]  # as `_wanted`, without a call

    def _wanted(self, results: tuple[Any, ...]) -> Any:
        """Return the results of a call without those of `saved`."""
        return results[0] if self.num_results == 1 else results[: self.num_results]

    def choose(self, backend: str | None, arguments: tuple[Any, ...], transformed: bool) -> str:
        """Return the backend that computes the op: the one named, or the first that can run.

        Triton's interpreter is for tests, so CPU tensors use "triton" only by name.

        Raises:
            BackendUnavailable: The named backend cannot run. No other is tried.
            ValueError: The named backend is unknown.
        """
        main = arguments[self._main]
        device, dtype = main.device, main.dtype if self._dtype_argument is None else arguments[self._dtype_argument]
        if backend is not None:
            reason = self.why_not(backend, device, dtype, arguments)
            if reason is None and transformed and backend != "reference":
                reason = NOT_BY_KERNELS
            if reason is not None:
                raise BackendUnavailable(f'{self.name}: backend "{backend}" cannot run: {reason}')
            return backend
        if transformed and self.reference is not None:
            return "reference"
        if (self.is_default is None or self.is_default(self.Arguments(*arguments, "native"))) and (
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
            reason = self._unsupported(device, dtype) if self._unsupported is not None else None
            reason = reason or why_not_native(device, dtype)
        elif backend == "triton":
            reason = why_not_triton(device, dtype) if self._has_triton else "there is no Triton kernel"
        else:
            kind = InvalidValue if isinstance(backend, str) else InvalidType
            raise kind(self.name, "backend", f"to be one of {', '.join(BACKENDS)} or None", repr(backend))
        if reason is None and arguments and backend in self._unfit:
            reason = self._unfit[backend](self.Arguments(*arguments, backend))
        return reason

    def checked_reference(self, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """Return the results of the reference, after a check."""
        assert self.reference is not None
        if self._check is not None:
            self._check(self.Arguments(*arguments, "reference"))
        results = self.reference(*arguments)
        return (results,) if isinstance(results, Tensor) else results

    def _by_reference(self, arguments: tuple[Any, ...], out: Outs = ()) -> Any:
        if runs_eagerly(*(arguments[i] for i in self.tensors)):
            self._check_storage(arguments)
        results = self.checked_reference(arguments)
        for each in () if torch.compiler.is_compiling() else out:
            check_storage(self.name, "out", each)
            check_apart(self.name, each, self.Arguments(*arguments, "reference")._asdict())
        return self._wanted(_written(results, out))

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
        a = self.prepared((*arguments, backend))
        if self._check is not None:
            self._check(a)
        results = self.allocated(a, saves, out)
        for each in out:
            if each.data_ptr() == 0:
                check_storage(self.name, "out", each)
            check_apart(self.name, each, a._asdict())
        if backend == "triton" or self._native is not None:
            self._check_storage(a)  # a kernel of the compiled module checks its fields
        if backend == "triton":
            self._launcher()(results, a)
        elif self._native is not None:
            self._native(results, a)
        else:
            self.kernel.launch(results, a)
        for each in out:
            torch.autograd.graph.increment_version(each)  # autograd does not see what a kernel writes
        return results

    def kernel_values(self, arguments: tuple[Any, ...], out: Outs) -> tuple[Any, ...]:
        """Return the values of the CPU kernel's fields for a call that writes its first results to `out`.

        Results that only the backward pass reads are absent, and so is the scratch buffer.

        Args:
            arguments: Arguments of the schema, in order. Tensors must be dense, the maps in one memory format.
            out: Tensors for the first results.

        Raises:
            ValueError: Tensors have different memory formats.
        """
        a = self.Arguments(*arguments, "native")
        maps = [a[i] for i in self._maps if a[i] is not None]
        layout = self._layout or shared_format(self.name, [*maps, *out])
        values: tuple[Any, ...] = self.kernel.values(self.allocated(a, saves=False, out=out), a, layout)[0]
        return values

    def prepared(self, values: tuple[Any, ...]) -> Any:
        """Return the arguments and the backend by name, each tensor in a memory layout that kernels read."""
        given = [*values]
        if self._maps:
            layout = self._layout
            if layout is None:
                main = given[self._main]
                if not is_dense(main):
                    main = given[self._main] = self._copied(self._main, main, torch.contiguous_format)
                layout = memory_format(main)
            for i in self._maps:
                if given[i] is not None and not given[i].is_contiguous(memory_format=layout):
                    given[i] = self._copied(i, given[i], layout)
        for i in self._small:
            if given[i] is not None and not is_dense(given[i]):
                given[i] = self._copied(i, given[i], torch.contiguous_format)
        return self.Arguments._make(given)

    def _check_storage(self, arguments: Sequence[Any]) -> None:
        for i in self.tensors:
            if arguments[i] is not None:
                check_storage(self.name, self.Arguments._fields[i], arguments[i])

    def _copied(self, i: int, value: Tensor, layout: torch.memory_format) -> Tensor:
        check_storage(self.name, self.Arguments._fields[i], value)
        return value.contiguous(memory_format=layout)

    def allocated(self, arguments: Any, saves: bool = True, out: Outs = ()) -> Any:
        """Return new memory for the results by name, after those in `out`. Without `saves`, saved ones are None."""
        results: list[Tensor | None] = [*out]
        results += [allocate(arguments) for allocate in self._allocate[len(results) : None if saves else self.num_results]]
        if not saves:
            results += [None] * self._num_saved
        return self.Results._make(results)

    def _launcher(self) -> Callable[[Any, Any], None]:
        launcher: Callable[[Any, Any], None] = getattr(
            import_module(f"ddpm_fast.triton_kernels.{self.name.removesuffix('_backward')}"), self.name
        )
        return launcher


def _written(results: tuple[Any, ...], out: Outs) -> tuple[Any, ...]:
    """Return the results, the first ones copied to the tensors given for them."""
    return (*(each.copy_(result) for each, result in zip(out, results[: len(out)], strict=True)), *results[len(out) :])


def _named(kind: str, *names: str) -> Any:
    """Return a tuple type whose fields have these names. What is not given is None."""
    return namedtuple(kind, names, defaults=[None] * len(names))
