"""Checks of plain arguments: what passes, and what each error says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ddpm_fast.checks import check_choice, check_int, check_number, check_type


@pytest.mark.parametrize(
    ("value", "bounds", "options"),
    [(0, (), {}), (-3, (), {}), (1, (1,), {}), (5, (1, 5), {}), (None, (1,), {"optional": True})],
)
def test_ints_pass(value: int | None, bounds: tuple[int, ...], options: dict[str, Any]) -> None:
    check_int("f", "x", value, *bounds, **options)


@pytest.mark.parametrize(
    ("value", "bounds", "options", "error", "message"),
    [
        (0, (1,), {}, ValueError, "f: expected x to be a positive integer, got 0"),
        (-1, (0,), {}, ValueError, "f: expected x to be an integer of at least 0, got -1"),
        (6, (1, 5), {}, ValueError, r"f: expected x to be an integer in 1\.\.5, got 6"),
        (0, (1,), {"optional": True}, ValueError, "a positive integer or None, got 0"),
        (1.0, (), {}, TypeError, "f: expected x to be an integer, got 1.0"),
        (True, (1,), {}, TypeError, "a positive integer, got True"),
        ("1", (1,), {}, TypeError, "a positive integer, got '1'"),
        (None, (1,), {}, TypeError, "a positive integer, got None"),
    ],
)
def test_other_ints_do_not(
    value: object, bounds: tuple[int, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_int("f", "x", value, *bounds, **options)


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (math.nan, {}),
        (0, {"low": 0, "high": 0}),
        (0.5, {"above": 0, "below": 1}),
        (math.inf, {"above": 0}),
        (None, {"low": 0, "optional": True}),
        (-1e300, {"finite": True}),
    ],
)
def test_numbers_pass(value: float | None, bounds: dict[str, Any]) -> None:
    check_number("f", "x", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "error", "message"),
    [
        (-1, {"low": 0}, ValueError, "f: expected x to be at least 0, got -1"),
        (0, {"above": 0}, ValueError, "f: expected x to be positive, got 0"),
        (1, {"low": 0, "below": 1}, ValueError, "f: expected x to be at least 0 and below 1, got 1"),
        (1.5, {"above": 0, "high": 1}, ValueError, "f: expected x to be positive and at most 1, got 1.5"),
        (math.inf, {"low": 0, "finite": True}, ValueError, "f: expected x to be at least 0 and finite, got inf"),
        (math.nan, {"finite": True}, ValueError, "f: expected x to be finite, got nan"),
        (-math.inf, {"finite": True}, ValueError, "f: expected x to be finite, got -inf"),
        (0, {"above": 0, "optional": True}, ValueError, "positive or None, got 0"),
        (True, {}, TypeError, "f: expected x to be a number, got bool"),
        ("1", {"optional": True}, TypeError, "f: expected x to be a number or None, got str"),
    ],
)
def test_other_numbers_do_not(value: object, bounds: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_number("f", "x", value, **bounds)


def test_choices_and_types() -> None:
    check_choice("f", "x", "a", ("a", None))
    check_type("f", "x", "a", str)
    with pytest.raises(ValueError, match="f: expected x to be one of a, None, got 'b'"):
        check_choice("f", "x", "b", ("a", None))
    with pytest.raises(TypeError, match="f: expected x to be a str, got int"):
        check_type("f", "x", 1, str)
