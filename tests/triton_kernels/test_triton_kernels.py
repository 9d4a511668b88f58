"""The Triton launchers by the parity rule: on the CPU in Triton's interpreter, on a GPU compiled.

The cases of all backends are in tests/ops. Here is what belongs to the kernels: tiles and grids that end early, and several
partial results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from kernel_calls import defaulting_to, launch_triton
from op_calls import make_call
from op_cases import SCHEDULE, Case, multistep
from parameters import parametrize
from parity import Expected, assert_same, evaluate
from refusals import refused

from ddpm_fast import ddpm_plan, reference
from ddpm_fast.errors import InvalidValue
from ddpm_fast.predictions import TARGETS

pytest.importorskip("triton")

from ddpm_fast.triton_kernels import denoising_loss as loss_module
from ddpm_fast.triton_kernels import group_norm_silu as norm_module
from ddpm_fast.triton_kernels import group_norm_tiles, tiles

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = torch.tensor([0, -1, 2**62 + 12345], device=DEVICE)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# A pair; a tail and a partial block; two tiles a sample; planes that blocks straddle; one channel; two tiles of channels.
SHAPES = [(3, 2), (3, 1, 13), (3, 3, 20, 20), (3, 3, 5, 7), (3, 1, 6, 6), (3, 70, 2, 2)]


@parametrize(shape=SHAPES, dtype=[torch.float32, torch.bfloat16], layout=LAYOUTS)
def test_normals_have_the_bits_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    if len(shape) == 4:
        out = out.contiguous(memory_format=layout)
    stream = 1 if dtype == torch.float32 else reference.STREAM_X_T
    launch_triton("noise", {"out": out}, seeds=SEEDS, stream=stream)
    assert torch.equal(out, reference.noise(shape, SEEDS, stream, dtype))


def check(case: Case, layout: torch.memory_format, *, has_scratch: bool = False) -> None:
    """Compare with the reference, and with the bits under another default dtype: scratch tensors keep their digits."""
    call = make_call(case, device=DEVICE, channels_last=layout == torch.channels_last)
    got = evaluate(call, "triton")
    Expected(case, call).check(got)
    if has_scratch:
        with defaulting_to(torch.bfloat16):
            assert_same(evaluate(call, "triton"), got, "under another default dtype")


# One channel, where a channels_last state is contiguous too but the two-channel model output is not; three; two tiles.
@parametrize(variance=["fixed_small", "learned", "learned_range"], channels=[1, 3, 70], layout=LAYOUTS)
def test_reverse_step_with_guidance_and_learned_variance(variance: Any, channels: int, layout: torch.memory_format) -> None:
    plan = multistep(ddpm_plan(SCHEDULE, 50, variance=variance), -0.5)
    options = {"plan": plan, "guidance_scale": 3.0, "step": "sample", "half_model": True, "return_x_0": True}
    check(Case("reverse_step", "guidance", (3, channels, 4, 6), options), layout)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Cut samples into several tiles, and those of a norm into chunks, whose last kernel is returned with its calls."""
    monkeypatch.setattr(loss_module, "TILES_PER_PROGRAM", 1)
    limits = {"RESIDENT_FORWARD": (0, 0), "RESIDENT_BACKWARD": (0, 0), "SPLIT_TILE": 256, "TILES_PER_CHUNK": 2}
    for name, value in limits.items():
        monkeypatch.setattr(group_norm_tiles, name, value)
    kernel = norm_module._apply_kernel
    spy = MagicMock(arg_names=kernel.arg_names)
    spy.__getitem__.side_effect = lambda grid: kernel[grid]
    monkeypatch.setattr(norm_module, "_apply_kernel", spy)
    return spy


@parametrize(prediction=list(TARGETS), source=["noise", "seeds"], layout=LAYOUTS)
@pytest.mark.usefixtures("chunks")
def test_loss_of_many_tiles(prediction: str, source: str, layout: torch.memory_format) -> None:
    check(
        Case("denoising_loss", "tiles", (3, 3, 20, 21), {"prediction": prediction, "source": source}), layout, has_scratch=True
    )


# 2 groups of 8 channels, where nothing is padded; 3 of 6 in 9 x 5 pixels, padded in every way; deviations of a hundredth around
# a thousand, where E[x^2] - E[x]^2 has no digit right, nor has a mean that is summed carelessly.
MODULATED = {"shift": True, "scale_shift": True}
NORMS: Mapping[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "whole": ((3, 16, 8, 8), {"groups": 2, **MODULATED}),
    "padded": ((3, 18, 9, 5), {"groups": 3, "activation": None, **MODULATED}),
    "far from 0": ((2, 8, 16, 16), {"groups": 2, "affine": False, "activation": None, "offset": 1000.0, "spread": 1 / 64}),
}


@parametrize(norm=NORMS, layout=LAYOUTS)
def test_group_norm_in_chunks(
    norm: tuple[tuple[int, ...], dict[str, Any]], layout: torch.memory_format, chunks: MagicMock
) -> None:
    check(Case("group_norm_silu", "chunks", *norm), layout, has_scratch=True)
    chunks.__getitem__.assert_called()


@parametrize(norm=NORMS, layout=LAYOUTS)
def test_group_norm_in_one_tile(norm: tuple[tuple[int, ...], dict[str, Any]], layout: torch.memory_format) -> None:
    check(Case("group_norm_silu", "one-tile", *norm), layout, has_scratch=True)


MANY = [
    Case(op, "many", (3, 3, 8, 8), {"plan": ddpm_plan(SCHEDULE)})
    for op in ("noise", "q_sample", "denoising_loss", "reverse_step")
]
MANY += [Case("group_norm_silu", "many", *NORMS["whole"])]


@parametrize(case={str(case): case for case in MANY}, layout=LAYOUTS)
def test_more_samples_than_a_grid_has_rows(case: Case, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MAX_GRID_Y", 2)  # 3 samples: 2 x 2 programs
    check(case, layout)


@pytest.mark.parametrize(
    ("op", "shape", "error"),
    [
        ("noise", (1, 2**31), InvalidValue("", "samples of fewer than 2^31 elements", "2147483648")),
        ("norm", (1, 2**31), InvalidValue("", "samples of fewer than 2^31 elements", "2147483648")),
        (
            *("norm", (1, 5000)),
            InvalidValue("", "at most 4096 channels in a group for the Triton kernels", "5000"),
        ),
    ],
)
def test_what_is_too_large_is_refused(op: str, shape: tuple[int, ...], error: InvalidValue) -> None:
    x = torch.empty(shape, device="meta")
    with refused(error):
        if op == "noise":
            launch_triton("noise", {"out": x}, seeds=SEEDS[:1], stream=0)
        else:
            launch_triton("group_norm_silu", {"y": x, "mean": x, "rstd": x}, x=x, num_groups=1, eps=1e-5, silu=True)
