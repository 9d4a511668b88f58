"""The labels that a network reads: which there are, what they are called, and which one stands for no class."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from ..checks import check_device, check_range, check_strided, check_values
from ..errors import InvalidType, InvalidValue, expect

_UNKNOWN: Final = (
    "nothing says which label is no class: pass no_label to the Sampler, or add "
    '"_ddpm_fast": {"no_label": NUMBER} to the config.json of the model, exported if it is a run'
)
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MAX_LABEL: Final = 65_535  # ImageNet-21k has 21,841 classes
_NAMED: Final = 10  # names that a description lists


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
            none = stored if stored in range(number or 0) else None
            # Other libraries' networks may have no such label, so the last is one only if it is the only one without a name.
            none = len(names) if none is None and names and len(names) + 1 == number else none
        return cls(0 if number is None and config and none is None else number, none, names)

    @classmethod
    def of_classes(cls, names: Sequence[str]) -> Labels:
        """Return the labels that training gives to classes: their numbers, and then one for no class.

        Images next to sub-folders make a class without a name. Then no class has one.
        """
        return cls(len(names) + 1, len(names), tuple(names) if all(names) else ())

    @staticmethod
    def names_of(count: int, *given: object) -> tuple[str, ...]:
        """Return names of classes: the first of those given that are names of so many, or else numbers."""
        for names in given:
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
                continue
            if len(names) == count == len(set(names)):
                return tuple(names)
        return tuple(map(str, range(count)))

    @property
    def stored(self) -> dict[str, Any]:
        """Entries of a network's configuration. Those of `KEYS` are None if they are not known."""
        return {"num_class_embeds": self.number or None, "class_names": [*self.names] or None, "no_label": self.none}

    @property
    def classes(self) -> list[int] | None:
        """Labels of the classes, without `none`."""
        return None if self.number is None else [label for label in range(self.number) if label != self.none]

    # ------------------------------------------------------------------------------------------------- labels of images

    def parse(self, caller: str, given: Any, num: int, *, in_turn: bool = False) -> Tensor | None:
        """Return the label of each image, int64 [num], or None for a network without labels.

        Args:
            caller: Name of the calling function for error messages.
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
        if given is None or (isinstance(given, str) and self._is_none(given.lower())):
            wanted = f"to be labels of classes, as {_UNKNOWN}"
            expect(not self.number or self.none is not None, caller, "class_labels", wanted, given)
            return None if self.none is None else self.blank(num)
        wanted = "to be None, as the model has no classes"
        expect(self.number != 0 or self.none is not None, caller, "class_labels", wanted, given)
        wanted = f"to be an int or {num} ints"
        numbers = self._numbers(caller, given)
        try:
            labels = torch.as_tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidType(caller, "class_labels", wanted, repr(given)) from None
        check_values(caller, "class_labels", labels)
        fits = labels.dtype in _INTEGERS and labels.shape in ((), (num,))
        expect(fits, caller, "class_labels", wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
        if labels.min() < 0 or (self.number is not None and labels.max() >= self.number):
            allowed = "at least 0" if self.number is None else f"in 0..{self.number - 1}"
            raise InvalidValue(caller, "class_labels", f"to be {allowed}", given)
        return labels.to(torch.int64).expand(num)

    def listed(self, command: str, text: str | None, num: int, *, each: bool = False) -> list[int] | str | None:
        """Return a label for each image as a command's text lists them: in turn, "none", or None for the default.

        Args:
            command: Name of the command for error messages.
            text: Names or numbers with commas between them, or "none".
            num: Number of images.
            each: A class that would get no image is an error.
        """
        if text is None or (text == "none" and self._is_none(text)):
            return text
        known = {*(self.classes or ()), *range(len(self.names))}  # a label for no class may have a name
        expect(known, command, "classes", "to be none, as the model has no classes", repr(text))
        chosen: Any = self._numbers(command, [part.strip() for part in text.split(",")])
        expect({*chosen} <= known, command, "classes", f"to be in {min(known)}..{max(known)}", max(chosen))
        wanted = "one class" if num == 1 else f"at most {num} classes"
        fits = not each or len(chosen) <= num
        expect(fits, command, "classes", f"to be {wanted}, as there are no more images", repr(text))
        return [chosen[i % len(chosen)] for i in range(num)]

    def in_turn(self, num: int, count: int | None = None) -> Tensor:
        """Return the classes in turn, or the first `count` of them, int64 [num]. The network reads labels."""
        classes = torch.tensor(self.classes, device="cpu")[:count]
        return classes.repeat(-(-num // len(classes)))[:num]

    def blank(self, num: int) -> Tensor:
        """Return labels of no class, int64 [num], or of class 0 if no label is known to stand for none."""
        return torch.full((num,), self.none or 0, device="cpu")

    def dropped(self, labels: Tensor, where: Tensor) -> Tensor:
        """Return labels [N] with that of no class where a mask [N] is true."""
        return labels.masked_fill(where, self.none or 0)

    def ends(self) -> Tensor | None:
        """Return the first and the last label, int64 [2], to try a network with. None: it reads none."""
        return torch.tensor([0, self.number - 1]) if self.number else None

    def guides(self, caller: str, guidance_scale: float | None, labels: Tensor | None) -> bool:
        """Return whether guidance of labels [N] takes a second prediction. Raise a ValueError if there can be none."""
        if guidance_scale is None or guidance_scale == 1:
            return False
        unlabelled = labels is None or bool(labels.eq(-1 if self.none is None else self.none).all())
        if unlabelled or self.none is None:
            reason = "there are no class_labels" if unlabelled else _UNKNOWN
            raise InvalidValue(caller, "guidance_scale", f"to be None or 1, as {reason}", guidance_scale)
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

    def described(self, chosen: Sequence[int] | str | None, num: int) -> str:
        """Return which classes `num` images have, of labels as `listed` returns them."""
        labels: list[Any] = (
            [] if chosen == "none" else (self.classes or [])[:num] if chosen is None else [*dict.fromkeys(chosen)]
        )
        if len(labels) != 1:
            return f"{len(labels)} classes in turn" if labels else "no class"
        return f"class {self.names[labels[0]] if labels[0] < len(self.names) else labels[0]}"

    # ------------------------------------------------------------------------------------------------------------- checks

    def check_stored(self, caller: str) -> None:
        """Raise a ValueError unless the names and the label for no class fit the number of labels."""
        number = self.number or 0
        named = number - (self.none is not None and self.none == number - 1)  # a label for no class that is the last has none
        for holds, wanted in (
            (all(self.names), "None or a list of non-empty strings"),
            (len({*self.names}) == len(self.names), "without repetitions"),
            (len(self.names) <= named, f"None or at most {named} names, as labels have"),
        ):
            expect(holds, caller, "class_names", f"to be {wanted}", repr(self.names))
        wanted = f"to be None or below num_class_embeds = {number or None}"
        expect(self.none is None or self.none < number, caller, "no_label", wanted, self.none)

    def check_none(self, caller: str, none: int) -> None:
        """Raise a ValueError unless the network may read `none` as the label for no class."""
        expect(self.number != 0, caller, "no_label", "to be None, as the model has no classes", none)
        fits = self.number is None or none < self.number
        expect(fits, caller, "no_label", f"to be in 0..{(self.number or 0) - 1}", none)

    def check_trained(self, caller: str, read: Labels) -> None:
        """Raise a ValueError unless the network to train reads these labels, or none."""
        wanted = f"to have num_class_embeds = {self.number}, the number of classes plus one"
        expect(read.number in (0, self.number), caller, "model", wanted, read.number)
        wanted = f"to have no_label = {self.none}, the last label, or None"
        expect(read.none in (None, self.none), caller, "model", wanted, read.none)

    def _is_none(self, text: str) -> bool:
        """Return whether a text stands for no class. A class may be called none."""
        return text == "none" and "none" not in [name.lower() for name in self.names]

    def _numbers(self, caller: str, given: Any) -> Any:
        """Return labels with each text replaced by its number. Numbers and tensors are returned unchanged, unchecked."""
        if isinstance(given, str):
            return self._number(caller, given)
        if isinstance(given, Sequence) and any(isinstance(each, str) for each in given):
            return [self._number(caller, each) if isinstance(each, str) else each for each in given]
        return given

    def _number(self, caller: str, name: str) -> int:
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
        raise InvalidValue(caller, "class_labels", f"to be {wanted}", repr(name))


def check_labels(caller: str, number: int | None, labels: Any, x: Tensor, *, values: bool = True) -> None:
    """Raise unless labels are as a network with `number` labels reads them with images x [N, ...]: int64 [N], or None.

    Args:
        caller: Name of the calling function for error messages.
        number: Number of labels, None for a network that reads none.
        labels: The labels.
        x: The images.
        values: Look at the values, which takes labels on a CPU.
    """
    if number is None:
        if labels is not None:
            raise InvalidValue(caller, "class_labels", "to be None (num_class_embeds is None)", f"a {type(labels).__name__}")
        return
    n = x.shape[0]
    if labels is None:
        raise InvalidValue(caller, "class_labels", f"to be int64 [N] (num_class_embeds is {number})", "None")
    if not isinstance(labels, Tensor):
        raise InvalidType(caller, "class_labels", f"to be int64 [{n}]", type(labels).__name__)
    check_strided(caller, "class_labels", labels)
    if labels.dim() != 1 or labels.shape[0] != n or labels.dtype != torch.int64:
        raise InvalidValue(caller, "class_labels", f"to be int64 [{n}]", f"{labels.dtype} {tuple(labels.shape)}")
    check_device(caller, "class_labels", labels, "x", x)
    if values:
        check_range(caller, "class_labels", labels, number)


def count_of(value: Any) -> int | None:
    """Return a number of a configuration. Those of foreign networks may have values of any type."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ------------------------------------------------------------------------------------------------------------ labels in files


def checked_labels(
    root: str, labels: Any | None, count: int, classes: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels as int64 [count], and the names of the classes.

    Args:
        root: The file of the labels, for errors.
        labels: Integers. None: there is one class "".
        count: Number of images.
        classes: Names of the classes. None: their numbers.

    Raises:
        ValueError: `labels` are not `count` integers, or one is out of range.
    """
    if labels is None:
        return torch.zeros(count, dtype=torch.int64), ("",)
    values, most = np.asarray(labels), _MAX_LABEL if classes is None else len(classes) - 1
    right, got = values.dtype.kind in "iu" and values.shape == (count,), f"{values.dtype} {list(values.shape)}"
    expect(right, "load_dataset", f"the labels of {root}", f"to be integers [{count}]", got)
    low, high = int(values.min()), int(values.max())
    expect(low >= 0 and high <= most, "load_dataset", "labels", f"in 0..{most}", low if low < 0 else high, root)
    return torch.from_numpy(values.astype(np.int64)), tuple(classes or map(str, range(high + 1)))


def listed_labels(place: str, read: Callable[[], bytes], names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]] | None:
    """Return the labels in a `dataset.json`, as the data set tools of EDM and StyleGAN write it, and the classes: numbers.

    Args:
        place: The file, for errors.
        read: A function that reads it.
        names: Paths of images, relative to the file's folder.

    Returns:
        int64 [N], and one class "" if the labels are null. None: the file is of another kind.

    Raises:
        ValueError: The labels are not pairs of name and number, or a name has none.
    """
    try:
        values = json.loads(read())
    except Exception as error:  # damaged archives raise errors of many types
        raise InvalidValue("load_dataset", place, "to be JSON", error) from error
    if not (isinstance(values, dict) and "labels" in values):
        return None
    pairs = values["labels"]
    if pairs is None:
        return checked_labels(place, None, len(names))
    paired = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    expect(paired, "load_dataset", "labels", "to be a list of pairs [name, label], or null", reprlib.repr(pairs), place)
    given = {str(name): label for name, label in pairs}
    labels = [given.get(name.replace("\\", "/"), "none") for name in names]
    for name, label in zip(names, labels, strict=True):
        right = type(label) is int and 0 <= label <= _MAX_LABEL
        wanted = f"the label of {name} in {place} to be in 0..{_MAX_LABEL}"
        expect(right, "load_dataset", "", wanted, "none" if label == "none" else reprlib.repr(label))
    return checked_labels(place, labels, len(names))
