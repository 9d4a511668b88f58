"""Each bad input raises before anything runs, and the message names the op, the argument, what was wanted and what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import freed
from op_cases import SCHEDULE
from refusals import by, refused

import ddpm_fast
from ddpm_fast import (
    Objective,
    attention,
    conv3x3,
    ddpm_plan,
    denoising_loss,
    dpm_solver_plan,
    group_norm_affine,
    group_norm_silu,
    noise,
    q_sample,
    reverse_step,
    sample_seeds,
)
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue

X, WIDE = torch.zeros(2, 4, 3, 3), torch.zeros(2, 8, 3, 3)
W, QKV = torch.zeros(5, 4, 3, 3), torch.zeros(2, 6, 12)
SEEDS = sample_seeds(0, 2)
PLAN = ddpm_plan(SCHEDULE, 10)
LEARNED = ddpm_plan(SCHEDULE, 10, variance="learned")
SPARSE = "a tensor of layout torch.sparse_coo"
ORDER_3 = dpm_solver_plan(SCHEDULE, 10, order=3)

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: sample_seeds(1.5, 2),
        by("sample_seeds", InvalidType("seed", "to be an integer in -9223372036854775808..18446744073709551615", "1.5")),
    ),
    (lambda: sample_seeds(0, -1), by("sample_seeds", InvalidValue("n", "to be an integer in 0..4294967296", "-1"))),
    (
        lambda: sample_seeds(0, 10, (1 << 63) - 10),
        by("sample_seeds", InvalidValue("start + n", "to be below 2^63", "9223372036854775808")),
    ),
    (lambda: noise((3, 2), SEEDS), by("noise", InvalidValue("seeds", "to have shape [3], one per sample", "[2]"))),
    (
        lambda: noise((2, 2), SEEDS.int()),
        by("noise", InvalidType("seeds", "to be an int64 tensor (see sample_seeds)", "torch.int32")),
    ),
    (lambda: noise((2, 2), [1, 2]), by("noise", InvalidType("seeds", "to be an int64 tensor (see sample_seeds)", "list"))),
    (lambda: noise((2, -2), SEEDS), by("noise", InvalidValue("shape", "to be a sequence of ints, each at least 0", "[2, -2]"))),
    (
        lambda: noise((2, 2), SEEDS, dtype=torch.int32),
        by("noise", InvalidType("dtype", "to be float32, float64, float16 or bfloat16", "torch.int32")),
    ),
    (
        lambda: noise((2, 2), SEEDS, stream=1 << 32),
        by("noise", InvalidValue("stream", "to be an integer in 0..4294967295", "4294967296")),
    ),
    (
        lambda: noise((2, 2), SEEDS, memory_format=torch.channels_last),
        by(
            "noise",
            InvalidValue(
                "memory_format",
                "to be torch.contiguous_format or, for [N, C, H, W], torch.channels_last",
                "torch.channels_last with shape [2, 2]",
            ),
        ),
    ),
    (
        lambda: noise((2, 2), SEEDS, backend="cuda"),
        by("noise", InvalidValue("backend", "to be one of native, triton, reference or None", "'cuda'")),
    ),
    (lambda: noise((2, 2), SEEDS, stream=1.5), by("noise", InvalidType("stream", "to be an integer in 0..4294967295", "1.5"))),
    (lambda: noise((2, 1.5), SEEDS), by("noise", InvalidType("shape", "to be a sequence of ints", "(2, 1.5)"))),
    (lambda: noise((True, 4), SEEDS), by("noise", InvalidType("shape", "to be a sequence of ints", "(True, 4)"))),
    (
        lambda: noise((2, 4), SEEDS, device="nowhere"),
        by("noise", InvalidValue("device", "to be a torch.device or its name", "'nowhere'")),
    ),
    (lambda: noise(2, SEEDS), by("noise", InvalidType("shape", "to be a sequence of ints", "2"))),
    (
        lambda: q_sample(X, 3, PLAN, seeds=SEEDS),
        by("q_sample", InvalidType("schedule", "to be a NoiseSchedule", "SamplingPlan")),
    ),
    (
        lambda: q_sample(X.int(), 3, SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidType("x_0", "to be float32, float64, float16, bfloat16 or uint8", "torch.int32")),
    ),
    (
        lambda: q_sample(X[0, 0, 0, 0].byte(), 3, SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidValue("x_0", "to have at least 1 dimensions [N, ...]", "shape []")),
    ),
    (lambda: q_sample([1.0], 3, SCHEDULE, seeds=SEEDS), by("q_sample", InvalidType("x_0", "to be a tensor", "list"))),
    (lambda: q_sample(X, 3, SCHEDULE), by("q_sample", InvalidValue("", "exactly one of noise and seeds", "neither"))),
    (
        lambda: q_sample(X, 3, SCHEDULE, seeds=SEEDS, noise=X),
        by("q_sample", InvalidValue("", "exactly one of noise and seeds", "both")),
    ),
    (lambda: q_sample(X, 1000, SCHEDULE, seeds=SEEDS), by("q_sample", InvalidValue("t", "in 0..999", "1000"))),
    (
        lambda: q_sample(X, 1.0, SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidType("t", "to be an int or an int64 tensor", "float")),
    ),
    (
        lambda: q_sample(X, torch.tensor([1, 1000]), SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidValue("t", "in 0..999", "values from 1 to 1000")),
    ),
    (
        lambda: q_sample(X, torch.tensor([-1, 2]), SCHEDULE, seeds=SEEDS, backend="reference"),
        by("q_sample", InvalidValue("t", "in 0..999", "values from -1 to 2")),
    ),
    (
        lambda: q_sample(X, torch.tensor([1, 2, 3]), SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidValue("t", "to be an int or of shape [2]", "[3]")),
    ),
    (
        lambda: q_sample(X, torch.tensor([1.0, 2.0]), SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidType("t", "to be an int or an int64 tensor", "torch.float32")),
    ),
    (
        lambda: q_sample(X, 3, SCHEDULE, noise=X[:1]),
        by("q_sample", InvalidValue("noise", "to have shape [2, 4, 3, 3]", "[1, 4, 3, 3]")),
    ),
    (
        lambda: q_sample(X, 3, SCHEDULE, noise=X.double()),
        by("q_sample", InvalidType("noise", "to have the dtype of x_t, torch.float32", "torch.float64")),
    ),
    (
        lambda: reverse_step(X, X[:1], 0, PLAN, seeds=SEEDS),
        by("reverse_step", InvalidValue("model_output", "to have shape [2, 4, 3, 3]", "[1, 4, 3, 3]")),
    ),
    (
        lambda: reverse_step(X, X, 0, LEARNED, seeds=SEEDS),
        by(
            "reverse_step",
            InvalidValue(
                "model_output",
                "to have shape [2, 8, 3, 3] (twice the channels, for learned variance)",
                "[2, 4, 3, 3]",
            ),
        ),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, guidance_scale=2.0),
        by(
            "reverse_step",
            InvalidValue("model_output", "to have shape [4, 4, 3, 3] (two halves, for guidance)", "[2, 4, 3, 3]"),
        ),
    ),
    (
        lambda: reverse_step(X, X.double(), 0, PLAN, seeds=SEEDS),
        by(
            "reverse_step",
            InvalidType(
                "model_output",
                "to have the dtype of x_t, torch.float32, or half precision if that is float32",
                "torch.float64",
            ),
        ),
    ),
    (
        lambda: reverse_step(X, X, 10, PLAN, seeds=SEEDS),
        by("reverse_step", InvalidValue("step", "to be an integer in 0..9", "10")),
    ),
    (
        lambda: reverse_step(X, X, torch.tensor(10), PLAN, seeds=SEEDS),
        by("reverse_step", InvalidValue("step", "in 0..9", "values from 10 to 10")),
    ),
    (
        lambda: reverse_step(X, X, torch.tensor([1, 2, 3]), PLAN, seeds=SEEDS),
        by("reverse_step", InvalidValue("step", "to be an int or to have 1 or 2 elements", "shape [3]")),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN),
        by("reverse_step", InvalidValue("", "noise or seeds, since the plan's steps draw noise (sigma > 0)", "neither")),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, noise=X),
        by("reverse_step", InvalidValue("", "at most one of noise and seeds", "both")),
    ),
    (
        lambda: reverse_step(X, X, 1, ORDER_3),
        by("reverse_step", InvalidValue("x_0_prev", "to be given, as the plan weighs it by k3", "None")),
    ),
    (
        lambda: reverse_step(X, X, 1, ORDER_3, x_0_prev=X),
        by("reverse_step", InvalidValue("x_0_prev2", "to be given, as the plan weighs it by k4", "None")),
    ),
    (
        lambda: reverse_step(X, X, 1, ORDER_3, x_0_prev=X, x_0_prev2=X[:1]),
        by("reverse_step", InvalidValue("x_0_prev2", "to have shape [2, 4, 3, 3]", "[1, 4, 3, 3]")),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=X[:1]),
        by("reverse_step", InvalidValue("out", "to have shape [2, 4, 3, 3]", "[1, 4, 3, 3]")),
    ),
    (
        lambda: reverse_step(X, X.clone().requires_grad_(), 0, PLAN, seeds=SEEDS, out=X.clone()),
        by(
            "reverse_step",
            InvalidValue("", "no gradients with out= (call under torch.no_grad())", "an input that requires one"),
        ),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=X.contiguous(memory_format=torch.channels_last)),
        by("reverse_step", InvalidValue("out", "to be dense, with the strides of x_t, (36, 9, 3, 1)", "(36, 1, 12, 4)")),
    ),
    (
        lambda: reverse_step(X.mT, X, 0, PLAN, seeds=SEEDS, out=X.mT),
        by(
            "reverse_step",
            InvalidValue(
                "x_t",
                "to be contiguous or channels_last with out=",
                "strides (36, 9, 1, 3) for shape [2, 4, 3, 3]: pass x_t.contiguous(), or no out",
            ),
        ),
    ),
    (
        lambda: reverse_step(X[:1], X[:1], 0, PLAN, seeds=SEEDS[:1], out=X.flatten()[4:40].view(1, 4, 3, 3)),
        by("reverse_step", InvalidValue("out", "to be x_t itself or apart from it in memory", "a partial overlap")),
    ),
    (
        lambda: reverse_step(X, WIDE, 0, LEARNED, seeds=SEEDS, out=WIDE.flatten()[:72].view(2, 4, 3, 3)),
        by("reverse_step", InvalidValue("out", "to be model_output itself or apart from it in memory", "a partial overlap")),
    ),
    (
        lambda: reverse_step(
            X, X, 0, PLAN, noise=WIDE.flatten()[:72].view(2, 4, 3, 3), out=WIDE.flatten()[4:76].view(2, 4, 3, 3)
        ),
        by("reverse_step", InvalidValue("out", "to be noise itself or apart from it in memory", "a partial overlap")),
    ),
    *(
        (
            lambda backend=backend: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=torch._neg_view(X.clone()), backend=backend),
            by("reverse_step", InvalidValue("out", "to be a tensor without lazy negation", "one: pass out.resolve_neg()")),
        )
        for backend in ("native", "reference")
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=X[:1].clone().expand(2, 4, 3, 3)),
        by("reverse_step", InvalidValue("out", "to be dense, with the strides of x_t, (36, 9, 3, 1)", "(0, 9, 3, 1)")),
    ),
    (lambda: noise((2, 4), SEEDS.to_sparse()), by("noise", InvalidType("seeds", "to be a dense tensor", SPARSE))),
    (
        lambda: q_sample(X, SEEDS.to_sparse(), SCHEDULE, seeds=SEEDS),
        by("q_sample", InvalidType("t", "to be a dense tensor", SPARSE)),
    ),
    (
        lambda: reverse_step(X, X, SEEDS.to_sparse(), PLAN, seeds=SEEDS),
        by("reverse_step", InvalidType("step", "to be a dense tensor", SPARSE)),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=X.to_sparse()),
        by("reverse_step", InvalidType("out", "to be a dense tensor", SPARSE)),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=(X, X.clone())),
        by("reverse_step", InvalidValue("out", "to be a tensor, without return_x_0", "a tuple of 2")),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, return_x_0=True, out=(X,)),
        by("reverse_step", InvalidValue("out", "to be a pair (x_{t-1}, x_0^)", "a tuple of 1")),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, return_x_0=True, out=(X, X.view_as(X))),
        by("reverse_step", InvalidValue("out", "to be apart from the destination of x_{t-1} in memory", "an overlap")),
    ),
    (
        lambda: reverse_step(X, X, 0, SCHEDULE, seeds=SEEDS),
        by("reverse_step", InvalidType("plan", "to be a SamplingPlan", "NoiseSchedule")),
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, guidance_scale="2"),
        by("reverse_step", InvalidType("guidance_scale", "to be a number", "str")),
    ),
    (lambda: group_norm_silu(X, 2, eps="x"), by("group_norm_silu", InvalidType("eps", "to be a number", "str"))),
    (
        lambda: group_norm_silu(X, 2, scale_shift=torch.ones(2, 4)),
        by("group_norm_silu", InvalidType("scale_shift", "to be a pair of tensors", "Tensor")),
    ),
    (lambda: group_norm_silu(X, 3), by("group_norm_silu", InvalidValue("num_groups", "to divide the 4 channels of x", "3"))),
    (lambda: group_norm_silu(X, 2.0), by("group_norm_silu", InvalidType("num_groups", "to be a positive integer", "2.0"))),
    (lambda: group_norm_silu(X, 0), by("group_norm_silu", InvalidValue("num_groups", "to be a positive integer", "0"))),
    (
        lambda: group_norm_silu(X[0, 0, 0], 1),
        by("group_norm_silu", InvalidValue("x", "to have at least 2 dimensions [N, ...]", "shape [3]")),
    ),
    (lambda: group_norm_silu(X, 2, torch.ones(3)), by("group_norm_silu", InvalidValue("weight", "to have shape [4]", "[3]"))),
    (
        lambda: group_norm_silu(X, 2, torch.ones(4).half()),
        by("group_norm_silu", InvalidType("weight", "to have the dtype of x, torch.float32", "torch.float16")),
    ),
    (
        lambda: group_norm_silu(X, 2, shift=torch.ones(2, 3)),
        by("group_norm_silu", InvalidValue("shift", "to have shape [2, 4]", "[2, 3]")),
    ),
    (
        lambda: group_norm_silu(X, 2, scale_shift=(torch.ones(2, 4), torch.ones(4))),
        by("group_norm_silu", InvalidValue("scale_shift[1]", "to have shape [2, 4]", "[4]")),
    ),
    (lambda: group_norm_silu(X, 2, eps=0.0), by("group_norm_silu", InvalidValue("eps", "to be positive and finite", "0.0"))),
    (
        lambda: group_norm_silu(X, 2, activation="relu"),
        by("group_norm_silu", InvalidValue("activation", "to be silu or None", "'relu'")),
    ),
    (
        lambda: denoising_loss(X, X, 3, SCHEDULE, seeds=SEEDS, prediction="x0"),
        by("denoising_loss", InvalidValue("prediction", "to be one of epsilon, sample, v_prediction, flow", "'x0'")),
    ),
    (
        lambda: denoising_loss(X, X, 3, SCHEDULE, seeds=SEEDS, reduction="max"),
        by("denoising_loss", InvalidValue("reduction", "to be one of mean, sum, none", "'max'")),
    ),
    (
        lambda: denoising_loss(X, X, 3, SCHEDULE, seeds=SEEDS, weight=torch.ones(3)),
        by("denoising_loss", InvalidValue("weight", "to have shape [2], one per sample", "[3]")),
    ),
    (
        lambda: denoising_loss(X.int(), X, 3, SCHEDULE, seeds=SEEDS),
        by(
            "denoising_loss",
            InvalidType(
                "model_output",
                "to be float64, float16, bfloat16 or of x_0's dtype, torch.float32",
                "torch.int32",
            ),
        ),
    ),
    (
        lambda: denoising_loss(torch.zeros(2), torch.zeros(2), 3, Objective(SCHEDULE, variance="learned"), seeds=SEEDS),
        by("denoising_loss", InvalidValue("x_0", "to have at least 2 dimensions [N, ...]", "shape [2]")),
    ),
    (
        lambda: denoising_loss(X[:1], X, 3, SCHEDULE, seeds=SEEDS),
        by("denoising_loss", InvalidValue("model_output", "to have shape [2, 4, 3, 3]", "[1, 4, 3, 3]")),
    ),
    (lambda: conv3x3([1.0], W), by("conv3x3", InvalidType("x", "to be a tensor", "list"))),
    (
        lambda: conv3x3(X.int(), W),
        by("conv3x3", InvalidType("x", "to be float32, float64, float16 or bfloat16", "torch.int32")),
    ),
    (lambda: conv3x3(X[0], W), by("conv3x3", InvalidValue("x", "to be [N, C, H, W]", "shape [4, 3, 3]"))),
    (lambda: conv3x3(X, [1.0]), by("conv3x3", InvalidType("weight", "to be a tensor", "list"))),
    (
        lambda: conv3x3(X, W.double()),
        by("conv3x3", InvalidType("weight", "to have the dtype of x, torch.float32", "torch.float64")),
    ),
    (lambda: conv3x3(WIDE, W), by("conv3x3", InvalidValue("weight", "to have shape [out, 8, 3, 3]", "[5, 4, 3, 3]"))),
    (lambda: conv3x3(X, W[..., :1]), by("conv3x3", InvalidValue("weight", "to have shape [out, 4, 3, 3]", "[5, 4, 3, 1]"))),
    (lambda: conv3x3(X, W.to("meta")), by("conv3x3", InvalidValue("weight", "on the device of x, cpu", "meta"))),
    (lambda: conv3x3(X, W, torch.zeros(4)), by("conv3x3", InvalidValue("bias", "to have shape [5]", "[4]"))),
    (
        lambda: conv3x3(X, W, torch.zeros(5).half()),
        by("conv3x3", InvalidType("bias", "to have the dtype of x, torch.float32", "torch.float16")),
    ),
    (
        lambda: conv3x3(X.bfloat16(), W.double()),
        by("conv3x3", InvalidType("weight", "to be float32 or of x's dtype, torch.bfloat16", "torch.float64")),
    ),
    (lambda: conv3x3(X, W[0]), by("conv3x3", InvalidValue("weight", "to have shape [out, 4, 3, 3]", "[4, 3, 3]"))),
    (lambda: conv3x3(X, W, 1.0), by("conv3x3", InvalidType("bias", "to be a tensor", "float"))),
    (lambda: conv3x3(X, W, skip=X[:1]), by("conv3x3", InvalidValue("skip", "to have shape [2, 4, 3, 3]", "[1, 4, 3, 3]"))),
    (
        lambda: conv3x3(X, W, skip=X.double()),
        by("conv3x3", InvalidType("skip", "to have the dtype of x, torch.float32", "torch.float64")),
    ),
    (lambda: conv3x3(X, W, skip=X[0]), by("conv3x3", InvalidValue("skip", "to be [N, C, H, W]", "shape [4, 3, 3]"))),
    (lambda: conv3x3(X, W, residual=X[0]), by("conv3x3", InvalidValue("residual", "to be [N, C, H, W]", "shape [4, 3, 3]"))),
    (lambda: conv3x3(X, W, skip=1.0), by("conv3x3", InvalidType("skip", "to be a tensor", "float"))),
    (lambda: conv3x3(X, W, skip=X), by("conv3x3", InvalidValue("weight", "to have shape [out, 8, 3, 3]", "[5, 4, 3, 3]"))),
    (
        lambda: conv3x3(X, W, affine=torch.zeros(2, 2, 4)),
        by("conv3x3", InvalidValue("affine", "to have shape [2, 3, 4]", "[2, 2, 4]")),
    ),
    (
        lambda: conv3x3(X, W, affine=torch.zeros(2, 3, 4).half()),
        by("conv3x3", InvalidType("affine", "to have the dtype of the statistics, torch.float32", "torch.float16")),
    ),
    (lambda: conv3x3(X, W, affine=X), by("conv3x3", InvalidValue("affine", "to have shape [2, 3, 4]", "[2, 4, 3, 3]"))),
    (lambda: conv3x3(X, W, activation="relu"), by("conv3x3", InvalidValue("activation", "to be silu or None", "'relu'"))),
    (lambda: conv3x3(X, W, residual=X), by("conv3x3", InvalidValue("residual", "to have shape [2, 5, 3, 3]", "[2, 4, 3, 3]"))),
    (
        lambda: conv3x3(X, W, residual=torch.zeros(2, 5, 3, 3), upsample=True),
        by("conv3x3", InvalidValue("residual", "to have shape [2, 5, 6, 6]", "[2, 5, 3, 3]")),
    ),
    (lambda: conv3x3(X, W, divisor=0), by("conv3x3", InvalidValue("divisor", "to be another number than 0", "0"))),
    (lambda: conv3x3(X, W, divisor="2"), by("conv3x3", InvalidType("divisor", "to be a number", "str"))),
    (lambda: conv3x3(X, W, upsample=2), by("conv3x3", InvalidType("upsample", "to be a bool", "int"))),
    (
        lambda: conv3x3(X, W, backend="cuda"),
        by("conv3x3", InvalidValue("backend", "to be one of native, triton, reference or None", "'cuda'")),
    ),
    (lambda: attention([1.0], 2), by("attention", InvalidType("qkv", "to be a tensor", "list"))),
    (
        lambda: attention(QKV.int(), 2),
        by("attention", InvalidType("qkv", "to be float32, float64, float16 or bfloat16", "torch.int32")),
    ),
    (
        lambda: attention(QKV[0], 2),
        by("attention", InvalidValue("qkv", "to be [N, L, 3 C] with C a multiple of 2 heads", "[6, 12]")),
    ),
    (
        lambda: attention(QKV, 3),
        by("attention", InvalidValue("qkv", "to be [N, L, 3 C] with C a multiple of 3 heads", "[2, 6, 12]")),
    ),
    (lambda: attention(QKV, 0), by("attention", InvalidValue("num_heads", "to be an integer in 1..2147483647", "0"))),
    (lambda: attention(QKV, 2.0), by("attention", InvalidType("num_heads", "to be an integer in 1..2147483647", "2.0"))),
    (lambda: attention(QKV, True), by("attention", InvalidType("num_heads", "to be an integer in 1..2147483647", "True"))),
    (lambda: attention(QKV, 2, scale="1"), by("attention", InvalidType("scale", "to be a number", "str"))),
    (lambda: group_norm_affine([1.0], 2), by("group_norm_affine", InvalidType("x", "to be a tensor", "list"))),
    (
        lambda: group_norm_affine(X.int(), 2),
        by("group_norm_affine", InvalidType("x", "to be float32, float64, float16 or bfloat16", "torch.int32")),
    ),
    (
        lambda: group_norm_affine(X[:, :, 0], 2),
        by("group_norm_affine", InvalidValue("x", "to be [N, C, H, W]", "shape [2, 4, 3]")),
    ),
    (
        lambda: group_norm_affine(X, 3),
        by("group_norm_affine", InvalidValue("num_groups", "to divide the 4 channels of x", "3")),
    ),
    (
        lambda: group_norm_affine(X, 3, skip=X),
        by("group_norm_affine", InvalidValue("num_groups", "to divide the 8 channels of x", "3")),
    ),
    (lambda: group_norm_affine(X, 2.0), by("group_norm_affine", InvalidType("num_groups", "to be a positive integer", "2.0"))),
    (
        lambda: group_norm_affine(X, 2, torch.ones(3)),
        by("group_norm_affine", InvalidValue("weight", "to have shape [4]", "[3]")),
    ),
    (
        lambda: group_norm_affine(X, 2, None, torch.ones(4).half()),
        by("group_norm_affine", InvalidType("bias", "to have the dtype of x, torch.float32", "torch.float16")),
    ),
    (
        lambda: group_norm_affine(X, 2, eps=0.0),
        by("group_norm_affine", InvalidValue("eps", "to be positive and finite", "0.0")),
    ),
    (lambda: group_norm_affine(X, 2, eps="x"), by("group_norm_affine", InvalidType("eps", "to be a number", "str"))),
    (
        lambda: group_norm_affine(X, 2, skip=X[:1]),
        by("group_norm_affine", InvalidValue("skip", "to have shape [2, S, 3, 3]", "[1, 4, 3, 3]")),
    ),
    (
        lambda: group_norm_affine(X, 2, skip=X.half()),
        by("group_norm_affine", InvalidType("skip", "to have the dtype of x, torch.float32", "torch.float16")),
    ),
    (
        lambda: group_norm_affine(X, 2, skip=X[0]),
        by("group_norm_affine", InvalidValue("skip", "to have shape [2, S, 3, 3]", "[4, 3, 3]")),
    ),
    (
        lambda: group_norm_affine(X[..., None], 2),
        by("group_norm_affine", InvalidValue("x", "to be [N, C, H, W]", "shape [2, 4, 3, 3, 1]")),
    ),
    (lambda: group_norm_affine(X, 2, skip=1.0), by("group_norm_affine", InvalidType("skip", "to be a tensor", "float"))),
    (
        lambda: group_norm_affine(X, 2, shift=torch.ones(2, 3)),
        by("group_norm_affine", InvalidValue("shift", "to have shape [2, 4]", "[2, 3]")),
    ),
    (
        lambda: group_norm_affine(X, 2, scale_shift=torch.ones(2, 4)),
        by("group_norm_affine", InvalidType("scale_shift", "to be a pair of tensors", "Tensor")),
    ),
    (
        lambda: group_norm_affine(X, 2, scale_shift=(torch.ones(4), torch.ones(2, 4))),
        by("group_norm_affine", InvalidValue("scale_shift[0]", "to have shape [2, 4]", "[4]")),
    ),
]


@pytest.mark.parametrize(("call", "error"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[], Any], error: ArgumentError) -> None:
    with refused(error):
        call()


def gradient_of_freed() -> None:
    y = group_norm_silu(X.clone().requires_grad_(), 2, backend="native")
    y.backward(freed(y))


Unavailable = ddpm_fast.BackendUnavailable
# Errors of backends and kernels.
OTHER: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: group_norm_silu(torch.zeros(1, 4097), 1, backend="triton"), Unavailable, "4096 channels"),
    (
        lambda: group_norm_silu(X.double(), 2, backend="triton"),
        *(Unavailable, 'group_norm_silu: backend "triton" cannot run: .*float64'),
    ),
    (
        lambda: conv3x3(X, W, backend="triton"),
        *(Unavailable, 'conv3x3: backend "triton" cannot run: there is no Triton kernel'),
    ),
    (
        lambda: conv3x3(X.double(), W.double(), backend="native"),
        Unavailable,
        'conv3x3: backend "native" cannot run: it computes in float32 and bfloat16, not in torch.float64',
    ),
    (
        lambda: attention(QKV.bfloat16(), 4, backend="native"),
        Unavailable,
        'attention: backend "native" cannot run: in bfloat16 it takes an even number of channels in a head, got 1',
    ),
    (
        lambda: group_norm_affine(X, 2, backend="triton"),
        *(Unavailable, 'group_norm_affine: backend "triton" cannot run: there is no Triton kernel'),
    ),
    (lambda: noise((2, 4), freed(SEEDS), backend="native"), ValueError, "noise: expected seeds to have memory"),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=freed(X), backend="native"),
        *(ValueError, "reverse_step: expected out to have memory"),
    ),
    (
        lambda: reverse_step(X, X, freed(SEEDS), PLAN, seeds=SEEDS, backend="native"),
        *(ValueError, "reverse_step: expected step to have memory"),
    ),
    (gradient_of_freed, ValueError, "group_norm_silu.*: expected .* to have memory"),
]


@pytest.mark.usefixtures("matrix_kernels")
@pytest.mark.parametrize(("call", "kind", "message"), OTHER, ids=range(len(OTHER)))
def test_backends_and_kernels_say_why_not(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_named_backend_that_cannot_run_says_why_and_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.ops.backend.native_error", lambda: "no such file")
    with pytest.raises(ddpm_fast.BackendUnavailable, match=r'noise: backend "native" cannot run: .*no such file'):
        noise((2, 3), SEEDS, backend="native")
    assert noise((2, 3), SEEDS).shape == (2, 3)  # without a name, the next backend
