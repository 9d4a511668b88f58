"""`Condition`: what a network reads after x_t, and how messages call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refused

from ddpm_fast.errors import InvalidValue
from ddpm_fast.interface import Condition

SHAPE = (3, 4, 8)


@pytest.mark.parametrize(
    ("condition", "text", "is_computed"),
    [
        (Condition(None), "a condition", False),
        (Condition(), "0 channels of a condition", False),
        (Condition(1, "grey"), "1 channel of a condition (grey)", True),
        (Condition(2, "images"), "2 channels of a condition (images)", False),
    ],
)
def test_a_description_has_the_channels_and_the_kind(condition: Condition, text: str, is_computed: bool) -> None:
    assert (str(condition), condition.is_computed) == (text, is_computed)


@pytest.mark.parametrize(
    ("condition", "given", "expected", "got"),
    [
        (Condition(2), None, "to be [5, 2, 4, 8], as the model reads 2 channels after x_t", "None"),
        (Condition(0), torch.zeros(5, 2, 4, 8), "to be None, as the model reads x_t alone", "a condition"),
        (Condition(2), torch.zeros(5, 3, 4, 8), "to be floating [5, 2, 4, 8]", "torch.float32 [5, 3, 4, 8]"),
        (Condition(None), torch.zeros(5, 3, 4, 9), "to be floating [5, 3, 4, 8]", "torch.float32 [5, 3, 4, 9]"),
        (Condition(2), torch.full((5, 2, 4, 8), torch.nan), "to be finite", "NaN or infinity"),
    ],
)
def test_what_a_network_does_not_read_is_refused(condition: Condition, given: Any, expected: str, got: str) -> None:
    with refused(InvalidValue("condition", expected, got)):
        condition.check(given, 5, SHAPE)


def test_what_a_network_reads_is_accepted() -> None:
    Condition(0).check(None, 5, SHAPE)
    Condition(None).check(None, 5, SHAPE)
    Condition(2).check(torch.zeros(5, 2, 4, 8), 5, SHAPE)
    Condition(None).check(torch.zeros(5, 7, 4, 8), 5, SHAPE)
    Condition(0).expect_none("model")
    with refused(InvalidValue("model", "to be one without a condition: draw it", "1 channel of a condition (grey)")):
        Condition(1, "grey").expect_none("model", ": draw it")
