"""The labels that a network reads: which there are, what they are called, and which one stands for no class.

The label of an image is a row of a tensor. Other modules do not know its dtype or shape, so they ask `Labels`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from ..checks import check_device, check_range, check_strided, check_values
from ..errors import InvalidType, InvalidValue, expect

_UNKNOWN: Final = (
    "nothing says which label is no class: pass no_label to the Sampler, or add "
    '"_ddpm_fast": {"no_label": NUMBER} to the config.json of the model, exported if it is a run'
)
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NAMED: Final = 10  # names that a description lists
_COLUMNS: Final = 16  # that a grid has at most


@dataclass(frozen=True)
class Labels:
    """The labels that a network reads. Another kind of labels is another class with these methods.

    Attributes:
        number: Number of labels, with `none`. 0: the network reads no label. None: it is not known.
        none: The label that stands for no class. None: no label does, or it is not known which.
        names: Names of the classes in the order of their labels, as far as they are known.
    """

    KEYS: ClassVar = ("class_names", "no_label")
    """Keys of a network's configuration that describe labels, and do not change the network."""

    number: int | None = 0
    none: int | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], none: int | None = None) -> Labels:
        """Return what a configuration in diffusers' keys says of labels. `none` overrides its `no_label`."""
        number, names = count_of(config.get("num_class_embeds")), tuple(config.get("class_names") or ())
        if none is None:
            stored = count_of(config.get("no_label"))
            none = stored if number is not None and stored in range(number) else None
            # Other libraries' networks may have no such label, so the last is one only if it is the only one without a name.
            none = len(names) if none is None and names and len(names) + 1 == number else none
        return cls(0 if number is None and config and none is None else number, none, names)

    @classmethod
    def of_classes(cls, names: Sequence[str]) -> Labels:
        """Return the labels that training gives to classes: their numbers, and then one for no class.

        If images lie next to the sub-folders, no class has a name.
        """
        return cls(len(names) + 1, len(names), tuple(names) if all(names) else ())

    @classmethod
    def of_number(cls, count: int | None, *given: object) -> Labels:
        """Return the labels of so many classes. None: the network reads no label.

        Args:
            count: Number of classes.
            *given: Names of the classes: the first that are names of so many are taken, or else numbers.
        """
        if count is None:
            return cls()
        for names in given:
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
                continue
            if len(names) == count == len(set(names)):
                return cls.of_classes(names)
        return cls.of_classes([*map(str, range(count))])

    def of_data(self, *names: object) -> Labels:
        """Return the labels of a data set for a network that reads these, with the first names that fit."""
        return Labels.of_number(self.count, *names)

    @classmethod
    def stated(cls, number: int | None, none: int | None, names: Sequence[str] | None) -> Labels:
        """Return the labels of a network's own configuration, in which None means that the network has no such value.

        Raises:
            ValueError: The names or the label for no class do not fit the number of labels.
        """
        number, names = 0 if number is None else number, tuple(names or ())
        named = number - (none is not None and none == number - 1)  # a label for no class that is the last has none
        for holds, wanted in (
            (all(names), "None or a list of non-empty strings"),
            (len({*names}) == len(names), "without repetitions"),
            (len(names) <= named, f"None or at most {named} names, as labels have"),
        ):
            expect(holds, "class_names", f"to be {wanted}", repr(names))
        expect(none is None or none < number, "no_label", f"to be None or below num_class_embeds = {number or None}", none)
        return cls(number, none, names)

    @property
    def stored(self) -> dict[str, Any]:
        """Entries of a network's configuration. Those of `KEYS` are None if they are not known."""
        return {"num_class_embeds": self.number or None, "class_names": [*self.names] or None, "no_label": self.none}

    @property
    def in_data(self) -> dict[str, Any]:
        """Fields of a data set's description that say which labels it has: the names of the classes, or one without a name."""
        return {"classes": self.names or ("",)}

    @property
    def reads(self) -> bool:
        """True if the network reads labels, as far as is known."""
        return bool(self.number)

    @property
    def count(self) -> int | None:
        """Number of the classes to train with, whose labels lie before that of no class. None: the network reads no label."""
        return self.number - 1 if self.number else None

    @property
    def columns(self) -> int:
        """Number of classes that a grid shows. 0: it shows none."""
        return min(len(self.classes or ()), _COLUMNS)

    @property
    def _spare(self) -> int:
        """The label of an image without one: that of no class, or class 0 if no label is known to stand for none."""
        return 0 if self.none is None else self.none

    @property
    def classes(self) -> list[int] | None:
        """Labels of the classes, without `none`."""
        return None if self.number is None else [label for label in range(self.number) if label != self.none]

    # ------------------------------------------------------------------------------------------------- labels of images

    def parse(self, given: Any, num: int, *, in_turn: bool = False) -> Tensor | None:
        """Return the label of each image, int64 [num], or None for a network without labels.

        Args:
            given: See `BatchOptions.class_labels`.
            num: Number of images.
            in_turn: Without labels take the classes in turn, if there are any, and not "none".

        Raises:
            ValueError: Labels are out of range, have another shape, a name is unknown, or the network has no classes. None are
                given, and no label is known to stand for no class.
            TypeError: Labels are not integers.
        """
        if given is None and in_turn and self.classes:
            return self.in_turn(num)
        if given is None or (isinstance(given, str) and self.is_none(given.lower())):
            expect(not self.number or self.none is not None, "class_labels", f"to be labels of classes, as {_UNKNOWN}", given)
            return None if self.none is None else self.blank(num)
        expect(self.number != 0 or self.none is not None, "class_labels", "to be None, as the model has no classes", given)
        wanted = f"to be an int or {num} ints"
        numbers = self.numbers(given)
        try:
            labels = torch.as_tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidType("class_labels", wanted, repr(given)) from None
        check_values("class_labels", labels)
        fits = labels.dtype in _INTEGERS and labels.shape in ((), (num,))
        expect(fits, "class_labels", wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
        if labels.min() < 0 or (self.number is not None and labels.max() >= self.number):
            allowed = "at least 0" if self.number is None else f"in 0..{self.number - 1}"
            raise InvalidValue("class_labels", f"to be {allowed}", given)
        return labels.to(torch.int64).expand(num)

    def of_item(self, place: str, label: Any) -> int:
        """Return the label of an item of a data set as a number. It is 0 if the network reads no label.

        Args:
            place: The item, for errors.
            label: An integer.

        Raises:
            ValueError: It is no label of a class.
        """
        if self.count is None:
            return 0
        try:
            number = operator.index(label)
        except (TypeError, ValueError, RuntimeError):  # a tensor raises all of them
            number = -1
        got = "no label" if label is None else repr(label)
        expect(0 <= number < self.count, place, f"to have a label in 0..{self.count - 1}", got)
        return number

    def in_turn(self, num: int, count: int | None = None) -> Tensor:
        """Return the classes in turn, or the first `count` of them, int64 [num]. The network reads labels."""
        classes = torch.tensor(self.classes, device="cpu")[:count]
        return classes.repeat(-(-num // len(classes)))[:num]

    def blank(self, num: int) -> Tensor:
        """Return labels of no class, int64 [num], or of class 0 if no label is known to stand for none."""
        return torch.full((num,), self._spare, device="cpu")

    def dropped(self, labels: Tensor, where: Tensor) -> Tensor:
        """Return labels [N] with that of no class where a mask [N] is true."""
        return labels.masked_fill(where, self._spare)

    def are_none(self, labels: Tensor) -> bool:
        """Return whether all labels stand for no class."""
        return self.none is not None and bool(labels.eq(self.none).all())

    def ends(self) -> Tensor | None:
        """Return the first and the last label, int64 [2], to try a network with. None: it reads none."""
        return torch.tensor([0, self.number - 1], device="cpu") if self.number else None

    def guides(self, guidance_scale: float | None, labels: Tensor | None) -> bool:
        """Return whether guidance of labels [N] takes a second prediction. Raise a ValueError if there can be none."""
        if guidance_scale is None or guidance_scale == 1:
            return False
        unlabelled = labels is None or self.are_none(labels)
        if unlabelled or self.none is None:
            reason = "there are no class_labels" if unlabelled else _UNKNOWN
            raise InvalidValue("guidance_scale", f"to be None or 1, as {reason}", guidance_scale)
        return True

    # ------------------------------------------------------------------------------------------------------ descriptions

    def __str__(self) -> str:
        """Return the number of classes and the first names. Empty: the network reads no labels."""
        return self.about(_NAMED)

    def about(self, most: int | None = None) -> str:
        """Return the number of classes and their names, `most` of them. Empty: the network reads no labels."""
        labels = range(len(self.names)) if self.classes is None else self.classes
        names = [self.names[label] for label in labels if label < len(self.names)][:most]
        text = ", ".join(names) + ", ..." * (0 < len(names) < len(labels))
        return f"{len(labels)} class{'es' * (len(labels) != 1)}{f': {text}' * bool(text)}" if labels else ""

    # ------------------------------------------------------------------------------------------------------------- checks

    def check(self, labels: Any, x: Tensor, *, values: bool = True) -> None:
        """Raise unless labels are as the network reads them with images x [N, ...]: int64 [N], or None if it reads none.

        Args:
            labels: The labels.
            x: The images.
            values: Look at the values, which takes labels on a CPU.
        """
        number, n = self.number, x.shape[0]
        if not number:
            if labels is not None:
                raise InvalidValue("class_labels", "to be None (num_class_embeds is None)", f"a {type(labels).__name__}")
            return
        if labels is None:
            raise InvalidValue("class_labels", f"to be int64 [N] (num_class_embeds is {number})", "None")
        if not isinstance(labels, Tensor):
            raise InvalidType("class_labels", f"to be int64 [{n}]", type(labels).__name__)
        check_strided("class_labels", labels)
        if labels.dim() != 1 or labels.shape[0] != n or labels.dtype != torch.int64:
            raise InvalidValue("class_labels", f"to be int64 [{n}]", f"{labels.dtype} {tuple(labels.shape)}")
        check_device("class_labels", labels, "x", x)
        if values:
            check_range("class_labels", labels, number)

    def embedding(self, width: int) -> nn.Module | None:
        """Return a new layer from labels [N] to what is added to the embedding of timesteps, [N, width]. None: no labels."""
        return nn.Embedding(self.number, width) if self.number else None

    def check_none(self, none: int) -> None:
        """Raise a ValueError unless the network may read `none` as the label for no class."""
        expect(self.number != 0, "no_label", "to be None, as the model has no classes", none)
        if self.number is not None:
            expect(none < self.number, "no_label", f"to be in 0..{self.number - 1}", none)

    def check_images(self, labels: Tensor, remedy: str) -> None:
        """Raise a ValueError, with a remedy, unless labels of images are those of classes that the network reads."""
        known = self.classes or [0]
        wanted = f"to be in {min(known)}..{max(known)}, as the model has"
        expect({*labels.tolist()} <= {*known}, "labels", wanted, f"{int(labels.max())}; {remedy}")

    def check_trained(self, read: Labels) -> None:
        """Raise a ValueError unless the network to train reads these labels, or none."""
        wanted = f"to have num_class_embeds = {self.number}, the number of classes plus one"
        expect(read.number in (0, self.number), "model", wanted, read.number)
        expect(read.none in (None, self.none), "model", f"to have no_label = {self.none}, the last label, or None", read.none)

    def is_none(self, text: str) -> bool:
        """Return whether a text stands for no class. A class may be called none."""
        return text == "none" and "none" not in [name.lower() for name in self.names]

    def numbers(self, given: Any) -> Any:
        """Return labels with each text replaced by its number. Numbers and tensors are returned unchanged, unchecked."""
        if isinstance(given, str):
            return self._number(given)
        if isinstance(given, Sequence) and any(isinstance(each, str) for each in given):
            return [self._number(each) if isinstance(each, str) else each for each in given]
        return given

    def _number(self, name: str) -> int:
        """Return the label of a name, in upper or lower case, or a number if no name is one."""
        if name in self.names:  # exactly: other names may differ from it in case alone
            return self.names.index(name)
        lower = [known.lower() for known in self.names]
        if name.lower() in lower:
            return lower.index(name.lower())
        if name.isdecimal() and len(name) < 19 and not any(known.isdecimal() for known in self.names):
            return int(name)
        among = f"integers or names among {', '.join(self.names)}"
        wanted = among if self.names else "integers, as the model has no class names"
        raise InvalidValue("class_labels", f"to be {wanted}", repr(name))


def count_of(value: Any) -> int | None:
    """Return a number of a configuration. Those of foreign networks may have values of any type."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
