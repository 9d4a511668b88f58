"""CUDA kernels in the emulator: the parity rule for every case on both emulated cards, and the same bits in every order.

A call raises what the emulator finds, such as a race or a read of uninitialised memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_calls import MATRIX_OPS
from op_calls import make_call, unaligned
from op_cases import CASES, SCHEDULE, Case
from parity import Expected, assert_same, check_overwriting, evaluate

import ddpm_fast

PLAN = ddpm_fast.ddpm_plan(SCHEDULE)
LEARNED_PLAN = ddpm_fast.ddpm_plan(SCHEDULE, 50, variance="learned_range")

EMULATED = [case for case in CASES if case.op not in MATRIX_OPS]
SMALL = [case for case in EMULATED if not case.benchmark]
CARDS = {0: "sm_80", 1: "sm_90"}
ORDERS = (
    {"order": "natural"},
    {"order": "reversed"},
    {"order": "shuffled", "seed": 1, "preempt": 50},
)
# Each order accesses the same addresses, and float16 those of bfloat16, so AddressSanitizer looks at one. The other sanitizer
# finds races in all.
ONE_ORDER = os.environ.get("DDPM_FAST_EMULATOR") == "address"
DTYPES = (torch.float32, torch.bfloat16) if ONE_ORDER else (torch.float32, torch.float16, torch.bfloat16)


def _parameters(cases: Sequence[Case], dtypes: Sequence[torch.dtype] = DTYPES, orders=ORDERS, copy=torch.clone):
    rows = (
        (case, dtype, channels_last)
        for case in cases
        for dtype in dtypes
        for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
    )
    for case, dtype, channels_last in rows:
        name = f"{case}-{str(dtype).removeprefix('torch.')}-{'channels_last' if channels_last else 'contiguous'}"
        yield pytest.param(case, dtype, channels_last, orders, copy, id=name)


def _check(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool, orders=ORDERS, copy=torch.clone) -> None:
    call = make_call(case, dtype, channels_last=channels_last)
    expected = Expected(case, call)
    for device, card in CARDS.items():
        emulated.set_device(device)
        first = None
        for order in orders[:1] if ONE_ORDER else orders:
            emulated.set_order(**order)
            got = evaluate(call, "native", copy)
            if first is None:
                expected.check(got)
                first = got
            assert_same(got, first, f"in {order} on {card}")


# Cases larger than a block: several tiles of a sample and an incomplete one; more channels than a tile has.
_LARGE = (
    Case("noise", "tiles", (2, 3, 50, 43)),
    Case("noise", "wide", (2, 600, 3, 3)),
    Case("q_sample", "tiles", (2, 3, 50, 43)),
    Case("q_sample", "uint8-tiles", (2, 3, 40, 48), {"uint8": True}),
    Case("reverse_step", "tiles", (2, 3, 50, 43), {"plan": PLAN, "return_x_0": True}),
    Case("reverse_step", "learned-tiles", (2, 3, 40, 48), {"plan": LEARNED_PLAN, "guidance_scale": 2.0}),
    Case("denoising_loss", "tiles", (2, 3, 50, 43), {"prediction": "v_prediction"}),
    Case("denoising_loss", "wide", (2, 600, 3, 3)),
    Case("group_norm_silu", "one-group", (1, 4, 128, 72), {"groups": 1, "shift": True}),
    Case("group_norm_silu", "groups-of-4", (2, 32, 52, 40), {"groups": 8, "scale_shift": True}),
)


_UNALIGNED = [
    Case("q_sample", "unaligned-given-noise", (2, 4, 8, 8), {"source": "noise"}),
    Case("reverse_step", "unaligned-learned", (2, 4, 8, 8), {"plan": LEARNED_PLAN}),
    Case("denoising_loss", "unaligned-velocity", (2, 4, 8, 8), {"prediction": "v_prediction"}),
    Case("group_norm_silu", "unaligned-shift", (2, 16, 8, 8), {"groups": 4, "shift": True}),
]


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last", "orders", "copy"),
    [
        *_parameters(SMALL),
        *_parameters([case for case in EMULATED if case.benchmark], [torch.bfloat16], ORDERS[:1]),
        *_parameters(_LARGE, (torch.float32, torch.bfloat16), (ORDERS[0], ORDERS[2])),
        *_parameters(_UNALIGNED, (torch.float32, torch.bfloat16), copy=unaligned),
    ],
)
def test_parity_with_the_same_bits_in_every_order(
    emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool, orders: Any, copy: Any
) -> None:
    _check(emulated, case, dtype, channels_last, orders, copy)


@pytest.mark.slow
def test_more_samples_than_a_grid_is_deep(emulated: ModuleType) -> None:
    """On one card: the other one runs the same kernels, as there is no cluster."""
    case = Case("group_norm_silu", "deep", (65535 + 2, 8, 1, 2), {"groups": 1, "shift": True})
    call = make_call(case, torch.bfloat16, channels_last=True)
    emulated.take_launches()
    Expected(case, call).check(evaluate(call, "native"))
    assert len(emulated.take_launches()) == 5, "forward and backward take two launches each, and the parameters' gradients one"


def test_large_group_norms_run_every_kernel(emulated: ModuleType) -> None:
    case = _LARGE[-2]
    for channels_last, name in ((False, "contiguous"), (True, "channels_last")):
        call = make_call(case, torch.float32, channels_last=channels_last)
        ran = []
        for device in CARDS:
            emulated.set_device(device)
            emulated.take_launches()
            evaluate(call, "native")
            ran.append([launch for launch in emulated.take_launches() if name in launch["kernel"]])
        kernels = [{launch["kernel"] for launch in launches} for launches in ran]
        assert len(kernels[0]) == 4, "without clusters: forward and backward are two kernels each"
        assert len(kernels[1]) == 2, "with clusters: one each"
        assert all(launch["cluster"] >= 8 for launch in ran[1])


def test_the_largest_cluster(emulated: ModuleType) -> None:
    case = Case("group_norm_silu", "half-a-megabyte-a-group", (1, 8, 128, 136), {"groups": 1})
    call = make_call(case, torch.float32, channels_last=True)
    emulated.set_device(1)
    emulated.take_launches()
    Expected(case, call).check(evaluate(call, "native"))
    assert max(launch["cluster"] for launch in emulated.take_launches()) == 16


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_card_that_refuses_clusters_takes_two_passes(emulated: ModuleType, channels_last: bool) -> None:
    call = make_call(_LARGE[-1], torch.bfloat16, channels_last=channels_last)
    emulated.set_device(0)
    expected = evaluate(call, "native")
    emulated.set_device(2)
    with pytest.warns(RuntimeWarning, match=r"^group_norm_silu: CUDA refused a cluster of blocks \(invalid cluster size\)"):
        got = evaluate(call, "native")
    assert_same(got, expected, "on a card without clusters")
    emulated.take_launches()
    assert_same(evaluate(call, "native"), expected, "in a second call")  # a warning would be an error
    assert {launch["cluster"] for launch in emulated.take_launches()} == {1}


# Numbers of vectors in a slice that leave lanes of a warp idle: odd numbers and their doubles, in both dtypes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_channels", [15, 18, 30, 36, 42])
def test_groups_of_any_channels_are_read_in_vectors(emulated: ModuleType, group_channels: int, dtype: torch.dtype) -> None:
    case = Case("group_norm_silu", "awkward", (1, 8 * group_channels, 10, 13), {"groups": 8, "shift": True})
    emulated.take_launches()
    _check(emulated, case, dtype, True, orders=(ORDERS[0], ORDERS[2]))
    assert not [launch for launch in emulated.take_launches() if "scalar" in launch["kernel"]]


_OVERWRITTEN = [
    Case(
        "reverse_step",
        f"order-{order}",
        (2, 3, 17, 19),
        {"plan": ddpm_fast.dpm_solver_plan(SCHEDULE, 10, order=order, eta=1.0)},
    )
    for order in (1, 2, 3)
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order["order"])
@pytest.mark.parametrize("case", _OVERWRITTEN, ids=str)
def test_a_step_overwrites_its_state_and_history(emulated: ModuleType, case: Case, order: dict[str, object]) -> None:
    emulated.set_order(**order)
    check_overwriting(make_call(case), "native")
