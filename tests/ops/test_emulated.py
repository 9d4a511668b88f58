"""The CUDA kernels, run by the emulator: every case by the parity rule on both emulated cards, the same bits in every order.

Whatever the emulator finds on the way (a race, a read of memory that nobody wrote, ...) is raised by the call.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from parity import Expected, Results, evaluate

from ddpm_fast.testing import CASES, Case, make_call

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CARDS = {0: "sm_80", 1: "sm_90"}
ORDERS = (
    {"order": "natural"},
    {"order": "reversed"},
    {"order": "shuffled", "seed": 1, "preempt": 50},
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...] = DTYPES):
    for case in cases:
        for dtype in dtypes:
            for channels_last in (False, True) if len(case.shape) == 4 else (False,):
                layout = "channels_last" if channels_last else "contiguous"
                yield pytest.param(case, dtype, channels_last, id=f"{case}-{_name(dtype)}-{layout}")


def _assert_identical(got: Results, expected: Results, how: str) -> None:
    for i, (a, b) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        assert torch.equal(a, b), f"output {i}: other bits in {how}"
    for name, grad in got.grads.items():
        assert torch.equal(grad, expected.grads[name]), f"gradient of {name}: other bits in {how}"


def _check(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool, orders=ORDERS) -> None:
    call = make_call(case, dtype, channels_last=channels_last)
    expected = Expected(case, call)
    for device, card in CARDS.items():
        emulated.set_device(device)
        first = None
        for order in orders:
            emulated.set_order(**order)
            got = evaluate(call, "native")
            if first is None:
                expected.check(got)
                first = got
            _assert_identical(got, first, f"{order} on {card}")


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last"), list(_parameters(tuple(case for case in CASES if not case.benchmark)))
)
def test_case(emulated: ModuleType, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    _check(emulated, case, dtype, channels_last)
