"""The elementwise CUDA kernels on the emulator where the CASES do not go: many tiles, wide pixels, odd addresses, many samples.

The layout and the address of a tensor decide how a kernel cuts it up, and must not show in the result: it has the bits of the
tensor's contiguous, aligned twin. Noise has the bits of the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from op_cases import SCHEDULE
from torch import Tensor

from ddpm_fast import Objective, ddpm_plan, denoising_loss, noise, q_sample, reference, reverse_step, sample_seeds
from ddpm_fast.predictions import TARGETS

# Blocks handle up to 4096 elements, in channels_last at least 8 pixels of up to 512 channels.
SHAPES = {
    "several-tiles": (2, 3, 64, 48),
    "blocks-straddle-channels": (1, 5, 37, 27),
    "single-row-pixels": (3, 7, 1, 5),
    "pixels-in-two-tiles": (1, 516, 3, 3),
    "pixels-in-three-uneven-tiles": (1, 1031, 2, 5),
}


def _moved(x: Tensor, channels_last: bool, off: int) -> Tensor:
    """A copy in that layout, whose first element lies `off` elements behind an aligned address."""
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    room = torch.empty(x.numel() + off, dtype=x.dtype)
    return room[off:].as_strided(x.shape, x.stride()).copy_(x)


def _places() -> Iterator[object]:
    for channels_last in (False, True):
        for off in (0, 1):
            layout = "channels_last" if channels_last else "contiguous"
            yield pytest.param(channels_last, off, id=f"{layout}-{'odd' if off else 'aligned'}-address")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_noise(emulated: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seeds = sample_seeds(1, shape[0])
    expected = reference.noise(shape, seeds, 3, dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = noise(shape, seeds, stream=3, dtype=dtype, memory_format=layout)
        assert torch.equal(got, expected), layout


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize(("channels_last", "off"), list(_places()))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_sample(emulated: ModuleType, shape: tuple[int, ...], channels_last: bool, off: int, uint8: bool) -> None:
    seeds, t = sample_seeds(2, shape[0]), torch.arange(100, 100 + shape[0])
    x_0 = torch.randn(shape)
    x_0 = (64 * x_0 + 128).clamp(0, 255).to(torch.uint8) if uint8 else x_0
    expected = q_sample(x_0, t, SCHEDULE, seeds=seeds)
    got = q_sample(_moved(x_0, channels_last, off), t, SCHEDULE, seeds=seeds)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize(("channels_last", "off"), list(_places()))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reverse_step(emulated: ModuleType, shape: tuple[int, ...], channels_last: bool, off: int, options: str) -> None:
    """The step runs in place with a bfloat16 output, variances, guidance, history, x_0 and a step for each sample."""
    n, c = shape[:2]
    every = options == "everything"
    plan = ddpm_plan(SCHEDULE, variance="learned_range" if every else "fixed_small")
    tensors = {
        "x_t": torch.randn(shape),
        "model_output": torch.randn((1 + every) * n, (1 + every) * c, *shape[2:]).bfloat16(),
        "x_0_prev": torch.randn(shape) if every else None,
        "x_0_prev2": torch.randn(shape) if every else None,
    }
    step = torch.arange(n) if every else 5

    def run(channels_last: bool, off: int) -> tuple[Tensor, ...]:
        moved = {name: x if x is None else _moved(x, channels_last, off) for name, x in tensors.items()}
        scale = 2.5 if every else None
        result = reverse_step(
            **moved, step=step, plan=plan, seeds=sample_seeds(4, n), guidance_scale=scale, return_x_0=every,
            out=moved["x_t"],
        )  # fmt: skip
        return result if isinstance(result, tuple) else (result,)

    for got, expected in zip(run(channels_last, off), run(False, 0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize(("channels_last", "off"), list(_places()))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_denoising_loss(emulated: ModuleType, shape: tuple[int, ...], channels_last: bool, off: int, prediction: str) -> None:
    """The sum's order may depend on the layout, the gradient not."""
    seeds, t = sample_seeds(5, shape[0]), torch.arange(300, 300 + shape[0])
    x_0, m = torch.randn(shape), torch.randn(shape)

    def run(x_0: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        m = m.requires_grad_()
        loss = denoising_loss(m, x_0, t, SCHEDULE, prediction=prediction, seeds=seeds, reduction="none")
        return loss, torch.autograd.grad(loss.sum(), m)[0]

    loss, grad = run(_moved(x_0, channels_last, off), _moved(m, channels_last, off))
    expected_loss, expected_grad = run(x_0, m)
    table = Objective(SCHEDULE, prediction).on(t.device).table
    truth = reference.denoising_loss(m.double(), x_0.double(), t, table, None, seeds)
    assert torch.equal(grad, expected_grad)
    for each in (loss, expected_loss):
        torch.testing.assert_close(each.double(), truth, rtol=2e-7, atol=0)


@pytest.mark.slow
def test_more_samples_than_a_grid_has_rows(emulated: ModuleType) -> None:
    n = 65535 + 3
    seeds = sample_seeds(6, n)
    assert torch.equal(noise((n, 1), seeds), reference.noise((n, 1), seeds, 0, torch.float32))


@pytest.fixture(autouse=True)
def _fixed_values() -> None:
    torch.manual_seed(0)
