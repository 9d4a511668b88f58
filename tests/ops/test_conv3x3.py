"""`conv3x3` and `Conv3x3` in training on a CPU: outputs and gradients by Winograd's algorithm, and what stays PyTorch's."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from kernel_calls import HAS_BFLOAT16, MATRIX_OPS, TRAINS_BFLOAT16, pretend
from op_calls import make_call
from op_cases import Case
from parity import Expected, evaluate
from refusals import refused
from small_unets import make_inputs, make_unet, relative_error
from torch import Tensor, nn

from ddpm_fast import conv3x3
from ddpm_fast.errors import InvalidValue
from ddpm_fast.nn import UNet
from ddpm_fast.nn import conv as layers
from ddpm_fast.nn.conv import Conv3x3
from ddpm_fast.nn.layers import Upsample
from ddpm_fast.ops import backend, why_not
from ddpm_fast.ops.backend import BackendUnavailable, why_not_matrix_kernels
from ddpm_fast.ops.packed_conv import pack_weights, pack_winograd_op

conv = import_module("ddpm_fast.ops.conv3x3")  # the attribute of this name is the op
pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module")

CPU, CHANNELS_LAST = torch.device("cpu"), torch.channels_last
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
    (3, 163, 90, 27, 29),  # by F(4x4, 3x3) in float32
]
# The kernels are tested on any instruction set. `Conv3x3` uses them on some.
on_any_cpu = pytest.mark.usefixtures("matrix_kernels")
serves = pytest.mark.skipif(
    why_not_matrix_kernels(CPU, torch.float32) is not None, reason="convolutions are PyTorch's on this machine"
)
serves_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="bfloat16 is PyTorch's on this machine")
with_upsampling = pytest.mark.parametrize("upsample", [False, True], ids=["plain", "upsampled"])


def case_of(shape: tuple[int, ...], upsample: bool) -> Case:
    n, channels, out_channels, height, width = shape
    return Case("conv3x3", "here", (n, channels, height, width), {"out": out_channels, "upsample": upsample})


def weight_gradients(x: Tensor, grad: Tensor, has_bias: bool, upsample: bool) -> tuple[Tensor, Tensor | None]:
    gradients: tuple[Tensor, Tensor | None] = conv.weight_gradient_op(x, grad, has_bias, upsample, backend="native")
    return gradients


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_right_as_pytorchs(
    shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype], upsample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, products = types
    monkeypatch.setattr(conv, "product_dtype", lambda _: products)
    case = case_of(shape, upsample)
    call = make_call(case, dtype, channels_last=True)
    Expected(case, call).check_norms(evaluate(call, "native"))


def map_of(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=CHANNELS_LAST)


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_earlier_call_left_in_memory_does_not_matter(dtype: torch.dtype, upsample: bool) -> None:
    scale = 2 if upsample else 1
    x, grad = map_of(1, 24, 4, 146, dtype=dtype), map_of(1, 40, 4 * scale, 146 * scale, dtype=dtype)
    exact, _ = weight_gradients(x, grad, False, upsample)
    spoilt = torch.full((1, 64, 8, 256), torch.nan, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
    weight_gradients(spoilt, spoilt, False, False)
    assert torch.equal(weight_gradients(x, grad, False, upsample)[0], exact)


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 280, 3, 6)])  # more channels than a task takes
def test_gradients_of_weights_are_float32_to_the_last(shape: tuple[int, ...], upsample: bool) -> None:
    """bfloat16 rounds transformed maps, but no sums. The bias's sums are of maps that are not transformed."""
    call = make_call(case_of(shape, upsample), torch.bfloat16, channels_last=True).map(lambda x: x.double().requires_grad_())
    (y,), given = call("reference"), call.arguments
    grad = map_of(*y.shape, dtype=torch.bfloat16)
    exact = torch.autograd.grad(y, (given["weight"], given["bias"]), grad.double())
    weights, biases = weight_gradients(given["x"].bfloat16(), grad, True, upsample)
    assert biases is not None
    assert weights.dtype == biases.dtype == torch.float32
    assert relative_error(weights, exact[0]) <= 2 * torch.finfo(torch.bfloat16).eps / 2
    assert relative_error(biases, exact[1]) <= 16 * torch.finfo(torch.float32).eps


@on_any_cpu
@with_upsampling
@pytest.mark.parametrize(
    ("name", "unneeded"), [("weight", ["conv_ops", "pack_weights"]), ("bias", []), ("x", ["weight_gradient_op"])]
)
def test_only_what_is_needed_is_computed(
    name: str, unneeded: list[str], upsample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(case_of((2, 8, 12, 6, 6), upsample), channels_last=True)
    all_gradients = evaluate(call, "native").grads
    leaf = call.tensors[name].requires_grad_()
    (y,) = call("native")
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().float()
    for op in unneeded:
        monkeypatch.setattr(conv, op, None)
    (grad,) = torch.autograd.grad(y, leaf, cotangent)
    assert torch.equal(grad, all_gradients[name])


@on_any_cpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("flipped", [False, True])
def test_weights_of_large_tiles_are_rounded_once(flipped: bool, memory_format: torch.memory_format) -> None:
    weight = torch.randn(70, 90, 3, 3, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    points = torch.tensor([0, 5 / 8, -5 / 8, 3 / 2, -3 / 2], dtype=torch.float64)
    distances = (points[:, None] - points + torch.eye(5)).prod(dim=1)
    infinity = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    rows = torch.cat((torch.stack((points**0, points, points**2), dim=1) / distances[:, None], infinity))
    taps = (weight.flip(2, 3).transpose(0, 1) if flipped else weight).double()
    exact = torch.einsum("pk,ql,oikl->opqi", rows, rows, taps).flatten(1, 2)  # [out, 36, in]
    packed = pack_weights(weight, "winograd_large", torch.float32, flipped=flipped)  # [panels, 36, in, panel, 1]
    outs = packed.squeeze(4).permute(0, 3, 1, 2).flatten(0, 1)
    # Half a unit in the last place, and a little for the roundings of float64.
    torch.testing.assert_close(outs[: len(exact)].double(), exact, rtol=torch.finfo(torch.float32).eps / 1.99, atol=0)
    assert not outs[len(exact) :].any()


@on_any_cpu
@pytest.mark.parametrize(("dtype", "upsample"), [(torch.bfloat16, False), (torch.float32, True)])
def test_weights_that_large_tiles_cannot_have(dtype: torch.dtype, upsample: bool) -> None:
    with pytest.raises(BackendUnavailable, match="has weights in float32, and follows no upsampling"):
        pack_winograd_op(torch.randn(8, 8, 3, 3), dtype, False, upsample, True, backend="native")


def doubled_first(x: Tensor, layer: Conv3x3) -> Tensor:
    return conv3x3(x, layer.weight, layer.bias, upsample=True, backend="reference")


FORWARD = ["pack_winograd", "conv_winograd"]


class TestWhereItServes:
    @pytest.fixture
    def layer(self) -> Conv3x3:
        torch.manual_seed(0)
        return Conv3x3(8, 12, 3, padding=1).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload, no-any-return]

    @serves
    @pytest.mark.usefixtures("no_matrix_units")
    @pytest.mark.parametrize(
        "how", ["float32", *(pytest.param(how, marks=serves_bfloat16) for how in ("autocast", "bfloat16"))]
    )
    def test_a_recorded_gradient(self, layer: Conv3x3, calls: list[str], how: str) -> None:
        x = torch.randn(4, 8, 6, 6)  # contiguous, as PyTorch's the output is channels_last where the weights are
        layer, x = (layer.bfloat16(), x.bfloat16()) if how == "bfloat16" else (layer, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            y = layer(x)
        assert calls == FORWARD
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        assert y.dtype == (torch.float32 if how == "float32" else torch.bfloat16)
        y.sum().backward()
        assert calls == [*FORWARD, "conv_winograd_weight_gradient"]  # x needs no gradient
        grad, weight = layer.weight.grad, layer.weight
        assert grad is not None
        assert (grad.dtype, grad.stride()) == (weight.dtype, weight.stride())

    @serves
    @pytest.mark.parametrize(
        ("n", "channels", "out_channels", "side", "forward", "backward"),
        [
            (8, 80, 80, 16, "_large", "_large"),  # 128 tiles of 4x4
            (8, 80, 79, 16, "_large", ""),
            (8, 79, 80, 16, "", "_large"),
            (7, 80, 80, 16, "", ""),  # 112 tiles: packing more weights would take longer
        ],
    )
    def test_a_large_batch_of_many_channels(
        self, n: int, channels: int, out_channels: int, side: int, forward: str, backward: str, calls: list[str]
    ) -> None:
        layer = Conv3x3(channels, out_channels, 3, padding=1).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
        layer(torch.randn(n, channels, side, side, requires_grad=True)).sum().backward()
        assert calls == [
            *("pack_winograd", f"conv_winograd{forward}", "pack_winograd", f"conv_winograd{backward}"),
            "conv_winograd_weight_gradient",
        ]

    @serves
    @pytest.mark.parametrize("divisor", [1.0, 1.5])
    def test_a_residual_is_added_where_the_output_is_written(self, layer: Conv3x3, calls: list[str], divisor: float) -> None:
        x, residual = (map_of(4, c, 6, 6, dtype=torch.float32).requires_grad_() for c in (8, 12))

        def run() -> list[Tensor]:
            y = layers.added(layer, x, residual, divisor)
            return [y, *torch.autograd.grad(y.square().sum(), [x, residual, *layer.parameters()])]

        fused = run()
        assert calls == [*FORWARD, "pack_winograd", "conv_winograd", "conv_winograd_weight_gradient"]
        assert type(fused[0].grad_fn).__name__ == "DerivativeBackward"  # nothing comes after the convolution
        with torch.no_grad():
            torch.testing.assert_close(layers.added(layer, x, residual, divisor), fused[0])
        outputs: list[Tensor] = []
        layer.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        torch.testing.assert_close(run(), fused)
        torch.testing.assert_close(outputs[0] + residual, fused[0] * divisor)

    @serves
    def test_a_residual_of_another_make_is_added_by_pytorch(self, layer: Conv3x3) -> None:
        x = map_of(4, 8, 6, 6, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert layers.added(layer, x, torch.randn(4, 12, 6, 6), 1.0).dtype == torch.float32
            assert layers.added(layer, x, torch.randn(4, 12, 6, 6).bfloat16(), 1.0).dtype == torch.bfloat16
        assert layers.added(layer, x, torch.randn(4, 12, 6, 6).double(), 1.0).dtype == torch.float64
        assert layers.added(layer, x, torch.randn(12, 1, 1), 1.0).shape == (4, 12, 6, 6)

    @serves
    @pytest.mark.parametrize("how", ["global hook", "compiled"])
    def test_calls_that_are_watched_are_made(self, layer: Conv3x3, how: str) -> None:
        x, residual = map_of(4, 8, 6, 6, dtype=torch.float32), map_of(4, 12, 6, 6, dtype=torch.float32)
        seen: list[nn.Module] = []
        if how == "global hook":
            hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module))
            try:
                layers.added(layer, x, residual, 1.0)
            finally:
                hook.remove()
        else:

            def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
                seen.append(layer)
                return graph.forward

            layer.compile(backend=backend)
            layers.added(layer, x, residual, 1.0)
        assert seen == [layer]

    @pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # which PyTorch's own forward mode calls
    def test_what_is_pytorchs(self, layer: Conv3x3, calls: list[str]) -> None:
        x = torch.randn(4, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)
        with torch.no_grad():
            layer(x)
        copy.deepcopy(layer).requires_grad_(False)(x)
        for dtype in (torch.float16, *([] if TRAINS_BFLOAT16 else [torch.bfloat16])):
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
        with torch.autograd.forward_ad.dual_level():
            layer(torch.autograd.forward_ad.make_dual(x, x))
        assert not calls

    @serves
    def test_after_an_upsampling(self, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        layer = Upsample(8).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
        x = torch.randn(4, 8, 6, 6, requires_grad=True)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "doubled", None)  # there is no large map
            y = layer(x)
        assert calls == FORWARD
        torch.testing.assert_close(y, doubled_first(x, layer.conv))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
        one = torch.randn(1, 8, 2, 2, requires_grad=True)  # too few tiles for that, enough of the large map
        torch.testing.assert_close(layer(one), doubled_first(one, layer.conv))

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


def test_what_is_no_map_is_not_upsampled() -> None:
    with refused(InvalidValue("x", "to be [N, C, H, W]", "shape (8, 6, 6)")):
        Upsample(8)(torch.randn(8, 6, 6))


@serves
@pytest.mark.parametrize(("channels", "n"), [([32, 64, 64], 4), ([80, 80, 80], 8)])
def test_a_networks_gradient_is_pytorchs(channels: list[int], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_unet("heads", block_out_channels=channels)
    x, t, _ = make_inputs(config, n)

    def gradient(model: UNet) -> Tensor:
        gradients = torch.autograd.grad(model(x.to(model.conv_in.weight.dtype), t).square().mean(), list(model.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    truth = gradient(copy.deepcopy(model).double())
    model = model.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    got = gradient(model)
    monkeypatch.setattr(conv, "why_not_matrix_kernels", lambda *_: "a test wants PyTorch's")
    assert relative_error(got, truth) <= 2 * relative_error(gradient(model), truth)


@pytest.mark.parametrize(
    ("isa", "tiles", "processor", "reason", "products", "trained"),
    [
        ("avx2", False, "AuthenticAMD 25", None, torch.float32, False),
        ("avx512", False, "AuthenticAMD 25", None, torch.float32, False),
        ("avx512_bf16", False, "AuthenticAMD 25", None, torch.bfloat16, True),
        ("avx512_bf16", False, "AuthenticAMD 26", None, torch.bfloat16, True),
        ("avx512_bf16", False, "GenuineIntel 6", None, torch.float32, True),
        ("avx512_bf16", True, "GenuineIntel 6", None, torch.float32, False),  # oneDNN is faster in bfloat16
        ("amx", True, "GenuineIntel 6", None, torch.float32, False),
        ("baseline", False, "AuthenticAMD 25", "it needs AVX2 or AVX-512", torch.float32, False),
    ],
)
def test_processors_that_kernels_serve(
    isa: str,
    tiles: bool,
    processor: str,
    reason: str | None,
    products: torch.dtype,
    trained: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, isa=isa, tiles=tiles, processor_isa=isa, processor=processor)
    float64 = "it computes in float32 and bfloat16, not in torch.float64"
    for dtype, expected in ((torch.float64, float64), (torch.bfloat16, reason), (torch.float32, reason)):
        got = backend.why_not_matrix_kernels(CPU, dtype)
        assert got is None if expected is None else expected in str(got)
        assert {why_not("native", op, CPU, dtype) for op in MATRIX_OPS} == {got}
    assert backend.product_dtype(torch.bfloat16) == products
    assert backend.product_dtype(torch.float32) == torch.float32
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    assert conv.is_trained_natively(torch.bfloat16, weight) == trained
    assert conv.is_trained_natively(torch.float32, weight.detach().float().requires_grad_()) == (isa != "baseline")


def test_reasons_why_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it runs on the CPU, not on cuda, where PyTorch's convolution and attention are the reference"
    assert backend.why_not_matrix_kernels(torch.device("cuda", 0), torch.float32) == reason
    monkeypatch.setattr(backend, "native_error", lambda: "gone")
    assert backend.why_not_matrix_kernels(CPU, torch.float32) == "the compiled module did not load: gone"
