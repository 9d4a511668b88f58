"""The registration of a FusedOp with torch.library: `torch.ops.ddpm_fast.<name>`.

Calls come here that are compiled, traced or recorded, and those of tensors that are not plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ..checks import check_strided
from .backend import BackendUnavailable
from .derivative import Derivative
from .modes import is_transformed, is_transformed_tensor

if TYPE_CHECKING:
    from .fused_op import FusedOp

LIBRARY: Final = torch.library.Library("ddpm_fast", "DEF")
NOT_BY_KERNELS: Final = (
    "kernels have neither forward mode nor higher derivatives, which torch.func transforms and forward-mode differentiation "
    'need: leave backend out or pass "reference"'
)


class Registration:
    """Operator of torch.library. Called, it computes the op by the dispatcher.

    The operator returns all results, those of `saved` too. In place of one that is not wanted it has an empty bool tensor:
    the vmap of batched gradients takes no operator with optional results.

    Args:
        op: The op.
        schema: Its arguments in torch.library's syntax.
    """

    # `Library.define` and `Library.impl` replace `custom_op`, because a call then costs a third as much.
    def __init__(self, op: FusedOp, schema: str) -> None:
        self._op = op
        self._count = len(op.Results._fields)
        returns = "Tensor" if self._count == 1 else f"({', '.join(['Tensor'] * self._count)})"
        LIBRARY.define(f"{op.name}({schema}, str? backend) -> {returns}", tags=[torch.Tag.pt2_compliant_tag])
        LIBRARY.impl(op.name, self._compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ddpm_fast::{op.name}", self._fake, lib=LIBRARY)
        LIBRARY.impl(op.name, self._autograd, "Autograd", with_keyset=True)
        if op.reference is not None:
            LIBRARY.impl(op.name, self._batched, "FuncTorchBatchedDecomposition")
        self._overload = getattr(torch.ops.ddpm_fast, op.name).default

    def __call__(self, arguments: tuple[Any, ...], backend: str | None) -> tuple[Tensor | None, ...]:
        """Return all results."""
        return self._received(self._overload(*arguments, backend))

    def _compute(self, *values: Any) -> Any:
        op, arguments = self._op, values[:-1]
        for i in op.tensors:
            if arguments[i] is not None:
                check_strided(op.name, op.Arguments._fields[i], arguments[i])
        chosen = op.choose(values[-1], arguments, is_transformed())
        return self._sent(self._by_reference(arguments) if chosen == "reference" else op.run(chosen, arguments), values)

    def _by_reference(self, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """Return all results. The reference leaves out those that only a kernel's backward pass reads."""
        op, results = self._op, self._op.checked_reference(arguments)
        missing = len(op.Results._fields) - len(results)
        return (*results, *op.allocated(op.Arguments(*arguments, "reference"))[-missing:]) if missing else results

    def _fake(self, *values: Any) -> Any:
        return self._sent(self._op.allocated(self._op.prepared(values)), values)

    def _autograd(self, keys: torch._C.DispatchKeySet, *values: Any) -> Any:
        """Compute the op for tensors that need a gradient or belong to a transform."""
        op, arguments, backend = self._op, values[:-1], values[-1]
        tensors = [arguments[i] for i in op.tensors if arguments[i] is not None]
        transformed = any(is_transformed_tensor(tensor) for tensor in tensors)
        if transformed and (backend not in (None, "reference") or op.reference is None):
            raise BackendUnavailable(f'{op.name}: backend "{backend or "native"}" cannot run: {NOT_BY_KERNELS}')
        chosen = op.choose(backend, arguments, False)
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        has_no_backward = needs_grad and op.backward is None and op.reference is not None
        if transformed or chosen == "reference" or has_no_backward:
            return self._sent(self._by_reference(arguments), values)
        # A choice by `is_default` depends on autograd, so it is made above it. Any other is left to each call.
        compute = partial(self._below_autograd, keys, chosen if op.is_default else backend)
        if needs_grad and op.backward is not None:
            results = Derivative.apply(op, compute, True, backend, *arguments)  # type: ignore[no-untyped-call]
        else:
            results = compute(arguments)
        return self._sent(results, values)

    def _below_autograd(
        self, keys: torch._C.DispatchKeySet, backend: str | None, arguments: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results = self._overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments, backend)
        return self._received(results)

    def _batched(self, *values: Any) -> Any:
        """Compute the op for tensors of torch.vmap by the reference."""
        return self._sent(self._by_reference(values[:-1]), values)

    def _sent(self, results: Sequence[Tensor | None], values: tuple[Any, ...]) -> Any:
        """Return results as the operator does."""
        like: Tensor = values[self._op.tensors[0]]
        tensors = [like.new_empty(0, dtype=torch.bool) if result is None else result for result in results]
        return tensors[0] if self._count == 1 else tuple(tensors)

    def _received(self, results: Any) -> tuple[Tensor | None, ...]:
        """Return results of the operator, None in place of those that are absent."""
        tensors = (results,) if self._count == 1 else results
        return tuple(None if tensor.dtype == torch.bool else tensor for tensor in tensors)
