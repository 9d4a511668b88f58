"""Timesteps of a plan: named spacings, and listed ones after a check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int
from ..errors import InvalidType, InvalidValue

Spacing = Literal["leading", "trailing", "linspace"]

INTEGERS: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def spaced_timesteps(total: int, num_steps: int, spacing: Spacing) -> Tensor:
    """Return the timesteps of a named spacing, rounded as diffusers rounds them.

    For some counts diffusers' "trailing" adds timestep -1. This function omits it.

    Args:
        total: The number of timesteps T.
        num_steps: The number of steps S, in 1..T.
        spacing: "leading", "trailing" or "linspace".

    Returns:
        int64 [S], strictly descending in 0..T-1.

    Raises:
        ValueError: `num_steps` is out of range, or `spacing` is unknown.
    """
    check_int("num_steps", num_steps, 1, total)
    descending: np.ndarray
    if spacing == "leading":
        descending = np.arange(num_steps)[::-1] * (total // num_steps)
    elif spacing == "trailing":
        descending = np.arange(total, 0, -total / num_steps)[:num_steps].round() - 1
    elif spacing == "linspace":
        descending = np.linspace(0, total - 1, num_steps).round()[::-1]
    else:
        raise InvalidValue("spacing", 'to be "leading", "trailing", "linspace" or a sequence of timesteps', repr(spacing))
    return torch.from_numpy(descending.astype(np.int64))


def checked_timesteps(total: int, num_steps: int | None, spacing: Spacing | Sequence[int], must_descend: bool) -> Tensor:
    """Return the timesteps of a named spacing, or the listed ones after a check.

    Args:
        total: The number of timesteps T.
        num_steps: The number of steps S. None takes every timestep, or the length of the list.
        spacing: A named spacing, or a sequence of timesteps.
        must_descend: Require that listed timesteps strictly descend.

    Returns:
        int64 [S] on the CPU, in 0..T-1.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(spacing, str):
        return spaced_timesteps(total, total if num_steps is None else num_steps, spacing)
    check_int("num_steps", num_steps, 1, optional=True)
    timesteps = checked_tensor("spacing", spacing, "to be a name or timesteps")
    usable = timesteps.dim() == 1 and timesteps.numel() > 0 and timesteps.dtype in INTEGERS
    usable = usable and int(timesteps.min()) >= 0 and int(timesteps.max()) < total
    if not usable or (must_descend and not bool((timesteps.diff() < 0).all())):
        kind = "strictly descending timesteps" if must_descend else "timesteps"
        raise InvalidValue("spacing", f"to be {kind} in 0..{total - 1}", timesteps.tolist())
    if num_steps not in (None, timesteps.numel()):
        raise InvalidValue("num_steps", f"to be None or {timesteps.numel()}, as spacing lists", num_steps)
    return timesteps.to(torch.int64)


def checked_arrivals(timesteps: Tensor, previous: Sequence[int]) -> Tensor:
    """Return where each step arrives, as given, after a check.

    Args:
        timesteps: The start of each step, int64 [S].
        previous: The arrival of each step. At least -1, and below the start.

    Returns:
        int64 [S] on the CPU.

    Raises:
        ValueError: Another number of steps, or an arrival out of range.
    """
    arrivals = checked_tensor("previous", previous, "to be timesteps")
    usable = arrivals.shape == timesteps.shape and arrivals.dtype in INTEGERS
    if not usable or bool((arrivals >= timesteps).any()) or bool((arrivals < -1).any()):
        raise InvalidValue(
            "previous",
            f"to be {timesteps.numel()} timesteps, each at least -1 and below the one that its step starts from",
            arrivals.tolist(),
        )
    return arrivals.to(torch.int64)


def checked_tensor(name: str, values: object, wanted: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on the CPU. Raise a TypeError for anything else."""
    try:
        return torch.as_tensor(values, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(name, wanted, repr(values)) from error
