"""Comparisons of ops: which there are, their inputs, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_ops
import pytest
import torch
from benchmark_ops import Work
from kernel_calls import MATRIX_OPS
from op_cases import Case
from peers import OPS, Peer

from ddpm_fast.ops import OPS as ALL

H100_L2 = 50 * 2**20


def test_the_lists_have_the_ops_with_cuda_kernels_and_both_networks() -> None:
    ours = {name for name in ALL if not name.endswith("_backward")}
    assert {work.case.op for work in benchmark_ops.elementwise("cuda")} == ours - {"group_norm_silu", *MATRIX_OPS}
    norms = list(benchmark_ops.norms("cuda"))
    assert {work.case.name.split()[0] for work in norms} == {"cifar10-32", "256x256"}
    assert len(set(map(str, norms))) == len(norms)
    assert (norms[0].dtype, norms[0].layout) == ("bf16", "channels_last")  # as in sampling


def test_shapes_that_decide_are_few_and_larger_than_l2() -> None:
    works = list(benchmark_ops.deciding("cuda"))
    assert len(works) <= 40
    assert min(work.moved for work in works) > 2 * H100_L2
    norms = {(work.dtype, work.layout, work.direction) for work in works if work.case.op == "group_norm_silu"}
    assert len(norms) == 8
    is_norm = [work.case.op == "group_norm_silu" for work in works]
    assert is_norm == sorted(is_norm)  # the others come first
    compiled = list(benchmark_ops.deciding_compiled("cuda"))
    assert not any("compile" in work.peers for work in works)
    assert {(work.peers, work.layout, work.direction) for work in compiled} == {
        (("native", "compile"), "channels_last", direction) for direction in ("forward", "backward")
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_are_copies_of_a_few(layout: str) -> None:
    for work in benchmark_ops.product(benchmark_ops.elementwise_cases((5, 3, 8, 8)), ["float32"]):
        call = benchmark_ops.make_inputs(replace(work, layout=layout), "cpu")
        y = benchmark_ops.forward(OPS["native"].build(call, work.case), call)()
        assert isinstance(y, torch.Tensor)
        if y.dim() == 4:
            assert y.shape == (5, 3, 8, 8)
            assert torch.equal(y[0], y[2])
            assert not torch.equal(y[0], y[1])
            assert y.is_contiguous(memory_format=benchmark_ops.common.FORMATS[layout])


NORM = Work(Case("group_norm_silu", "small", (4, 64, 4, 4), {"shift": True}), "float32", "channels_last", "backward")
UINT8 = Work(Case("q_sample", "uint8", (4, 3, 8, 8), {"uint8": True}))


def test_results_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(benchmark_ops.LISTS, "elementwise", lambda device: [NORM, UINT8])
    out = tmp_path / "out.json"
    words = ["elementwise", "--peers", "native", "eager", "--each", "0.001", "--out", str(out)]
    benchmark_ops.main(words)
    rows = json.loads(out.read_text(encoding="utf-8"))["benchmark_ops elementwise"]["rows"]
    assert [row["by"] for row in rows] == ["native", "eager", "copy"] * 2
    assert "2 of 2 comparisons made" in capsys.readouterr().out
    benchmark_ops.main([*words, "--seconds", "0"])
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
    monkeypatch.setitem(benchmark_ops.LISTS, "elementwise", lambda device: [replace(NORM, direction="forward"), UINT8])
    with pytest.raises(SystemExit, match="1"):
        benchmark_ops.main(
            ["elementwise", "--peers", "native", "eager", "--each", "0.001", "--out", str(tmp_path / "out.json")]
        )
    said = capsys.readouterr().out
    assert "by native: AssertionError: group_norm_silu-small by native" in said
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["benchmark_ops elementwise"]["rows"]
    assert {row["by"] for row in rows} == {"eager", "copy"}
    assert {row["native is faster by"] for row in rows} == {None}
