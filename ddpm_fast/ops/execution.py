"""Execution: the choice of an op's backend, and its computation by kernels or by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import check_storage
from ..errors import InvalidType, InvalidValue
from .arguments import check_apart
from .backend import BACKENDS, BackendUnavailable, warn_without_cuda, why_not_native, why_not_triton
from .compiled_kernel import CompiledKernel, is_dense, memory_format, shared_format
from .op_spec import OpSpec

Outs = tuple[Tensor, ...]

NOT_BY_KERNELS: Final = (
    "kernels have neither forward mode nor higher derivatives, which torch.func transforms and forward-mode differentiation "
    'need: leave backend out or pass "reference"'
)


class Execution:
    """The computation of an op outside autograd and the dispatcher.

    Args:
        spec: The op.

    Attributes:
        kernel: Its compiled kernel. None: `spec.native` computes the op.

    Raises:
        ImportError: The fields of the kernel are not those that the schema gives.
    """

    def __init__(self, spec: OpSpec) -> None:
        self.spec, self.name = spec, spec.name
        self.kernel: Any = None if spec.native is not None else CompiledKernel(spec)

    # --------------------------------------------------------------------------------------------------------- backend

    def choose(self, backend: str | None, arguments: tuple[Any, ...], transformed: bool) -> str:
        """Return the backend that computes the op: the one named, or the first that can run.

        Triton's interpreter is for tests, so it takes CPU tensors only if `backend` names it.

        Raises:
            BackendUnavailable: The named backend cannot run. No other is tried.
            ValueError: The named backend is unknown.
        """
        spec = self.spec
        main = arguments[spec.main]
        device, dtype = main.device, main.dtype if spec.dtype is None else arguments[spec.dtype]
        named = spec.Arguments(*arguments, "native" if backend is None else backend) if spec.limits or spec.is_default else None
        if backend is not None:
            reason = self.why_not(backend, device, dtype, named)
            if reason is None and transformed and backend != "reference":
                reason = NOT_BY_KERNELS
            if reason is not None:
                raise BackendUnavailable(f'{self.name}: backend "{backend}" cannot run: {reason}')
            return backend
        if transformed and spec.reference is not None:
            return "reference"
        if (spec.is_default is None or spec.is_default(named)) and self.why_not("native", device, dtype, named) is None:
            return "native"
        if device.type == "cuda":
            warn_without_cuda(device)
            if self.why_not("triton", device, dtype, named) is None:
                return "triton"
        if spec.reference is None:
            raise BackendUnavailable(f"{self.name}: no backend can run on {device} in {dtype}")
        return "reference"

    def why_not(
        self, backend: str, device: torch.device, dtype: torch.dtype = torch.float32, arguments: Any = None
    ) -> str | None:
        """Return why a backend cannot compute the op, or None if it can.

        Args:
            backend: Its name.
            device: Device of the tensors.
            dtype: Dtype of the result.
            arguments: Arguments by name. None: those that all calls have.

        Raises:
            ValueError: The backend is unknown.
        """
        spec = self.spec
        if backend == "reference":
            return None if spec.reference is not None else "it has no reference"
        if not isinstance(backend, str) or backend not in BACKENDS:
            kind = InvalidValue if isinstance(backend, str) else InvalidType
            raise kind("backend", f"to be one of {', '.join(BACKENDS)} or None", repr(backend))
        if backend in spec.limits and (reason := spec.limits[backend](device, dtype, arguments)) is not None:
            return reason
        if backend == "native":
            return why_not_native(device, dtype)
        return why_not_triton(device, dtype) if spec.has_triton else "there is no Triton kernel"

    def checked_reference(self, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """Return the results of the reference, after a check."""
        spec = self.spec
        assert spec.reference is not None
        if spec.check is not None:
            spec.check(spec.Arguments(*arguments, "reference"))
        results = spec.reference(*arguments)
        return (results,) if isinstance(results, Tensor) else results

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
        spec = self.spec
        a = self.prepared((*arguments, backend))
        if spec.check is not None:
            spec.check(a)
        results = self.allocated(a, saves, out)
        for each in out:
            check_apart(each, a._asdict())
        if backend == "triton" or spec.native is not None:
            self._check_storage(a)  # a kernel of the compiled module checks its fields
        if backend == "triton":
            self._launcher()(results, a)
        elif spec.native is not None:
            spec.native(results, a)
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
        spec = self.spec
        a = spec.Arguments(*arguments, "native")
        maps = [a[i] for i in spec.maps if a[i] is not None]
        layout = spec.layout or shared_format([*maps, *out])
        values: tuple[Any, ...] = self.kernel.values(self.allocated(a, saves=False, out=out), a, layout)[0]
        return values

    def prepared(self, values: tuple[Any, ...]) -> Any:
        """Return the arguments and the backend by name, each tensor in a memory layout that kernels read."""
        spec, given = self.spec, [*values]
        if spec.maps:
            layout = spec.layout
            if layout is None:
                main = given[spec.main]
                if not is_dense(main):
                    main = given[spec.main] = self._copied(spec.main, main, torch.contiguous_format)
                layout = memory_format(main)
            for i in spec.maps:
                if given[i] is not None and not given[i].is_contiguous(memory_format=layout):
                    given[i] = self._copied(i, given[i], layout)
        for i in spec.small:
            if given[i] is not None and not is_dense(given[i]):
                given[i] = self._copied(i, given[i], torch.contiguous_format)
        return spec.Arguments._make(given)

    def _check_storage(self, arguments: Sequence[Any]) -> None:
        for i in self.spec.tensors:
            if arguments[i] is not None:
                check_storage(self.spec.Arguments._fields[i], arguments[i])

    def _copied(self, i: int, value: Tensor, layout: torch.memory_format) -> Tensor:
        check_storage(self.spec.Arguments._fields[i], value)
        return value.contiguous(memory_format=layout)

    def allocated(self, arguments: Any, saves: bool = True, out: Outs = ()) -> Any:
        """Return new memory for the results by name, after those in `out`. Without `saves`, saved ones are None."""
        spec = self.spec
        results: list[Tensor | None] = [*out]
        results += [allocate(arguments) for allocate in spec.allocate[len(out) : None if saves else spec.num_results]]
        return spec.Results(*results)  # those that are left are None

    def _launcher(self) -> Callable[[Any, Any], None]:
        launcher: Callable[[Any, Any], None] = getattr(import_module(f"ddpm_fast.triton_kernels.{self.name}"), self.name)
        return launcher
