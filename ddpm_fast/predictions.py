"""Predictions of a network by name. Nothing here needs PyTorch, so the command line's help does not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

Columns: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"

TARGETS: Final[dict[str, Columns]] = {
    "epsilon": lambda alpha, sigma: (0 * alpha, 0 * sigma + 1),
    "sample": lambda alpha, sigma: (0 * alpha + 1, 0 * sigma),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (0 * alpha - 1, 0 * sigma + 1),
}
"""Prediction -> function(alpha, sigma) that returns the columns a and b of the network's target, m = a x_0 + b epsilon.

With x_t = alpha x_0 + sigma epsilon, "v_prediction" is the velocity of Salimans and Ho 2022, and "flow" that of flow matching
(Lipman et al. 2023), epsilon - x_0.
"""

DIFFUSERS_PREDICTIONS: Final = ("epsilon", "sample", "v_prediction")
"""The predictions that diffusers' schedulers know."""
