"""Derivatives: of an op by its kernels, and of any function by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .modes import is_transformed
from .op_spec import OpSpec


class Derivative(torch.autograd.Function):
    """An op with its gradient, for eager mode and for the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: OpSpec,
        compute: Callable[[tuple[Any, ...]], tuple[Tensor | None, ...]],
        returns_saved: bool,
        backend: str | None,
        *arguments: Any,
    ) -> tuple[Tensor | None, ...]:
        """Return the results of `compute`. Those for the backward pass alone are left out unless `returns_saved`.

        `backend` is the caller's. The backward pass chooses again, because a transform may be active then.
        """
        results, count = compute(arguments), spec.num_results
        ctx.spec = spec
        ctx.save_for_backward(*[arguments[i] for i in spec.read], *[results[i] for i in spec.read_results])
        ctx.arguments = [*arguments, backend]
        for i in spec.tensors:  # autograd holds them
            ctx.arguments[i] = None
        if returns_saved:
            ctx.mark_non_differentiable(*results[count:])
            return (*results,)
        return (*results[:count],)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments by the op's `gradient`."""
        spec: OpSpec = ctx.spec
        assert spec.gradient is not None
        tensors, arguments, results = ctx.saved_tensors, ctx.arguments.copy(), [None] * len(spec.Results._fields)
        for i, tensor in zip(spec.read, tensors, strict=False):
            arguments[i] = tensor
        for i, tensor in zip(spec.read_results, tensors[len(spec.read) :], strict=True):
            results[i] = tensor
        needs = spec.Arguments._make((*ctx.needs_input_grad[4:], False))
        named = spec.Arguments._make(arguments), spec.Results._make(results)
        gradients = spec.gradient.compute(*named, grads[: spec.num_results], needs)
        return (None, None, None, None, *[gradients.get(name) for name in spec.Arguments._fields[:-1]])


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


def named_gradients(
    reference: Callable[..., Tensor], arguments: Any, names: Sequence[str], grad: Tensor, needs: Any
) -> dict[str, Tensor | None]:
    """Return the gradients of an op with one result by its reference, for the tensors of these names.

    Args:
        reference: The reference.
        arguments: The op's arguments by name, of which the last is the backend.
        names: The tensors.
        grad: Gradient of the result.
        needs: Whether each argument needs a gradient, by name.
    """

    def function(*tensors: Tensor) -> Tensor:
        return reference(*arguments._replace(**dict(zip(names, tensors, strict=True)))[:-1])

    inputs, needed = ([getattr(source, name) for name in names] for source in (arguments, needs))
    return dict(zip(names, gradients_of(function, inputs, grad, needed), strict=True))
