"""`ddpm-fast info`."""

import re

import pytest
import torch
from click.testing import CliRunner

from ddpm_fast import cli, info
from ddpm_fast.ops import OPS, backend


def _rows(text: str) -> dict[str, list[str]]:
    """The cells of the CPU's table, by op."""
    table = text.partition("Ops on cpu\n")[2].partition("\n\n")[0]
    return {op: line.split()[1:] for line in table.splitlines() for op in OPS if line.split()[:1] == [op]}


def test_the_table_says_what_runs() -> None:
    text = info.info()
    assert re.search(r"compiler (g\+\+|.*[Cc]lang) \d+\.", text)
    assert _rows(text).keys() == set(OPS)
    for cells in _rows(text).values():
        # Native is built; the tests run Triton's interpreter where there is no GPU.
        assert cells == (["yes", "no", "(1)", "yes"] if torch.cuda.is_available() else ["yes", "yes", "yes"])


def test_the_table_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it is a test"
    monkeypatch.setattr(info, "why_not", lambda backend, op, device: reason if backend == "native" else None)
    text = info.info()
    for cells in _rows(text).values():
        assert cells == ["no", "(1)", "yes", "yes"]
    assert text.count(f"(1) {reason}") == 1 + torch.cuda.device_count()


def test_a_native_module_that_is_absent_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "native_error", lambda: "no such file")
    assert "Native module\n  not loaded: no such file" in info.info()


def test_command() -> None:
    result = CliRunner().invoke(cli.main, ["info"])
    assert result.exit_code == 0
    assert result.output == info.info() + "\n"
