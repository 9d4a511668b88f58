"""The Triton launchers against the reference: on the CPU in Triton's interpreter, on a GPU compiled.

Parity through the public ops, with gradients, is in tests/ops; here is what belongs to the kernels: bits of the noise, layouts,
tiles that end early, several partial sums, every branch of a launcher.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_fast import reference

pytest.importorskip("triton")

from ddpm_fast.triton_kernels.noise import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = torch.tensor([0, -1, 2**62 + 12345])
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # rounding to nearest, relative

contiguous: Callable[[Tensor], Tensor] = Tensor.contiguous


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_rounded(actual: Tensor, exact: Tensor, operations: int) -> None:
    """Equal up to one rounding to the dtype and so many float32 roundings of values of the size of the result's largest."""
    size = exact.abs().max().item()
    error = (actual.double() - exact.double()).abs()
    bound = HALF_STEP[actual.dtype] * exact.double().abs() + operations * 2.0**-24 * size
    assert actual.isfinite().all()
    assert (error <= bound).all(), f"largest error {(error / bound).max().item():.2f} times the bound"


# Shapes: one pair; a line with a tail and a partial block; two tiles a sample; planes that blocks straddle; one channel.
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 13), (3, 3, 20, 20), (3, 3, 5, 7), (3, 1, 6, 6), (3, 70, 2, 2)])
@DTYPES
@LAYOUTS
def test_normals_have_the_bits_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    if layout is channels_last and len(shape) != 4:
        layout = contiguous
    out = layout(torch.full(shape, torch.nan, dtype=dtype, device=DEVICE))
    for stream in (0, 1, reference.STREAM_X_T):
        noise(out, SEEDS.to(DEVICE), stream)
        assert torch.equal(out, reference.noise(shape, SEEDS.to(DEVICE), stream, dtype))
