"""Predictions: what binds a kernel, and how many passes it takes."""

from __future__ import annotations

import shutil
from types import ModuleType
from typing import Any

import cards
import kernel_calls
import predict
import pytest
from cards import CARDS, Card
from op_cases import Case
from works import Work, deciding, product

CARD = Card("a card", bandwidth=1e12, multiprocessors=100, clock=1e9, architecture="sm_90a", cluster=16)
N = 10**8


def budgets(instructions: float, mufu: float) -> Any:
    return {"noise noise_kernel<float, false>": {"sm_90a": {"instructions": instructions, "mufu": mufu}}}


@pytest.mark.parametrize(
    ("elements", "instructions", "mufu", "bound", "microseconds"),
    [
        (N, 1, 0.1, "memory", 4e8 / 0.9e12 * 1e6),
        (N, 100, 0.1, "issue", N * 100 / (0.85 * 128 * 100e9) * 1e6),  # slots that stay empty take time
        (N, 10, 50, "MUFU", N * 50 / (16 * 100e9) * 1e6),
        (1000, 40, 0.5, "launch", 0),
    ],
)
def test_the_slowest_part_binds(elements: int, instructions: float, mufu: float, bound: str, microseconds: float) -> None:
    found = cards.predict(Work(Case("noise", "", (1, elements))), CARD, budgets(instructions, mufu))
    assert found == (pytest.approx(microseconds + 1e6 * cards.LAUNCH, rel=0.01), bound)


def test_a_thread_runs_the_merges_once_for_its_elements() -> None:
    """`channels_last_kernel<BFloat16, 2, 0>`: 24.4 instructions an element, and 755 for the 16 that a thread holds."""
    counted = {"norm": {"sm_90a": {"instructions": 24.4, "mufu": 0.0, "merges": 755}}}
    parts = cards._parts(cards.Pass("norm", 0, N, of_thread=16), CARD, counted, issue_efficiency=1)
    assert parts["issue"] == pytest.approx(N * 71.6 / (128 * 100e9), rel=1e-3)
    norm = Case("group_norm_silu", "", (16, 256, 4, 4))
    (launch,) = cards.launches(Work(norm, "bf16", "channels_last"), cards.CARDS[1])
    assert (launch.kernel.partition(" ")[2], launch.of_thread) == ("channels_last_kernel<BFloat16, 2, 0>", 16)


@pytest.mark.parametrize(("instructions", "mufu", "share"), [(1, 0.1, 1), (100, 0.1, 128 / 225), (10, 50, 16 / 112.5)])
def test_instructions_allow_a_share_of_copy(instructions: float, mufu: float, share: float) -> None:
    """The memory takes 4 bytes / 0.9 TB/s an element, the lanes 1 / 12.8e12 s an instruction, MUFU an eighth of their rate."""
    got = cards.allowed_share(Work(Case("noise", "", (1, N))), CARD, budgets(instructions, mufu))
    assert got == pytest.approx(share)


# Feature maps of the networks of Ho et al., and those that decide.
MAPS = [(1, 128, 32, 32), (64, 128, 32, 32), (64, 256, 16, 16), (64, 512, 8, 8), (64, 512, 4, 4), (256, 128, 32, 32)]
MAPS += [(8, 128, 256, 256), (8, 256, 128, 128), (8, 512, 32, 32), (8, 1024, 8, 8)]


@pytest.mark.parametrize(("device", "card"), list(enumerate(CARDS[:2])), ids=lambda each: getattr(each, "name", ""))
def test_norms_take_as_many_passes_as_the_kernels(emulated_module: ModuleType, device: int, card: Card) -> None:
    """A kernel that leaves sums for a second one asks for a workspace to leave them in."""
    emulated_module.set_device(device)
    for work in product(Case("group_norm_silu", "", each, {"shift": True}) for each in MAPS):
        if work.direction == "forward":
            n, c, height, width = work.case.shape
            sizes = {"n": n, "c": c, "hw": height * width, "channels_last": work.layout == "channels_last", "num_groups": 32}
            dtypes = {f"{small}_dtype": 0 for small in ("weight", "bias", "shift", "scale", "scale_shift")}
            others = {"eps": 1e-5, "silu": True, "stream_or_threads": 0, "dtype": {"float32": 0, "bf16": 3}[work.dtype]}
            leaves = kernel_calls.launch(emulated_module, "group_norm_silu_workspace", **sizes, **dtypes, **others) > 0
            passes = [each.moved for each in cards.launches(work, card)]
            assert passes == ([work.moved // 2, work.moved] if leaves else [work.moved]), str(work)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_every_comparison_is_predicted_from_kernels_that_there_are(capsys: Any) -> None:
    predict.main([])
    found = [float(us) for line in capsys.readouterr().out.splitlines()[4:] for us in line.split()[-2 * len(CARDS) :: 2]]
    assert len(found) == len(list(deciding())) * len(CARDS)
    assert all(us > 1e6 * cards.LAUNCH for us in found)
    predict.main(["--network", "tiny"])
    assert "milliseconds of a step on an H100, predicted" in capsys.readouterr().out
