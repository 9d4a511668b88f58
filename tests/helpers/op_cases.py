"""CASES: inputs for each op, shared by tests and benchmarks.

An entry switches on parity of values and gradients (every backend, dtype and memory format), opcheck,
compilation and the benchmark. Each case is named after its purpose. There are no full products of
parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ddpm_fast.plan import COLUMNS, SamplingPlan, ddim_plan, ddpm_plan
from ddpm_fast.predictions import TARGETS
from ddpm_fast.reference import STREAM_X_T
from ddpm_fast.schedule import NoiseSchedule, Objective

SCHEDULE = NoiseSchedule.linear()


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        op: Name of the op in `ddpm_fast.ops`.
        name: Purpose of the case.
        shape: Shape of the main tensor, [N, ...].
        options: Options of the op's input builder.
        benchmark: Whether the shape is from a real network and worth timing.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    benchmark: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def multistep(plan: SamplingPlan, k4: float = 0.0) -> SamplingPlan:
    """Return a plan that also uses the x_0^ of earlier steps, as multistep samplers do."""
    coefficients = plan.coefficients.clone()
    coefficients[:, COLUMNS.index("k3")], coefficients[:, COLUMNS.index("k4")] = 0.25, k4
    return SamplingPlan(plan.schedule, plan.timesteps, coefficients, plan.prediction, plan.variance)


_DDPM = ddpm_plan(SCHEDULE)
_STRIDED = ddpm_plan(SCHEDULE, 37, spacing="trailing", variance="fixed_large")
_UNCLIPPED = ddpm_plan(SCHEDULE, clip=None)
_VELOCITY = ddpm_plan(SCHEDULE, 50, prediction="v_prediction")
_LEARNED = ddpm_plan(SCHEDULE, 50, variance="learned")
_RANGE = ddpm_plan(SCHEDULE, 50, variance="learned_range")
_DDIM = ddim_plan(SCHEDULE, 50, use_clipped_model_output=False)  # the form that uses k2

CASES: tuple[Case, ...] = (
    # noise: the tail of a block of four; one element; nothing; several vectors with a tail; no layout; a network's shape
    Case("noise", "odd-sizes", (2, 3, 5, 7)),
    Case("noise", "one-element", (3, 1, 1, 1)),
    Case("noise", "empty-batch", (0, 3, 4, 4)),
    Case("noise", "last-stream", (2, 5, 9, 13), {"stream": STREAM_X_T}),
    Case("noise", "no-channels", (3, 131)),
    Case("noise", "cifar-batch", (16, 3, 32, 32), benchmark=True),
    Case("q_sample", "odd-sizes", (3, 3, 5, 7)),
    Case("q_sample", "given-noise", (3, 3, 5, 7), {"source": "noise"}),
    Case("q_sample", "int-t", (2, 1, 9, 9), {"t": 500}),
    Case("q_sample", "vectors", (2, 131)),
    Case("q_sample", "strided", (2, 3, 4, 5), {"strided": True, "source": "noise"}),
    Case("q_sample", "uint8", (3, 3, 5, 7), {"uint8": True}),
    Case("q_sample", "uint8-given-noise", (2, 3, 4, 8), {"uint8": True, "source": "noise"}),
    Case("q_sample", "empty-batch", (0, 3, 4, 4)),
    Case("q_sample", "cifar-batch", (16, 3, 32, 32), benchmark=True),
    Case("reverse_step", "ddpm-clip", (3, 3, 5, 7), {"plan": _DDPM}),
    Case("reverse_step", "no-clip", (3, 3, 5, 7), {"plan": _UNCLIPPED}),
    Case("reverse_step", "given-noise", (2, 3, 5, 7), {"plan": _STRIDED, "source": "noise", "step": 5}),
    Case("reverse_step", "step-per-sample", (4, 3, 5, 7), {"plan": _STRIDED, "step": "sample", "return_x_0": True}),
    Case("reverse_step", "last-step-no-noise", (2, 3, 4, 4), {"plan": _DDPM, "step": 999}),
    Case("reverse_step", "velocity-half-model", (2, 3, 5, 7), {"plan": _VELOCITY, "half_model": True}),
    Case("reverse_step", "ddim", (2, 3, 5, 7), {"plan": _DDIM, "source": None}),
    Case("reverse_step", "guidance", (2, 3, 5, 7), {"plan": _DDPM, "guidance_scale": 2.5, "return_x_0": True}),
    Case("reverse_step", "learned", (2, 3, 5, 7), {"plan": _LEARNED}),
    Case("reverse_step", "learned-range-guidance", (3, 3, 5, 7), {"plan": _RANGE, "guidance_scale": 1.5, "step": "sample"}),
    Case("reverse_step", "multistep", (2, 3, 5, 7), {"plan": multistep(_DDIM), "source": None}),
    Case("reverse_step", "order-3", (2, 3, 5, 7), {"plan": multistep(_RANGE, -0.5), "return_x_0": True}),
    Case("reverse_step", "vectors", (3, 131), {"plan": _DDPM}),
    Case("reverse_step", "strided", (2, 3, 4, 5), {"plan": _DDPM, "strided": True, "source": "noise"}),
    Case("reverse_step", "empty-batch", (0, 3, 4, 4), {"plan": _DDPM}),
    Case("reverse_step", "cifar-batch", (16, 3, 32, 32), {"plan": _DDPM}, benchmark=True),
    # group_norm_silu: channels per group of 1, 3, 4, 12 and all; rows that are no multiple of a vector; every option
    Case("group_norm_silu", "odd-sizes", (2, 6, 5, 7), {"groups": 2}),
    Case("group_norm_silu", "shift", (2, 64, 4, 4), {"shift": True}),
    Case("group_norm_silu", "scale-shift", (2, 64, 5, 3), {"scale_shift": True, "shift": True}),
    Case("group_norm_silu", "float32-parameters", (2, 32, 4, 4), {"groups": 8, "float32_parameters": True}),
    Case("group_norm_silu", "no-affine-no-activation", (2, 20, 6, 6), {"groups": 5, "affine": False, "activation": None}),
    Case("group_norm_silu", "instance-norm", (2, 7, 3, 5), {"groups": 7}),
    Case("group_norm_silu", "layer-norm", (2, 48, 3, 3), {"groups": 1}),
    Case("group_norm_silu", "one-pixel", (2, 64, 1, 1), {"groups": 16}),
    Case("group_norm_silu", "vectors", (3, 24), {"groups": 4}),
    Case("group_norm_silu", "strided", (2, 8, 4, 5), {"groups": 2, "strided": True, "shift": True}),
    Case("group_norm_silu", "one-channel", (3, 1, 6, 5), {"groups": 1}),
    Case("group_norm_silu", "small-spread-far-from-0", (2, 16, 8, 8), {"groups": 4, "offset": 100.0, "spread": 0.1}),
    Case("group_norm_silu", "empty-batch", (0, 8, 4, 4), {"groups": 2}),
    Case("group_norm_silu", "empty-map", (2, 8, 0, 4), {"groups": 2, "shift": True, "scale_shift": True}),
    Case("group_norm_silu", "384-channels", (1, 384, 9, 9), {"shift": True}),
    Case("group_norm_silu", "cifar-block", (2, 128, 32, 32), {"shift": True}, benchmark=True),
    Case("group_norm_silu", "cifar-middle", (16, 256, 8, 8), benchmark=True),
    *(Case("denoising_loss", p, (3, 3, 5, 7), {"prediction": p}) for p in TARGETS),
    *(Case("denoising_loss", f"{p}-given-noise", (3, 3, 5, 7), {"prediction": p, "source": "noise"}) for p in TARGETS),
    Case("denoising_loss", "weight-no-reduction", (4, 3, 5, 7), {"weight": True, "reduction": "none"}),
    Case("denoising_loss", "sum-int-t", (2, 131), {"reduction": "sum", "t": 10}),
    Case("denoising_loss", "empty-batch", (0, 3, 4, 4), {"reduction": "sum"}),
    Case("denoising_loss", "numbers", (5,), {"reduction": "none"}),
    Case("denoising_loss", "strided", (2, 3, 4, 5), {"prediction": "v_prediction", "strided": True, "source": "noise"}),
    Case("denoising_loss", "cifar-batch", (16, 3, 32, 32), benchmark=True),
    Case("group_norm_affine", "odd-sizes", (2, 6, 5, 7), {"groups": 2}),
    Case("group_norm_affine", "skip-shift", (2, 8, 4, 5), {"groups": 5, "skip": 7, "shift": True}),
    Case("group_norm_affine", "scale-shift", (2, 16, 3, 5), {"groups": 4, "scale_shift": True, "skip": 16}),
    Case("group_norm_affine", "cifar-block", (16, 128, 32, 32), benchmark=True),
    # conv3x3: channels that fill no vector; direct sums, for few tiles; each operation that is fused, and all of them
    Case("conv3x3", "odd-sizes", (2, 5, 7, 9), {"out": 9}),
    Case("conv3x3", "few-tiles", (1, 12, 3, 3), {"out": 20, "bias": False}),
    Case("conv3x3", "upsample", (2, 12, 5, 6), {"out": 20, "upsample": True}),
    Case("conv3x3", "norm-skip", (2, 6, 5, 7), {"out": 8, "skip": 5, "affine": True, "activation": "silu"}),
    Case("conv3x3", "affine", (2, 6, 4, 4), {"out": 8, "affine": True}),
    Case("conv3x3", "activation", (2, 6, 4, 4), {"out": 8, "activation": "silu"}),
    Case("conv3x3", "residual", (2, 8, 6, 5), {"out": 8, "residual": True, "divisor": 2.0}),
    Case(
        *("conv3x3", "everything", (2, 6, 4, 6)),
        {"out": 8, "skip": 3, "affine": True, "activation": "silu", "residual": True, "divisor": 1.5, "upsample": True},
    ),
    Case("conv3x3", "empty-batch", (0, 4, 4, 4), {"out": 4}),
    Case("conv3x3", "cifar-block", (16, 128, 32, 32), {"out": 128}, benchmark=True),
    Case("attention", "one-head", (2, 35, 16)),
    Case("attention", "heads", (3, 20, 24), {"heads": 3}),
    Case("attention", "one-pixel", (2, 1, 8), {"heads": 2}),
    Case("attention", "empty-batch", (0, 5, 4), {"heads": 2}),
    Case("attention", "no-pixels", (2, 0, 4), {"heads": 2}),
    Case("attention", "cifar-16x16", (16, 256, 256), benchmark=True),
)


def bytes_moved(case: Case, dtype: torch.dtype, *, backward: bool = False) -> int:
    """Return the bytes that a fused kernel must read and write, each large tensor once.

    It is the lower bound that benchmarks compare with.

    Args:
        case: The case.
        dtype: Dtype of floating inputs.
        backward: Count the backward pass instead of the forward pass.
    """
    elements = math.prod(case.shape)
    source = 1 if case.options.get("source") == "noise" else 0  # drawn noise costs no traffic
    if case.op == "noise":
        tensors = 1
    elif case.op == "q_sample":
        if case.options.get("uint8"):
            return elements * (1 + (1 + source) * dtype.itemsize)
        tensors = 2 + source
    elif case.op == "denoising_loss":
        target = Objective(SCHEDULE, case.options.get("prediction", "epsilon")).on(torch.device("cpu"))
        tensors = (2 if backward else 1) + target.reads_x_0 + source * target.reads_epsilon
    elif case.op == "reverse_step":
        plan: SamplingPlan = case.options["plan"]
        model = (1 if plan.variance == "fixed" else 2) * (1 if case.options.get("guidance_scale") is None else 2)
        tensors = 2 + model + source + int(case.options.get("return_x_0", False))
        tensors += int(plan.needs_x_0_prev) + int(plan.needs_x_0_prev2)
    elif case.op == "group_norm_affine":
        tensors = 1
    elif case.op == "conv3x3":
        channels, out_channels = case.shape[1], case.options["out"]
        moved = elements * (1 + out_channels / channels * (4 if case.options.get("upsample") else 1))
        return int(moved * (2 if backward else 1)) * dtype.itemsize
    elif case.op == "attention":
        tensors = 8 if backward else 4  # q, k, v and y; backward reads them and grad_y, and writes three gradients
    else:
        tensors = 3 if backward else 2
    return tensors * elements * dtype.itemsize
