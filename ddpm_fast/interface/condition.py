"""Images that a network reads next to x_t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_finite_maps
from ..errors import expect


@dataclass(frozen=True)
class Condition:
    """Images [N, K, H, W] that a network reads after the channels of x_t.

    Attributes:
        channels: K. 0: the network reads x_t alone. None: it is not known.
        kind: The degradation that makes it of an image, such as "grey", or "images" of other files. None: it is not known.
    """

    KEYS: ClassVar = ("condition", "condition_range")
    """Keys of a network's configuration."""

    channels: int | None = 0
    kind: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], channels: int | None) -> Condition:
        """Return the condition of so many channels that a configuration describes."""
        return cls(channels, config.get("condition"))

    @property
    def is_computed(self) -> bool:
        """True if a degradation computes it from images."""
        return self.kind not in (None, "images")

    def __str__(self) -> str:
        """Return what is read, for messages."""
        if self.channels is None:
            return "a condition"
        channels = f"{self.channels} channel{'s' * (self.channels != 1)} of a condition"
        return f"{channels} ({self.kind})" if self.kind else channels

    def check(self, condition: Any, num: int, shape: Sequence[int]) -> None:
        """Raise unless the condition of a call is as the network reads it. One without a configuration reads any channels.

        Args:
            condition: Floating [num, K, H, W], or None.
            num: Number of images.
            shape: (C, H, W) of an image.

        Raises:
            TypeError: It is no tensor.
            ValueError: It has another shape, is missing, or the network reads none.
        """
        size = ", ".join(map(str, shape[1:]))
        if condition is None:
            wanted = f"to be [{num}, {self.channels}, {size}], as the model reads {self.channels} channels after x_t"
            expect(not self.channels, "condition", wanted, "None")
            return
        expect(self.channels != 0, "condition", "to be None, as the model reads x_t alone", "a condition")
        readable = isinstance(condition, Tensor) and not condition.is_nested and condition.dim() == len(shape) + 1
        channels = max(condition.shape[1] if readable else 0, 1) if self.channels is None else self.channels
        check_finite_maps("condition", condition, [num, channels, *shape[1:]])

    def expect_none(self, name: str, remedy: str = "") -> None:
        """Raise a ValueError if the network reads a condition, which the caller cannot give."""
        expect(not self.channels, name, f"to be one without a condition{remedy}", str(self))
