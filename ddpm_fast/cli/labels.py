"""Labels of images as the words of a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import expect

if TYPE_CHECKING:
    from ..interface import Labels


def labels_in_text(labels: Labels, text: str | None, num: int, *, each: bool = False) -> list[int] | str | None:
    """Return a label for each image as --classes lists them: in turn, "none", or None for the default.

    Args:
        labels: The labels that the network reads.
        text: Names or numbers with commas between them, or "none".
        num: Number of images.
        each: A class that would get no image is an error.
    """
    name = "class_labels"
    if text is None or (text == "none" and labels.is_none(text)):
        return text
    known = {*(labels.classes or ()), *range(len(labels.names))}  # a label for no class may have a name
    expect(known, name, "to be none, as the model has no classes", repr(text))
    chosen: Any = labels.numbers([part.strip() for part in text.split(",")])
    unknown = [each for each in chosen if each not in known]
    expect(not unknown, name, f"to be in {min(known)}..{max(known)}", next(iter(unknown), None))
    wanted = "one class" if num == 1 else f"at most {num} classes"
    expect(not each or len(chosen) <= num, name, f"to be {wanted}, as there are no more images", repr(text))
    return [chosen[i % len(chosen)] for i in range(num)]


def described_labels(labels: Labels, chosen: Sequence[int] | str | None, num: int) -> str:
    """Return which classes `num` images have, of labels as `labels_in_text` returns them."""
    different: list[Any] = (
        [] if chosen == "none" else (labels.classes or [])[:num] if chosen is None else [*dict.fromkeys(chosen)]
    )
    if len(different) != 1:
        return f"{len(different)} classes in turn" if different else "no class"
    return f"class {labels.names[different[0]] if different[0] < len(labels.names) else different[0]}"
