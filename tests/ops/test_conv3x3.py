"""`conv3x3` and `Conv3x3` in training on a CPU: outputs and gradients by Winograd's algorithm, and what stays PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import HAS_BFLOAT16, MATRIX_OPS, pretend
from refusals import refused
from small_unets import relative_error
from torch import Tensor, nn

from ddpm_fast import conv3x3
from ddpm_fast.errors import InvalidValue
from ddpm_fast.nn import CIFAR10_32, UNet
from ddpm_fast.nn import conv as layers
from ddpm_fast.nn.conv import Conv3x3
from ddpm_fast.nn.layers import Upsample
from ddpm_fast.ops import backend, why_not
from ddpm_fast.ops.backend import MATRIX_DTYPES, why_not_matrix_kernels

conv = import_module("ddpm_fast.ops.conv3x3")  # the attribute of this name is the op
pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module")

CHANNELS_LAST = torch.channels_last
# n, channels, output channels, height, width: panels and vectors that are not full, odd sides, maps of one pixel, more columns
# than a strip, several blocks of tiles, one block of several samples.
SHAPES = [
    (9, 5, 9, 1, 1),
    (2, 3, 70, 7, 9),
    (8, 16, 3, 2, 1),
    (3, 24, 40, 5, 150),
    (2, 130, 33, 31, 18),
    (5, 64, 64, 4, 4),
    (1, 24, 40, 4, 146),  # a row of tiles in parts of two sizes
]
# The kernels are tested on any instruction set. `Conv3x3` uses them on some.
on_any_cpu = pytest.mark.usefixtures("matrix_kernels")
serves = pytest.mark.skipif(
    why_not_matrix_kernels(torch.device("cpu"), torch.float32) is not None, reason="convolutions are PyTorch's on this machine"
)


Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]

with_upsampling = pytest.mark.parametrize("upsample", [False, True], ids=["plain", "upsampled"])


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv3x3(x, weight, bias, backend="native")


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolution(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias)


def ours_upsampled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv3x3(x, weight, bias, upsample=True, backend="native")


def weight_gradients(x: Tensor, grad: Tensor, has_bias: bool, upsample: bool) -> tuple[Tensor, Tensor | None]:
    gradients: tuple[Tensor, Tensor | None] = conv.weight_gradient_op(x, grad, has_bias, upsample, backend="native")
    return gradients


def functions(upsample: bool) -> tuple[Convolution, Convolution]:
    """Ours and PyTorch's."""
    return (ours_upsampled, upsampled_convolution) if upsample else (ours, convolution)


def case(shape: tuple[int, ...], upsample: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the output's gradient, channels_last."""
    n, channels, out_channels, height, width = shape
    scale = 2 if upsample else 1
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    weight = randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    maps = (randn(n, channels, height, width), weight, randn(n, out_channels, scale * height, scale * width))
    x, weight, grad = (t.contiguous(memory_format=CHANNELS_LAST) for t in maps)
    return x, weight, randn(out_channels), grad


def output_and_gradients(function: Convolution, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    *inputs, grad = (t.to(dtype) for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_right_as_pytorchs(
    shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], upsample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, products = types
    monkeypatch.setattr(conv, "product_dtype", lambda _: products)
    own, pytorchs = functions(upsample)
    tensors = tuple(tensor.to(dtype) for tensor in case(shape, upsample))
    truth = output_and_gradients(pytorchs, tensors, torch.float64)
    plain = output_and_gradients(pytorchs, tensors, dtype)
    for got, allowed, exact in zip(output_and_gradients(own, tensors, dtype), plain, truth, strict=True):
        assert (got.shape, got.dtype) == (exact.shape, dtype)
        unit = torch.finfo(dtype).eps / 2
        assert relative_error(got, exact) <= max(2 * relative_error(allowed, exact), 4 * unit)


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_earlier_call_left_in_memory_does_not_matter(dtype: torch.dtype, upsample: bool) -> None:
    x, _, _, grad = (tensor.to(dtype) for tensor in case((1, 24, 40, 4, 146), upsample))
    exact, _ = weight_gradients(x, grad, False, upsample)
    spoilt = torch.full((1, 64, 8, 256), torch.nan, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
    weight_gradients(spoilt, spoilt, False, False)
    assert torch.equal(weight_gradients(x, grad, False, upsample)[0], exact)


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 280, 3, 6)])  # more channels than a task takes
def test_gradients_of_weights_are_float32_to_the_last(shape: tuple[int, ...], upsample: bool) -> None:
    """bfloat16 rounds transformed maps, but no sums. The bias's sums are of maps that are not transformed."""
    x, weight, bias, grad = (tensor.bfloat16() for tensor in case(shape, upsample))
    exact = output_and_gradients(functions(upsample)[1], (x, weight, bias, grad), torch.float64)[2:]
    weights, biases = weight_gradients(x, grad, True, upsample)
    assert biases is not None
    assert weights.dtype == biases.dtype == torch.float32
    assert relative_error(weights, exact[0]) <= 2 * torch.finfo(torch.bfloat16).eps / 2
    assert relative_error(biases, exact[1]) <= 16 * torch.finfo(torch.float32).eps


@on_any_cpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@with_upsampling
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_weights_are_transformed_and_laid_in_panels(
    dtype: torch.dtype, flipped: bool, upsample: bool, memory_format: torch.memory_format
) -> None:
    weight = torch.randn(37, 21, 3, 3, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    packed = conv.pack_winograd_op(weight, dtype, flipped, upsample, backend="native")
    used = weight.transpose(0, 1).flip(2, 3) if flipped else weight
    g = torch.tensor(
        [[[1, 0, 0], [1, 1, 1], [0, 1, 1]], [[1, 1, 0], [1, 1, 1], [0, 0, 1]]]
        if upsample
        else [[[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]],
        dtype=torch.float64,
    )  # [phase, row, tap]
    taps = torch.einsum("pak,qbl,oikl->pqabio", g, g, used.double()).flatten(0, 3)  # [positions, in, out]
    panels, _, steps, panel, step = packed.shape
    assert (panel, step) == (backend.native().cpu.panel, 2 if dtype == torch.bfloat16 else 1)
    full = packed.permute(1, 2, 4, 0, 3).reshape(len(taps), steps * step, panels * panel)  # in the order of `taps`
    # Four sums of three, each of which rounds; what cancels leaves the error of its terms.
    error = full[:, : taps.shape[1], : taps.shape[2]].double() - taps
    assert (
        error.abs() <= torch.finfo(dtype).eps / 2 * taps.abs() + 8 * torch.finfo(torch.float32).eps * weight.abs().max()
    ).all()
    assert not full[:, taps.shape[1] :].any()
    assert not full[:, :, taps.shape[2] :].any()


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("threads", [2, 3, 5, 16])
def test_threads_change_no_bit(threads: int, upsample: bool) -> None:
    own, tensors = functions(upsample)[0], case((3, 140, 33, 21, 70), upsample)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = output_and_gradients(own, tensors, torch.float32)
        torch.set_num_threads(threads)
        for _ in range(2):
            assert all(map(torch.equal, output_and_gradients(own, tensors, torch.float32), alone))
    finally:
        torch.set_num_threads(before)


@on_any_cpu
@with_upsampling
def test_only_what_is_needed_is_computed(upsample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, convolution = functions(upsample)
    x, weight, bias, grad = case((2, 8, 12, 6, 6), upsample)
    y = ours(x, weight.requires_grad_(), None)
    with monkeypatch.context() as patch:
        patch.setattr(conv, "conv_ops", None)  # no gradient of x
        patch.setattr(conv, "pack_winograd_op", None)
        (grad_weight,) = torch.autograd.grad(y, weight, grad)
    assert relative_error(grad_weight, torch.autograd.grad(convolution(x, weight, None), weight, grad)[0].double()) < 1e-6
    weight = weight.detach()
    (grad_bias,) = torch.autograd.grad(ours(x, weight, bias.requires_grad_()), bias, grad)
    assert relative_error(grad_bias, grad.double().sum((0, 2, 3))) < 1e-6
    monkeypatch.setattr(conv, "weight_gradient_op", None)
    x, bias = x.requires_grad_(), bias.detach()
    (grad_x,) = torch.autograd.grad(ours(x, weight, bias), x, grad)
    assert relative_error(grad_x, torch.autograd.grad(convolution(x, weight, bias), x, grad)[0].double()) < 1e-6


@on_any_cpu
@with_upsampling
def test_second_derivatives_are_pytorchs(upsample: bool) -> None:
    def second(function: Convolution) -> tuple[Tensor, ...]:
        x, weight, bias, _ = case((2, 4, 6, 5, 7))
        inputs = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
        first = torch.autograd.grad(function(*inputs).tanh().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), inputs)

    for got, expected in zip(*map(second, functions(upsample)), strict=True):
        assert relative_error(got, expected.double()) <= 32 * torch.finfo(torch.float32).eps


@on_any_cpu
@with_upsampling
def test_transformed_gradients_are_pytorchs(upsample: bool) -> None:
    """Autograd itself uses vmap for several output gradients at once."""
    x, weight, bias, grad = case((2, 4, 6, 5, 7), upsample)
    grads = torch.stack((grad, 2 * grad, grad * grad))

    def batched(function: Convolution) -> tuple[Tensor, ...]:
        inputs = tuple(tensor.detach().requires_grad_() for tensor in (x, weight, bias))
        return torch.autograd.grad(function(*inputs), inputs, grads, is_grads_batched=True)

    for got, expected in zip(*map(batched, functions(upsample)), strict=True):
        assert relative_error(got, expected.double()) <= 32 * torch.finfo(torch.float32).eps


FORWARD = ["pack_winograd", "conv_winograd"]


class TestWhereItServes:
    @pytest.fixture
    def layer(self) -> Conv3x3:
        torch.manual_seed(0)
        return Conv3x3(8, 12, 3, padding=1).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload, no-any-return]

    @serves
    def test_a_recorded_gradient(self, layer: Conv3x3, calls: list[str]) -> None:
        x = torch.randn(4, 8, 6, 6)  # contiguous, as PyTorch's the output is channels_last where the weights are
        y = layer(x)
        assert calls == FORWARD
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        torch.testing.assert_close(y, convolution(x, layer.weight, layer.bias))
        y.sum().backward()
        assert calls == [*FORWARD, "conv_winograd_weight_gradient"]  # x needs no gradient
        assert layer.weight.grad is not None
        assert layer.weight.grad.stride() == layer.weight.stride()

    @pytest.mark.skipif(not HAS_BFLOAT16, reason="bfloat16 is PyTorch's on this machine")
    @pytest.mark.usefixtures("no_matrix_units")
    @pytest.mark.parametrize("by_autocast", [True, False])
    def test_bfloat16(self, layer: Conv3x3, calls: list[str], by_autocast: bool) -> None:
        x = torch.randn(4, 8, 6, 6)
        layer, x = (layer, x) if by_autocast else (layer.bfloat16(), x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
            y = layer(x)
        assert calls == FORWARD
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == layer.weight.dtype

    def test_what_is_pytorchs(self, layer: Conv3x3, calls: list[str]) -> None:
        x = torch.randn(4, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)
        with torch.no_grad():
            layer(x)
        copy.deepcopy(layer).requires_grad_(False)(x)
        for dtype in (torch.float16, *([] if HAS_BFLOAT16 else [torch.bfloat16])):
            with torch.autocast("cpu", dtype):
                assert layer(x).dtype == dtype
        layer(torch.randn(8, 8, 8))  # no batch
        circular = copy.deepcopy(layer)
        circular.padding_mode, circular._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
        circular(x)
        Conv3x3(8, 4, 1).to(memory_format=CHANNELS_LAST)(x)  # type: ignore[call-overload]
        layer(x[:1, :, :2, :2])  # too few tiles
        copy.deepcopy(layer).to(memory_format=torch.contiguous_format)(x.contiguous())
        copy.deepcopy(layer).double()(x.double())
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.func.vmap(lambda one: torch.func.functional_call(layer, dict(layer.named_parameters()), one))(x[:, None])
        copy.deepcopy(layer).to("meta")(x.to("meta"))
        assert not calls

    @pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # which PyTorch's own forward mode calls
    def test_forward_derivatives_are_pytorchs(self, layer: Conv3x3, calls: list[str]) -> None:
        x = torch.randn(4, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)
        with torch.autograd.forward_ad.dual_level():
            tangent = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, x))).tangent
        assert not calls
        torch.testing.assert_close(tangent, convolution(x, layer.weight, None))

    @serves
    def test_after_an_upsampling(self, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        layer = Upsample(8).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
        x = torch.randn(4, 8, 6, 6, requires_grad=True)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "doubled", None)  # there is no large map
            y = layer(x)
        assert calls == FORWARD
        torch.testing.assert_close(y, upsampled_convolution(x, layer.conv.weight, layer.conv.bias))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
        one = torch.randn(1, 8, 2, 2, requires_grad=True)  # too few tiles for that, enough of the large map
        torch.testing.assert_close(layer(one), upsampled_convolution(one, layer.conv.weight, layer.conv.bias))

    @serves
    @pytest.mark.parametrize("how", ["module", "forward", "hook"])
    def test_what_is_put_around_a_convolution_gets_the_large_map(self, how: str) -> None:
        layer = Upsample(8).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
        x, seen = torch.randn(4, 8, 6, 6, requires_grad=True), list[torch.Size]()
        y, conv = layer(x), layer.conv
        if how == "module":
            layer.conv = nn.Sequential(conv)
            layer.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        elif how == "forward":
            forward = conv.forward
            conv.forward = lambda x: seen.append(x.shape) or forward(x)
        else:
            conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        torch.testing.assert_close(layer(x), y)
        assert seen == [(4, 8, 12, 12)]

    def test_wrong_input_is_an_error(self, layer: Conv3x3) -> None:
        with refused(InvalidValue("conv3x3", "weight", "to have shape [out, 7, 3, 3]", "[12, 8, 3, 3]")):
            layer(torch.randn(4, 7, 6, 6))
        with refused(InvalidValue("upsampling", "x", "to be [N, C, H, W]", "shape (8, 6, 6)")):
            Upsample(8)(torch.randn(8, 6, 6))

    @serves
    def test_hooks_and_copies(self, layer: Conv3x3) -> None:
        assert set(layer.state_dict()) == set(nn.Conv2d(8, 12, 3).state_dict())
        seen: list[str] = []
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        x = torch.randn(4, 8, 6, 6, requires_grad=True)
        layer(x).sum().backward()
        assert seen == ["forward", "backward"]
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@serves
def test_a_networks_gradient_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = UNet(
        **CIFAR10_32
        | {"block_out_channels": [32, 64], "norm_num_groups": 8, "sample_size": 16, "dropout": 0.0}
        | {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    )
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])

    def gradient(model: UNet) -> Tensor:
        gradients = torch.autograd.grad(model(x.to(model.conv_in.weight.dtype), t).square().mean(), list(model.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    truth = gradient(copy.deepcopy(model).double())
    model = model.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    got = gradient(model)
    monkeypatch.setattr(conv, "why_not_matrix_kernels", lambda *_: "a test wants PyTorch's")
    assert relative_error(got, truth) <= 2 * relative_error(gradient(model), truth)


def test_reasons_why_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    reason = "it runs on the CPU, not on cuda, where PyTorch's convolution and attention are the reference"
    assert backend.why_not_matrix_kernels(torch.device("cuda", 0), torch.float32) == reason
    assert backend.why_not_matrix_kernels(cpu, torch.float64) == "it computes in float32 and bfloat16, not in torch.float64"
    for isa, amx, dtype, reason in (
        ("avx2", False, torch.bfloat16, None),
        ("avx512_bf16", True, torch.float32, None),
        ("avx512_bf16", True, torch.bfloat16, "matrix units for bfloat16"),
        ("baseline", False, torch.float32, "it needs AVX2 or AVX-512"),
    ):
        pretend(monkeypatch, isa=isa, processor_isa=isa, amx_bf16=amx, processor="AuthenticAMD 25")
        got = backend.why_not_matrix_kernels(cpu, dtype)
        assert got is None if reason is None else reason in str(got)
        for op in MATRIX_OPS:
            assert why_not("native", op, cpu, dtype) == got
    for isa, amx, processor, products in (
        ("avx512_bf16", False, "AuthenticAMD 25", torch.bfloat16),
        ("avx512_bf16", False, "AuthenticAMD 26", torch.bfloat16),
        ("avx512_bf16", False, "GenuineIntel 6", torch.float32),
        ("avx512_bf16", True, "GenuineIntel 6", torch.float32),
        ("avx512", False, "AuthenticAMD 25", torch.float32),
    ):
        pretend(monkeypatch, isa=isa, amx_bf16=amx, processor=processor)
        assert backend.product_dtype(torch.bfloat16) == products
        assert backend.product_dtype(torch.float32) == torch.float32
    monkeypatch.setattr(backend, "native_error", lambda: "gone")
    assert backend.why_not_matrix_kernels(cpu, torch.float32) == "the compiled module did not load: gone"
    assert backend.product_dtype(torch.bfloat16) == torch.float32
