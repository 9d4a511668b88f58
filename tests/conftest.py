"""Test-wide settings."""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from pathlib import Path
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
    no_matrix_units,
)

# Machines that only check a GPU may lack what a whole file of tests needs.
collect_ignore = [
    file
    for module, file in (("hypothesis", "test_properties.py"), ("diffusers", "repository/test_argument_types.py"))
    if importlib.util.find_spec(module) is None
]


# Each case of these asks another question of a library.
ABOUT_LIBRARIES = (
    *("cli/", "files/", "integrations/", "nn/", "plan/", "schedule/", "test_pretrained.py", "test_schemas.py"),
    *("ops/test_parity.py", "ops/test_registration.py", "ops/test_tensors.py", "ops/test_transforms.py", "training/test_data"),
)


class PassedTests:
    """A plugin that writes the names of the tests that pass to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # also before or after the test itself
            self.failed.add(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text("\n".join(sorted(self.passed - self.failed)), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow tests, and full products of most parameters")
    help = "run a few cases of each test, but all that ask a library something"
    parser.addoption("--few", action="store_true", help=help)
    parser.addoption("--write-passed", metavar="FILE", type=Path, help="write the names of the tests that pass to FILE")
    help = "leave out the tests that FILE names, except those marked `again`"
    parser.addoption("--skip-passed", metavar="FILE", type=Path, help=help)


def pytest_configure(config: pytest.Config) -> None:
    pairwise.full = config.getoption("full")
    file = config.getoption("write_passed")
    if file is not None and not hasattr(config, "workerinput"):  # processes of pytest-xdist report to the one without it
        config.pluginmanager.register(PassedTests(file))


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless --full is given, and what has passed before."""
    for item in items:
        if "emulated_module" in getattr(item, "fixturenames", ()):  # CUDA kernels, compiled by g++
            item.add_marker("slow")
    full, file = config.getoption("full"), config.getoption("skip_passed")
    passed = set(file.read_text(encoding="utf-8").splitlines()) if file is not None and file.exists() else set()

    quick = [item for item in items if full or not item.get_closest_marker("slow")]
    chosen = _few(quick) if config.getoption("few") else {item.nodeid for item in quick}

    def is_left_out(item: pytest.Item) -> bool:
        if item.nodeid not in chosen:
            return True
        return item.nodeid in passed and not item.get_closest_marker("again")

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def _few(items: list[pytest.Item]) -> set[str]:
    """Return the names of the first, a middle and the last case of each test, and of all that are about libraries."""
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item.nodeid)
    chosen: set[str] = set()
    for test, names in cases.items():
        is_whole = test.removeprefix("tests/").startswith(ABOUT_LIBRARIES)
        chosen |= set(names) if is_whole else {names[0], names[(len(names) - 1) // 2], names[-1]}
    return chosen


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
