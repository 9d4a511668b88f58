"""Values and gradients of every case, backend, dtype and layout by the parity rule."""

import pytest
import torch
from kernel_calls import MATRIX_OPS
from op_calls import make_call
from op_cases import CASES, Case
from parity import Expected, evaluate

from ddpm_fast.dtypes import FLOATS
from ddpm_fast.ops import why_not
from ddpm_fast.ops.backend import MATRIX_DTYPES

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
SELECTED = [case for case in CASES if not case.benchmark]


def _has_kernel(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Return whether there is a kernel, on a machine that has everything."""
    return op not in MATRIX_OPS or (backend == "native" and dtype in MATRIX_DTYPES)


def _parameters():
    for backend, dtypes in (("native", tuple(DTYPES)), ("triton", (torch.float32, torch.bfloat16))):
        rows = (
            (case, dtype, channels_last)
            for case in SELECTED
            for dtype in dtypes
            if _has_kernel(case.op, backend, dtype)
            for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
        )
        for case, dtype, channels_last in rows:
            layout = "channels_last" if channels_last else "contiguous"
            yield pytest.param(case, backend, dtype, channels_last, id=f"{case}-{backend}-{DTYPES[dtype]}-{layout}")


@pytest.mark.every("case.op", "backend")
@pytest.mark.parametrize(("case", "backend", "dtype", "channels_last"), list(_parameters()))
def test_parity(case: Case, backend: str, dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    reason = why_not(backend, case.op, device, dtype)
    # Beside a GPU Triton's interpreter is off. Matrix kernels are for CPUs, and for some. Nothing else may be missing.
    if reason is not None and (torch.cuda.is_available() or case.op in MATRIX_OPS):
        pytest.skip(reason)
    call = make_call(case, dtype, device, channels_last=channels_last)
    Expected(case, call).check(evaluate(call, backend))


_NOISE = [
    pytest.param(case, channels_last, id=f"{case.name}-{'channels_last' if channels_last else 'contiguous'}")
    for case in SELECTED
    if case.op == "noise"
    for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "channels_last"), _NOISE)
def test_noise_is_the_same_bits_from_every_backend(
    case: Case, channels_last: bool, dtype: torch.dtype, device: torch.device
) -> None:
    call = make_call(case, dtype, device, channels_last=channels_last)
    (expected,) = call("reference")
    for backend in ("native", "triton"):
        if why_not(backend, "noise", device, dtype) is None:
            (got,) = call(backend)
            assert torch.equal(got, expected), backend
            assert got.stride() == expected.stride()
