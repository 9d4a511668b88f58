"""FusedOp: an op as a function and as an operator of torch.library, with its three backends and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import check_strided
from ..errors import public
from .arguments import check_apart
from .backend import BackendUnavailable
from .derivative import Derivative
from .execution import NOT_BY_KERNELS, Execution, Outs
from .modes import PLAIN_TYPES, is_traced, is_transformed, is_transformed_tensor, runs_eagerly
from .op_spec import OpSpec

LIBRARY: Final = torch.library.Library("ddpm_fast", "DEF")


class FusedOp(Execution):
    """An op as a function.

    A call chooses the backend and takes one of three paths:

    1. The reference is called directly, so PyTorch differentiates and compiles it.
    2. Plain tensors in eager mode bypass the dispatcher, which takes longer than a small kernel.
    3. Every other call goes through `torch.ops.ddpm_fast.<name>`: a call that is compiled, runs in a dispatch mode, or has
       a tensor subclass or a lazily negated tensor.

    Inside torch.func transforms and forward-mode differentiation the reference computes the op, eager and compiled.

    The operator of torch.library returns all results, those of `saved` too. In place of one that is not wanted it has an empty
    bool tensor: the vmap of batched gradients takes no operator with optional results.

    Args:
        spec: The op.
    """

    # `Library.define` and `Library.impl` replace `custom_op`, because a call then costs a third as much.
    def __init__(self, spec: OpSpec) -> None:
        super().__init__(spec)
        self._count = len(spec.Results._fields)
        returns = "Tensor" if self._count == 1 else f"({', '.join(['Tensor'] * self._count)})"
        LIBRARY.define(f"{spec.name}({spec.schema}, str? backend) -> {returns}", tags=[torch.Tag.pt2_compliant_tag])
        named = public(spec.name, traced=True)  # a compiled graph calls these, not the public function
        LIBRARY.impl(spec.name, named(self._compute), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ddpm_fast::{spec.name}", named(self._fake), lib=LIBRARY)
        LIBRARY.impl(spec.name, named(self._autograd), "Autograd", with_keyset=True)
        if spec.reference is not None:
            LIBRARY.impl(spec.name, named(self._batched), "FuncTorchBatchedDecomposition")
        self._overload = getattr(torch.ops.ddpm_fast, spec.name).default

    def __call__(self, *arguments: Any, backend: str | None = None, out: Outs = ()) -> Any:
        """Compute the op.

        Args:
            arguments: Arguments of the schema, in order.
            backend: Name of the backend. None: the first that can run.
            out: Tensors for the first results, not lazily negated. The dispatcher computes others and copies them.

        Returns:
            The result, or a tuple if there are several. A result that is not wanted is None.
        """
        spec, compiling = self.spec, torch.compiler.is_compiling()
        transformed = not compiling and is_transformed()
        chosen = self.choose(backend, arguments, transformed)
        if chosen == "reference":
            return self._call_reference(arguments, out)
        if compiling or transformed or is_traced():
            return self._wanted(_written(self._received(self._overload(*arguments, backend)), out))
        records, needs_grad = torch.is_grad_enabled(), False
        for i in spec.tensors:
            tensor = arguments[i]
            if tensor is not None:
                if type(tensor) not in PLAIN_TYPES or tensor.is_neg():
                    return self._wanted(_written(self._received(self._overload(*arguments, backend)), out))
                needs_grad = needs_grad or (records and tensor.requires_grad)
        if needs_grad and not out:
            if spec.gradient is not None:
                compute = partial(self.run, chosen)
                return self._wanted(Derivative.apply(spec, compute, False, backend, *arguments))  # type: ignore[no-untyped-call]
            if spec.reference is not None:
                return self._call_reference(arguments, out)
        results = self.run(chosen, arguments, saves=False, out=out)
        return results[0] if spec.num_results == 1 else results[: spec.num_results]  # as `_wanted`, without a call

    def _wanted(self, results: tuple[Any, ...]) -> Any:
        """Return the results of a call without those of `saved`."""
        return results[0] if self.spec.num_results == 1 else results[: self.spec.num_results]

    def _call_reference(self, arguments: tuple[Any, ...], out: Outs = ()) -> Any:
        if runs_eagerly(*(arguments[i] for i in self.spec.tensors)):
            self._check_storage(arguments)
        results = self.checked_reference(arguments)
        for each in () if torch.compiler.is_compiling() else out:
            check_apart(each, self.spec.Arguments(*arguments, "reference")._asdict())
        return self._wanted(_written(results, out))

    # ------------------------------------------------------------------------------------------------------- torch.library

    def _compute(self, *values: Any) -> Any:
        spec, arguments = self.spec, values[:-1]
        for i in spec.tensors:
            if arguments[i] is not None:
                check_strided(spec.Arguments._fields[i], arguments[i])
        chosen = self.choose(values[-1], arguments, is_transformed())
        return self._sent(self._all_by_reference(arguments) if chosen == "reference" else self.run(chosen, arguments), values)

    def _all_by_reference(self, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """Return all results. Tensors without values stand for those that only a kernel's backward reads."""
        spec, results = self.spec, self.checked_reference(arguments)
        missing = len(spec.Results._fields) - len(results)
        return (*results, *self.allocated(spec.Arguments(*arguments, "reference"))[-missing:]) if missing else results

    def _fake(self, *values: Any) -> Any:
        return self._sent(self.allocated(self.prepared(values)), values)

    def _autograd(self, keys: torch._C.DispatchKeySet, *values: Any) -> Any:
        """Compute the op for tensors that need a gradient or belong to a transform."""
        spec, arguments, backend = self.spec, values[:-1], values[-1]
        tensors = [arguments[i] for i in spec.tensors if arguments[i] is not None]
        transformed = any(is_transformed_tensor(tensor) for tensor in tensors)
        if transformed and (backend not in (None, "reference") or spec.reference is None):
            raise BackendUnavailable(f'{self.name}: backend "{backend or "native"}" cannot run: {NOT_BY_KERNELS}')
        chosen = self.choose(backend, arguments, False)
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        has_no_backward = needs_grad and spec.gradient is None and spec.reference is not None
        if transformed or chosen == "reference" or has_no_backward:
            return self._sent(self._all_by_reference(arguments), values)
        # A choice by `is_default` depends on autograd, so it is made above it. Any other is left to each call.
        compute = partial(self._below_autograd, keys, chosen if spec.is_default else backend)
        if needs_grad and spec.gradient is not None:
            results = Derivative.apply(spec, compute, True, backend, *arguments)  # type: ignore[no-untyped-call]
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
        return self._sent(self._all_by_reference(values[:-1]), values)

    def _sent(self, results: Sequence[Tensor | None], values: tuple[Any, ...]) -> Any:
        """Return results as the operator does."""
        like: Tensor = values[self.spec.tensors[0]]
        tensors = [like.new_empty(0, dtype=torch.bool) if result is None else result for result in results]
        return tensors[0] if self._count == 1 else tuple(tensors)

    def _received(self, results: Any) -> tuple[Tensor | None, ...]:
        """Return results of the operator, None in place of those that are absent."""
        tensors = (results,) if self._count == 1 else results
        return tuple(None if tensor.dtype == torch.bool else tensor for tensor in tensors)


def _written(results: tuple[Any, ...], out: Outs) -> tuple[Any, ...]:
    """Return the results, the first ones copied to the tensors given for them."""
    return (*(each.copy_(result) for each, result in zip(out, results[: len(out)], strict=True)), *results[len(out) :])
