"""Test-wide settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import environment  # noqa: F401 (first: torch and triton read the variables that it sets)

# isort: split
import build_age
import cases
import pytest
import summary
from fixtures import (  # noqa: F401
    EMULATED,
    _fresh_machine,
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

LEFT_OUT: pytest.StashKey[Counter[str]] = pytest.StashKey()  # how many tests the run's settings leave out, by reason
WHY: pytest.StashKey[str] = pytest.StashKey()  # why they leave out a test


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
    parser.addoption("--full", action="store_true", help="run slow tests, and all cases of each test")
    parser.addoption("--write-passed", metavar="FILE", type=Path, help="write the names of the tests that pass to FILE")
    help = "leave out the tests that FILE names, except those marked `again`"
    parser.addoption("--skip-passed", metavar="FILE", type=Path, help=help)


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("write_passed")
    if file is not None and not hasattr(config, "workerinput"):  # processes of pytest-xdist report to the one without it
        config.pluginmanager.register(PassedTests(file))


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow or reads data sets, unless --full is given, and what has passed before."""
    for item in items:
        if "emulated_module" in getattr(item, "fixturenames", ()):  # CUDA kernels, compiled by g++
            item.add_marker("slow")
    full, file = config.getoption("full"), config.getoption("skip_passed")
    passed = set(file.read_text(encoding="utf-8").splitlines()) if file is not None and file.exists() else set()

    late = {} if full else {"slow": summary.SLOW, "data_sets": summary.DATA_SETS}
    quick = [item for item in items if not any(map(item.get_closest_marker, late))]
    chosen = {item.nodeid for item in items} if full else cases.chosen(quick)

    def why_left_out(item: pytest.Item) -> str | None:
        for marker, why in late.items():
            if item.get_closest_marker(marker):
                return why
        if item.nodeid not in chosen:
            return summary.CASES
        return summary.PASSED if item.nodeid in passed and not item.get_closest_marker("again") else None

    left_out = []
    for item in items:
        why = why_left_out(item)
        if why is not None:
            item.stash[WHY] = why
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if WHY not in item.stash]


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what is left out, also by pytest's own options."""
    for item in items:
        item.config.stash.setdefault(LEFT_OUT, Counter())[item.stash.get(WHY, summary.CHOSEN)] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, which tells the one that prints
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(LEFT_OUT, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a process of pytest-xdist has run on the emulator. Each process leaves out the same tests."""
    output = getattr(node, "workeroutput", {})
    node.config.stash.setdefault(EMULATED, Counter()).update(output.get("emulated", {}))
    if "left_out" in output:  # a process that crashed has no output
        node.config.stash[LEFT_OUT] = Counter(output["left_out"])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # below the list of failures
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, object, object]:
    result = yield
    why_old = build_age.why_old()
    if why_old is not None:
        terminalreporter.write_line(
            f"The native module was not built from these sources: {why_old}. Run `make build`.", red=True
        )
    if config.stash.get(EMULATED, None):
        ran = ", ".join(f"{count} {what}" for what, count in config.stash[EMULATED].items())
        terminalreporter.write_line(f"On the emulator: {ran}")
    skipped = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    for line in summary.lines(config.stash.get(LEFT_OUT, {}), skipped):
        terminalreporter.write_line(line)
    return result


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
