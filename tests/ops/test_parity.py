"""Values and gradients of every case, family, dtype and layout by the parity rule."""

import pytest
import torch
from pairwise import covering
from parity import Expected, evaluate

from ddpm_fast.ops.backend import FLOATS, why_not
from ddpm_fast.testing import CASES, Case, make_call

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
SELECTED = [case for case in CASES if not case.benchmark]


def _parameters():
    for family, dtypes in (("native", tuple(DTYPES)), ("triton", (torch.float32, torch.bfloat16))):
        rows = (
            (case, dtype, channels_last)
            for case in SELECTED
            for dtype in dtypes
            for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
        )
        for case, dtype, channels_last in covering(rows):
            layout = "channels_last" if channels_last else "contiguous"
            yield pytest.param(case, family, dtype, channels_last, id=f"{case}-{family}-{DTYPES[dtype]}-{layout}")


@pytest.mark.parametrize(("case", "family", "dtype", "channels_last"), list(_parameters()))
def test_parity(case: Case, family: str, dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    reason = why_not(family, case.op, device, dtype)
    # Beside a GPU Triton's interpreter is off. Anywhere else nothing may be missing.
    if reason is not None and torch.cuda.is_available():
        pytest.skip(reason)
    call = make_call(case, dtype, device, channels_last=channels_last)
    Expected(case, call).check(evaluate(call, family))


_NOISE = [
    pytest.param(case, channels_last, id=f"{case.name}-{'channels_last' if channels_last else 'contiguous'}")
    for case in SELECTED
    if case.op == "noise"
    for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "channels_last"), _NOISE)
def test_noise_is_the_same_bits_from_every_family(
    case: Case, channels_last: bool, dtype: torch.dtype, device: torch.device
) -> None:
    call = make_call(case, dtype, device, channels_last=channels_last)
    (expected,) = call("reference")
    for family in ("native", "triton"):
        if why_not(family, "noise", device, dtype) is None:
            (got,) = call(family)
            assert torch.equal(got, expected), family
            assert got.stride() == expected.stride()
