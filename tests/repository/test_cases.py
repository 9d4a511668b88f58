"""The cases of each test that `make check` runs."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import cases


def named(**values: list[object]) -> dict[str, dict[str, object]]:
    return {str(row): dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())}


def test_each_value_is_there_once() -> None:
    rows = named(a=[1, True, 1.0], b=["x", "y"], c=[[], {}, ()])  # values that compare as equal, and some without a hash
    taken = [rows[name] for name in cases.covering(rows)]
    assert len(taken) == 3
    for parameter, count in (("a", 3), ("b", 2), ("c", 3)):
        assert len({repr(row[parameter]) for row in taken}) == count


def test_at_most_six_cases_are_taken_and_they_differ() -> None:
    rows = named(a=list(range(20)), b=["x", "y"])
    taken = cases.covering(rows)
    assert len(taken) == 6
    assert len({rows[name]["a"] for name in taken}) == 6
    assert {rows[name]["b"] for name in taken} == {"x", "y"}
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
