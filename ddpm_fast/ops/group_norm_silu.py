"""group_norm_silu: GroupNorm, its modulation and SiLU in one pass (Wu and He 2018)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ._library import (
    check_device,
    check_float,
    check_number,
    define,
    dense,
    dense_like,
    dtype_code,
    is_plain,
    no_second_derivative,
    pointer,
    sizes,
    typed,
)
from .backend import choose, launch, workspace

_TRITON_MAX_CHANNELS_PER_GROUP = 4096  # a tile of its kernels holds whole groups


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
        Tensor with the shape, dtype and memory format of x. Differentiable once in every tensor, and any
        number of times with backend="reference".

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    op = "group_norm_silu"
    check_float(op, "x", x, min_dim=2)
    n, channels = x.shape[:2]
    if not isinstance(num_groups, (int, torch.SymInt)) or isinstance(num_groups, bool):
        raise TypeError(f"{op}: expected num_groups to be an int, got {type(num_groups).__name__}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: expected num_groups to divide the {channels} channels of x, got {num_groups}")
    check_number(op, "eps", eps)
    if not eps > 0:
        raise ValueError(f"{op}: expected eps to be positive, got {eps}")
    if activation not in ("silu", None):
        raise ValueError(f'{op}: expected activation to be "silu" or None, got {activation!r}')
    if scale_shift is not None and not (isinstance(scale_shift, (tuple, list)) and len(scale_shift) == 2):
        raise TypeError(f"{op}: expected scale_shift to be a pair of tensors, got {type(scale_shift).__name__}")
    scale, scale_shift_ = (None, None) if scale_shift is None else scale_shift
    _check_modulation("weight", weight, (channels,), x)
    _check_modulation("bias", bias, (channels,), x)
    _check_modulation("shift", shift, (n, channels), x)
    _check_modulation("scale_shift[0]", scale, (n, channels), x)
    _check_modulation("scale_shift[1]", scale_shift_, (n, channels), x)
    too_wide = channels // num_groups > _TRITON_MAX_CHANNELS_PER_GROUP
    unfit = ("triton", f"it takes at most {_TRITON_MAX_CHANNELS_PER_GROUP} channels in a group") if too_wide else None
    family = choose(op, backend, x.device, x.dtype, unfit)
    arguments = (x, num_groups, weight, bias, eps, shift, scale, scale_shift_, activation == "silu")
    if family == "reference":
        return reference.group_norm_silu(*arguments)[0]
    y: Tensor
    if not is_plain(x, weight, bias, shift, scale, scale_shift_):
        y = torch.ops.ddpm_fast.group_norm_silu(*arguments, family)[0]
    elif torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, shift, scale, scale_shift_)
    ):
        y = _Eager.apply(*arguments, family)  # type: ignore[no-untyped-call]
    elif family == "native":
        y = _native_forward(*arguments)
    else:
        y = _impl(*arguments, family)[0]
    return y


class _Eager(torch.autograd.Function):
    """The op for plain tensors, bypassing the dispatcher.

    A U-Net has some fifty group norms. On its small feature maps, a call through torch.ops takes longer
    than the kernel.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, mean, rstd = _impl(*arguments)
        _save(ctx, arguments, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y)


def _check_modulation(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if value is None:
        return
    op = "group_norm_silu"
    check_float(op, name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: expected {name} to have shape {list(shape)}, got {list(value.shape)}")
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: expected {name} to be float32 or of x's dtype, {x.dtype}, got {value.dtype}")
    check_device(op, name, value, "x", x)


def _impl(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
    family: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.opmath(x.dtype)
    mean, rstd = x.new_empty((x.shape[0], num_groups), dtype=wide), x.new_empty((x.shape[0], num_groups), dtype=wide)
    if family == "native":
        y = _native_forward(x, num_groups, weight, bias, eps, shift, scale, scale_shift, silu, mean, rstd)
    else:
        from ..triton_kernels.group_norm_silu import group_norm_silu as run

        x = dense(x)
        y = torch.empty_like(x)
        weight, bias, shift, scale, scale_shift = [_contiguous(s) for s in (weight, bias, shift, scale, scale_shift)]
        run(y, mean, rstd, x, weight, bias, shift, scale, scale_shift, num_groups, eps, silu)
    return y, mean, rstd


def _native_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """Return y, and write the statistics to `mean` and `rstd` if they are given."""
    x = dense(x)
    weight, bias, shift, scale, scale_shift = [_contiguous(s) for s in (weight, bias, shift, scale, scale_shift)]
    y = torch.empty_like(x)
    n, c, hw, channels_last = sizes(x)
    code = dtype_code(x)
    scratch = workspace("group_norm_silu", x.device, code, n, c, hw, num_groups, channels_last)
    launch(
        "group_norm_silu",
        x.device,
        code,
        *(y.data_ptr(), pointer(mean), pointer(rstd), x.data_ptr()),
        *(*typed(weight), *typed(bias), *typed(shift), *typed(scale), *typed(scale_shift)),
        *(n, c, hw, num_groups, eps, int(silu), channels_last, pointer(scratch)),
    )
    return y


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
    family: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.opmath(x.dtype)
    statistics = (x.shape[0], num_groups)
    return torch.empty_like(dense(x)), x.new_empty(statistics, dtype=wide), x.new_empty(statistics, dtype=wide)


def _backward_impl(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
    family: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, *grads = _gradients(grad_y, x, mean, rstd, num_groups, weight, bias, shift, scale, scale_shift, silu, family)
    grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift = (
        mean.new_empty(0) if grad is None else grad for grad in grads
    )
    return grad_x, grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift


_Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
    family: str,
) -> _Gradients:
    """Return the gradients: of x in its dtype, of the small inputs in the dtype of the statistics.

    Absent inputs have None.
    """
    x = dense(x)
    grad_y = dense_like(grad_y, x)
    weight, bias, shift, scale, scale_shift = [_contiguous(s) for s in (weight, bias, shift, scale, scale_shift)]
    small = (weight, bias, shift, scale, scale_shift)
    wide = mean.dtype
    grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift = [
        None if value is None else torch.empty_like(value, dtype=wide) for value in small
    ]
    grads = (torch.empty_like(x), grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift)
    if family == "native":
        n, c, hw, channels_last = sizes(x)
        code = dtype_code(x)
        scratch = workspace("group_norm_silu_backward", x.device, code, n, c, hw, num_groups, channels_last)
        launch(
            "group_norm_silu_backward",
            x.device,
            code,
            *[0 if grad is None else grad.data_ptr() for grad in grads],
            *(grad_y.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
            *(*typed(weight), *typed(bias), *typed(shift), *typed(scale), *typed(scale_shift)),
            *(n, c, hw, num_groups, int(silu), channels_last, pointer(scratch)),
        )
    else:
        from ..triton_kernels.group_norm_silu import group_norm_silu_backward as run

        run(*grads, grad_y, x, mean, rstd, *small, num_groups, silu)
    return grads


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
    family: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return empty gradients of the right shapes: absent inputs have a tensor of size 0."""
    grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift = (
        x.new_empty(0 if value is None else value.shape, dtype=mean.dtype)
        for value in (weight, bias, shift, scale, scale_shift)
    )
    return torch.empty_like(dense(x)), grad_weight, grad_bias, grad_shift, grad_scale, grad_scale_shift


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    _save(ctx, inputs, mean, rstd)


def _save(ctx: Any, inputs: tuple[Any, ...], mean: Tensor, rstd: Tensor) -> None:
    x, ctx.num_groups, weight, bias, _, shift, scale, scale_shift, ctx.silu, ctx.family = inputs
    ctx.save_for_backward(x, mean, rstd, weight, bias, shift, scale, scale_shift)


def _backward(ctx: Any, grad_y: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mean, rstd, *small = ctx.saved_tensors
    # With create_graph the op itself has to be on the graph: its own derivative is the error that says what to do.
    direct = not torch.is_grad_enabled() and is_plain(grad_y, x)
    run: Any = _gradients if direct else torch.ops.ddpm_fast.group_norm_silu_backward
    grad_x, *grads = run(grad_y, x, mean, rstd, ctx.num_groups, *small, ctx.silu, ctx.family)
    weight, bias, shift, scale, scale_shift = [
        None if value is None else grad.to(value.dtype) for grad, value in zip(grads, small, strict=True)
    ]
    return grad_x, None, weight, bias, None, shift, scale, scale_shift, None, None


_SMALL = "Tensor? shift, Tensor? scale, Tensor? scale_shift, bool silu, str family"
define(
    "group_norm_silu",
    f"(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, {_SMALL}) -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
    _backward,
    _setup_context,
)
define(
    "group_norm_silu_backward",
    f"(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, Tensor? bias, {_SMALL}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    no_second_derivative("group_norm_silu"),
)
