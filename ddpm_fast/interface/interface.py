"""The interface of a network: what it reads and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import InvalidValue, expect
from .condition import Condition
from .labels import Labels, count_of

OWN: Final = "_ddpm_fast"
"""The key of a config.json under which the keys that describe data stand. diffusers ignores it."""


@dataclass(frozen=True)
class Interface:
    """The input and output of a network. None: its configuration does not say.

    Attributes:
        channels: Channels C of x_t, and of the images that it draws.
        read_channels: Channels that it reads: C, and those of a condition.
        predicted_channels: Channels that it returns: C, or 2 C with a variance.
        predicts_variance: True if it returns the variance of the reverse steps, too.
        size: (H, W) of its images. It may read others.
        multiple: H and W are multiples of it.
        labels: The labels that it reads.
        condition: The images that it reads after x_t.
    """

    channels: int | None
    read_channels: int | None
    predicted_channels: int | None
    predicts_variance: bool
    size: tuple[int, int] | None
    multiple: int
    labels: Labels
    condition: Condition

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        predicts_variance: bool | None = None,
        no_label: int | None = None,
        halves: bool = True,
    ) -> Interface:
        """Return the interface of a configuration in diffusers' keys. Levels halve the sides with `halves`.

        diffusers keeps the keys of this package, which it does not know, as a config.json has them.
        """
        own = config.get(OWN)
        config = {**config, **own} if isinstance(own, Mapping) else config
        if predicts_variance is None:
            predicts_variance = (config.get("variance") or "").startswith("learned")
        reads, gives = (count_of(config.get(key)) for key in ("in_channels", "out_channels"))
        size = config.get("sample_size")
        sides = [*map(count_of, size if isinstance(size, list | tuple) else (size, size))]
        known = [side for side in sides if side is not None]
        channels = gives if gives is None or not predicts_variance else gives // 2
        # A variance that the network does not predict, or is not asked for, is reported where outputs are checked.
        doubled = gives is not None and (gives % 2 if predicts_variance else gives == 2 * (reads or 0))
        channels = reads if gives is None or doubled else channels
        conditions = None if reads is None or channels is None or gives is None else reads - channels
        return cls(
            channels=channels,
            read_channels=reads,
            predicted_channels=gives,
            predicts_variance=predicts_variance,
            size=(known[0], known[1]) if len(known) == len(sides) == 2 else None,
            multiple=side_multiple(config.get("block_out_channels") or [1]) if halves else 1,
            labels=Labels.from_config(config, no_label),
            condition=Condition.from_config(config, conditions),
        )

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of an image that it draws."""
        return None if self.channels is None or self.size is None else (self.channels, *self.size)

    def check_images(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError unless the network reads and returns images of a shape (C, H, W)."""
        channels, *sides = shape
        predicted = channels * (2 if self.predicts_variance else 1)
        variance = "" if not self.predicts_variance else " and it predicts their variance"
        wanted = f"a model with {predicted} output channels, as images have {channels}{variance}"
        expect(self.predicted_channels in (None, predicted), "", wanted, self.predicted_channels)
        reads = self.read_channels
        wanted = f"to be (C, H, W) with C at most {reads}, which the model reads"
        expect(reads is None or channels <= reads, name, wanted, tuple(shape))
        expect(self.predicted_channels is None or len(sides) == 2, name, "to be (C, H, W)", tuple(shape))
        check_sides(name, sides, self.multiple)


def side_multiple(widths: Sequence[int]) -> int:
    """Return the number of which H and W are multiples: each level of a network with these widths halves them, but the last."""
    return 1 << len(widths) - 1


def check_sides(name: str, sides: Sequence[int], multiple: int) -> None:
    """Raise a ValueError unless the sides of images are multiples of a number."""
    if any(side % multiple for side in sides):  # torch.compile cannot write sides that it does not know into a message
        raise InvalidValue(name, f"to have H and W that are multiples of {multiple}", "x".join(map(str, sides)))
