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
from op_calls import make_call
from op_cases import CASES, SCHEDULE, Case
from pairwise import covering
from parity import Expected, Results, evaluate

import ddpm_fast

PLAN = ddpm_fast.ddpm_plan(SCHEDULE)
LEARNED_PLAN = ddpm_fast.ddpm_plan(SCHEDULE, 50, variance="learned_range")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EMULATED = [case for case in CASES if case.op not in MATRIX_OPS]
SMALL = [case for case in EMULATED if not case.benchmark]
CARDS = {0: "sm_80", 1: "sm_90"}
ORDERS = (
    {"order": "natural"},
    {"order": "reversed"},
    {"order": "shuffled", "seed": 1, "preempt": 50},
)
# Each order accesses the same addresses, so AddressSanitizer looks at one. The other sanitizer finds races in all.
ONE_ORDER = os.environ.get("DDPM_FAST_EMULATOR") == "address"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(cases: Sequence[Case], dtypes: Sequence[torch.dtype] = DTYPES):
    rows = (
        (case, dtype, channels_last)
        for case in cases
        for dtype in dtypes
        for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
    )
    for case, dtype, channels_last in covering(rows):
        layout = "channels_last" if channels_last else "contiguous"
        yield pytest.param(case, dtype, channels_last, id=f"{case}-{_name(dtype)}-{layout}")


def _assert_identical(got: Results, expected: Results, how: str) -> None:
    for i, (a, b) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        assert torch.equal(a, b), f"output {i}: other bits in {how}"
    for name, grad in got.grads.items():
        assert torch.equal(grad, expected.grads[name]), f"gradient of {name}: other bits in {how}"


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
            _assert_identical(got, first, f"{order} on {card}")


@pytest.mark.parametrize(("case", "dtype", "channels_last"), list(_parameters(SMALL)))
def test_case(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    _check(emulated, case, dtype, channels_last)


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last"), list(_parameters([case for case in EMULATED if case.benchmark], [torch.bfloat16]))
)
def test_a_network_s_shape(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    _check(emulated, case, dtype, channels_last, orders=ORDERS[:1])


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last"), list(_parameters([case for case in EMULATED if case.op == "noise"], DTYPES))
)
def test_normals_are_the_reference_s_to_the_bit(
    emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool
) -> None:
    call = make_call(case, dtype, channels_last=channels_last)
    assert torch.equal(*call("native"), *call("reference"))


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


@pytest.mark.parametrize(("case", "dtype", "channels_last"), list(_parameters(_LARGE, (torch.float32, torch.bfloat16))))
def test_a_large_case(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    _check(emulated, case, dtype, channels_last, orders=(ORDERS[0], ORDERS[2]))


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
    _assert_identical(got, expected, "a card without clusters")
    emulated.take_launches()
    _assert_identical(evaluate(call, "native"), expected, "a second call")  # a warning would be an error
    assert {launch["cluster"] for launch in emulated.take_launches()} == {1}


# Numbers of vectors in a slice that leave lanes of a warp idle: odd numbers and their doubles, in both dtypes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("group_channels", [15, 18, 30, 36, 42])
def test_groups_of_any_channels_are_read_in_vectors(emulated: ModuleType, group_channels: int, dtype: torch.dtype) -> None:
    case = Case("group_norm_silu", "awkward", (1, 8 * group_channels, 10, 13), {"groups": 8, "shift": True})
    emulated.take_launches()
    _check(emulated, case, dtype, True, orders=(ORDERS[0], ORDERS[2]))
    assert not [launch for launch in emulated.take_launches() if "scalar" in launch["kernel"]]


@pytest.mark.slow
def test_more_samples_than_a_grid_is_deep(emulated: ModuleType) -> None:
    case = Case("group_norm_silu", "many", (65535 + 2, 8, 1, 2), {"groups": 1, "shift": True})
    _check(emulated, case, torch.bfloat16, True, orders=ORDERS[:1])


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    """Return a copy whose address is aligned to one element only."""
    return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)


_UNALIGNED = [
    Case("q_sample", "given-noise", (2, 4, 8, 8), {"source": "noise"}),
    Case("reverse_step", "learned", (2, 4, 8, 8), {"plan": LEARNED_PLAN}),
    Case("denoising_loss", "velocity", (2, 4, 8, 8), {"prediction": "v_prediction"}),
    Case("group_norm_silu", "shift", (2, 16, 8, 8), {"groups": 4, "shift": True}),
]


@pytest.mark.parametrize(("case", "dtype", "channels_last"), list(_parameters(_UNALIGNED, (torch.float32, torch.bfloat16))))
def test_tensors_that_are_not_aligned(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    _check(emulated, case, dtype, channels_last, copy=_unaligned)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order["order"])
def test_a_reverse_step_in_place(emulated: ModuleType, order: dict[str, object]) -> None:
    emulated.set_order(**order)
    x_t, model_output = torch.randn(2, 2, 3, 17, 19)
    seeds = ddpm_fast.sample_seeds(3, 2)
    expected = ddpm_fast.reverse_step(x_t.clone(), model_output, 600, PLAN, seeds=seeds, backend="native")
    got = ddpm_fast.reverse_step(x_t, model_output, 600, PLAN, seeds=seeds, out=x_t, backend="native")
    assert got.data_ptr() == x_t.data_ptr()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order["order"])
def test_a_multistep_step_overwrites_its_state_and_history(emulated: ModuleType, order: dict[str, object]) -> None:
    emulated.set_order(**order)
    for name in ("x_0_prev", "x_0_prev2"):
        plan = ddpm_fast.dpm_solver_plan(PLAN.schedule, 10, eta=1.0, order=2 if name == "x_0_prev" else 3)
        x_t, model_output, x_0, other = torch.randn(4, 2, 3, 17, 19)
        options: Any = {"seeds": ddpm_fast.sample_seeds(3, 2), "return_x_0": True, "backend": "native"}
        history = {"x_0_prev": other, name: x_0}
        expected = ddpm_fast.reverse_step(x_t.clone(), model_output, 5, plan, **history, **options)
        got = ddpm_fast.reverse_step(x_t, model_output, 5, plan, **history, out=(x_t, x_0), **options)
        assert [each.data_ptr() for each in got] == [x_t.data_ptr(), x_0.data_ptr()]
        assert torch.equal(x_t, expected[0])
        assert torch.equal(x_0, expected[1])
