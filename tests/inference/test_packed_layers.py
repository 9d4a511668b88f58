"""Packed layers compute norm, activation, resampling, convolution and addition, in every method and size."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import pretend, with_threads
from small_unets import VARIANTS, assert_as_right, make_inputs, make_unet, relative_error
from torch import Tensor

from ddpm_fast import freeze
from ddpm_fast.inference import packed_layers
from ddpm_fast.inference.network import Conv, Norm, Resample, SelfAttention
from ddpm_fast.inference.packed_layers import PackedLayers
from ddpm_fast.inference.program import Buffer, Builder, NativeProgram, PythonProgram
from ddpm_fast.nn.layers import Attention
from ddpm_fast.ops import backend
from ddpm_fast.ops.backend import MATRIX_DTYPES
from ddpm_fast.ops.packed_conv import method_of

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module"),
    pytest.mark.usefixtures("matrix_kernels"),
]

# n, channels of x and of skip, output channels, height, width: panels and vectors that are not full, maps of one pixel, more
# columns than a strip, several samples in a block, blocks of several samples.
SHAPES = [
    (1, 5, 0, 9, 1, 1),
    (2, 3, 0, 70, 6, 8),
    (1, 32, 20, 40, 5, 7),
    (2, 16, 0, 3, 4, 150),
    (3, 24, 8, 64, 4, 4),
    (2, 10, 6, 12, 4, 6),
    (1, 12, 20, 24, 3, 3),
    (5, 130, 0, 33, 2, 6),
    (1, 64, 0, 130, 20, 18),
]
# Dtypes of feature maps and of products.
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
# kernel, stride, asymmetric padding, resampling.
CONVOLUTIONS: dict[str, tuple[int, int, bool, Resample | None]] = {
    "3x3": (3, 1, False, None),
    "1x1": (1, 1, False, None),
    "strided": (3, 2, False, None),
    "strided, padded behind": (3, 2, True, None),
    "upsampled": (3, 1, False, "up"),
    "downsampled": (3, 1, False, "down"),
}


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def run(make: Callable[..., Buffer], *inputs: Tensor) -> Tensor:
    """Return the result of a program. `make` appends its calls, given the builder and the buffers of the inputs."""
    builder = Builder()
    buffers = [builder.buffer(x.shape, x.dtype) for x in inputs]
    output = make(builder, *buffers)
    result = NativeProgram(builder.calls, buffers, output, threads=torch.get_num_threads())(inputs)
    assert torch.equal(result, PythonProgram(builder.calls, buffers, output, "native")(inputs))
    assert (result.shape, result.dtype) == (output.shape, output.dtype)
    assert result.is_contiguous(memory_format=torch.channels_last)
    return result


def make_conv(in_channels: int, out_channels: int, kernel: int, *, bias: bool = True, **options: object) -> Conv:
    generator = torch.Generator().manual_seed(in_channels + kernel)
    weight = torch.randn(out_channels, in_channels, kernel, kernel, generator=generator) / (in_channels * kernel**2) ** 0.5
    return Conv(weight, torch.randn(out_channels, generator=generator) if bias else None, **options)  # type: ignore[arg-type]


def make_norm(channels: int, *, silu: bool = True) -> Norm:
    weight, bias = torch.randn(2, channels, generator=torch.Generator().manual_seed(channels))
    return Norm(1 if channels % 4 else 4, 1e-5, weight, bias, silu)


def rounded(conv: Conv, dtype: torch.dtype) -> Conv:
    """Return the convolution with weights that have this dtype's values: a test compares arithmetic, not their rounding."""
    return Conv(conv.weight.to(dtype).float(), conv.bias, conv.stride, conv.asymmetric)


def by_pytorch(
    conv: Conv,
    x: Tensor,
    norm: Norm | None,
    resample: str | None,
    shift: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return act(norm(x)), resampled and convolved, layer by layer in the dtype of x."""
    if norm is not None:
        x = x if shift is None else x + shift.to(x.dtype)[:, :, None, None]
        weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
        x = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        if scale_shift is not None:
            scale, added = (term.to(x.dtype)[:, :, None, None] for term in scale_shift)
            x = x * (1 + scale) + added
        x = F.silu(x) if norm.silu else x
    if resample is not None:
        x = F.interpolate(x, scale_factor=2.0) if resample == "up" else F.avg_pool2d(x, 2)
    if conv.asymmetric:
        x = F.pad(x, (0, 1, 0, 1))
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return F.conv2d(x, conv.weight.to(x.dtype), bias, conv.stride, 0 if conv.asymmetric else conv.kernel // 2)


Types = tuple[torch.dtype, torch.dtype]


def check(convolution: str, shape: tuple[int, ...], types: Types, norm: str | None, methods: Sequence[str] = ()) -> None:
    dtype, products = types
    kernel, stride, asymmetric, resample = CONVOLUTIONS[convolution]
    n, channels, skip_channels, out_channels, height, width = shape
    if resample == "down":  # one map of an even size
        channels, skip_channels, height, width = channels + skip_channels, 0, height + height % 2, width + width % 2
    if asymmetric and min(height, width) == 1:
        pytest.skip("there is no output")
    generator = torch.Generator().manual_seed(0)
    total = channels + skip_channels
    conv = rounded(make_conv(total, out_channels, kernel, stride=stride, asymmetric=asymmetric), dtype)
    layer = None if norm is None else make_norm(total, silu=norm != "linear")
    terms = torch.randn(2, n, total, generator=generator)
    small: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    if norm is not None:
        small = {"scale_shift": (terms[0], terms[1])} if norm == "scale and shift" else {"shift": terms[0]}
    x = dense(torch.randn(n, total, height, width, generator=generator).to(dtype))
    maps = [dense(x[:, :channels]), dense(x[:, channels:])] if skip_channels else [x]
    truth = by_pytorch(conv, x.double(), layer, resample, **small)  # type: ignore[arg-type]
    added = dense(torch.randn(truth.shape, generator=generator).to(dtype))
    truth = (truth + added.double()) / 1.5
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed_layers, "product_dtype", lambda _: products)
        layers = PackedLayers(dtype)

    def append(builder: Builder, added: Buffer, stack: Buffer, *maps: Buffer) -> Buffer:
        rows = stack.rows()
        options = {"shift": rows[0]} if "shift" in small else {"scale_shift": tuple(rows)} if small else {}
        return layers.conv(builder, conv, maps, norm=layer, residual=(added,), divisor=1.5, resample=resample, **options)  # type: ignore[arg-type]

    out = run(append, added, terms, *maps)
    allowed = relative_error((by_pytorch(conv, x, layer, resample, **small) + added) / 1.5, truth)  # type: ignore[arg-type]
    # Long sums in another order, or in tiles, are as good as PyTorch's up to a factor, or as a plain running sum. PyTorch's own
    # error depends on the processor, as the order of its sums does. A running sum rounds K times. A rounding's relative error
    # is unit / sqrt(6) on average, and partial sums grow like sqrt(i / K):
    #   unit sqrt(K / 12)
    unit = torch.finfo(dtype).eps / 2
    # F(4x4, 3x3) has larger factors. For white inputs and weights the transforms of its sums multiply a rounding of a product,
    # relative to the output, by 4.8 in root mean square, and those of F(2x2, 3x3) by 1.7.
    factor = 4.8 / 1.7 if methods == ("winograd_large",) and dtype == torch.float32 else 1
    assert relative_error(out, truth) <= factor * max(2 * allowed, max(4, (total * kernel**2 / 12) ** 0.5) * unit)
    if products != dtype:  # nothing but the result is rounded to bfloat16
        assert relative_error(out, truth) <= unit
    if methods:
        assert {method for _, method, _ in layers._packed} <= set(methods)


@pytest.mark.parametrize("norm", ["shift", "scale and shift", "linear", None])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_norm_activation_convolution_and_addition(
    convolution: str, shape: tuple[int, ...], types: Types, norm: str | None
) -> None:
    check(convolution, shape, types, norm)


@pytest.mark.parametrize("method", ["winograd_large", "winograd", "direct"])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("convolution", ["3x3", "upsampled", "downsampled"])
def test_each_method_serves_a_3x3_convolution(
    convolution: str, method: str, types: Types, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "winograd_large" and (types[1] != torch.float32 or convolution == "upsampled"):
        pytest.skip("F(4x4, 3x3) has products in float32, and follows no upsampling")
    monkeypatch.setattr(packed_layers, "method_of", lambda *_, **__: method)
    monkeypatch.setattr(packed_layers, "WINOGRAD_CHANNELS", 0)
    for shape in SHAPES:
        for norm in ("shift", None):
            check(convolution, shape, types, norm, methods=(method,))


# Shapes of whole tiles: outputs that threads share, pixels that they share, one tile of pixels, several samples in a block.
TILED = [(1, 64, 0, 128, 16, 16), (2, 40, 24, 96, 32, 32), (1, 32, 0, 128, 4, 4), (6, 33, 0, 64, 8, 8)]


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_tiles_serve_every_convolution(convolution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, isa="amx")
    for shape in (*SHAPES, *TILED):
        for norm in ("shift", "scale and shift", "linear", None):
            check(convolution, shape, (torch.bfloat16, torch.bfloat16), norm, methods=("tiles",))


@pytest.mark.parametrize("shape", TILED)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_tiles_give_the_same_bits_for_any_threads_and_batch(
    convolution: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, isa="amx")
    kernel, stride, asymmetric, resample = CONVOLUTIONS[convolution]
    n, channels, skip_channels, out_channels, height, width = shape
    layers, channels = PackedLayers(torch.bfloat16), channels + skip_channels
    conv, norm = make_conv(channels, out_channels, kernel, stride=stride, asymmetric=asymmetric), make_norm(channels)
    x = dense(torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(0)).bfloat16())

    def out(x: Tensor) -> Tensor:
        return run(lambda builder, x: layers.conv(builder, conv, (x,), norm=norm, resample=resample), x)

    one = with_threads(1, lambda: out(x))
    for threads in (2, 3, 7):
        assert torch.equal(with_threads(threads, lambda: out(x)), one)
    assert torch.equal(with_threads(2, lambda: out(x[-1:])), one[-1:])
    assert {method for _, method, _ in layers._packed} == {"tiles"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_serve_a_network(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, isa="amx")
    model, config = make_unet(variant)
    inputs, frozen = make_inputs(config, 3), freeze(model, torch.bfloat16)
    assert_as_right(frozen(*inputs), model, *inputs)
    assert frozen.why_not_packed is None
    assert {method for _, method, _ in frozen._layers._packed} == {"tiles"}


def test_the_method_follows_from_the_shape() -> None:
    single, half = torch.float32, torch.bfloat16
    for shape, products, upsample, expected in (
        ((1, 80, 4, 4), single, False, "direct"),
        ((2, 80, 4, 4), single, False, "winograd"),  # 2 tiles of 4x4
        ((1, 80, 8, 8), single, False, "winograd"),  # 4
        ((2, 80, 8, 8), single, False, "winograd_large"),  # 8
        ((2, 79, 8, 8), single, False, "winograd"),
        ((2, 80, 8, 8), half, False, "winograd"),
        ((2, 80, 8, 8), single, True, "winograd"),
        ((8, 80, 4, 4), single, False, "winograd_large"),
        ((8, 80, 5, 5), single, False, "winograd"),  # 32 tiles of 4x4, 72 of 2x2
        ((8, 80, 7, 7), single, False, "winograd_large"),  # 32, 128
        ((1, 80, 6, 150), single, False, "winograd"),  # 76 of 4x4, 225 of 2x2
        ((0, 80, 8, 8), single, False, "direct"),
    ):
        assert method_of(*shape, products, upsample=upsample) == expected, shape


@pytest.mark.parametrize("channels", [(3, 96), (96, 3), (96, 16)])
def test_few_channels_are_summed_directly(channels: tuple[int, int]) -> None:
    layers, conv = PackedLayers(torch.float32), make_conv(*channels, 3)
    run(lambda builder, x: layers.conv(builder, conv, (x,)), dense(torch.randn(1, channels[0], 16, 16)))
    assert [method for _, method, _ in layers._packed] == ["winograd_large" if channels == (96, 16) else "direct"]


def test_programs_share_packed_weights() -> None:
    layers, conv = PackedLayers(torch.float32), make_conv(80, 16, 3)
    for n in (1, 2, 1):
        run(lambda builder, x: layers.conv(builder, conv, (x,)), dense(torch.randn(n, 80, 16, 16)))
    (packed,) = layers._packed.values()
    run(lambda builder, x: layers.conv(builder, conv, (x,)), dense(torch.randn(1, 80, 2, 2)))
    assert {method for _, method, _ in layers._packed} == {"winograd_large", "direct"}
    assert next(iter(layers._packed.values())) is packed


# n, heads, height, width, channels of a head: one pixel, panels and vectors that are not full, odd widths.
ATTENTIONS = [(1, 1, 1, 1, 2), (2, 3, 5, 1, 6), (1, 2, 8, 8, 40), (2, 1, 7, 9, 130), (2, 4, 4, 5, 3), (3, 4, 4, 4, 1)]


@pytest.mark.parametrize("dtype", [*MATRIX_DTYPES, "tiles"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape", ATTENTIONS)
@torch.no_grad()
def test_attention(shape: tuple[int, ...], normed: bool, dtype: torch.dtype | str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(dtype, str):
        pretend(monkeypatch, isa="amx")
        dtype = torch.bfloat16
    n, heads, height, width, head_dim = shape
    channels = heads * head_dim
    options = {"head_dim": head_dim, "num_groups": 1 if normed else None, "eps": 1e-5, "output_scale_factor": 1.5}
    plain = Attention(channels, **options)  # type: ignore[arg-type]
    for parameter in plain.parameters():
        parameter.copy_(parameter.to(dtype))
    weight, bias = plain._joined()
    out = plain.to_out[0]
    norm = None if plain.group_norm is None else Norm(1, 1e-5, plain.group_norm.weight, plain.group_norm.bias, False)
    qkv, projection = Conv(weight[:, :, None, None], bias), Conv(out.weight[:, :, None, None], out.bias)  # type: ignore[arg-type]
    layer, layers = SelfAttention(norm, qkv, projection, heads, 1.5), PackedLayers(dtype)
    x = dense(torch.randn(n, channels, height, width).to(dtype))
    truth = copy.deepcopy(plain).double()(x.double())
    allowed = relative_error(copy.deepcopy(plain).to(dtype)(x), truth)
    got = run(lambda builder, x: layers.attention(builder, layer, x), x)
    assert relative_error(got, truth) <= max(2 * allowed, 4 * torch.finfo(dtype).eps / 2)


def test_an_image_does_not_depend_on_the_others() -> None:
    """Its method may change with the number of tiles, and then the rounding."""
    layers, norm, x = PackedLayers(torch.float32), make_norm(80), dense(torch.randn(5, 80, 12, 12))
    for conv, options in ((make_conv(80, 40, 3), {"norm": norm}), (make_conv(80, 40, 3, stride=2), {})):
        whole, alone = (
            run(lambda b, x, conv=conv, o=options: layers.conv(b, conv, (x,), **o), part)  # type: ignore[misc]
            for part in (x, x[3:4])
        )
        assert torch.equal(whole[3:4], alone)


def test_large_weights_lie_in_huge_pages_or_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.randn(300, 1000).bfloat16().repeat(4, 1)
    assert torch.equal(packed_layers._in_huge_pages(large), large)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert packed_layers._in_huge_pages(large) is large
