"""Prints what `test_ops.py` measured, which pytest-benchmark's own table has no columns for."""

from typing import Any

import common
import pytest

MEASURED: pytest.StashKey[list[dict[str, object]]] = pytest.StashKey()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> list[dict[str, object]]:
    """The rows of the table."""
    return request.config.stash.setdefault(MEASURED, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(MEASURED, [])
    if rows:
        common.print_machine(common.machine())
        common.print_table("medians; copy: the bytes that have to move, copied, over the time taken", rows)
