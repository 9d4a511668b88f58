"""Test-wide settings."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import build_age
import environment  # noqa: F401 (before fixtures: torch and triton read the variables that it sets)
import pairwise
import pytest
from fixtures import (  # noqa: F401
    EMULATED,
    _nan_filled_buffers,
    _seeded,
    calls,
    device,
    emulated,
    emulated_module,
    matrix_kernels,
    no_matrix_kernels,
)

# Machines that only check a GPU may lack what a whole file of tests needs.
collect_ignore = [
    file
    for module, file in (("hypothesis", "test_properties.py"), ("diffusers", "test_argument_types.py"))
    if importlib.util.find_spec(module) is None
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow tests, and full products of parameters")


def pytest_configure(config: pytest.Config) -> None:
    pairwise.full = config.getoption("full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless --full is given."""
    if config.getoption("full"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a process of pytest-xdist has run on the emulator."""
    counts = getattr(node, "workeroutput", {}).get("emulated", {})
    node.config.stash.setdefault(EMULATED, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    why_old = build_age.why_old()
    if why_old is not None:
        terminalreporter.write_line(
            f"The native module was not built from these sources: {why_old}. Run `make build`.", red=True
        )
    if config.stash.get(EMULATED, None):
        ran = ", ".join(f"{count} {what}" for what, count in config.stash[EMULATED].items())
        terminalreporter.write_line(f"On the emulator: {ran}")
