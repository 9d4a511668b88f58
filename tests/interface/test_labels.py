"""`Labels`: how labels are given, stored and described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refused

from ddpm_fast.cli.labels import described_labels, labels_in_text
from ddpm_fast.errors import InvalidValue
from ddpm_fast.interface import Labels

NAMES = ("T-shirt", "ankle boot", "BAG", "bag")
UNNAMED = Labels(None)


@pytest.mark.parametrize("names", [NAMES, ()])
@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, [3, 3]), ([0, 1], [0, 1]), ((2, 2), [2, 2]), (range(2), [0, 1]), (torch.tensor([1, 0], dtype=torch.uint8), [1, 0])],
)
def test_numbers_are_labels(names: tuple[str, ...], given: Any, expected: list[int]) -> None:
    parsed = Labels(None, None, names).parse(given, 2)
    assert parsed is not None
    assert (parsed.dtype, parsed.tolist()) == (torch.int64, expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("t-SHIRT", 0),
        ("bag", 3),
        ("BAG", 2),
        ("Bag", 2),  # the first
        (["ankle boot", 7, "T-shirt"], [1, 7, 0]),
        (("Ankle Boot",), [1]),
        (["2", "BAG"], [2, 2]),
    ],
)
def test_names_become_numbers(given: Any, expected: Any) -> None:
    parsed = Labels(None, None, NAMES).parse(given, 1 if isinstance(expected, int) else len(expected))
    assert parsed is not None
    assert parsed.tolist() == ([expected] if isinstance(expected, int) else expected)


def test_a_text_is_a_name_before_it_is_a_number() -> None:
    parsed, unnamed = (
        Labels(None, None, ("1", "2", "7")).parse(["7", 1, "1"], 3),
        UNNAMED.parse(["7", "1"], 2),
    )
    assert parsed is not None
    assert unnamed is not None
    assert (parsed.tolist(), unnamed.tolist()) == ([2, 1, 0], [7, 1])


UNKNOWN = InvalidValue("class_labels", "to be integers or names among T-shirt, ankle boot, BAG, bag", "'hat'")
NAMELESS = InvalidValue("class_labels", "to be integers, as the model has no class names", "'bag'")
NUMBERED = InvalidValue("class_labels", "to be integers or names among 1, 2, 7", "'0'")


@pytest.mark.parametrize(
    ("config", "given", "error"),
    [
        ({"class_names": ("1", "2", "7"), "num_class_embeds": 3}, "0", NUMBERED),
        ({"class_names": NAMES, "num_class_embeds": 4}, "hat", UNKNOWN),
        ({"class_names": NAMES, "num_class_embeds": 4}, [0, "hat"], UNKNOWN),
        ({}, ["bag"], NAMELESS),
        ({"num_class_embeds": 3}, ["bag"], NAMELESS),
        ({"num_class_embeds": 3, "class_names": None}, ["bag"], NAMELESS),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(config: dict[str, Any], given: Any, error: InvalidValue) -> None:
    with refused(error):
        Labels.from_config(config).parse(given, 1 if isinstance(given, str) else len(given))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (Labels(), ""),
        (UNNAMED, ""),
        (Labels(3), "3 classes"),
        (Labels(3, 0), "2 classes"),
        (Labels(3, 2, ("cat", "dog")), "2 classes: cat, dog"),
        (Labels(3, 0, ("none", "dog", "cow")), "2 classes: dog, cow"),
        (Labels(2, 1, ("cat",)), "1 class: cat"),
        (Labels(8, None, ("a", "b")), "8 classes: a, b, ..."),
        (Labels(1, 0), ""),
        (Labels.of_classes([*"abcdefghijkl"]), "12 classes: a, b, c, d, e, f, g, h, i, j, ..."),
        (Labels.of_classes(["", "cat"]), "2 classes"),
    ],
)
def test_a_description_has_the_number_and_the_first_names(labels: Labels, text: str) -> None:
    assert str(labels) == text


@pytest.mark.parametrize(
    "labels", [Labels(), Labels(3), Labels(3, 0), Labels.of_classes(["cat", "dog"]), Labels(2, 0, ("cat",))]
)
def test_labels_are_stored_in_a_configuration(labels: Labels) -> None:
    assert Labels.from_config({"sample_size": 8, **labels.stored}) == labels


@pytest.mark.parametrize(
    ("text", "num", "listed", "described"),
    [
        (None, 2, None, "2 classes in turn"),
        ("none", 2, "none", "no class"),
        ("dog", 2, [1, 1], "class dog"),
        ("dog, CAT", 3, [1, 0, 1], "2 classes in turn"),
        ("0,1,2", 3, [0, 1, 2], "3 classes in turn"),
    ],
)
def test_a_text_lists_classes_in_turn(text: str | None, num: int, listed: Any, described: str) -> None:
    labels = Labels(4, 3, ("cat", "dog"))
    assert labels_in_text(labels, text, num) == listed
    assert described_labels(labels, labels_in_text(labels, text, num), num) == described


@pytest.mark.parametrize(
    ("labels", "text", "expected", "got"),
    [
        (Labels(), "cat", "to be none, as the model has no classes", "'cat'"),
        (Labels(3, 2), "2", "to be in 0..1", "2"),
        (Labels(3, 2), "0,1", "to be one class, as there are no more images", "'0,1'"),
    ],
)
def test_texts_that_list_no_classes_are_refused(labels: Labels, text: str, expected: str, got: str) -> None:
    with refused(InvalidValue("class_labels", expected, got)):
        labels_in_text(labels, text, 1, each=True)


def test_guidance_needs_a_class_and_a_label_for_none() -> None:
    known = Labels(3, 2)
    assert not known.guides(None, None)
    assert not known.guides(1, torch.tensor([0]))
    assert known.guides(2.0, torch.tensor([2, 0]))
    for labels, given in ((known, None), (known, torch.tensor([2, 2])), (Labels(3), torch.tensor([0]))):
        with pytest.raises(ValueError, match=r"^expected guidance_scale to be None or 1, as (there are no|nothing says)"):
            labels.guides(2.0, given)


def test_names_are_the_first_that_fit() -> None:
    assert Labels.of_number(2, None, ["a"], ["a", "a"], ["a", 1], ("b", "c"), ["d", "e"]) == Labels(3, 2, ("b", "c"))
    assert Labels.of_number(2, "ab") == Labels(3, 2, ("0", "1"))
    assert Labels.of_number(None, ["a", "b"]) == Labels()


def test_classes_take_turns_and_some_are_dropped() -> None:
    labels = Labels(4, 1)
    assert labels.in_turn(7).tolist() == [0, 2, 3, 0, 2, 3, 0]
    assert labels.in_turn(3, 2).tolist() == [0, 2, 0]
    assert labels.dropped(torch.tensor([0, 2, 3]), torch.tensor([True, False, True])).tolist() == [1, 2, 1]
    assert labels.blank(2).tolist() == [1, 1]
    assert labels.are_none(labels.blank(2))
    assert not labels.are_none(torch.tensor([1, 0]))
    assert not Labels(4).are_none(torch.tensor([0]))  # nothing says which label is no class
    ends = labels.ends()
    assert ends is not None
    assert ends.tolist() == [0, 3]
    assert Labels().ends() is None
