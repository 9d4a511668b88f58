"""Each bad input raises before anything runs, and the message names the op, the argument, what was wanted and what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ddpm_fast
from ddpm_fast import (
    attention,
    conv3x3,
    ddpm_plan,
    denoising_loss,
    group_norm_affine,
    group_norm_silu,
    noise,
    q_sample,
    reverse_step,
    sample_seeds,
)
from ddpm_fast.testing import SCHEDULE

X, WIDE = torch.zeros(2, 4, 3, 3), torch.zeros(2, 8, 3, 3)
W, QKV = torch.zeros(5, 4, 3, 3), torch.zeros(2, 6, 12)
SEEDS = sample_seeds(0, 2)
PLAN = ddpm_plan(SCHEDULE, 10)
LEARNED = ddpm_plan(SCHEDULE, 10, variance="learned")

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sample_seeds(1.5, 2), TypeError, "sample_seeds: expected seed to be an integer in .*got 1.5"),
    (lambda: sample_seeds(0, -1), ValueError, "sample_seeds: expected n to be an integer in .*, got -1"),
    (lambda: sample_seeds(0, 10, 1 << 32), ValueError, "sample_seeds: expected start . n to be at most 2.32, got"),
    (lambda: noise((3, 2), SEEDS), ValueError, r"noise: expected seeds to have shape \[3\].*got \[2\]"),
    (lambda: noise((2, 2), SEEDS.int()), TypeError, "noise: expected seeds to be an int64 tensor.*got torch.int32"),
    (lambda: noise((2, 2), [1, 2]), TypeError, "noise: expected seeds to be an int64 tensor.*got list"),
    (lambda: noise((2, -2), SEEDS), ValueError, r"noise: expected shape .*got \[2, -2\]"),
    (lambda: noise((2, 2), SEEDS, dtype=torch.int32), TypeError, "noise: expected dtype .*got torch.int32"),
    (lambda: noise((2, 2), SEEDS, stream=1 << 32), ValueError, "noise: expected stream .*got 4294967296"),
    (lambda: noise((2, 2), SEEDS, memory_format=torch.channels_last), ValueError, "noise: expected memory_format"),
    (
        lambda: noise((2, 2), SEEDS, backend="cuda"),
        ValueError,
        "noise: expected backend to be one of native, triton, reference or None, got 'cuda'",
    ),
    (lambda: noise((2, 2), SEEDS, stream=1.5), TypeError, "noise: expected stream to be an integer in 0..4294967295, got 1.5"),
    (lambda: noise((2, 1.5), SEEDS), TypeError, "noise: expected shape to be a sequence of ints"),
    (lambda: noise((True, 4), SEEDS), TypeError, r"noise: expected shape to be a sequence of ints, got \(True, 4\)"),
    (
        lambda: noise((2, 4), SEEDS, device="nowhere"),
        ValueError,
        "noise: expected device to be a torch.device or its name, got 'nowhere'",
    ),
    (lambda: noise(2, SEEDS), TypeError, "noise: expected shape to be a sequence of ints, got 2"),
    (
        lambda: q_sample(X, 3, PLAN, seeds=SEEDS),
        TypeError,
        "q_sample: expected schedule to be a NoiseSchedule, got SamplingPlan",
    ),
    (lambda: q_sample(X.int(), 3, SCHEDULE, seeds=SEEDS), TypeError, "q_sample: expected x_0 .*got torch.int32"),
    (lambda: q_sample([1.0], 3, SCHEDULE, seeds=SEEDS), TypeError, "q_sample: expected x_0 to be a tensor, got list"),
    (lambda: q_sample(X, 3, SCHEDULE), ValueError, "q_sample: expected exactly one of noise and seeds, got neither"),
    (lambda: q_sample(X, 3, SCHEDULE, seeds=SEEDS, noise=X), ValueError, "exactly one of noise and seeds, got both"),
    (lambda: q_sample(X, 1000, SCHEDULE, seeds=SEEDS), ValueError, "q_sample: expected t in 0..999, got 1000"),
    (lambda: q_sample(X, 1.0, SCHEDULE, seeds=SEEDS), TypeError, "q_sample: expected t .*got float"),
    (
        lambda: q_sample(X, torch.tensor([1, 1000]), SCHEDULE, seeds=SEEDS),
        ValueError,
        "q_sample: expected t in 0..999.*1 to 1000",
    ),
    (
        lambda: q_sample(X, torch.tensor([-1, 2]), SCHEDULE, seeds=SEEDS, backend="reference"),
        ValueError,
        "expected t in 0..999",
    ),
    (
        lambda: q_sample(X, torch.tensor([1, 2, 3]), SCHEDULE, seeds=SEEDS),
        ValueError,
        r"q_sample: expected t .*\[2\], got \[3\]",
    ),
    (
        lambda: q_sample(X, torch.tensor([1.0, 2.0]), SCHEDULE, seeds=SEEDS),
        TypeError,
        "q_sample: expected t .*got torch.float32",
    ),
    (lambda: q_sample(X, 3, SCHEDULE, noise=X[:1]), ValueError, r"q_sample: expected noise to have shape \[2, 4, 3, 3\], got"),
    (lambda: q_sample(X, 3, SCHEDULE, noise=X.double()), TypeError, "q_sample: expected noise to have the dtype of x_t"),
    (lambda: reverse_step(X, X[:1], 0, PLAN, seeds=SEEDS), ValueError, "reverse_step: expected model_output to have shape"),
    (lambda: reverse_step(X, X, 0, LEARNED, seeds=SEEDS), ValueError, "twice the channels, for learned variance"),
    (lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, guidance_scale=2.0), ValueError, "two halves, for guidance"),
    (lambda: reverse_step(X, X.double(), 0, PLAN, seeds=SEEDS), TypeError, "reverse_step: expected model_output .*float64"),
    (lambda: reverse_step(X, X, 10, PLAN, seeds=SEEDS), ValueError, "reverse_step: expected step .*0..9.*got 10"),
    (lambda: reverse_step(X, X, torch.tensor(10), PLAN, seeds=SEEDS), ValueError, "reverse_step: expected step in 0..9"),
    (lambda: reverse_step(X, X, torch.tensor([1, 2, 3]), PLAN, seeds=SEEDS), ValueError, "reverse_step: expected step .*3"),
    (lambda: reverse_step(X, X, 0, PLAN), ValueError, "reverse_step: expected noise or seeds.*got neither"),
    (lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, noise=X), ValueError, "at most one of noise and seeds, got both"),
    (lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=X[:1]), ValueError, "reverse_step: expected out to have shape"),
    (
        lambda: reverse_step(X, X.clone().requires_grad_(), 0, PLAN, seeds=SEEDS, out=X.clone()),
        ValueError,
        "reverse_step: expected no gradients with out=",
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=X.contiguous(memory_format=torch.channels_last)),
        ValueError,
        "reverse_step: expected out to be dense, with the strides of x_t",
    ),
    (
        lambda: reverse_step(X[:1], X[:1], 0, PLAN, seeds=SEEDS[:1], out=X.flatten()[4:40].view(1, 4, 3, 3)),
        ValueError,
        "reverse_step: expected out to be x_t itself or apart from it in memory, got a partial overlap",
    ),
    (
        lambda: reverse_step(X, WIDE, 0, LEARNED, seeds=SEEDS, out=WIDE.flatten()[:72].view(2, 4, 3, 3)),
        ValueError,
        "reverse_step: expected out to be model_output itself or apart from it in memory, got a partial overlap",
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, out=(X, X.clone())),
        ValueError,
        "reverse_step: expected out to be a tensor, without return_x_0, got a tuple of 2",
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, return_x_0=True, out=(X,)),
        ValueError,
        r"reverse_step: expected out to be a pair .* got a tuple of 1",
    ),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, return_x_0=True, out=(X, X.view_as(X))),
        ValueError,
        r"reverse_step: expected out to be apart from the destination of x_\{t-1\} in memory, got an overlap",
    ),
    (lambda: reverse_step(X, X, 0, SCHEDULE, seeds=SEEDS), TypeError, "reverse_step: expected plan to be a SamplingPlan"),
    (
        lambda: reverse_step(X, X, 0, PLAN, seeds=SEEDS, guidance_scale="2"),
        TypeError,
        "reverse_step: expected guidance_scale to be a number, got str",
    ),
    (lambda: group_norm_silu(X, 2, eps="x"), TypeError, "group_norm_silu: expected eps to be a number, got str"),
    (lambda: group_norm_silu(X, 2, scale_shift=torch.ones(2, 4)), TypeError, "expected scale_shift to be a pair of tensors"),
    (lambda: group_norm_silu(torch.zeros(1, 4097), 1, backend="triton"), ddpm_fast.BackendUnavailable, "4096 channels"),
    (lambda: group_norm_silu(X, 3), ValueError, "group_norm_silu: expected num_groups to divide the 4 channels of x, got 3"),
    (lambda: group_norm_silu(X, 2.0), TypeError, "group_norm_silu: expected num_groups to be a positive integer, got 2.0"),
    (lambda: group_norm_silu(X, 0), ValueError, "group_norm_silu: expected num_groups .*got 0"),
    (lambda: group_norm_silu(X[0, 0, 0], 1), ValueError, "group_norm_silu: expected x to have at least 2 dimensions"),
    (
        lambda: group_norm_silu(X, 2, torch.ones(3)),
        ValueError,
        r"group_norm_silu: expected weight to have shape \[4\], got \[3\]",
    ),
    (lambda: group_norm_silu(X, 2, torch.ones(4).half()), TypeError, "group_norm_silu: expected weight to be float32"),
    (lambda: group_norm_silu(X, 2, shift=torch.ones(2, 3)), ValueError, "group_norm_silu: expected shift to have shape"),
    (
        lambda: group_norm_silu(X, 2, scale_shift=(torch.ones(2, 4), torch.ones(4))),
        ValueError,
        r"group_norm_silu: expected scale_shift\[1\] to have shape \[2, 4\]",
    ),
    (lambda: group_norm_silu(X, 2, eps=0.0), ValueError, "group_norm_silu: expected eps to be positive and finite, got 0.0"),
    (lambda: group_norm_silu(X, 2, activation="relu"), ValueError, "group_norm_silu: expected activation .*got 'relu'"),
    (
        lambda: denoising_loss(X, X, 3, SCHEDULE, seeds=SEEDS, prediction="x0"),
        ValueError,
        "denoising_loss: expected prediction .*got 'x0'",
    ),
    (
        lambda: denoising_loss(X, X, 3, SCHEDULE, seeds=SEEDS, reduction="max"),
        ValueError,
        "denoising_loss: expected reduction .*got 'max'",
    ),
    (
        lambda: denoising_loss(X, X, 3, SCHEDULE, seeds=SEEDS, weight=torch.ones(3)),
        ValueError,
        r"denoising_loss: expected weight to have shape \[2\]",
    ),
    (
        lambda: denoising_loss(X[:1], X, 3, SCHEDULE, seeds=SEEDS),
        ValueError,
        "denoising_loss: expected model_output to have shape",
    ),
    (lambda: conv3x3([1.0], W), TypeError, "conv3x3: expected x to be a tensor, got list"),
    (lambda: conv3x3(X.int(), W), TypeError, "conv3x3: expected x .*got torch.int32"),
    (lambda: conv3x3(X[0], W), ValueError, r"conv3x3: expected x to be \[N, C, H, W\], got shape \[4, 3, 3\]"),
    (lambda: conv3x3(X, [1.0]), TypeError, "conv3x3: expected weight to be a tensor, got list"),
    (lambda: conv3x3(X, W.double()), TypeError, "conv3x3: expected weight to be float32 or of x's dtype, torch.float32, got"),
    (
        lambda: conv3x3(WIDE, W),
        ValueError,
        r"conv3x3: expected weight to have shape \[out, 8, 3, 3\], got \[5, 4, 3, 3\]",
    ),
    (lambda: conv3x3(X, W[..., :1]), ValueError, r"conv3x3: expected weight to have shape .*got \[5, 4, 3, 1\]"),
    (lambda: conv3x3(X, W.to("meta")), ValueError, "conv3x3: expected weight on the device of x, cpu, got meta"),
    (lambda: conv3x3(X, W, torch.zeros(4)), ValueError, r"conv3x3: expected bias to have shape \[5\], got \[4\]"),
    (lambda: conv3x3(X, W, torch.zeros(5).half()), TypeError, "conv3x3: expected bias to be float32 or of x's dtype"),
    (lambda: conv3x3(X, W, 1.0), TypeError, "conv3x3: expected bias to be a tensor, got float"),
    (lambda: conv3x3(X, W, skip=X[:1]), ValueError, r"conv3x3: expected skip to have shape \[2, 4, 3, 3\], got \[1, 4, 3, 3\]"),
    (lambda: conv3x3(X, W, skip=X.double()), TypeError, "conv3x3: expected skip to have the dtype of x"),
    (lambda: conv3x3(X, W, skip=X[0]), ValueError, r"conv3x3: expected skip to be \[N, C, H, W\], got shape \[4, 3, 3\]"),
    (lambda: conv3x3(X, W, residual=X[0]), ValueError, r"conv3x3: expected residual to be \[N, C, H, W\], got shape"),
    (lambda: conv3x3(X, W, skip=1.0), TypeError, "conv3x3: expected skip to be a tensor, got float"),
    (lambda: conv3x3(X, W, skip=X), ValueError, r"conv3x3: expected weight to have shape \[out, 8, 3, 3\], got \[5, 4, 3, 3\]"),
    (
        lambda: conv3x3(X, W, affine=torch.zeros(2, 2, 4)),
        ValueError,
        r"conv3x3: expected affine to have shape \[2, 3, 4\], got \[2, 2, 4\]",
    ),
    (lambda: conv3x3(X, W, affine=torch.zeros(2, 3, 4).half()), TypeError, "conv3x3: expected affine .*got torch.float16"),
    (lambda: conv3x3(X, W, affine=X), ValueError, "conv3x3: expected affine to have shape"),
    (lambda: conv3x3(X, W, activation="relu"), ValueError, "conv3x3: expected activation .*got 'relu'"),
    (
        lambda: conv3x3(X, W, residual=X),
        ValueError,
        r"conv3x3: expected residual to have shape \[2, 5, 3, 3\], got \[2, 4, 3, 3\]",
    ),
    (
        lambda: conv3x3(X, W, residual=torch.zeros(2, 5, 3, 3), upsample=True),
        ValueError,
        r"conv3x3: expected residual to have shape \[2, 5, 6, 6\], got \[2, 5, 3, 3\]",
    ),
    (lambda: conv3x3(X, W, divisor=0), ValueError, "conv3x3: expected divisor to be another number than 0, got 0"),
    (lambda: conv3x3(X, W, divisor="2"), TypeError, "conv3x3: expected divisor to be a number, got str"),
    (lambda: conv3x3(X, W, upsample=2), TypeError, "conv3x3: expected upsample to be a bool, got int"),
    (lambda: conv3x3(X, W, backend="cuda"), ValueError, "conv3x3: expected backend to be one of native, .*, got 'cuda'"),
    (
        lambda: conv3x3(X, W, backend="triton"),
        ddpm_fast.BackendUnavailable,
        'conv3x3: backend "triton" cannot run: there is no Triton kernel',
    ),
    (
        lambda: conv3x3(X.double(), W.double(), backend="native"),
        ddpm_fast.BackendUnavailable,
        'conv3x3: backend "native" cannot run: it computes in float32 and bfloat16, not in torch.float64',
    ),
    (lambda: attention([1.0], 2), TypeError, "attention: expected qkv to be a tensor, got list"),
    (lambda: attention(QKV.int(), 2), TypeError, "attention: expected qkv .*got torch.int32"),
    (
        lambda: attention(QKV[0], 2),
        ValueError,
        r"attention: expected qkv to be \[N, L, 3 C\] with C a multiple of 2 heads, got \[6, 12\]",
    ),
    (lambda: attention(QKV, 3), ValueError, r"attention: expected qkv .*C a multiple of 3 heads, got \[2, 6, 12\]"),
    (lambda: attention(QKV, 0), ValueError, "attention: expected num_heads to be a positive integer, got 0"),
    (lambda: attention(QKV, 2.0), TypeError, "attention: expected num_heads to be a positive integer, got 2.0"),
    (lambda: attention(QKV, True), TypeError, "attention: expected num_heads to be a positive integer, got True"),
    (lambda: attention(QKV, 2, scale="1"), TypeError, "attention: expected scale to be a number, got str"),
    (
        lambda: attention(QKV.bfloat16(), 4, backend="native"),
        ddpm_fast.BackendUnavailable,
        'attention: backend "native" cannot run: in bfloat16 it takes an even number of channels in a head, got 1',
    ),
    (lambda: group_norm_affine([1.0], 2), TypeError, "group_norm_affine: expected x to be a tensor, got list"),
    (lambda: group_norm_affine(X.int(), 2), TypeError, "group_norm_affine: expected x .*got torch.int32"),
    (
        lambda: group_norm_affine(X[:, :, 0], 2),
        ValueError,
        r"group_norm_affine: expected x to be \[N, C, H, W\], got shape \[2, 4, 3\]",
    ),
    (lambda: group_norm_affine(X, 3), ValueError, "group_norm_affine: expected num_groups to divide the 4 channels.*got 3"),
    (
        lambda: group_norm_affine(X, 3, skip=X),
        ValueError,
        "group_norm_affine: expected num_groups to divide the 8 channels.*got 3",
    ),
    (lambda: group_norm_affine(X, 2.0), TypeError, "group_norm_affine: expected num_groups to be a positive integer, got 2.0"),
    (
        lambda: group_norm_affine(X, 2, torch.ones(3)),
        ValueError,
        r"group_norm_affine: expected weight to have shape \[4\], got \[3\]",
    ),
    (
        lambda: group_norm_affine(X, 2, None, torch.ones(4).half()),
        TypeError,
        "group_norm_affine: expected bias to be float32 or of x's dtype",
    ),
    (
        lambda: group_norm_affine(X, 2, eps=0.0),
        ValueError,
        "group_norm_affine: expected eps to be positive and finite, got 0.0",
    ),
    (lambda: group_norm_affine(X, 2, eps="x"), TypeError, "group_norm_affine: expected eps to be a number, got str"),
    (
        lambda: group_norm_affine(X, 2, skip=X[:1]),
        ValueError,
        r"group_norm_affine: expected skip to have shape \[2, 4, 3, 3\], got \[1, 4, 3, 3\]",
    ),
    (lambda: group_norm_affine(X, 2, skip=X.half()), TypeError, "group_norm_affine: expected skip to have the dtype of x"),
    (
        lambda: group_norm_affine(X, 2, skip=X[0]),
        ValueError,
        r"group_norm_affine: expected skip to be \[N, C, H, W\], got shape \[4, 3, 3\]",
    ),
    (
        lambda: group_norm_affine(X[..., None], 2),
        ValueError,
        r"group_norm_affine: expected x to be \[N, C, H, W\], got shape \[2, 4, 3, 3, 1\]",
    ),
    (lambda: group_norm_affine(X, 2, skip=1.0), TypeError, "group_norm_affine: expected skip to be a tensor, got float"),
    (
        lambda: group_norm_affine(X, 2, shift=torch.ones(2, 3)),
        ValueError,
        r"group_norm_affine: expected shift to have shape \[2, 4\], got \[2, 3\]",
    ),
    (
        lambda: group_norm_affine(X, 2, scale_shift=torch.ones(2, 4)),
        TypeError,
        "group_norm_affine: expected scale_shift to be a pair of tensors, got Tensor",
    ),
    (
        lambda: group_norm_affine(X, 2, scale_shift=(torch.ones(4), torch.ones(2, 4))),
        ValueError,
        r"group_norm_affine: expected scale_shift\[0\] to have shape \[2, 4\], got \[4\]",
    ),
    (
        lambda: group_norm_affine(X, 2, backend="triton"),
        ddpm_fast.BackendUnavailable,
        'group_norm_affine: backend "triton" cannot run: there is no Triton kernel',
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_named_backend_that_cannot_run_says_why_and_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.ops.backend.native_error", lambda: "no such file")
    with pytest.raises(ddpm_fast.BackendUnavailable, match=r'noise: backend "native" cannot run: .*no such file'):
        noise((2, 3), SEEDS, backend="native")
    assert noise((2, 3), SEEDS).shape == (2, 3)  # without a name, the next backend


def test_triton_has_no_float64() -> None:
    with pytest.raises(ddpm_fast.BackendUnavailable, match=r'group_norm_silu: backend "triton" cannot run: .*float64'):
        group_norm_silu(X.double(), 2, backend="triton")
