"""`ddpm-fast info`."""

import re

import pytest
import torch
from click.testing import CliRunner
from kernel_calls import MATRIX_OPS

from ddpm_fast import cli, info
from ddpm_fast.ops import OPS
from ddpm_fast.ops.backend import why_not_matrix_kernels
from ddpm_fast.ops.fused_op import FusedOp

pytestmark = pytest.mark.again  # it describes the build


def _rows(text: str) -> dict[str, list[str]]:
    """Return the cells of the CPU's table by op: yes, or the reason for a no."""
    table = text.partition("Ops on cpu\n")[2].partition("\n\n")[0]
    reasons = dict(re.findall(r"^ *(\(\d+\)) (.*)$", table, re.MULTILINE))
    rows = {}
    for line in table.splitlines():
        op, *_ = line.split() or [""]
        if op in OPS:
            rows[op] = [reasons[number] if number else "yes" for number in re.findall(r"\byes\b|\bno (\(\d+\))", line)]
    return rows


def test_the_table_says_what_runs() -> None:
    text = info.info()
    assert re.search(r"compiler (g\+\+|.*[Cc]lang) \d+\.", text)
    assert _rows(text).keys() == set(OPS)
    matrix_kernels = why_not_matrix_kernels(torch.device("cpu"), torch.float32) or "yes"
    # Native is built. The tests run Triton's interpreter if there is no GPU.
    triton = "CPU tensors need Triton's interpreter" if torch.cuda.is_available() else "yes"
    for op, (native_cell, triton_cell, reference_cell) in _rows(text).items():
        assert native_cell == (matrix_kernels if op in MATRIX_OPS else "yes")
        assert triton_cell.startswith("there is no Triton kernel" if op in MATRIX_OPS else triton)
        assert reference_cell == "yes"


def test_the_table_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it is a test"
    monkeypatch.setattr(FusedOp, "why_not", lambda op, backend, device: reason if backend == "native" else None)
    text = info.info()
    assert _rows(text) == {op: [reason, "yes", "yes"] for op in OPS}
    assert text.count(f"(1) {reason}") == 1 + torch.cuda.device_count()


def test_a_native_module_that_is_absent_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "native_error", lambda: "no such file")
    assert "Native module\n  not loaded: no such file" in info.info()


def test_command() -> None:
    result = CliRunner().invoke(cli.main, ["info"])
    assert result.exit_code == 0
    assert result.output == info.info() + "\n"
