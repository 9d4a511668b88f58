"""Pairwise products: a few rows of a product of independent parameters that still hold every pair of values.

Most faults need one value or two values together, so these rows find almost all that the full product finds. The full product
runs with `--full`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

full = False  # pytest_configure sets it, before any test module is imported


def covering(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the rows that cover every pair of values in `rows`, or all rows with `--full`.

    Greedy: take the row with most pairs that no row before it has; the first one if several have as many. The result is the
    same in every process. Rows may be any part of a product, so combinations that make no sense are left out of `rows`.
    """
    rows = list(rows)
    if full:
        return rows
    numbers: list[dict[Any, int]] = [{} for _ in rows[0]]
    keys = [tuple(seen.setdefault(_key(value), len(seen)) for seen, value in zip(numbers, row, strict=True)) for row in rows]
    pairs = [set(itertools.combinations(enumerate(key), 2)) if len(key) > 1 else {key} for key in keys]
    left = set().union(*pairs)
    taken = []
    while left:
        best = max(range(len(rows)), key=lambda i: (len(pairs[i] & left), -i))
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
    """Parametrize a test with every pair of values of different parameters; with `--full`, with their product."""
    rows = covering(itertools.product(*map(list, values.values())))
    return pytest.mark.parametrize(tuple(values), rows)
