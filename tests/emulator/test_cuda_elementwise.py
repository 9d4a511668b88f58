"""The elementwise CUDA kernels on the emulator where the CASES do not go: many tiles, wide pixels, odd addresses, many samples.

The layout and the address of a tensor decide how a kernel cuts it up, and must not show in the result: it has the bits of the
tensor's contiguous, aligned twin. Noise has the bits of the CPU's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from op_calls import make_call, unaligned
from op_cases import CASES, SCHEDULE, Case
from parity import evaluate

from ddpm_fast import ddpm_plan, noise, reference, sample_seeds
from ddpm_fast.predictions import TARGETS

# Blocks handle up to 4096 elements, in channels_last at least 8 pixels of up to 512 channels.
SHAPES = {
    "several-tiles": (2, 3, 64, 48),
    "blocks-straddle-channels": (1, 5, 37, 27),
    "single-row-pixels": (3, 7, 1, 5),
    "pixels-in-two-tiles": (1, 516, 3, 3),
    "pixels-in-three-uneven-tiles": (1, 1031, 2, 5),
}
# Guidance, a learned variance, two steps of history, x_0, and a step for each sample.
EVERYTHING = next(case for case in CASES if case.name == "order-3").options | {"guidance_scale": 2.5, "step": "sample"}
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("noise", {"stream": 3}),
    ("noise", {"dtype": torch.bfloat16}),
    ("q_sample", {}),
    ("q_sample", {"uint8": True}),
    ("reverse_step", {"plan": ddpm_plan(SCHEDULE), "half_model": True}),
    ("reverse_step", EVERYTHING | {"half_model": True}),
    *(("denoising_loss", {"prediction": prediction, "reduction": "none"}) for prediction in TARGETS),
)


@pytest.mark.parametrize("copy", [torch.clone, unaligned], ids=["aligned", "odd-address"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("op", "options"), OPTIONS, ids=[f"{op}-{i}" for i, (op, _) in enumerate(OPTIONS)])
def test_the_layout_and_the_address_do_not_show(
    emulated: ModuleType, op: str, options: dict[str, Any], shape: tuple[int, ...], channels_last: bool, copy: Any
) -> None:
    case = Case(op, "cut", shape, options)
    call, cut = (make_call(case, options.get("dtype", torch.float32), channels_last=last) for last in (False, channels_last))
    expected, got = evaluate(call, "native"), evaluate(cut, "native", copy)
    if op == "denoising_loss":  # the order of its sum may depend on the layout
        (truth,) = call.map(lambda x: x.double())("reference")
        for loss in (*got.outputs, *expected.outputs):
            torch.testing.assert_close(loss.double(), truth, rtol=2e-7, atol=0)
        assert torch.equal(got.grads["model_output"], expected.grads["model_output"])
        return
    for each, wanted in zip((*got.outputs, *got.grads.values()), (*expected.outputs, *expected.grads.values()), strict=True):
        assert torch.equal(each, wanted)
    if op == "noise":
        assert torch.equal(got.outputs[0], *call("reference"))


@pytest.mark.slow
def test_more_samples_than_a_grid_has_rows(emulated: ModuleType) -> None:
    n = 65535 + 3
    seeds = sample_seeds(6, n)
    assert torch.equal(noise((n, 1), seeds), reference.noise((n, 1), seeds, 0, torch.float32))
