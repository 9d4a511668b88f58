"""Pairwise products: a few rows of a product of independent parameters that still hold every pair of values.

Most faults need one value or two values together, so these rows find almost all that the full product finds. The full product
runs with `--full`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

full = False  # pytest_configure sets it, before any test module is imported


def covering(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return rows that hold every pair of values that `rows` holds; with `--full`, all of them.

    Greedy: the row with most pairs that no row before it has comes next. The result is the same in every process. `rows` may be
    part of a product: combinations that make no sense are left out of it.
    """
    rows = list(rows)
    if full or len(rows) < 2 or len(rows[0]) < 2:
        return rows
    numbers: list[dict[Any, int]] = [{} for _ in rows[0]]
    keys = [tuple(seen.setdefault(_key(value), len(seen)) for seen, value in zip(numbers, row, strict=True)) for row in rows]
    pairs = [set(itertools.combinations(enumerate(key), 2)) for key in keys]
    # Rows with equally many new pairs are taken in a shuffled order. In order, the first values would always repeat.
    order = sorted(range(len(rows)), key=lambda i: zlib.crc32(repr(keys[i]).encode()))
    left = set().union(*pairs)
    taken = []
    while left:
        best = max(order, key=lambda i: len(pairs[i] & left))
        left -= pairs[best]
        taken.append(best)
    return [rows[i] for i in sorted(taken)]


def _key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value  # 0 is not False


def pairwise(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with every pair of values of two parameters; with `--full`, with the product of all.

    The keys of a mapping are the names of its values in the test's name.
    """
    named = [_named(name, each) for name, each in values.items()]
    rows = covering(itertools.product(*(range(len(each)) for each in named)))
    parameters = [[each[i] for each, i in zip(named, row, strict=True)] for row in rows]
    return pytest.mark.parametrize(
        tuple(values), [pytest.param(*(v for _, v in p), id="-".join(name for name, _ in p)) for p in parameters]
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
