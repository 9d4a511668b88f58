from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

full = False  # pytest_configure sets it, before any test module is imported


def covering(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    return list(rows)


def pairwise(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the product of all.

    The keys of a mapping are the names of its values in the test's name.
    """
    rows = itertools.product(*(_named(name, each) for name, each in values.items()))
    return pytest.mark.parametrize(
        tuple(values), [pytest.param(*(v for _, v in p), id="-".join(name for name, _ in p)) for p in rows]
    )


def _named(parameter: str, values: Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return [(str(name), value) for name, value in values.items()]
    plain = (str, int, float, bool, type(None))
    return [
        (
            str(value) if isinstance(value, plain) else getattr(value, "name", getattr(value, "__name__", f"{parameter}{i}")),
            value,
        )
        for i, value in enumerate(values)
    ]
