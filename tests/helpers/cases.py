"""The cases of each test that `make check` runs: every value of each parameter once, and six at most.

Most faults show with one value of one parameter. `--full` runs all cases, which finds those that need two values together.
tests/mutations says how many faults both find.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest

MOST = 6


def chosen(items: Sequence[pytest.Item]) -> set[str]:
    """Return the names of the cases to run. They are the same in every process.

    A marker `every("op")` makes a test of its own of each value of the parameter `op`, `every("case.op")` of each `case.op`.
    So does each device, so that a GPU leaves no case of the CPU out.
    """
    tests: defaultdict[tuple[object, ...], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for item in items:
        parameters = getattr(item, "callspec").params if hasattr(item, "callspec") else {}  # noqa: B009 (pytest.Function alone)
        apart = [attrgetter(*marker.args)(SimpleNamespace(**parameters)) for marker in item.iter_markers("every")]
        tests[item.nodeid.partition("[")[0], repr(apart), parameters.get("device")][item.nodeid] = parameters
    return {name for cases in tests.values() for name in covering(cases)}


def some(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return rows that hold each value of each column, for a test that loops over a product."""
    numbered = {str(i): row for i, row in enumerate(rows)}
    taken = covering({name: {str(i): value for i, value in enumerate(row)} for name, row in numbered.items()})
    return [numbered[name] for name in taken]


def covering(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return names of cases that hold each value of each parameter, and six of them at most.

    Greedy: the case with most values that no case before it has comes next.
    """
    values = {name: {(key, _identity(value)) for key, value in parameters.items()} for name, parameters in cases.items()}
    left = set().union(*values.values())
    # Cases with equally many new values are taken in a shuffled order. In order, the first values would always repeat.
    order = sorted(cases, key=lambda name: zlib.crc32(name.encode()))
    taken = order[:1] if not left else []
    while left and len(taken) < MOST:
        best = max(order, key=lambda name: len(values[name] & left))
        left -= values[best]
        taken.append(best)
    return taken


def _identity(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value  # 0 is not False
