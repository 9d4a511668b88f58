"""Convolutions with packed weights, and attention: what they compute, in every method, size and instruction set."""

from __future__ import annotations

import copy
import mmap
import pickle

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import MATRIX_OPS
from small_unets import relative_error
from torch import Tensor, nn

from ddpm_fast.nn import packed
from ddpm_fast.nn.layers import Attention, GroupNormSiLU
from ddpm_fast.nn.packed import PackedAttention, PackedConv
from ddpm_fast.ops import attention, backend, why_not
from ddpm_fast.ops.backend import MATRIX_DTYPES

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
# kernel, stride, asymmetric padding, upsampling.
CONVOLUTIONS = {
    "3x3": (3, 1, False, False),
    "1x1": (1, 1, False, False),
    "strided": (3, 2, False, False),
    "strided, padded behind": (3, 2, True, False),
    "upsampled": (3, 1, False, True),
}


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def expected(layer: PackedConv, x: Tensor, norm: bool, added: Tensor | None, **small: Tensor) -> Tensor:
    """In x's dtype, layer by layer."""
    if norm:
        assert layer.norm is not None
        x = layer.norm.to(x.dtype)(x, **small)
    if layer.upsample:
        x = F.interpolate(x, scale_factor=2.0)
    if layer.asymmetric:
        x = F.pad(x, (0, 1, 0, 1))
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    out = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    return out if added is None else out + added


def check(convolution: str, shape: tuple[int, ...], dtype: torch.dtype, norm: bool, methods: tuple[str, ...] = ()) -> None:
    kernel, stride, asymmetric, upsample = CONVOLUTIONS[convolution]
    n, channels, skip_channels, out_channels, height, width = shape
    if asymmetric and min(height, width) == 1:
        pytest.skip("there is no output")
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    total = channels + skip_channels
    plain = nn.Conv2d(total, out_channels, kernel, stride, 0 if asymmetric else kernel // 2)
    group_norm = GroupNormSiLU(1 if total % 4 else 4, total, 1e-5)
    with torch.no_grad():
        plain.weight.copy_(randn(*plain.weight.shape) / plain.weight[0].numel() ** 0.5)
        assert plain.bias is not None
        plain.bias.copy_(randn(out_channels))
        group_norm.weight.copy_(randn(total))
        group_norm.bias.copy_(randn(total))
    plain.weight.data = plain.weight.to(dtype).float()  # what is compared is the arithmetic, not the rounding of weights
    layer = PackedConv(plain, group_norm if norm else None, dtype=dtype, upsample=upsample, asymmetric=asymmetric)
    x = dense(randn(n, total, height, width).to(dtype))
    skip = dense(x[:, channels:]) if skip_channels else None
    small = {"shift": randn(n, total)} if norm else {}
    with torch.no_grad():
        truth = expected(layer, x.double(), norm, None, **{name: value.double() for name, value in small.items()})
        added = dense(randn(*truth.shape).to(dtype))
        truth = (truth + added.double()) / 1.5
        if layer.norm is not None:
            layer.norm.float()
        out = layer(dense(x[:, :channels]), skip, added=added, divisor=1.5, **small)
        allowed = relative_error(expected(layer, x, norm, added, **{k: v.to(dtype) for k, v in small.items()}) / 1.5, truth)
    assert (out.shape, out.dtype) == (truth.shape, dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    # Long sums in another order, or in tiles, are as good as PyTorch's up to a factor; never better than rounding allows.
    unit = torch.finfo(dtype).eps / 2
    assert relative_error(out, truth) <= max(2 * allowed, 4 * unit)
    if methods:
        assert set(layer._packed) <= set(methods)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_is_norm_activation_convolution_and_addition(
    convolution: str, shape: tuple[int, ...], dtype: torch.dtype, norm: bool
) -> None:
    check(convolution, shape, dtype, norm)


@pytest.mark.parametrize("method", ["winograd", "direct"])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("convolution", ["3x3", "upsampled"])
def test_either_method_serves_a_3x3_convolution(
    convolution: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "WINOGRAD_TILES", 0 if method == "winograd" else 10**9)
    monkeypatch.setattr(packed, "WINOGRAD_CHANNELS", 0)
    for shape in SHAPES:
        for norm in (True, False):
            check(convolution, shape, dtype, norm, methods=(method,))


@pytest.mark.parametrize("channels", [(3, 64), (64, 3), (64, 64)])
def test_few_channels_are_summed_directly(channels: tuple[int, int]) -> None:
    layer = PackedConv(nn.Conv2d(*channels, 3, padding=1), dtype=torch.float32)
    layer(dense(torch.randn(1, channels[0], 16, 16)))
    assert list(layer._packed) == ["winograd" if channels == (64, 64) else "direct"]


# n, heads, height, width, channels of a head: one pixel, panels and vectors that are not full, more keys than a sum takes.
ATTENTIONS = [(1, 1, 1, 1, 2), (2, 3, 5, 1, 6), (1, 2, 8, 8, 40), (2, 1, 7, 9, 130), (1, 1, 19, 31, 32), (3, 4, 4, 4, 16)]


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, heads, height, width, channels = shape
    generator = torch.Generator().manual_seed(0)
    qkv = dense(torch.randn(n, 3 * heads * channels, height, width, generator=generator).to(dtype))
    qkv = qkv.permute(0, 2, 3, 1).flatten(1, 2)  # [n, pixels, channels], as the kernels read a channels_last map

    def expected(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(n, height * width, 3, heads, channels).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)

    truth = expected(qkv.double())
    for out in (
        attention(qkv, heads, scale=0.3, backend="native"),
        torch.ops.ddpm_fast.attention(qkv, heads, 0.3, "native")[0],
    ):
        assert (out.shape, out.dtype) == (truth.shape, dtype)
        assert out.is_contiguous()
        unit = torch.finfo(dtype).eps / 2
        assert relative_error(out, truth) <= max(2 * relative_error(expected(qkv), truth), 4 * unit)


def test_attention_to_scores_far_apart() -> None:
    """The largest takes all, and its exponential does not overflow."""
    qkv = torch.randn(1, 20, 3 * 16, generator=torch.Generator().manual_seed(0))
    qkv[..., :32] *= 1e3
    index = torch.einsum("qc,kc->qk", qkv[0, :, :16], qkv[0, :, 16:32]).argmax(1)
    assert torch.equal(attention(qkv, 1, scale=1.0, backend="native")[0], qkv[0, index, 32:])


def test_attention_of_heads_of_an_odd_width() -> None:
    torch.manual_seed(0)
    plain = Attention(12, head_dim=3, num_groups=4, eps=1e-5).requires_grad_(False)
    x = dense(torch.randn(2, 12, 4, 5).bfloat16())
    truth = copy.deepcopy(plain).double()(x.double())
    allowed = relative_error(copy.deepcopy(plain).bfloat16()(x), truth)
    assert relative_error(PackedAttention(plain, torch.bfloat16)(x), truth) <= 2 * allowed


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_no_bit(threads: int) -> None:
    torch.manual_seed(0)
    x = dense(torch.randn(2, 64, 12, 12))
    layers = [
        PackedConv(nn.Conv2d(64, 96, 3, padding=1), GroupNormSiLU(8, 64, 1e-5), dtype=torch.float32),
        PackedConv(nn.Conv2d(64, 96, 3, 2, padding=1), dtype=torch.float32),
        PackedConv(nn.Conv2d(64, 96, 3, padding=1), dtype=torch.float32, upsample=True),
        PackedConv(nn.Linear(64, 192), GroupNormSiLU(8, 64, 1e-5), dtype=torch.float32),
        PackedAttention(Attention(64, head_dim=16, num_groups=8, eps=1e-5), torch.float32),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [layer(x) for layer in layers]
        torch.set_num_threads(threads)
        for layer, out in zip(layers, alone, strict=True):
            for _ in range(2):
                assert torch.equal(layer(x), out)
    finally:
        torch.set_num_threads(before)


def test_an_image_does_not_depend_on_the_others() -> None:
    """But for the method, which the number of tiles decides."""
    torch.manual_seed(0)
    x = dense(torch.randn(5, 32, 8, 8))
    for layer in (
        PackedConv(nn.Conv2d(32, 40, 3, padding=1), GroupNormSiLU(8, 32, 1e-5), dtype=torch.float32),
        PackedConv(nn.Conv2d(32, 40, 3, 2, padding=1), dtype=torch.float32),
    ):
        assert torch.equal(layer(x)[3:4], layer(x[3:4]))


def make_layer() -> PackedConv:
    torch.manual_seed(0)
    return PackedConv(nn.Conv2d(8, 20, 3, padding=1), GroupNormSiLU(4, 8, 1e-5), dtype=torch.float32)


def test_empty_batches_and_maps() -> None:
    layer = make_layer()
    assert layer(torch.empty(0, 8, 6, 6)).shape == (0, 20, 6, 6)
    assert PackedConv(nn.Conv2d(8, 20, 3, padding=1), dtype=torch.float32)(torch.empty(1, 8, 0, 4)).shape == (1, 20, 0, 4)


def test_inputs_in_other_layouts_and_dtypes() -> None:
    layer, x, added, shift = make_layer(), torch.randn(2, 8, 6, 6), torch.randn(2, 20, 6, 6), torch.randn(2, 16)
    out = layer(dense(x), added=dense(added), shift=shift[:, 8:].contiguous())
    assert torch.equal(layer(x, added=added, shift=shift[:, 8:]), out)
    with pytest.raises(TypeError, match=r"PackedConv: expected x to be torch\.float32, got torch\.bfloat16"):
        layer(x.bfloat16())


def test_default_dtype_and_device_do_not_matter() -> None:
    layer, x = make_layer(), torch.randn(2, 8, 6, 6)
    out = layer(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(layer(x), out)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_are_loaded_are_packed_again() -> None:
    layer, other, x = make_layer(), make_layer(), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        other.weight.mul_(2)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    copied = pickle.loads(pickle.dumps(layer))
    assert copied._packed == {}
    assert torch.equal(copied(x), layer(x))


def test_convolutions_that_it_has_not() -> None:
    for other in (
        *(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    ):
        with pytest.raises(ValueError, match="PackedConv: expected conv to be 1x1 or 3x3, padded with zeros to as many pixels"):
            PackedConv(other, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_read_as_such(dtype: torch.dtype) -> None:
    plain = nn.Conv2d(8, 20, 3, padding=1).to(dtype)
    x = torch.randn(2, 8, 6, 6)
    layer = PackedConv(plain, dtype=torch.float32)
    torch.testing.assert_close(layer(x), F.conv2d(x, plain.weight.float(), plain.bias.float(), padding=1))  # type: ignore[union-attr]


def test_reasons_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    reason = "it runs on the CPU, not on cuda, where PyTorch's convolution and attention are the reference"
    assert backend.why_not_matrix_kernels(torch.device("cuda", 0), torch.float32) == reason
    assert backend.why_not_matrix_kernels(cpu, torch.float64) == "it computes in float32 and bfloat16, not in torch.float64"
    for isa, amx, dtype, reason in (
        ("avx2", False, torch.bfloat16, None),
        ("avx512_bf16", True, torch.float32, None),
        ("avx512_bf16", True, torch.bfloat16, "matrix units for bfloat16"),
        ("baseline", False, torch.float32, "neither AVX2 nor AVX-512"),
    ):
        monkeypatch.setattr(backend, "BUILD", {"isa": isa, "amx_bf16": amx})
        got = backend.why_not_matrix_kernels(cpu, dtype)
        assert got is None if reason is None else reason in str(got)
        assert backend.has_fast_bfloat16() == (isa == "avx512_bf16")
        for op in MATRIX_OPS:
            assert why_not("native", op, cpu, dtype) == got
    monkeypatch.setattr(backend, "native_error", lambda: "gone")
    assert backend.why_not_matrix_kernels(cpu, torch.float32) == "the compiled module did not load: gone"
    assert not backend.has_fast_bfloat16()


def test_large_weights_lie_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.randn(100), torch.randn(300, 1000).bfloat16().repeat(4, 1)
    assert packed._in_huge_pages(small) is small
    copied = packed._in_huge_pages(large)
    assert torch.equal(copied, large)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert copied.data_ptr() % (2 << 20) == 0

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert packed._in_huge_pages(large) is large
