"""Comparisons of ops: which there are, their inputs, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_ops
import common
import pytest
import torch
from kernel_calls import MATRIX_OPS
from op_cases import Case
from peers import OPS, Peer
from works import LISTS, Work, deciding, deciding_compiled

from ddpm_fast.ops import OPS as ALL

H100_L2 = 50 * 2**20


def test_shapes_that_decide_are_few_and_larger_than_l2() -> None:
    works = list(deciding())
    assert {work.case.op for work in works} == {name for name in ALL if not name.endswith("_backward")} - {*MATRIX_OPS}
    assert len(works) <= 40
    assert min(work.moved for work in works) > 2 * H100_L2
    norms = {(work.dtype, work.layout, work.direction) for work in works if work.case.op == "group_norm_silu"}
    assert len(norms) == 8
    is_norm = [work.case.op == "group_norm_silu" for work in works]
    assert is_norm == sorted(is_norm)  # the others come first
    assert not any("compile" in work.peers for work in works)
    assert {(work.peers, work.layout, work.direction) for work in deciding_compiled()} == {
        (("native", "compile"), "channels_last", direction) for direction in ("forward", "backward")
    }


PEERS = ("native", "eager")
NORM = Work(Case("group_norm_silu", "small", (4, 64, 4, 4), {"shift": True}), "float32", "channels_last", "backward", PEERS)
UINT8 = Work(Case("q_sample", "uint8", (4, 3, 8, 8), {"uint8": True}), peers=PEERS)
WORDS = ["deciding", "--each", "0.001"]


def test_results_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(LISTS, "deciding", lambda tiny: [NORM, UINT8])
    out = tmp_path / "out.json"
    benchmark_ops.main([*WORDS, "--out", str(out)])
    assert benchmark_ops.make_inputs(NORM, "cpu").arguments["x"].is_contiguous(memory_format=torch.channels_last)
    rows = common.read_results(out)["benchmark_ops deciding"]["rows"]
    assert [row["by"] for row in rows] == ["native", "eager", "copy"] * 2
    assert "2 of 2 comparisons made" in capsys.readouterr().out
    benchmark_ops.main([*WORDS, "--seconds", "0"])
    assert "0 of 2 comparisons made" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.01 * y, lambda y: torch.where(torch.arange(4).view(4, 1, 1, 1) == 3, y + 1e-6, y)]
)
def test_a_wrong_peer_fails_and_the_others_go_on(
    wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second is within the tolerance, but the last sample differs from its copy."""
    native = OPS["native"].build
    monkeypatch.setitem(OPS, "native", Peer(lambda call, case: lambda **x: wrong(native(call, case)(**x))))
    monkeypatch.setitem(LISTS, "deciding", lambda tiny: [replace(NORM, direction="forward"), UINT8])
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="1"):
        benchmark_ops.main([*WORDS, "--out", str(out)])
    assert "by native: AssertionError: group_norm_silu-small by native" in capsys.readouterr().out
    rows = common.read_results(out)["benchmark_ops deciding"]["rows"]
    assert {(row["by"], row["native is faster by"]) for row in rows} == {("eager", None), ("copy", None)}
