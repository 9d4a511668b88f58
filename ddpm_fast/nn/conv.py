"""`Conv3x3`, whose training step on a CPU is this package's own, and the packed weights that the inference form has, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._library import define, dtype_code, is_plain, pointer
from ..ops.backend import BUILD, native, native_error
from .replay import empty, keep

Layer = TypeVar("Layer", bound=nn.Module)

DTYPES: Final = (torch.float32, torch.bfloat16)

# 2x2 tiles of a batch that are worth reading 16/9 of the weights; after an upsampling, of the small maps, 36/16 of them.
WINOGRAD_TILES: Final = 8


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why convolutions of this dtype are not this package's own; None where they are."""
    if device.type != "cpu":
        return f"they run on the CPU, not on {device.type}"
    if native_error() is not None:
        return f"the compiled module did not load: {native_error()}"
    if dtype not in DTYPES:
        return f"they compute in float32 and bfloat16, not in {dtype}"
    if not hasattr(native().cpu, "conv_winograd_upsampled_gradient"):
        return "the compiled module is older than this source and lacks them: build it again"
    if BUILD["isa"] == "baseline":
        return "this CPU has neither AVX2 nor AVX-512"
    if dtype == torch.bfloat16 and BUILD["amx_bf16"]:
        return "this CPU has matrix units for bfloat16, which oneDNN uses and they do not"
    return None


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    return native_error() is None and (BUILD["isa"] == "avx512_bf16" or BUILD.get("amx_bf16", False))


def trained_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype | None:
    """The dtype of a layer's training step in this package's kernels; None where it is PyTorch's, or none is recorded."""
    by_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if by_autocast else x.dtype
    given = [tensor for tensor in (x, *parameters) if tensor is not None]
    serves = (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in given)
        and is_plain(*given)
        and all(tensor.device == x.device and tensor.dtype in DTYPES for tensor in given)
        and (by_autocast or all(tensor.dtype == dtype for tensor in given))
        and why_not_packed(x.device, dtype) is None
        and (dtype == torch.float32 or has_fast_bfloat16())
    )
    return dtype if serves else None


def step_of(dtype: torch.dtype) -> int:
    """Input channels that a multiply-add takes."""
    return 2 if dtype == torch.bfloat16 else 1


def winograd_tiles(n: int, height: int, width: int) -> int:
    """2x2 tiles of n maps."""
    return n * ((height + 1) // 2) * ((width + 1) // 2)


def pack_winograd(weight: Tensor, dtype: torch.dtype, *, flipped: bool = False, upsample: bool = False) -> Tensor:
    """G g G^T of 3x3 weights [out, in, 3, 3] in the order in which the kernel reads them: [panels, 16, in / step, panel, step].

    Args:
        dtype: of the result. See `ddpm_fast.nn.packed.pack` for panels and steps.
        flipped: for the convolution that takes the output's gradient to the input's: in and out exchanged, taps from the last.
        upsample: for the convolution after an upsampling by 2, whose four phases have 9 matrices each: 36 instead of 16.
    """
    pack = _pack if is_plain(weight) else torch.ops.ddpm_fast.pack_winograd
    packed: Tensor = pack(weight.detach().float(), dtype, flipped, upsample)
    return packed


def _pack(weight: Tensor, dtype: torch.dtype, flipped: bool, upsample: bool) -> Tensor:
    packed = _pack_fake(weight, dtype, flipped, upsample)
    (out_channels, channels), (out_stride, stride, *taps) = weight.shape[:2], weight.stride()
    start = weight.data_ptr()
    if flipped:
        out_channels, channels, out_stride, stride = channels, out_channels, stride, out_stride
        start, taps = start + 2 * sum(taps) * weight.element_size(), [-stride for stride in taps]
    native().cpu.pack_winograd(
        *(dtype_code(packed), packed.data_ptr(), start, out_channels, channels, out_stride, stride, *taps),
        *(upsample, torch.get_num_threads()),
    )
    return packed


def _pack_fake(weight: Tensor, dtype: torch.dtype, flipped: bool, upsample: bool) -> Tensor:
    out_channels, channels = weight.shape[1::-1] if flipped else weight.shape[:2]
    panel, step = native().cpu.panel, step_of(dtype)
    return weight.new_empty(-(-out_channels // panel), 36 if upsample else 16, -(-channels // step), panel, step, dtype=dtype)


define("pack_winograd", "(Tensor weight, ScalarType dtype, bool flipped, bool upsample) -> Tensor", _pack, _pack_fake)


class Conv3x3(nn.Conv2d):
    """nn.Conv2d, for convolutions 3x3 of stride 1 and padding 1: [N, in_channels, H, W] -> [N, out_channels, H, W].

    Where gradients are recorded on a CPU, in channels_last and a dtype that it is fast at (float32, or bfloat16, by autocast
    too), output and gradients are by Winograd's F(2x2, 3x3), in this package's kernels; elsewhere, and for second
    derivatives, they are PyTorch's. What an infinity reaches may be NaN where PyTorch has an infinity.
    """

    def forward(self, input: Tensor) -> Tensor:
        out = _trained(self, input, upsample=False)
        return super().forward(input) if out is None else out


def upsampled(conv: nn.Module, x: Tensor) -> Tensor:
    """conv of x with every pixel twice in both directions: [N, in, H, W] -> [N, out, 2 H, 2 W].

    In training it is by F(2x2, 2x2) of the small map where `Conv3x3` would be this package's, and is what it was made: what
    stands in its place or watches it gets the large map.
    """
    out = _trained(conv, x, upsample=True) if is_untouched(conv, Conv3x3) else None
    if out is None:
        out = conv(doubled(x))
    return out


def is_untouched(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether it does what this very class does, and nobody watches its calls."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and "forward" not in vars(layer) and not any(hooks)


def _trained(conv: Conv3x3, x: Tensor, *, upsample: bool) -> Tensor | None:
    """The convolution of x, whose gradients this package's kernels make; None where they do not."""
    dtype = trained_dtype(x, conv.weight, conv.bias)
    if dtype is None or not _is_for_winograd(conv, x):
        return None
    out: Tensor = _Winograd.apply(x.to(dtype), conv.weight, conv.bias, upsample)  # type: ignore[no-untyped-call]
    return out


def doubled(x: Tensor) -> Tensor:
    """Every pixel twice in both directions: [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    if x.dim() != 4:  # of [C, H, W] PyTorch would double the width alone
        raise ValueError(f"upsampling: expected x to be [N, C, H, W], got shape {tuple(x.shape)}")
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _is_usual(conv: nn.Conv2d) -> bool:
    """3x3, of stride 1 and padding 1, with zeros."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _is_for_winograd(conv: Conv3x3, x: Tensor) -> bool:
    weight = conv.weight
    return (
        _is_usual(conv)
        and x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and winograd_tiles(x.shape[0], *x.shape[2:]) >= WINOGRAD_TILES
        and (_is_channels_last(x) or _is_channels_last(weight))  # what PyTorch's output then is, too
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, upsample: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes, ctx.upsample = None if bias is None else list(bias.shape), upsample
        scale = 2 if upsample else 1
        (height, width), packed = x.shape[2:], pack_winograd(weight, x.dtype, upsample=upsample)
        return _convolve(x, packed, bias, "winograd", upsample, len(weight), scale * height, scale * width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not is_plain(grad, x, weight):  # has a derivative
            return *_pytorchs_gradients(x, weight, grad, ctx.bias_sizes, ctx.upsample, needed), None
        grad_x = grad_weight = grad_bias = None
        if needed[0]:
            packed = pack_winograd(weight, x.dtype, flipped=True, upsample=ctx.upsample)
            method = "winograd_upsampled_gradient" if ctx.upsample else "winograd"
            grad_x = _convolve(grad, packed, None, method, False, *x.shape[1:])
        if needed[1] or needed[2]:
            grad_weight, grad_bias = _weight_gradients(x, grad, ctx.bias_sizes is not None, ctx.upsample)
        return grad_x, grad_weight, grad_bias, None


def _pytorchs_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, bias_sizes: list[int] | None, upsample: bool, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(grad, doubled(x) if upsample else x, weight.to(x.dtype), bias_sizes),
        *([1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(needed)),
    )
    if upsample and grad_x is not None:
        grad_x = 4 * F.avg_pool2d(grad_x, 2)
    return grad_x, grad_weight, grad_bias


def _convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, method: str, upsample: bool, out_channels: int, height: int, width: int
) -> Tensor:
    x, bias = x.contiguous(memory_format=torch.channels_last), None if bias is None else float_bias(bias)
    return convolve(x, None, None, False, packed, bias, None, 1.0, method, upsample, out_channels, height, width, 3, 1, 1)


def _weight_gradients(x: Tensor, grad: Tensor, has_bias: bool, upsample: bool) -> tuple[Tensor, Tensor | None]:
    """In float32, whatever the dtype of the maps."""
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    (n, channels, height, width), out_channels = x.shape, grad.shape[1]
    shape = (out_channels, channels, 3, 3)
    grad_weight = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    grad_bias = x.new_empty(out_channels, dtype=torch.float32) if has_bias else None
    native().cpu.conv_winograd_weights(
        *(dtype_code(x), grad_weight.data_ptr(), pointer(grad_bias), x.data_ptr(), grad.data_ptr()),
        *(n, height, width, channels, out_channels, upsample, torch.get_num_threads()),
    )
    return grad_weight, grad_bias


# ---------------------------------------------------------------------------------------------------- the kernels' own form


def float_bias(bias: Tensor) -> Tensor:
    """As the kernels read it: float32 [out], without a gradient. It may be the bias's own memory."""
    return bias.detach().float().contiguous()


def convolve(
    x: Tensor,
    skip: Tensor | None,
    lines: Tensor | None,
    silu: bool,
    weights: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    divisor: float,
    method: str,
    upsample: bool,
    out_channels: int,
    out_height: int,
    out_width: int,
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    """A convolution of channels_last maps.

    Args:
        weights: as `ddpm_fast.nn.packed.pack` packs them for this method.
        method: "direct" or "winograd"; or "winograd_upsampled_gradient", of the gradient of the output of an upsampled
            convolution, with weights of `pack_winograd(flipped=True, upsample=True)`, to that of its input.
        upsample: of every pixel twice in both directions before the convolution.
    """
    n, channels, height, width = x.shape
    y = empty((n, out_channels, out_height, out_width), x.dtype, x.device)
    getattr(native().cpu, f"conv_{method}")(
        *(dtype_code(x), y.data_ptr(), x.data_ptr(), pointer(skip), pointer(lines), silu, weights.data_ptr()),
        *(pointer(bias), pointer(added), divisor, n, height, width, channels, 0 if skip is None else skip.shape[1]),
        *(out_height, out_width, out_channels, kernel, stride, padding, upsample, torch.get_num_threads()),
    )
    keep(weights, bias)
    return y
