"""Class labels by number or by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddpm_fast.sampling.arguments import labels_of

CONFIG: dict[str, Any] = {"num_class_embeds": 5, "class_names": ["T-shirt", "ankle boot", "BAG", "bag"]}


@pytest.mark.parametrize("config", [CONFIG, {}, {"class_names": None}])
@pytest.mark.parametrize("labels", [None, 3, -1, [0, 1], (2, 2), [], range(2), torch.tensor([1, 0]), 1.5])
def test_numbers_and_tensors_are_unchanged(config: dict[str, Any], labels: Any) -> None:
    assert labels_of("sample", config, labels) is labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("t-SHIRT", 0),
        ("bag", 3),
        ("BAG", 2),
        ("Bag", 2),  # the first
        (["ankle boot", 7, "T-shirt"], [1, 7, 0]),
        (("Ankle Boot",), [1]),
    ],
)
def test_names_become_numbers(labels: Any, expected: Any) -> None:
    assert labels_of("sample", CONFIG, labels) == expected


@pytest.mark.parametrize("labels", ["hat", [0, "hat"]])
def test_unknown_names_are_errors_that_list_the_known(labels: Any) -> None:
    known = "T-shirt, ankle boot, BAG, bag"
    with pytest.raises(ValueError, match=f"^sample: expected class_labels to be integers or names among {known}, got 'hat'$"):
        labels_of("sample", CONFIG, labels)


@pytest.mark.parametrize("config", [{}, {"num_class_embeds": 3}, {"class_names": None}])
def test_names_need_a_model_with_names(config: dict[str, Any]) -> None:
    message = "^sample: expected class_labels to be integers, as the model has no class names, got 'bag'$"
    with pytest.raises(ValueError, match=message):
        labels_of("sample", config, ["bag"])
