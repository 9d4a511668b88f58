"""Attention's training step on a CPU: what its kernels compute, and everything that stays PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import HAS_BFLOAT16
from small_unets import relative_error
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast.nn.layers import Attention
from ddpm_fast.ops import backend
from ddpm_fast.ops.backend import MATRIX_DTYPES, why_not_matrix_kernels

conv3x3 = import_module("ddpm_fast.ops.conv3x3")  # the attributes of these names are the ops
attention = import_module("ddpm_fast.ops.attention")
pytestmark = pytest.mark.skipif(
    backend.native_error() is not None,
    reason="there is no compiled module",
)

# n, heads, pixels, channels of a head: one pixel, panels, vectors and steps that are not full, several blocks of keys, more
# terms than a sum takes.
SHAPES = [
    *((1, 1, 1, 2), (3, 2, 5, 8), (2, 4, 16, 64), (1, 3, 49, 100), (2, 1, 64, 256), (1, 1, 256, 256), (1, 2, 300, 8)),
    *((3, 1, 1, 256), (1, 4, 65, 2), (1, 1, 257, 100), (1, 1, 600, 64)),
]
# The kernels are tested on any instruction set. `Attention` uses them on some.
on_any_cpu = pytest.mark.usefixtures("matrix_kernels")
serves = pytest.mark.skipif(
    why_not_matrix_kernels(torch.device("cpu"), torch.float32) is not None, reason="attention is PyTorch's on this machine"
)
serves_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="bfloat16 is PyTorch's on this machine")


def ours(qkv: Tensor, num_heads: int) -> Tensor:
    return ddpm_fast.attention(qkv, num_heads, backend="native")


def pytorchs(qkv: Tensor, num_heads: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def case(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Qkv and the output's gradient."""
    n, heads, pixels, channels = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(n, pixels, 3 * heads * channels, generator=generator)
    return qkv, torch.randn(n, pixels, heads * channels, generator=generator)


def output_and_gradients(
    attend: Callable[[Tensor, int], Tensor], num_heads: int, qkv: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """y, and the gradients of q, k and v."""
    qkv = qkv.detach().to(dtype).requires_grad_()
    y = attend(qkv, num_heads)
    (grad_qkv,) = torch.autograd.grad(y, qkv, grad.to(dtype))
    return y.detach(), *grad_qkv.chunk(3, dim=2)


@pytest.fixture
def nans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the kernels write with NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    monkeypatch.setattr(
        *(Tensor, "new_empty", lambda x, *size, dtype=None: torch.full(size, torch.nan, dtype=dtype or x.dtype)), raising=True
    )


@on_any_cpu
@pytest.mark.usefixtures("nans")
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_right_as_pytorchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    qkv, grad = (tensor.to(dtype) for tensor in case(shape))
    truth = output_and_gradients(pytorchs, shape[1], qkv, grad, torch.float64)
    plain = output_and_gradients(pytorchs, shape[1], qkv, grad, dtype)
    got = output_and_gradients(ours, shape[1], qkv, grad, dtype)
    margin, unit = (2 if dtype == torch.float32 else 1.1), torch.finfo(dtype).eps / 2
    for name, one, allowed, exact in zip("yqkv", got, plain, truth, strict=True):
        assert (one.shape, one.dtype) == (exact.shape, dtype)
        if shape[2] == 1 and name in "qk":  # 0: a difference of two sums, rounded differently
            assert one.norm() <= 8 * torch.finfo(torch.float32).eps * qkv.norm() * grad.norm()
        else:
            assert relative_error(one, exact) <= max(margin * relative_error(allowed, exact), 4 * unit)


@on_any_cpu
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 5, 6), (1, 2, 64, 40), (2, 1, 63, 130), (1, 1, 589, 32), (3, 4, 16, 16)]
)
def test_a_scale_is_applied_by_either_call(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, qkv = shape[1], case(shape)[0].to(dtype)

    def expected(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)

    truth, unit = expected(qkv.double()), torch.finfo(dtype).eps / 2
    for out in (
        ddpm_fast.attention(qkv, heads, scale=0.3, backend="native"),
        torch.ops.ddpm_fast.attention(qkv, heads, 0.3, "native")[0],
    ):
        assert (out.shape, out.dtype) == (truth.shape, dtype)
        assert out.is_contiguous()
        assert relative_error(out, truth) <= max(2 * relative_error(expected(qkv), truth), 4 * unit)


@on_any_cpu
@pytest.mark.usefixtures("nans")
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


@on_any_cpu
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype, threads: int) -> None:
    qkv, grad = case((2, 2, 300, 40))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = output_and_gradients(ours, 2, qkv, grad, dtype)
        torch.set_num_threads(threads)
        for _ in range(2):
            assert all(map(torch.equal, output_and_gradients(ours, 2, qkv, grad, dtype), alone))
    finally:
        torch.set_num_threads(before)


@on_any_cpu
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_to_attend_to(shape: tuple[int, ...]) -> None:
    qkv = torch.zeros(shape, requires_grad=True)
    y = ours(qkv, 2)
    y.sum().backward()
    assert y.shape == (*shape[:2], 4)
    assert qkv.grad is not None
    assert qkv.grad.shape == shape


def by_definition(qkv: Tensor, num_heads: int) -> Tensor:
    """Compute attention by operations that have second derivatives. PyTorch's fused attention on a CPU has none."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@on_any_cpu
def test_second_derivatives_are_pytorchs() -> None:
    def second(attend: Callable[[Tensor, int], Tensor], qkv: Tensor) -> Tensor:
        qkv = qkv.requires_grad_()
        (first,) = torch.autograd.grad(attend(qkv, 3).tanh().sum(), qkv, create_graph=True)
        return torch.autograd.grad(first.square().sum(), qkv)[0]

    qkv = case((2, 3, 7, 4))[0]
    assert relative_error(second(ours, qkv), second(by_definition, qkv.double())) <= 1e-5


@on_any_cpu
def test_transformed_gradients_are_pytorchs() -> None:
    """Autograd itself uses vmap for several output gradients at once."""
    qkv, grad = case((2, 3, 7, 4))
    qkv, grads = qkv.requires_grad_(), torch.stack((grad, 2 * grad, grad * grad))
    (got,) = torch.autograd.grad(ours(qkv, 3), qkv, grads, is_grads_batched=True)
    for one, g in zip(got, grads, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(by_definition(qkv, 3), qkv, g)[0])


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
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_recorded_gradient(
        self, layer: Attention, x: Tensor, calls: list[str], memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = x.contiguous(memory_format=memory_format)
        got = self.gradients(layer, x)
        assert attended(calls) == STEP
        monkeypatch.setattr(conv3x3, "why_not_matrix_kernels", lambda *_: "a test wants PyTorch's")
        plain = self.gradients(layer, x)
        assert attended(calls) == STEP
        assert got[0].stride() == plain[0].stride()
        truth = self.gradients(copy.deepcopy(layer).double(), x.double())
        norms = [exact.norm() for exact in truth]
        for ours, allowed, exact in zip(got, plain, truth, strict=True):
            # The bias of the keys has no gradient: what is there is rounding, of the size of the others'.
            error, fair = (ours.double() - exact).norm(), (allowed.double() - exact).norm()
            assert error <= max(2 * fair, 1e-6 * max(norms))

    @serves
    @serves_bfloat16
    @pytest.mark.usefixtures("no_matrix_units")
    @pytest.mark.parametrize("by_autocast", [True, False])
    def test_bfloat16(
        self, layer: Attention, x: Tensor, calls: list[str], by_autocast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        truth = self.gradients(copy.deepcopy(layer).double(), x.double())
        layer, x = (layer, x) if by_autocast else (layer.bfloat16(), x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
            got = self.gradients(layer, x)
            assert attended(calls) == STEP
            monkeypatch.setattr(conv3x3, "why_not_matrix_kernels", lambda *_: "a test wants PyTorch's")
            plain = self.gradients(layer, x)
        assert attended(calls) == STEP
        for ours, allowed, exact in zip(got, plain, truth, strict=True):
            assert ours.dtype == allowed.dtype
            error, fair = (ours.double() - exact).norm(), (allowed.double() - exact).norm()
            assert error <= 1.5 * fair + 1e-3 * max(exact.norm() for exact in truth)

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
    def test_what_is_pytorchs(self, layer: Attention, x: Tensor, calls: list[str]) -> None:
        with torch.no_grad():
            layer(x)
        copy.deepcopy(layer).requires_grad_(False)(x)
        layer(x[..., :5])  # too few pixels
        for dtype in (torch.float16, *([] if HAS_BFLOAT16 else [torch.bfloat16])):
            with torch.autocast("cpu", dtype):
                layer(x)
        copy.deepcopy(layer).double()(x.double())
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.func.vmap(lambda one: torch.func.functional_call(layer, dict(layer.named_parameters()), one))(x[:, None])
        copy.deepcopy(layer).to("meta")(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):  # pairs of channels are whole
            Attention(12, head_dim=3, num_groups=4, eps=1e-5)(x[:, :12])
        assert not attended(calls)

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

    @pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # which PyTorch's own forward mode calls
    def test_forward_derivatives_are_pytorchs(self, layer: Attention, x: Tensor, calls: list[str]) -> None:
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.autograd.forward_ad.dual_level(), math:
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
        assert not attended(calls)
