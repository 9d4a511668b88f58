"""Gradients where inputs depend on each other, and of backward passes that a transform or autocast watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import make_call
from op_cases import CASES, SCHEDULE, Case
from parity import skip_unless
from torch import Tensor, func
from torch.autograd import forward_ad

from ddpm_fast import (
    attention,
    conv3x3,
    ddpm_plan,
    denoising_loss,
    group_norm_affine,
    group_norm_silu,
    reverse_step,
    sample_seeds,
)
from ddpm_fast.ops import OPS, why_not
from ddpm_fast.predictions import Variance

# torch imports its own deprecated function for forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
WEIGHT = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1)) / 9
WIDE = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(2)) / 12
SHIFT = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
SEEDS = sample_seeds(0, 2)

# Name -> function of x, weight and shift with inputs of an op that depend on each other, and a name of the op.
DEPENDENT: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "residual is x": ("conv3x3", lambda x, w, s: conv3x3(x, w[:, :8], residual=x, backend="native")),
    "residual of x": ("conv3x3", lambda x, w, s: conv3x3(x, w[:, :8], residual=x.tanh(), backend="native")),
    "skip is x": ("conv3x3", lambda x, w, s: conv3x3(x, w, skip=x, backend="native")),
    "norm of x": (
        "conv3x3",
        lambda x, w, s: conv3x3(x, w[:, :8], affine=group_norm_affine(x, 2), activation="silu", backend="native"),
    ),
    "tied convolutions": ("conv3x3", lambda x, w, s: conv3x3(conv3x3(x, w[:, :8]), w[:, :8])),
    "scale is shift": ("group_norm_silu", lambda x, w, s: group_norm_silu(x, 2, scale_shift=(s, s))),
    "shift of x": ("group_norm_silu", lambda x, w, s: group_norm_silu(x, 2, shift=s * x.mean((2, 3)))),
    "x_0 of the output": (
        "denoising_loss",
        lambda x, w, s: denoising_loss(x, 0.5 * x, 5, SCHEDULE, seeds=SEEDS, prediction="v_prediction"),
    ),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_inputs_that_depend_on_each_other(name: str) -> None:
    op, function = DEPENDENT[name]
    if why_not("native", op, torch.device("cpu")) is not None:
        pytest.skip("native kernels cannot run here")
    inputs = [value.clone().requires_grad_() for value in (X, WIDE, SHIFT)]

    def gradients(inputs: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        loss = function(*inputs).square().sum()
        return torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)

    with pytest.MonkeyPatch.context() as patch:
        for each in OPS.values():
            patch.setattr(each, "choose", lambda *_: "reference")
        truth = gradients([value.detach().double().requires_grad_() for value in inputs])
    for found in (gradients(inputs), gradients(inputs, create_graph=True)):
        for gradient, exact in zip(found, truth, strict=True):
            exact = exact.detach()
            assert float((gradient.detach() - exact).abs().max()) <= 1e-5 * (float(exact.abs().max()) or 1.0)


RECORDED = [
    *(case for case in CASES if case.name in ("odd-sizes", "scale-shift", "upsample", "v_prediction-given-noise")),
    Case("attention", "many-pixels", (2, 288, 8)),
]
# By default PyTorch computes and records these.
WAYS = [(case, how) for case in RECORDED if make_call(case).tensors for how in ("vmap", "tangent", "is_grads_batched")]
WAYS += [(case, "is_grads_batched") for case in CASES if case.name in ("everything", "heads")]


@pytest.mark.parametrize(("case", "how"), WAYS, ids=str)
@pytest.mark.usefixtures("matrix_kernels")
def test_transforms_of_a_recorded_backward_pass(case: Case, how: str) -> None:
    """The forward pass ran kernels. The reference then computes the backward pass."""
    call = make_call(case, channels_last=True).map(lambda x: x.requires_grad_())
    backend = "native" if how == "is_grads_batched" else None  # a transform refuses a backend that was named
    skip_unless("native", call)
    y, *_ = call(backend)
    rows = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(4))

    def gradients(row: Tensor, **options: Any) -> tuple[Tensor, ...]:
        inputs = list(call.tensors.values())
        return torch.autograd.grad(y, inputs, row, retain_graph=True, materialize_grads=True, allow_unused=True, **options)

    expected = [gradients(row) for row in rows]
    if how == "tangent":
        with forward_ad.dual_level():
            duals = gradients(forward_ad.make_dual(rows[0], rows[1]))
            found = [torch.stack([forward_ad.unpack_dual(dual).tangent]) for dual in duals]
        expected = expected[1:2]
    else:
        found = func.vmap(gradients)(rows) if how == "vmap" else gradients(rows, is_grads_batched=True)
    for got, wanted in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-5)


def test_autocast_of_the_backward_pass_changes_nothing() -> None:
    x = X.clone().requires_grad_()
    y = conv3x3(x, WEIGHT, activation="silu", backend="native" if why_not("native", "conv3x3", x.device) is None else None)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


def test_the_dispatcher_s_attention_has_a_gradient() -> None:
    """`backend` may be left out there too: forward and backward pass then take the same."""
    qkv = torch.randn(2, 16, 48, requires_grad=True)
    y = torch.ops.ddpm_fast.attention(qkv, 2, 0.25, None)[0]
    (found,) = torch.autograd.grad(y.sum(), qkv)
    (expected,) = torch.autograd.grad(attention(qkv, 2, scale=0.25, backend="reference").sum(), qkv)
    torch.testing.assert_close(found, expected)


def test_a_tangent_inside_compiled_code() -> None:
    def tangent(x: Tensor, t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(group_norm_silu(forward_ad.make_dual(x, t), 2)).tangent

    torch._dynamo.reset()
    x, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager", fullgraph=True)(x, t), tangent(x, t))


def test_the_residual_is_not_kept_for_the_backward_pass() -> None:
    if why_not("native", "conv3x3", X.device) is not None:
        pytest.skip("native kernels cannot run here")
    x, residual = X.clone().requires_grad_(), torch.randn(2, 8, 6, 6)
    y = conv3x3(x, WEIGHT, residual=residual, backend="native")
    residual.mul_(2)
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_gradient_of_a_learned_variance_is_rounded_once(variance: Variance, dtype: torch.dtype) -> None:
    """Drawn noise enters in float32, as it does in the forward pass."""
    plan = ddpm_plan(SCHEDULE, 5, variance=variance)
    x_t, output = X.to(dtype), WIDE[:2, :, :1, :1].expand(2, 16, 6, 6).to(dtype)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = output.to(dtype).requires_grad_()
        reverse_step(x_t.to(dtype), leaf, 1, plan, seeds=SEEDS).float().sum().backward()
        assert leaf.grad is not None
        return leaf.grad.float()

    exact = gradient(torch.float32)
    error = (gradient(dtype) - exact).abs()
    smallest = torch.finfo(dtype).smallest_normal
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs().clamp(min=smallest)).all()
