"""q_sample: noise x_0 to timestep t in one pass (eq. 3, Ho et al. 2020, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_dtype, check_float, check_one_of, check_range, check_type, checked_seeds
from ..errors import InvalidType, public
from ..schedule import NoiseSchedule, Objective
from .arguments import check_like, index_tensor
from .compiled_kernel import dtype_code
from .fused_op import FusedOp
from .op_spec import Gradient, OpSpec


@public(traced=True)
def q_sample(
    x_0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule | Objective,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw x_t ~ q(x_t | x_0).

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon

    With `seeds`, epsilon is drawn in the kernel and never stored. Source: derivation eq. 3 (Ho et al. 2020,
    eq. 4).

    Args:
        x_0: [N, ...], floating, or uint8 images. Values 0..255 of uint8 stand for -1..1, and no floating
            copy of them is made.
        t: Timestep, 0..T-1: an int, or int64 [N]. Values on a GPU are not checked.
        schedule: Noise schedule, which has abar, or the objective that has it.
        noise: epsilon, shaped like x_t. Pass either `noise` or `seeds`.
        seeds: int64 [N]. epsilon is `noise(x_0.shape, seeds, stream=STREAM_Q_SAMPLE)`, which
            `denoising_loss` draws too.
        dtype: Dtype of x_t for a uint8 x_0. None: float32. A floating x_0 keeps its dtype.
        backend: "native", "triton" or "reference". None: the first that can run, and "reference" inside
            torch.func transforms and forward-mode differentiation.

    Returns:
        x_t with the shape and memory format of x_0, differentiable in x_0 and noise.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    dtype = _checked_dtype(x_0, dtype)
    check_one_of("noise", noise, "seeds", seeds)
    schedule = schedule.schedule if isinstance(schedule, Objective) else schedule
    check_type("schedule", schedule, NoiseSchedule)
    t = index_tensor("t", t, schedule.num_timesteps, x_0.shape[0], x_0.device)
    if noise is not None:
        check_like("noise", noise, "x_t", x_0.new_empty(0, dtype=dtype), tuple(x_0.shape))
    if seeds is not None:
        seeds = checked_seeds(seeds, x_0.shape[0], x_0.device)
    table = schedule.target("x_t", x_0.device).table
    x_t: Tensor = q_sample_op(x_0, t, table, noise, seeds, dtype, backend=backend)
    return x_t


def _checked_dtype(x_0: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of x_t, or raise."""
    check_float("x_0", x_0, also=(torch.uint8,))
    if x_0.dtype == torch.uint8:
        check_dtype("dtype", dtype, optional=True)
        return dtype or torch.float32
    if dtype is not None and dtype is not x_0.dtype:
        raise InvalidType("dtype", f"to be that of x_0, {x_0.dtype}, or None, as x_0 is not uint8", dtype)
    return x_0.dtype


def _backward(arguments: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    (grad,), t, table = grads, arguments.t, arguments.table

    def scaled(column: int) -> Tensor:
        scaled: Tensor = (reference.per_sample(table[t, column], grad) * grad).to(grad.dtype)
        return scaled

    return {"x_0": scaled(0) if needs.x_0 else None, "noise": scaled(1) if needs.noise else None}


q_sample_op = FusedOp(
    OpSpec(
        "q_sample",
        reference.q_sample,
        outputs={"x_t": lambda a: torch.empty_like(a.x_0, dtype=a.dtype)},
        has_triton=True,
        gradient=Gradient(_backward, reads=("t", "table")),
        fields={"dtype": lambda a: dtype_code(a.dtype)},  # x_0 may be uint8
        check=lambda a: check_range("t", a.t, a.table.shape[0]),
    )
)
