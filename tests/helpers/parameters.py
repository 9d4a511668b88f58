"""Tests with the product of several parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def parametrize(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the product of all values. `tests/helpers/cases.py` chooses those of `make check`.

    The keys of a mapping are the names of its values in the test's name.
    """
    rows = itertools.product(*(_named(name, each) for name, each in values.items()))
    named = [pytest.param(*(value for _, value in row), id="-".join(name for name, _ in row)) for row in rows]
    return pytest.mark.parametrize(tuple(values), named)


def _named(parameter: str, values: Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return [(str(name), value) for name, value in values.items()]
    return [(_name(value) or f"{parameter}{i}", value) for i, value in enumerate(values)]


def _name(value: Any) -> str | None:
    if isinstance(value, str | int | float | bool | None):
        return str(value)
    return getattr(value, "name", getattr(value, "__name__", None))
