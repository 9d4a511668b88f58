"""group_norm_affine: a group norm as an affine map of each channel, which `conv3x3` applies to its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..checks import check_map
from ..dtypes import opmath
from ..errors import public
from .arguments import check_like
from .backend import why_not_matrix_kernels
from .derivative import named_gradients
from .fused_op import FusedOp
from .group_norm_silu import check_norm
from .op_spec import Gradient, OpSpec


@public(traced=True)
def group_norm_affine(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    shift: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the group norm of x and skip as center, slope and intercept of each channel.

        norm(cat(x, skip)) = (cat(x, skip) - center) slope + intercept

    `conv3x3(x, ..., skip=skip, affine=...)` applies it while it reads its input, so the normalized map is
    never stored. Statistics are those of `group_norm_silu`.

    Args:
        x: [N, C, H, W], floating.
        num_groups: Number of groups, a divisor of C + S.
        weight: [C + S], in x's dtype or float32. None: 1.
        bias: [C + S], in x's dtype or float32. None: 0.
        eps: Added to the variance, positive.
        skip: Further channels [N, S, H, W], in x's dtype, or None.
        shift: [N, C + S], in x's dtype or float32, added before the statistics.
        scale_shift: Two [N, C + S], in x's dtype or float32.
        backend: "native" or "reference". None: the first that can run. Gradients are
            those of the reference.

    Returns:
        [N, 3, C + S] in float32, or float64 for a float64 x. Differentiable any number of times in every tensor.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    check_map("x", x)
    channels = 0
    if skip is not None:
        check_like("skip", skip, "x", x, (x.shape[0], "S", *x.shape[2:]))
        channels = skip.shape[1]
    scale, shift_2 = check_norm(x, num_groups, weight, bias, eps, shift, scale_shift, more_channels=channels)
    affine: Tensor = group_norm_affine_op(x, skip, num_groups, weight, bias, eps, shift, scale, shift_2, backend=backend)
    return affine


def _output(arguments: Any) -> Tensor:
    x, skip = arguments.x, arguments.skip
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    affine: Tensor = x.new_empty((x.shape[0], 3, channels), dtype=opmath(x.dtype))
    return affine


def _backward(a: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    """Return the gradients of the reference."""
    names = ("x", "skip", "weight", "bias", "shift", "scale", "scale_shift")
    return named_gradients(reference.group_norm_affine, a, names, grads[0], needs)


group_norm_affine_op = FusedOp(
    OpSpec(
        "group_norm_affine",
        reference.group_norm_affine,
        outputs={"affine": _output},
        gradient=Gradient(_backward),
        fields={
            "channels": lambda a: a.x.shape[1],
            "skip_channels": lambda a: 0 if a.skip is None else a.skip.shape[1],
        },
        limits={"native": why_not_matrix_kernels},
    )
)
