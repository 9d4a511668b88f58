"""Predictions: what binds a kernel, and how many passes it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import kernel_calls
import predict
import pytest
from benchmark_ops import Work
from predict import CARDS, Card

from ddpm_fast.testing import Case

CARD = Card("a card", bandwidth=1e12, multiprocessors=100, clock=1e9, l2=2**20, architecture="sm_90a", cluster=16)
N = 10**8


def budgets(instructions: float, mufu: float) -> Any:
    return {"noise noise_kernel<float, false>": {"sm_90a": {"instructions": instructions, "mufu": mufu}}}


@pytest.mark.parametrize(
    ("elements", "instructions", "mufu", "bound", "microseconds"),
    [
        (N, 1, 0.1, "memory", 4e8 / 0.9e12 * 1e6),
        (N, 100, 0.1, "issue", N * 100 / (128 * 100e9) * 1e6),
        (N, 10, 50, "MUFU", N * 50 / (16 * 100e9) * 1e6),
        (1000, 40, 0.5, "launch", 0),
    ],
)
def test_the_slowest_part_binds(elements: int, instructions: float, mufu: float, bound: str, microseconds: float) -> None:
    found = predict.predict(Work(Case("noise", "", (1, elements))), CARD, budgets(instructions, mufu))
    assert (found["bound"], found["passes"]) == (bound, 1)
    assert found["at least us"] == pytest.approx(microseconds + 1e6 * predict.LAUNCH, rel=0.01)


def test_norms_take_as_many_passes_as_the_kernels(emulated_module: ModuleType) -> None:
    """A kernel that leaves sums for a second one asks for a workspace to leave them in."""
    for device, card in ((0, CARDS[0]), (1, CARDS[1])):
        emulated_module.set_device(device)
        for work in predict.works():
            if (work.case.op, work.direction) == ("group_norm_silu", "forward"):
                n, c, height, width = work.case.shape
                is_last = work.layout == "channels_last"
                sizes = {"n": n, "c": c, "hw": height * width, "channels_last": is_last, "num_groups": 32}
                dtypes = {f"{small}_dtype": 0 for small in ("weight", "bias", "shift", "scale", "scale_shift")}
                others = {"eps": 1e-5, "silu": True, "stream_or_threads": 0}
                dtype = {"float32": 0, "bf16": 3}[work.dtype]
                kernel = (emulated_module, "group_norm_silu_workspace")
                leaves = kernel_calls.launch(*kernel, dtype=dtype, **sizes, **dtypes, **others) > 0
                passes = [each.moved for each in predict.launches(work, card)]
                assert passes == ([work.moved // 2, work.moved] if leaves else [work.moved]), (str(work), card.name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_every_comparison_is_predicted_from_kernels_that_there_are(tmp_path: Path, capsys: Any) -> None:
    predict.main(["--out", str(tmp_path / "predicted.json")])
    written = json.loads((tmp_path / "predicted.json").read_text(encoding="utf-8"))
    assert "lower bound" in written["what"]
    assert len(written["rows"]) == len(predict.works())
    assert all(row[card.name]["at least us"] > 1e6 * predict.LAUNCH for row in written["rows"] for card in CARDS)
    assert "a lower bound" in capsys.readouterr().out
