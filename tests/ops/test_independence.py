"""Results and gradients have the same bits for any number of threads, and for a sample alone."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import with_threads
from op_calls import Call, make_call
from op_cases import SCHEDULE, Case
from parameters import parametrize
from parity import skip_unless
from torch import Tensor

from ddpm_fast import ddpm_plan
from ddpm_fast.predictions import TARGETS

ELEMENTWISE: dict[str, dict[str, object]] = {"noise": {}, "q_sample": {}}
ELEMENTWISE["reverse_step"] = {"plan": ddpm_plan(SCHEDULE), "step": "sample"}
# Enough work for two threads, in an odd number of samples. One thread takes the norm's samples whole, two cut each into
# slices of channels. Maps, scores and tiles of an upsampled map do not divide into equal parts.
LARGE = [
    *(Case(op, "large", (33, 3, 32, 32), options) for op, options in ELEMENTWISE.items()),
    *(Case("denoising_loss", f"large-{p}", (33, 3, 32, 32), {"prediction": p, "reduction": "none"}) for p in TARGETS),
    Case("group_norm_silu", "slices", (3, 96, 13, 13), {"shift": True}),
    Case("group_norm_silu", "few-channels", (5, 3, 64, 64), {"groups": 3}),
    Case("conv3x3", "blocks", (3, 140, 21, 70), {"out": 33}),
    Case("conv3x3", "upsampled-blocks", (3, 140, 21, 70), {"out": 33, "upsample": True}),
    Case("attention", "blocks", (2, 300, 80), {"heads": 2}),
]
BATCHES = [
    *(Case(op, "batch", (3, 3, 16, 16), options) for op, options in ELEMENTWISE.items()),
    *(Case("denoising_loss", f"batch-{p}", (3, 3, 16, 16), {"prediction": p, "reduction": "none"}) for p in TARGETS),
    Case("group_norm_silu", "batch", (3, 16, 8, 8), {"groups": 4, "shift": True, "scale_shift": True}),
]
SHARED = ("weight", "bias")  # arguments that all samples share
LAYOUTS = {"contiguous": False, "channels_last": True}


def results(call: Call, backend: str) -> dict[str, Tensor]:
    """Return outputs and gradients by name. A sample's gradients are those of its own outputs."""
    call = call.map(lambda x: x.detach().clone().requires_grad_())
    outputs, inputs = call(backend), call.tensors
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if inputs:
        loss = torch.stack([output.double().square().sum() for output in outputs]).sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        found |= dict(zip(inputs, grads, strict=True))
    return found


@pytest.mark.usefixtures("matrix_kernels")
@parametrize(case={str(case): case for case in LARGE}, dtype=[torch.float32, torch.bfloat16], channels_last=LAYOUTS)
def test_threads_change_no_bit(case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    call = make_call(case, dtype, channels_last=channels_last and len(case.shape) == 4)
    skip_unless("native", call)
    alone = with_threads(1, lambda: results(call, "native"))
    for threads in (2, 3, 5, 16, 40):  # 40: more than there are shares of the work
        for name, value in with_threads(threads, lambda: results(call, "native")).items():
            assert torch.equal(value, alone[name]), (threads, name)


def sample_of(call: Call, i: int) -> Call:
    def part(name: str, value: object) -> object:
        if isinstance(value, tuple):
            return (1, *value[1:]) if name == "shape" else tuple(part(name, each) for each in value)
        return value[i : i + 1] if isinstance(value, Tensor) and name not in SHARED else value

    return Call(call.function, {name: part(name, value) for name, value in call.arguments.items()})


@parametrize(
    case={str(case): case for case in BATCHES},
    backend=["native", "triton", "reference"],
    channels_last=LAYOUTS,
)
def test_a_sample_does_not_depend_on_its_batch(case: Case, backend: str, channels_last: bool, device: torch.device) -> None:
    call = make_call(case, device=device, channels_last=channels_last)
    skip_unless(backend, call)
    batch = results(call, backend)
    for name, value in results(sample_of(call, 1), backend).items():
        assert name in SHARED or torch.equal(value, batch[name][1:2]), name
