"""The kernel that resamples maps by 2 after a norm and an activation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddpm_fast.ops import backend
from ddpm_fast.ops.resample import resample_op

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module"),
    pytest.mark.usefixtures("matrix_kernels"),
]

# n, channels, height, width: vectors that are not full, one pixel or square, rows of one square, many rows.
SHAPES = [(1, 3, 2, 2), (2, 5, 4, 6), (3, 16, 2, 8), (2, 37, 6, 2), (1, 130, 32, 32), (0, 8, 4, 4)]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(shape[0], 3, shape[1])


@pytest.mark.parametrize("up", [False, True], ids=["mean", "up"])
@pytest.mark.parametrize("act", ["nothing", "norm", "silu"])
@pytest.mark.parametrize("dtype", backend.MATRIX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_is_as_right_as_pytorchs(shape: tuple[int, ...], dtype: torch.dtype, act: str, up: bool) -> None:
    squares = torch.zeros(3, dtype=torch.float64)
    for _ in range(32 if math.prod(shape) < 1000 else 1):  # whose error is larger is luck for a few values
        x, affine = make(shape, dtype)
        given = None if act == "nothing" else affine
        wide = None if given is None else given.double()
        y = resample_op(x, given, act == "silu", up, backend="native")
        exact = resample_op(x.double(), wide, act == "silu", up, backend="reference")
        plain = resample_op(x, given, act == "silu", up, backend="reference")
        assert (y.shape, y.dtype) == (exact.shape, dtype)
        assert y.is_contiguous(memory_format=torch.channels_last)
        squares += torch.stack([each.square().sum() for each in (y.double() - exact, plain.double() - exact, exact)])
    error, allowed, size = squares.sqrt()
    assert error <= max(2 * allowed, torch.finfo(dtype).eps / 2 * size)


def test_the_mean_is_rounded_once() -> None:
    """Each of these sums would lose its last bit in bfloat16."""
    x = torch.tensor([1.0, 1.0078125, 1.0078125, 1.015625]).view(1, 1, 2, 2).bfloat16()
    assert resample_op(x, None, False, False, backend="native").item() == 1.0078125


@pytest.mark.parametrize("dtype", backend.MATRIX_DTYPES)
@pytest.mark.parametrize(("shape", "up"), [((1, 20, 4, 4), False), ((1, 20, 3, 5), True)])
def test_nan_and_infinity_stay(shape: tuple[int, ...], up: bool, dtype: torch.dtype) -> None:
    x, _ = make(shape, dtype)
    x[0, 3, 1, 1], x[0, 7, 2, 2] = torch.nan, torch.inf
    y = resample_op(x, None, False, up, backend="native")
    expected = resample_op(x, None, False, up, backend="reference")
    exact = {"rtol": 0.0, "atol": 0.0} if up else {}  # upsampling alone changes no value
    torch.testing.assert_close(y, expected, equal_nan=True, **exact)
    assert y.isnan().any()
    assert y.isinf().any()
