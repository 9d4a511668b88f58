"""The interface of a network: what it reads and what it gives, read from its configuration in this one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import expect
from ..nn import UNet
from ..nn.config import OWN
from .frozen import FrozenUNet
from .model import Model, inference_form, model_config


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
        num_labels: Number of labels that it reads, 0 if it reads none.
        no_label: The label that stands for no class. None: no label does, or it is not known which.
        class_names: Names of the classes in the order of their labels, as far as they are known.
    """

    channels: int | None
    read_channels: int | None
    predicted_channels: int | None
    predicts_variance: bool
    size: tuple[int, int] | None
    multiple: int
    num_labels: int | None
    no_label: int | None
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, *, predicts_variance: bool | None = None, no_label: int | None = None) -> Interface:
        """Return the interface of a network.

        Args:
            model: The network.
            predicts_variance: As the objective or the plan says. None: as the configuration says, which training writes.
            no_label: The label for no class. None: as the configuration says, see `UNet`.
        """
        model = inference_form(model)
        return cls.from_config(
            model_config(model),
            predicts_variance=predicts_variance,
            no_label=no_label,
            halves=isinstance(model, UNet | FrozenUNet),
        )

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
        reads, gives, embeds = (_count(config.get(key)) for key in ("in_channels", "out_channels", "num_class_embeds"))
        size = config.get("sample_size")
        sides = [*map(_count, size if isinstance(size, list | tuple) else (size, size))]
        known = [side for side in sides if side is not None]
        channels = gives if gives is None or not predicts_variance else gives // 2
        # A variance that the network does not predict, or is not asked for, is said where outputs are checked.
        doubled = gives is not None and (gives % 2 if predicts_variance else gives == 2 * (reads or 0))
        channels = reads if gives is None or doubled else channels
        names = tuple(config.get("class_names") or ())
        if no_label is None:
            stored = _count(config.get("no_label"))
            no_label = stored if stored in range(embeds or 0) else None
            # Other libraries' networks may have no such label, so the last is one only if it is the only one without a name.
            no_label = len(names) if no_label is None and names and len(names) + 1 == embeds else no_label
        return cls(
            channels=channels,
            read_channels=reads,
            predicted_channels=gives,
            predicts_variance=predicts_variance,
            size=(known[0], known[1]) if len(known) == len(sides) == 2 else None,
            multiple=2 ** (len(config.get("block_out_channels") or [1]) - 1) if halves else 1,
            num_labels=0 if embeds is None and config and no_label is None else embeds,
            no_label=no_label,
            class_names=names,
        )

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of an image that it draws."""
        return None if self.channels is None or self.size is None else (self.channels, *self.size)

    @property
    def classes(self) -> list[int] | None:
        """Labels of the classes, without `no_label`."""
        return None if self.num_labels is None else [label for label in range(self.num_labels) if label != self.no_label]

    @property
    def condition_channels(self) -> int | None:
        """Channels K of the condition that the network reads after x_t, 0 for none."""
        if self.read_channels is None or self.channels is None or self.predicted_channels is None:
            return None
        return self.read_channels - self.channels

    def check_images(self, caller: str, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError unless the network reads and returns images of a shape (C, H, W)."""
        channels, *sides = shape
        predicted = channels * (2 if self.predicts_variance else 1)
        variance = "" if not self.predicts_variance else " and it predicts their variance"
        wanted = f"a model with {predicted} output channels, as images have {channels}{variance}"
        expect(self.predicted_channels in (None, predicted), caller, "", wanted, self.predicted_channels)
        reads = self.read_channels
        wanted = f"to be (C, H, W) with C at most {reads}, which the model reads"
        expect(reads is None or channels <= reads, caller, name, wanted, tuple(shape))
        expect(self.predicted_channels is None or len(sides) == 2, caller, name, "to be (C, H, W)", tuple(shape))
        wanted = f"to have H and W that are multiples of {self.multiple}"
        fits = all(side % self.multiple == 0 for side in sides)
        expect(fits, caller, name, wanted, "x".join(map(str, sides)))


def _count(value: Any) -> int | None:
    """Return a number of a configuration. Those of foreign networks may have values of any type."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
