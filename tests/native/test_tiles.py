"""AMX's tiles: the bits of their products, by the hardware and by the C++ that stands for it on other processors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernel_calls import with_threads
from torch import Tensor

from ddpm_fast.ops import backend
from ddpm_fast.ops.attention import attention_tiles_op
from ddpm_fast.ops.backend import BackendUnavailable
from ddpm_fast.ops.packed_conv import conv_ops, pack_weights

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module"),
    pytest.mark.usefixtures("matrix_kernels"),
]


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    divisor: float = 1.0,
    stride: int = 1,
    upsample: bool = False,
    skip: Tensor | None = None,
    affine: Tensor | None = None,
) -> Tensor:
    """Convolve by tiles. The padding is that of an output of the input's size, divided by the stride."""
    out, _, kernel, _ = weight.shape
    packed = pack_weights(weight, "tiles", torch.bfloat16, upsample=upsample)
    x, skip = (None if each is None else each.contiguous(memory_format=torch.channels_last) for each in (x, skip))  # type: ignore[assignment]
    size = [(2 if upsample else 1) * side // stride for side in x.shape[2:]]
    arguments = (
        x,
        skip,
        affine,
        affine is not None,
        packed,
        bias,
        None,
        divisor,
        upsample,
        out,
        *size,
        kernel,
        stride,
        kernel // 2,
    )
    y: Tensor = conv_ops["tiles"](*arguments, backend="native")
    return y


def to_float32(exact: Fraction) -> float:
    """Round to the nearest float32, ties to even, and subnormal numbers to 0."""
    near = np.float32(float(exact))
    candidates = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
    best = min(candidates, key=lambda each: (abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1))
    return without_subnormals(float(best))


def without_subnormals(value: float) -> float:
    return value if abs(value) >= 2**-126 else 0.0


def by_the_rule(x: list[float], weight: list[float]) -> float:
    """Return the sum of products as tiles compute it, 32 at a time: even and odd ones, each one after the other."""
    total = 0.0
    for first in range(0, len(x), 32):
        sums = [0.0, 0.0]
        for i in range(first, first + 32):
            product = Fraction(without_subnormals(x[i])) * Fraction(without_subnormals(weight[i]))
            sums[i % 2] = to_float32(Fraction(sums[i % 2]) + product)
        total = to_float32(Fraction(total) + Fraction(to_float32(Fraction(sums[0]) + Fraction(sums[1]))))
    return total


# Exponents of x and of the weights.
RANGES = {"normal": (0, 0), "wide": (-30, 30), "subnormal": (-130, -110), "underflow": (-70, -55)}


@pytest.mark.parametrize("name", RANGES)
def test_a_product_has_the_bits_of_the_rule(name: str) -> None:
    """The bias takes away what the rule gives, so nothing is left if all bits are equal. The divisor enlarges what is left."""
    if name == "underflow" and backend.BUILD["isa"] == "baseline":
        pytest.skip("without fused multiply-add a product that underflows is rounded by itself")
    low, high = RANGES[name]
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape: int, centre: float = 0.0) -> Tensor:
        exponents = torch.randint(low, high + 1, shape, generator=generator)
        return torch.ldexp(torch.randn(shape, generator=generator), exponents).mul(2.0**centre).bfloat16()

    # Products of subnormal inputs are 0, so the weights are large.
    x, weight = draw(1, 96, 1, 1), draw(32, 96, 1, 1, centre=125 if name == "subnormal" else 0)
    rows, pixel = weight.flatten(1).double().tolist(), x.flatten().double().tolist()
    expected = torch.tensor([by_the_rule(pixel, row) for row in rows])
    assert torch.equal(convolved(x, weight), expected.bfloat16().view(1, 32, 1, 1))
    assert convolved(x, weight, -expected, divisor=2.0**-60).count_nonzero() == 0
    assert (expected != 0).sum() > 20


# n, channels of x and of skip, output channels, side, kernel, stride, upsampling: on two threads every arrangement of tiles,
# with outputs or pixels shared, and every arrangement of the input.
SHAPES = [
    (1, 64, 0, 128, 16, 3, 1, False),
    (1, 96, 0, 128, 4, 3, 1, False),
    (3, 40, 24, 40, 6, 3, 1, False),
    (2, 64, 0, 64, 32, 1, 1, False),
    (1, 40, 0, 64, 32, 3, 2, False),
    (1, 32, 0, 32, 16, 3, 1, True),
]


def results() -> list[Tensor]:
    """Return what tiles compute."""
    generator, outs = torch.Generator().manual_seed(0), []
    for n, channels, skip_channels, out, side, kernel, stride, upsample in SHAPES:
        x, skip = (torch.randn(n, each, side, side, generator=generator).bfloat16() for each in (channels, skip_channels))
        total = channels + skip_channels
        weight = torch.randn(out, total, kernel, kernel, generator=generator)
        affine = torch.randn(n, 3, total, generator=generator)
        options = {"stride": stride, "upsample": upsample, "skip": skip if skip_channels else None}
        outs += [convolved(x * scale, weight * scale, **options) for scale in (1, 2.0**-62)]  # type: ignore[arg-type]
        outs.append(convolved(x, weight, affine=affine, **options))  # type: ignore[arg-type]
    qkv = torch.randn(2, 70, 3 * 2 * 24, generator=generator).bfloat16()
    return [*outs, attention_tiles_op(qkv, 2, 0.2, backend="native")]


def digests() -> list[str]:
    return [hashlib.sha256(each.contiguous().view(torch.int16).numpy()).hexdigest() for each in results()]


def test_what_tiles_compute_is_finite_and_its_bits_do_not_depend_on_threads() -> None:
    one = with_threads(1, results)
    assert all(each.isfinite().all() for each in one)
    for threads in (2, 5, 64):
        assert all(map(torch.equal, with_threads(threads, results), one))


def test_other_dtypes_and_odd_heads_are_refused() -> None:
    x = torch.zeros(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(BackendUnavailable, match=r"it computes in bfloat16, not in torch\.float32"):
        convolved(x, torch.zeros(32, 32, 1, 1))
    with pytest.raises(BackendUnavailable, match="even number of channels in a head, got 3"):
        attention_tiles_op(torch.zeros(1, 4, 9, dtype=torch.bfloat16), 1, 1.0, backend="native")


@pytest.mark.again
@pytest.mark.skipif(backend.BUILD.get("isa") != "amx", reason="this processor has no tiles, or may not use them")
def test_the_hardware_gives_the_bits_of_the_rule() -> None:
    code = "from test_tiles import digests; print(digests())"
    printed = [
        subprocess.run(
            [sys.executable, "-c", f"import torch; torch.set_num_threads(2); {code}"],
            env=os.environ | {"DDPM_FAST_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("amx", "avx512_bf16")
    ]
    assert printed[0] == printed[1]
