"""The cases of each test that `make check` runs."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import cases
import pytest


@pytest.mark.parametrize(
    ("values", "most"),
    [
        ({"a": [1, True, 1.0], "b": ["x", "y"], "c": [[], {}, ()]}, 3),  # equal values, and some without a hash
        ({"a": list(range(20)), "b": ["x", "y"]}, 6),
    ],
)
def test_each_value_is_there_once_and_six_cases_at_most(values: dict[str, list[object]], most: int) -> None:
    rows = {str(row): dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())}
    taken = cases.covering(rows)
    assert len(taken) == most
    for name, each in values.items():
        assert len({repr(rows[row][name]) for row in taken}) == min(most, len(each))
    assert cases.covering(dict(reversed(rows.items()))) == taken  # any order of collection


def item(test: str, op: str, layout: object, *apart: str) -> Any:
    markers = [SimpleNamespace(args=apart)] if apart else []
    parameters = {"op": op, "layout": layout}
    return SimpleNamespace(
        nodeid=f"{test}[{op}-{layout}]", callspec=SimpleNamespace(params=parameters), iter_markers=lambda name: markers
    )


def test_the_cases_of_each_value_of_a_parameter_may_be_a_test_of_their_own() -> None:
    product = [*itertools.product(("noise", "q_sample"), (None, []))]
    together = [item("test_together", *row) for row in product]
    apart = [item("test_apart", *row, "op") for row in product]
    alone = SimpleNamespace(nodeid="test_alone", iter_markers=lambda name: [])
    chosen = cases.chosen([*together, *apart, alone])
    counts = Counter(name.partition("[")[0] for name in chosen)
    assert counts == {"test_together": 2, "test_apart": 4, "test_alone": 1}
