"""benchmarks/predict.py: what binds a kernel, how many passes it takes, and measurements beside predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import kernel_calls
import predict
import pytest
from gpu_ops import Work
from predict import CARDS, Card

from ddpm_fast.testing import Case

CARD = Card("a card", bandwidth=1e12, multiprocessors=100, clock=1e9, l2=2**20, architecture="sm_90a", cluster=16)
N = 10**8
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def budgets(instructions: float, mufu: float) -> Any:
    return {"noise noise_kernel<float, false>": {"sm_90a": {"instructions": instructions, "mufu": mufu}}}


@pytest.mark.parametrize(
    ("instructions", "mufu", "bound", "microseconds"),
    [
        (1, 0.1, "memory", 4e8 / 0.9e12 * 1e6),
        (100, 0.1, "issue", N * 100 / (128 * 100e9) * 1e6),
        (10, 50, "MUFU", N * 50 / (16 * 100e9) * 1e6),
    ],
)
def test_the_slowest_part_binds(instructions: float, mufu: float, bound: str, microseconds: float) -> None:
    work = Work(Case("noise", "", (1, N)), "float32")
    found = predict.predict(work, CARD, budgets(instructions, mufu))
    assert found.bound == bound
    assert found.microseconds == pytest.approx(microseconds + 1e6 * predict.LAUNCH)


def test_small_tensors_are_bound_by_the_launch() -> None:
    found = predict.predict(Work(Case("noise", "", (1, 1000)), "float32"), CARD, budgets(40, 0.5))
    assert (found.bound, found.passes) == ("launch", 1)


@needs_compiler
def test_norms_that_do_not_fit_on_chip_take_two_passes() -> None:
    a100, h100 = CARDS[0], CARDS[1]
    options = {"groups": 32}
    small = Work(Case("group_norm_silu", "", (64, 128, 32, 32), options), "bf16")
    large = Work(Case("group_norm_silu", "", (2, 128, 256, 256), options), "bf16")
    assert [p.kernel for p in predict.launches(small, a100)] == ["group_norm_silu contiguous_kernel<BFloat16, 2, 0>"]
    assert [p.kernel for p in predict.launches(large, h100)] == ["group_norm_silu contiguous_kernel<BFloat16, 8, 0>"]
    size = 2 * 128 * 256 * 256 * 2
    assert [(p.kernel[-2:], p.moved) for p in predict.launches(large, a100)] == [("1>", size), ("2>", 2 * size)]
    backward = predict.launches(large._replace(direction="backward"), a100)
    assert [p.moved for p in backward] == [2 * size, 3 * size, 0]


@needs_compiler
def test_every_comparison_is_predicted_from_kernels_that_there_are() -> None:
    budgets = json.loads(predict.BUDGETS.read_text(encoding="utf-8"))["native"]["kernels"]
    table = predict.rows(budgets, {})
    assert len(table) == len(predict.works())
    assert all(row[card.name]["predicted us"] > 1e6 * predict.LAUNCH for row in table for card in CARDS)


def test_norms_take_as_many_passes_as_the_kernels(emulated_module: ModuleType) -> None:
    """A kernel that leaves sums for a second one asks for a workspace to leave them in."""
    for device, card in ((0, CARDS[0]), (1, CARDS[1])):
        emulated_module.set_device(device)
        for work in predict.works():
            if (work.case.op, work.direction) == ("group_norm_silu", "forward"):
                n, c, height, width = work.case.shape
                sizes = {"n": n, "c": c, "hw": height * width, "channels_last": work.channels_last, "num_groups": 32}
                dtypes = {f"{small}_dtype": 0 for small in ("weight", "bias", "shift", "scale", "scale_shift")}
                others = {"eps": 1e-5, "silu": True, "stream_or_threads": 0}
                dtype = {"float32": 0, "bf16": 3}[work.dtype]
                kernel = (emulated_module, "group_norm_silu_workspace")
                leaves = kernel_calls.launch(*kernel, dtype=dtype, **sizes, **dtypes, **others) > 0
                assert len(predict.launches(work, card)) == 1 + leaves, (str(work), card.name)


def test_measurements_stand_beside_predictions(tmp_path: Path) -> None:
    work = predict.works()[0]
    row = {"op": work.case.op, "case": work.case.name, "shape": "x".join(map(str, work.case.shape)), "dtype": work.dtype}
    row |= {"layout": "contiguous", "direction": "forward", "by": "native", "ms": {"median": 0.2, "low": 0.1, "high": 0.3}}
    machine = {"device": "NVIDIA H100 80GB HBM3"}
    results = {"gpu_ops elementwise": {"machine": machine, "rows": [row, row | {"by": "eager"}]}}
    (tmp_path / "nvidia-h100.json").write_text(json.dumps(results))
    (tmp_path / "a-cpu.json").write_text(json.dumps({"train_speed": {"rows": []}}))
    other = {"gpu_ops elementwise": {"machine": {"device": "NVIDIA GH200 480GB"}, "rows": [row]}}
    (tmp_path / "nvidia-gh200.json").write_text(json.dumps(other))
    found = predict.measured(tmp_path)
    assert list(found.values()) == [200.0]
    ((card, key),) = found
    assert (card, key) == ("H100", predict._key(row))


def test_the_table_marks_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "works", lambda: [Work(Case("noise", "beyond-l2", (256, 3, 256, 256)), "float32")])
    of = {card.architecture: {"instructions": 40, "mufu": 0.5} for card in CARDS}
    key = "noise beyond-l2 256x3x256x256 float32 contiguous forward"
    table = predict.rows({"noise noise_kernel<float, false>": of}, {("H200", key): 70.0})
    text = predict.markdown(table, "nvcc 0")
    assert text.startswith("# Predicted, not measured")
    assert text.count("**70 measured**") == 1
    assert table[0]["H200"]["measured us"] == 70
    assert "measured us" not in table[0]["H100"]
