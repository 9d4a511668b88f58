"""Predictions: what binds a kernel, and how many passes it takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import ModuleType
from typing import Any

import kernel_calls
import predict
import pytest
from benchmark_ops import Work, deciding
from op_cases import Case
from predict import CARDS, Card

CARD = Card("a card", bandwidth=1e12, multiprocessors=100, clock=1e9, l2=2**20, architecture="sm_90a", cluster=16)
N = 10**8
BUDGETS = json.loads(predict.BUDGETS.read_text(encoding="utf-8"))["native"]["kernels"]


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
    found = predict.predict(Work(Case("noise", "", (1, elements))), CARD, budgets(instructions, mufu), issue_efficiency=1)
    assert (found["bound"], found["passes"]) == (bound, 1)
    assert found["us"] == pytest.approx(microseconds + 1e6 * predict.LAUNCH, rel=0.01)


def test_issue_slots_that_stay_empty_take_time() -> None:
    work = Work(Case("noise", "", (1, N)))
    full, half = (predict.predict(work, CARD, budgets(100, 0.1), issue_efficiency=share)["us"] for share in (1, 0.5))
    assert half == pytest.approx(2 * full, rel=0.01)
    assert predict.predict(work, CARD, budgets(1, 0.1), issue_efficiency=0.5)["bound"] == "memory"


def test_a_thread_runs_the_merges_once_for_its_elements() -> None:
    """`channels_last_kernel<BFloat16, 2, 0>`: 24.4 instructions an element, and 755 for the 16 that a thread holds."""
    counted = {"norm": {"sm_90a": {"instructions": 24.4, "mufu": 0.0, "merges": 755}}}
    parts = predict._parts(predict.Pass("norm", 0, N, of_thread=16), CARD, counted, issue_efficiency=1)
    assert parts["issue"] == pytest.approx(N * 71.6 / (128 * 100e9), rel=1e-3)
    norm = Case("group_norm_silu", "", (16, 256, 4, 4))
    (launch,) = predict.launches(Work(norm, "bf16", "channels_last"), predict.CARDS[1])
    assert (launch.kernel.partition(" ")[2], launch.of_thread) == ("channels_last_kernel<BFloat16, 2, 0>", 16)


@pytest.mark.parametrize(("instructions", "mufu", "share"), [(1, 0.1, 1), (100, 0.1, 128 / 225), (10, 50, 16 / 112.5)])
def test_instructions_allow_a_share_of_copy(instructions: float, mufu: float, share: float) -> None:
    """The memory takes 4 bytes / 0.9 TB/s an element, the lanes 1 / 12.8e12 s an instruction, MUFU an eighth of their rate."""
    got = predict.allowed_share(Work(Case("noise", "", (1, N))), CARD, budgets(instructions, mufu))
    assert got == pytest.approx(share)


def test_both_directions_are_the_launches_of_each() -> None:
    work = Work(Case("denoising_loss", "", (1, N)))
    each = [predict.launches(replace(work, direction=direction), CARD) for direction in ("forward", "backward", "both")]
    assert each[2] == each[0] + each[1]
    assert sum(launch.moved for launch in each[2]) == replace(work, direction="both").moved


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
def test_every_comparison_is_predicted_from_kernels_that_there_are(capsys: Any) -> None:
    rows = []
    for words, said in (([], "expected at an assumed issue efficiency of 0.85"), (["--issue-efficiency", "1"], "lower bounds")):
        predict.main(words)
        told = capsys.readouterr().out
        assert said in told
        rows.append([float(word) for line in told.splitlines()[4:] for word in line.split()[-2 * len(CARDS) :: 2]])
    expected, least = rows
    assert len(expected) == len(predict.works()) * len(CARDS)
    assert all(us > 1e6 * predict.LAUNCH for us in least)
    slower = [more > us for more, us in zip(expected, least, strict=True)]
    assert any(slower)
    assert not all(slower), "what the memory binds does not depend on the issue efficiency"


def test_a_card_belongs_to_a_network(capsys: Any) -> None:
    predict.main(["--network", "tiny", "--card", "A100"])
    assert "milliseconds of a step on an A100, predicted" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        predict.main(["--card", "A100"])
    assert "--card: goes with --network" in capsys.readouterr().err


def test_the_issue_efficiency_is_a_share(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        predict.main(["--issue-efficiency", "1.1"])
    assert "expected a share above 0 and at most 1, got 1.1" in capsys.readouterr().err


def test_some_ops_cannot_reach_a_copy() -> None:
    """On an H100, in float32."""
    found = {
        (work.case.op, work.layout, work.direction): predict.allowed_share(work, predict.CARDS[1], BUDGETS)
        for work in deciding("cuda")
        if work.dtype == "float32" and work.case.op in ("noise", "denoising_loss", "q_sample")
    }
    assert 0.8 < found["denoising_loss", "contiguous", "forward"] < 0.9
    assert 0.7 < found["noise", "channels_last", "forward"] < 0.85
    assert 0.65 < found["denoising_loss", "channels_last", "forward"] < 0.8
    assert found["q_sample", "contiguous", "forward"] == 1
