"""Attention's training step on a CPU: what its kernels compute, and everything that stays PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from kernel_calls import HAS_BFLOAT16, TRAINS_BFLOAT16
from small_unets import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import ddpm_fast
from ddpm_fast.nn.layers import Attention
from ddpm_fast.ops import backend
from ddpm_fast.ops.backend import MATRIX_DTYPES, why_not_matrix_kernels

layers = import_module("ddpm_fast.nn.layers")
conv3x3 = import_module("ddpm_fast.ops.conv3x3")  # the attributes of these names are the ops
attention = import_module("ddpm_fast.ops.attention")
pytestmark = pytest.mark.skipif(
    backend.native_error() is not None,
    reason="there is no compiled module",
)

# n, heads, pixels, channels of a head: one pixel, panels, vectors and steps that are not full, several blocks of keys, more
# terms than a sum takes.
SHAPES: list[tuple[tuple[int, ...], float | None]] = [
    *(((1, 1, 1, 2), None), ((3, 2, 5, 8), None), ((2, 4, 16, 64), None), ((1, 3, 49, 100), None), ((2, 1, 64, 256), None)),
    *(((1, 1, 256, 256), None), ((1, 2, 300, 8), None), ((3, 1, 1, 256), None), ((1, 4, 65, 2), None)),
    *(((1, 1, 257, 100), None), ((1, 1, 600, 64), None), ((1, 1, 1, 2), 0.3), ((2, 3, 5, 6), 0.3), ((1, 2, 64, 40), 0.3)),
    *(((2, 1, 63, 130), 0.3), ((1, 1, 589, 32), 0.3), ((3, 4, 16, 16), 0.3)),
]
# The kernels are tested on any instruction set. `Attention` uses them on some.
on_any_cpu = pytest.mark.usefixtures("matrix_kernels")
serves = pytest.mark.skipif(
    why_not_matrix_kernels(torch.device("cpu"), torch.float32) is not None, reason="attention is PyTorch's on this machine"
)
serves_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="bfloat16 is PyTorch's on this machine")


def ours(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    return ddpm_fast.attention(qkv, num_heads, scale=scale, backend="native")


def pytorchs(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    return ddpm_fast.attention(qkv, num_heads, scale=scale, backend="reference")


def case(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Qkv and the output's gradient."""
    n, heads, pixels, channels = shape
    qkv = torch.randn(n, pixels, 3 * heads * channels)
    return qkv, torch.randn(n, pixels, heads * channels)


def output_and_gradients(
    attend: Callable[[Tensor, int], Tensor], num_heads: int, qkv: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """y, and the gradients of q, k and v."""
    qkv = qkv.detach().to(dtype).requires_grad_()
    y = attend(qkv, num_heads)
    assert y.is_contiguous()
    (grad_qkv,) = torch.autograd.grad(y, qkv, grad.to(dtype))
    return y.detach(), *grad_qkv.chunk(3, dim=2)


@on_any_cpu
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(("shape", "scale"), SHAPES)
def test_output_and_gradients_are_as_right_as_pytorchs(shape: tuple[int, ...], scale: float | None, dtype: torch.dtype) -> None:
    qkv, grad = (tensor.to(dtype) for tensor in case(shape))
    truth, plain, got = (
        output_and_gradients(partial(attend, scale=scale), shape[1], qkv, grad, wide)
        for attend, wide in ((pytorchs, torch.float64), (pytorchs, dtype), (ours, dtype))
    )
    margin, unit = (2 if dtype == torch.float32 else 1.1), torch.finfo(dtype).eps / 2
    for name, one, allowed, exact in zip("yqkv", got, plain, truth, strict=True):
        assert (one.shape, one.dtype) == (exact.shape, dtype)
        if shape[2] == 1 and name in "qk":  # 0: a difference of two sums, rounded differently
            assert one.norm() <= 8 * torch.finfo(torch.float32).eps * qkv.norm() * grad.norm()
        else:
            assert relative_error(one, exact) <= max(margin * relative_error(allowed, exact), 4 * unit)


@on_any_cpu
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_scores_far_apart(dtype: torch.dtype) -> None:
    """A query's largest weight is 1 and the others 0: then v has the gradient of its queries, and q and k have none."""
    qkv, grad = (tensor.to(dtype) for tensor in case((1, 1, 20, 16)))
    qkv[..., :32] *= 1e3
    scores = qkv[0, :, :16].double() @ qkv[0, :, 16:32].double().T
    expected = torch.zeros(20, 16, dtype=torch.float64).index_add_(0, scores.argmax(1), grad[0].double())
    y, grad_q, grad_k, grad_v = output_and_gradients(ours, 1, qkv, grad, dtype)
    assert torch.equal(y[0], qkv[0, scores.argmax(1), 32:])
    assert relative_error(grad_v[0], expected) <= torch.finfo(dtype).eps
    # The rest of w (dw - D) is a difference of equal sums, rounded differently.
    assert grad_q.abs().max() <= 1e3 * 16 * torch.finfo(torch.float32).eps
    assert grad_k.abs().max() <= 1e3 * 16 * torch.finfo(torch.float32).eps


STEP = ["attention", "attention_backward"]


def attended(calls: list[str]) -> list[str]:
    """Return the calls without those of the norm."""
    return [name for name in calls if name in STEP]


class TestWhereItServes:
    @pytest.fixture(autouse=True)
    def _fewer_pixels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(attention.FEWEST_PIXELS, torch.float32, 30)

    @pytest.fixture
    def layer(self) -> Attention:
        torch.manual_seed(0)
        return Attention(24, head_dim=12, num_groups=4, eps=1e-5)

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(2, 24, 5, 6, generator=torch.Generator().manual_seed(1))

    @staticmethod
    def gradients(layer: Attention, x: Tensor) -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [*layer.parameters()])]

    @serves
    @pytest.mark.usefixtures("no_matrix_units")
    @pytest.mark.parametrize(
        ("how", "memory_format"),
        [
            ("float32", torch.contiguous_format),
            ("float32", torch.channels_last),
            pytest.param("autocast", torch.contiguous_format, marks=serves_bfloat16),
            pytest.param("bfloat16", torch.contiguous_format, marks=serves_bfloat16),
        ],
    )
    def test_a_recorded_gradient(
        self,
        layer: Attention,
        x: Tensor,
        calls: list[str],
        how: str,
        memory_format: torch.memory_format,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        truth = self.gradients(copy.deepcopy(layer).double(), x.double())
        x = x.contiguous(memory_format=memory_format)
        layer, x = (layer.bfloat16(), x.bfloat16()) if how == "bfloat16" else (layer, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            got = self.gradients(layer, x)
            monkeypatch.setattr(conv3x3, "why_not_matrix_kernels", lambda *_: "a test wants PyTorch's")
            plain = self.gradients(layer, x)
        assert attended(calls) == STEP
        assert got[0].stride() == plain[0].stride()
        largest = max(exact.norm() for exact in truth)
        for ours, allowed, exact in zip(got, plain, truth, strict=True):
            assert ours.dtype == allowed.dtype
            # The bias of the keys has no gradient: what is there is rounding, of the size of the others'.
            error, fair = (ours.double() - exact).norm(), (allowed.double() - exact).norm()
            assert error <= (max(2 * fair, 1e-6 * largest) if how == "float32" else 1.5 * fair + 1e-3 * largest)

    @serves
    def test_where_only_some_gradients_are_wanted(self, layer: Attention, x: Tensor, calls: list[str]) -> None:
        layer.requires_grad_(False)
        layer(x.requires_grad_()).sum().backward()
        assert attended(calls) == STEP
        layer.to_v.weight.requires_grad_(True)
        layer(x.detach()).sum().backward()
        assert attended(calls) == STEP * 2
        assert layer.to_v.weight.grad is not None
        assert layer.to_q.weight.grad is None

    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # from PyTorch's attention, in vmap
    @pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # which PyTorch's own forward mode calls
    def test_what_is_pytorchs(self, layer: Attention, x: Tensor, calls: list[str]) -> None:
        with torch.no_grad():
            layer(x)
        copy.deepcopy(layer).requires_grad_(False)(x)
        layer(x[..., :5])  # too few pixels
        for dtype in (torch.float16, *([] if TRAINS_BFLOAT16 else [torch.bfloat16])):
            with torch.autocast("cpu", dtype):
                layer(x)
        copy.deepcopy(layer).double()(x.double())
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.func.vmap(lambda one: torch.func.functional_call(layer, dict(layer.named_parameters()), one))(x[:, None])
        copy.deepcopy(layer).to("meta")(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):  # pairs of channels are whole
            Attention(12, head_dim=3, num_groups=4, eps=1e-5)(x[:, :12])
        with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            layer(torch.autograd.forward_ad.make_dual(x, x))
        assert not attended(calls)

    @serves
    def test_an_output_layer_of_another_make(self, layer: Attention, x: Tensor, calls: list[str]) -> None:
        seen: list[str] = []
        y = layer(x)
        linear = layer.to_out[0]
        weight = linear.weight
        del linear._parameters["weight"]  # as torch.nn.utils.prune.remove: the weight comes after the bias
        linear.weight = weight
        torch.testing.assert_close(layer(x), y)
        linear.register_forward_hook(lambda *_: seen.append("hook"))
        torch.testing.assert_close(layer(x), y)
        assert seen == ["hook"]
        assert attended(calls) == ["attention"] * 3

    def test_projections_of_another_make(self, layer: Attention, x: Tensor, calls: list[str]) -> None:
        class Linear(nn.Linear):
            pass

        seen: list[str] = []
        for change in (
            lambda layer: layer.to_k.register_forward_hook(lambda *_: seen.append("hook")),
            lambda layer: layer.to_k.register_full_backward_hook(lambda *_: seen.append("hook")),
            lambda layer: setattr(layer, "to_v", nn.Linear(24, 24, bias=False)),
            lambda layer: setattr(layer, "to_v", Linear(24, 24)),
            lambda layer: setattr(layer, "to_v", nn.Sequential(nn.Linear(24, 24))),
        ):
            changed = copy.deepcopy(layer)
            change(changed)
            changed(x).sum().backward()
        assert seen == ["hook"] * 2
        assert not attended(calls)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_layers_of_float32_are_convolutions_of_16_maps(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[int] = []

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        maps.append(len(x))
        return torch.conv2d(x, weight, bias)

    monkeypatch.setattr(layers.F, "conv2d", conv2d)
    weight, bias = torch.randn(24, 8), torch.randn(24) if with_bias else None

    def run(linear: Callable[..., Tensor], h: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (h, weight, *([] if bias is None else [bias]))]
        y = linear(*inputs, *([None] if bias is None else []))
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for h, expected in (
        (torch.randn(4, 36, 8), [16]),
        (torch.randn(1, 8, 64).transpose(1, 2), [16]),  # as a contiguous map has it
        (torch.randn(3, 35, 8), []),
        (torch.randn(0, 64, 8), []),
    ):
        maps.clear()
        for got, own, exact in zip(run(layers._linear, h), run(F.linear, h), run(F.linear, h, torch.float64), strict=True):
            assert (got.shape, got.dtype) == (own.shape, own.dtype)
            allowed = max(2 * (own - exact).norm(), 2 * torch.finfo(torch.float32).eps * exact.norm())
            assert (got - exact).norm() <= allowed
        assert maps == expected
    for dtype, cast in ((torch.bfloat16, False), (torch.float32, True), (torch.float64, False)):
        h, wide = torch.randn(1, 64, 8, dtype=dtype), weight.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            assert torch.equal(layers._linear(h, wide, None), F.linear(h, wide))
    assert not maps
