"""3x3 convolutions: `Conv3x3` with a native training step on the CPU, and packed weights for kernels."""

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

# Fewest 2x2 tiles of a batch for which reading 16/9 of the weights pays (36/16 after an upsampling, of the small maps).
WINOGRAD_TILES: Final = 8


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why convolutions of this dtype do not use this package's kernels, or None if they do."""
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
    """Return whether this CPU has bfloat16 multiply instructions."""
    return native_error() is None and (BUILD["isa"] == "avx512_bf16" or BUILD.get("amx_bf16", False))


def trained_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype | None:
    """Return the dtype of a layer's training step in this package's kernels.

    None if PyTorch computes the step, or if no gradient is recorded.
    """
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
    """Return the number of input channels per multiply-add: 2 in bfloat16, 1 in float32."""
    return 2 if dtype == torch.bfloat16 else 1


def winograd_tiles(n: int, height: int, width: int) -> int:
    """Return the number of 2x2 tiles in n feature maps."""
    return n * ((height + 1) // 2) * ((width + 1) // 2)


def pack_winograd(weight: Tensor, dtype: torch.dtype, *, flipped: bool = False, upsample: bool = False) -> Tensor:
    """Return 3x3 weights transformed by Winograd's G and packed for the kernel.

        G g G^T,  packed as [panels, 16, in / step, panel, step]

    `ddpm_fast.nn.packed.pack` explains panels and steps.

    Args:
        weight: [out, in, 3, 3].
        dtype: Dtype of the result.
        flipped: Pack for the input's gradient: in and out exchanged, taps in reverse order.
        upsample: Pack for the convolution after an upsampling by 2. Its four phases have 9 matrices
            each, so the second dimension is 36 instead of 16.
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
    """nn.Conv2d for 3x3 convolutions with stride 1 and padding 1.

    Training steps on a CPU use this package's Winograd F(2x2, 3x3) kernels, forward and backward. They need
    channels_last maps or weights in float32, or in bfloat16 on a CPU with AVX-512 BF16 and no AMX. The
    dtype may come from autocast. A batch must have at least `WINOGRAD_TILES` 2x2 tiles.

    PyTorch computes all other calls and second derivatives. With infinite inputs the kernels may return NaN
    where PyTorch returns infinities.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of input: [N, in_channels, H, W] -> [N, out_channels, H, W]."""
        out = _trained(self, input, upsample=False)
        return super().forward(input) if out is None else out


def upsampled(conv: nn.Module, x: Tensor) -> Tensor:
    """Return `conv` of x upsampled by 2 (nearest): [N, in, H, W] -> [N, out, 2 H, 2 W].

    Training steps of an unmodified `Conv3x3` use Winograd F(2x2, 2x2) on the small map, under the
    conditions given there. Any other module, or one with hooks, is called with the upsampled map.

    Args:
        conv: A convolution.
        x: [N, in, H, W].
    """
    out = _trained(conv, x, upsample=True) if is_untouched(conv, Conv3x3) else None
    if out is None:
        out = conv(doubled(x))
    return out


def is_untouched(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Return whether `layer` is an unmodified `kind` without hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and "forward" not in vars(layer) and not any(hooks)


def _trained(conv: Conv3x3, x: Tensor, *, upsample: bool) -> Tensor | None:
    """Return the convolution of x with gradients by this package's kernels, or None if they do not apply."""
    dtype = trained_dtype(x, conv.weight, conv.bias)
    if dtype is None or not _is_for_winograd(conv, x):
        return None
    out: Tensor = _Winograd.apply(x.to(dtype), conv.weight, conv.bias, upsample)  # type: ignore[no-untyped-call]
    return out


def doubled(x: Tensor) -> Tensor:
    """Upsample by 2 (nearest): [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    if x.dim() != 4:  # of [C, H, W] PyTorch would double the width alone
        raise ValueError(f"upsampling: expected x to be [N, C, H, W], got shape {tuple(x.shape)}")
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _is_usual(conv: nn.Conv2d) -> bool:
    """Return whether `conv` is 3x3 with stride 1, padding 1 and zero padding."""
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
    """Return the gradients of weight and bias in float32."""
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
    """Return the bias as contiguous float32 [out], detached. May share memory with `bias`."""
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
    """Convolve channels_last feature maps, with the operations before and after fused.

        (conv(act(norm(x and skip))) + bias + added) / divisor

    Args:
        x: [N, C, H, W], channels_last.
        skip: Further input channels [N, S, H, W], or None.
        lines: Affine coefficients of the norm, [N, 3, C + S], or None for no norm.
        silu: Apply SiLU after the norm.
        weights: Packed by `ddpm_fast.nn.packed.pack` for this method.
        bias: float32 [out_channels], or None.
        added: Residual, shaped like the output, or None.
        divisor: Divides the sum.
        method: "direct", "winograd" or "winograd_upsampled_gradient". The last one maps the gradient of
            an upsampled convolution's output to that of its input. Its weights come from
            `pack_winograd(flipped=True, upsample=True)`.
        upsample: Upsample the input by 2 (nearest) before the convolution.
        out_channels: Channels of the output.
        out_height: Height of the output.
        out_width: Width of the output.
        kernel: Kernel size, 1 or 3.
        stride: Stride, 1 or 2.
        padding: Zeros on each side.

    Returns:
        [N, out_channels, out_height, out_width] in x's dtype, channels_last.
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
