"""group_norm_silu: GroupNorm, its modulation and SiLU in one pass (Wu and He 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ..checks import check_choice, check_float, check_int, check_number
from ..dtypes import opmath
from ..errors import InvalidType, InvalidValue, public
from .arguments import check_like
from .derivative import gradients_of
from .fused_op import FusedOp
from .op_spec import Gradient, OpSpec, schema_of

_TRITON_MAX_CHANNELS_PER_GROUP = 4096  # a tile of its kernels holds whole groups


@public(traced=True)
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    activation: Literal["silu"] | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Return GroupNorm of x with its modulation and SiLU, computed in one pass.

        act(GroupNorm(x + shift))                              by default
        act(GroupNorm(x + shift) (1 + scale) + shift_2)        with scale_shift = (scale, shift_2)

    Statistics are float32 (float64 for float64 inputs) and use deviations from the mean. Results are
    bit-identical from run to run and for any number of threads. Under autocast x keeps its dtype. Only the
    mean and 1 / sqrt(variance + eps) are saved for the backward pass.

    Args:
        x: [N, C, ...], floating. Kernels read contiguous and channels_last tensors without a copy.
        num_groups: Number of groups, a divisor of C.
        weight: [C], in x's dtype or float32. None: 1.
        bias: [C], in x's dtype or float32. None: 0.
        eps: Added to the variance, positive.
        shift: [N, C], in x's dtype or float32, added before the statistics. The blocks of Ho et al. add
            the time embedding here.
        scale_shift: Two [N, C], in x's dtype or float32 (adaptive group norm, Dhariwal and Nichol 2021).
        activation: "silu" or None.
        backend: "native", "triton" or "reference". None: the first that can run, and "reference" inside
            torch.func transforms and forward-mode differentiation.

    Returns:
        Tensor with the shape, dtype and memory format of x. Differentiable any number of
        times in every tensor.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    if activation != "silu":
        check_choice("activation", activation, ("silu", None))
    check_float("x", x, min_dim=2)
    scale, shift_2 = check_norm(x, num_groups, weight, bias, eps, shift, scale_shift)
    y: Tensor = group_norm_silu_op(
        *(x, num_groups, weight, bias, eps, shift, scale, shift_2, activation == "silu"), backend=backend
    )
    return y


def check_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale_shift: tuple[Tensor, Tensor] | None,
    *,
    more_channels: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the two tensors of `scale_shift`, or raise if an argument of a norm does not fit x, which the caller checks."""
    n, channels = x.shape[:2]
    channels += more_channels
    check_int("num_groups", num_groups, 1)
    if channels % num_groups:
        raise InvalidValue("num_groups", f"to divide the {channels} channels of x", num_groups)
    check_number("eps", eps, above=0, finite=True)
    if scale_shift is not None and not (isinstance(scale_shift, (tuple, list)) and len(scale_shift) == 2):
        raise InvalidType("scale_shift", "to be a pair of tensors", type(scale_shift).__name__)
    scale, shift_2 = (None, None) if scale_shift is None else scale_shift
    for name, value in (("weight", weight), ("bias", bias)):
        check_like(name, value, "x", x, (channels,), also=(torch.float32,), optional=True)
    for name, value in (("shift", shift), ("scale_shift[0]", scale), ("scale_shift[1]", shift_2)):
        check_like(name, value, "x", x, (n, channels), also=(torch.float32,), optional=True)
    return scale, shift_2


def _why_not_triton(device: torch.device, dtype: torch.dtype, arguments: Any) -> str | None:
    if arguments is not None and arguments.x.shape[1] // arguments.num_groups > _TRITON_MAX_CHANNELS_PER_GROUP:
        return f"it takes at most {_TRITON_MAX_CHANNELS_PER_GROUP} channels in a group"
    return None


def _statistic(arguments: Any) -> Tensor:
    x: Tensor = arguments.x
    return x.new_empty((x.shape[0], arguments.num_groups), dtype=opmath(x.dtype))


_SMALL = ("weight", "bias", "shift", "scale", "scale_shift")


def _gradient_of(name: str) -> Callable[[Any], Tensor | None]:
    """Return a function that allocates the gradient of a small input, in the dtype of the statistics."""

    def allocate(arguments: Any) -> Tensor | None:
        value = getattr(arguments, name)
        return None if value is None else torch.empty_like(value, dtype=arguments.mean.dtype)

    return allocate


def _gradients_by_reference(x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    num_groups, weight, bias, eps, shift, scale, scale_shift, silu, grad_y, _, _ = arguments

    def norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, scale_shift: Tensor) -> Tensor:
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, shift, scale, scale_shift, silu)[0]

    return gradients_of(norm, (x, weight, bias, shift, scale, scale_shift), grad_y)


group_norm_silu_backward_op = FusedOp(
    OpSpec(
        "group_norm_silu_backward",
        _gradients_by_reference,
        schema=f"{schema_of(reference.group_norm_silu)}, Map grad_y, Tensor mean, Tensor rstd",
        outputs={"grad_x": lambda a: torch.empty_like(a.x)} | {f"grad_{name}": _gradient_of(name) for name in _SMALL},
        has_triton=True,
        fields={"eps": None},
    )
)


def _backward(arguments: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    a = arguments
    gradients = group_norm_silu_backward_op(*a[:-1], grads[0], results.mean, results.rstd, backend=a.backend)
    return dict(zip(("x", *_SMALL), gradients, strict=True))


group_norm_silu_op = FusedOp(
    OpSpec(
        "group_norm_silu",
        reference.group_norm_silu,
        outputs={"y": lambda a: torch.empty_like(a.x)},
        saved={"mean": _statistic, "rstd": _statistic},
        has_triton=True,
        gradient=Gradient(_backward),
        limits={"triton": _why_not_triton},
    )
)
