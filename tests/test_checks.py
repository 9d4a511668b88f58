"""Checks of plain arguments: what passes, and what each error says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from refusals import by, refused

from ddpm_fast.checks import (
    check_callable,
    check_choice,
    check_dtype,
    check_int,
    check_ints,
    check_number,
    check_path,
    check_same,
    check_type,
    checked_device,
    computing_device,
)
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.options import checked, within


@pytest.mark.parametrize(
    ("check", "value", "options"),
    [
        (check_int, 0, {}),
        (check_int, -3, {}),
        (check_int, 1, {"low": 1}),
        (check_int, 5, {"low": 1, "high": 5}),
        (check_int, None, {"low": 1, "optional": True}),
        (check_number, math.nan, {}),
        (check_number, 0, {"low": 0, "high": 0}),
        (check_number, 0.5, {"above": 0, "below": 1}),
        (check_number, math.inf, {"above": 0}),
        (check_number, None, {"low": 0, "optional": True}),
        (check_number, -1e300, {"finite": True}),
        (check_choice, "a", {"choices": ("a", None)}),
        (check_type, "a", {"kind": str}),
        (check_type, None, {"kind": str, "optional": True}),
        *((check_callable, value, {}) for value in (print, None)),
        *((check_path, value, {}) for value in ("a", Path("a"), Path(""))),
        (check_dtype, torch.float16, {}),
        (check_dtype, None, {"optional": True}),
        *((check_ints, value, {"low": 1, "form": "sizes"}) for value in ((2, 3), [2], torch.Size([1]), range(1, 3))),
    ],
)
def test_right_arguments_pass(check: Callable[..., None], value: object, options: dict[str, Any]) -> None:
    check("x", value, **options)


@pytest.mark.parametrize(
    ("check", "value", "options", "error"),
    [
        (check_int, 0, {"low": 1}, InvalidValue("x", "to be a positive integer", "0")),
        (check_int, -1, {"low": 0}, InvalidValue("x", "to be an integer of at least 0", "-1")),
        (check_int, 6, {"low": 1, "high": 5}, InvalidValue("x", "to be an integer in 1..5", "6")),
        (check_int, 0, {"low": 1, "optional": True}, InvalidValue("x", "to be a positive integer or None", "0")),
        (check_int, 1.0, {}, InvalidType("x", "to be an integer", "1.0")),
        (check_int, True, {"low": 1}, InvalidType("x", "to be a positive integer", "True")),
        (check_int, "1", {"low": 1}, InvalidType("x", "to be a positive integer", "'1'")),
        (check_int, None, {"low": 1}, InvalidType("x", "to be a positive integer", "None")),
        (check_number, -1, {"low": 0}, InvalidValue("x", "to be at least 0", "-1")),
        (check_number, 0, {"above": 0}, InvalidValue("x", "to be positive", "0")),
        (check_number, 1, {"low": 0, "below": 1}, InvalidValue("x", "to be at least 0 and below 1", "1")),
        (check_number, 1.5, {"above": 0, "high": 1}, InvalidValue("x", "to be positive and at most 1", "1.5")),
        (check_number, math.inf, {"low": 0, "finite": True}, InvalidValue("x", "to be at least 0 and finite", "inf")),
        (check_number, math.nan, {"finite": True}, InvalidValue("x", "to be finite", "nan")),
        (check_number, -math.inf, {"finite": True}, InvalidValue("x", "to be finite", "-inf")),
        (check_number, 0, {"above": 0.5}, InvalidValue("x", "to be above 0.5", "0")),
        (check_number, 0, {"above": 0, "optional": True}, InvalidValue("x", "to be positive or None", "0")),
        (check_number, True, {}, InvalidType("x", "to be a number", "bool")),
        (check_number, "1", {"optional": True}, InvalidType("x", "to be a number or None", "str")),
        (check_number, 1 << 63, {}, InvalidValue("x", "to be a number that fits in 64 bits", "9223372036854775808")),
    ],
)
def test_other_numbers_do_not(check: Callable[..., None], value: object, options: dict[str, Any], error: ArgumentError) -> None:
    with refused(error):
        check("x", value, **options)


def test_devices_are_named_or_chosen() -> None:
    for name in ("cpu", "meta", torch.device("cpu")):
        assert checked_device(name) == torch.device(name)
    assert computing_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_choice("x", "b", ("a", None)), ValueError, "x to be a or None, got 'b'"),
        (lambda: check_choice("x", 1, ("a", None)), TypeError, "x to be a or None, got 1"),
        # A tensor of two numbers has no truth value.
        (lambda: check_choice("x", torch.ones(2), (0, 1)), TypeError, r"one of 0, 1, got tensor\(\[1., 1.\]\)"),
        (lambda: check_type("x", 1, str), TypeError, "x to be a str, got int"),
        (lambda: check_type("x", 1, str, optional=True), TypeError, "x to be a str or None, got int"),
        (lambda: check_callable("x", 1), TypeError, "x to be callable or None, got int"),
        (lambda: check_path("x", b"a"), TypeError, r"x to be a path \(str or os.PathLike\), got bytes"),
        (lambda: check_path("x", ""), ValueError, "x to be a path, got an empty text"),
        (lambda: check_dtype("x", torch.int8), TypeError, "x to be float32, .*or bfloat16, got torch.int8"),
        (lambda: check_dtype("x", None), TypeError, "x to be float32, .*or bfloat16, got None"),
        (lambda: check_dtype("x", "float32", optional=True), TypeError, "bfloat16 or None, got 'float32'"),
        (lambda: check_ints("x", (2, True), 1, "sizes"), TypeError, r"x to be sizes, got \(2, True\)"),
        (lambda: check_ints("x", b"ab", 1, "sizes"), TypeError, "x to be sizes, got b'ab'"),
        (lambda: check_ints("x", (), 1, "sizes"), ValueError, r"x to be sizes, each at least 1, got \[\]"),
        (lambda: check_ints("x", (2, 0), 1, "sizes"), ValueError, r"each at least 1, got \[2, 0\]"),
        (lambda: checked_device(0), TypeError, "device to be a torch.device or its name, got int"),
        (lambda: checked_device("gpu"), ValueError, "device to be a torch.device or its name, got 'gpu'"),
        (lambda: checked_device("cuda:99"), ValueError, "device to be available, got cuda:99: PyTorch sees"),
        (lambda: checked_device("xla"), ValueError, "device to be available, got xla: PyTorch cannot use it"),
        (lambda: computing_device("meta"), ValueError, "device to be one that computes, got meta"),
    ],
)
def test_other_wrong_arguments_do_not(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^expected .*{message}"):
        call()


@checked()
def _called(a: Annotated[int, within(low=1)], *, b: Annotated[float, within(0, 1)] = 0.0, c: bool = False) -> tuple[Any, ...]:
    return a, b, c


def test_a_signature_declares_what_is_checked() -> None:
    assert _called(1, b=0.5) == (1, 0.5, False)
    assert str(inspect.signature(_called)).startswith("(a: int, *, b: float = 0.0, c: bool = False)")
    for call, error in (
        (lambda: _called(0), by("_called", InvalidValue("a", "to be a positive integer", "0"))),
        (lambda: _called(a=1, b=2.0), by("_called", InvalidValue("b", "to be at least 0 and at most 1", "2.0"))),
        (lambda: _called(a=True), by("_called", InvalidType("a", "to be a positive integer", "True"))),
    ):
        with refused(error):
            call()


def test_a_call_that_does_not_fit_the_signature_is_pythons_error() -> None:
    for call in (lambda: _called(1, 2.0), lambda: _called(b=2.0), lambda: _called(1, a=0), lambda: _called(1, d=1)):
        with pytest.raises(TypeError, match=r"^_called\(\) ") as error:
            call()
        assert type(error.value) is TypeError


def test_values_of_elsewhere_are_wanted_by_name() -> None:
    check_same({"flour": 2}, {"flour": 2, "eggs": 1}, "'cake'")
    with refused(InvalidValue("flour", "to be 2, as in 'cake'", "3; bake another")):
        check_same({"flour": 3}, {"flour": 2}, "'cake'", "; bake another")
    with refused(InvalidValue("eggs", "to be None, as in 'cake'", "1")):
        check_same({"eggs": 1}, {}, "'cake'")
