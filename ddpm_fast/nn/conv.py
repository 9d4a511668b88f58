"""`Conv3x3`, whose training step on a CPU is this package's own, and the packed weights that the inference form has, too."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from ..ops._library import define, dtype_code, is_plain, pointer
from ..ops.backend import BUILD, native, native_error
from .replay import empty, keep

DTYPES: Final = (torch.float32, torch.bfloat16)

# 2x2 tiles of a batch that are worth reading 16/9 of the weights.
WINOGRAD_TILES: Final = 8


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why convolutions of this dtype are not this package's own; None where they are."""
    if device.type != "cpu":
        return f"they run on the CPU, not on {device.type}"
    if native_error() is not None:
        return f"the compiled module did not load: {native_error()}"
    if dtype not in DTYPES:
        return f"they compute in float32 and bfloat16, not in {dtype}"
    if not hasattr(native().cpu, "record"):
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


def pack_winograd(weight: Tensor, dtype: torch.dtype, *, flipped: bool = False) -> Tensor:
    """G g G^T of 3x3 weights [out, in, 3, 3] in the order in which the kernel reads them: [panels, 16, in / step, panel, step].

    Args:
        dtype: of the result. See `ddpm_fast.nn.packed.pack` for panels and steps.
        flipped: for the convolution that takes the output's gradient to the input's: in and out exchanged, taps from the last.
    """
    pack = _pack if is_plain(weight) else torch.ops.ddpm_fast.pack_winograd
    packed: Tensor = pack(weight.detach().float(), dtype, flipped)
    return packed


def _pack(weight: Tensor, dtype: torch.dtype, flipped: bool) -> Tensor:
    packed = _pack_fake(weight, dtype, flipped)
    (out_channels, channels), (out_stride, stride, *taps) = weight.shape[:2], weight.stride()
    start = weight.data_ptr()
    if flipped:
        out_channels, channels, out_stride, stride = channels, out_channels, stride, out_stride
        start, taps = start + 2 * sum(taps) * weight.element_size(), [-stride for stride in taps]
    native().cpu.pack_winograd(
        *(dtype_code(packed), packed.data_ptr(), start, out_channels, channels, out_stride, stride, *taps),
        torch.get_num_threads(),
    )
    return packed


def _pack_fake(weight: Tensor, dtype: torch.dtype, flipped: bool) -> Tensor:
    out_channels, channels = weight.shape[1::-1] if flipped else weight.shape[:2]
    panel, step = native().cpu.panel, step_of(dtype)
    return weight.new_empty(-(-out_channels // panel), 16, -(-channels // step), panel, step, dtype=dtype)


define("pack_winograd", "(Tensor weight, ScalarType dtype, bool flipped) -> Tensor", _pack, _pack_fake)


class Conv3x3(nn.Conv2d):
    """nn.Conv2d, for convolutions 3x3 of stride 1 and padding 1: [N, in_channels, H, W] -> [N, out_channels, H, W].

    Where gradients are recorded on a CPU, in channels_last and a dtype that it is fast at (float32, or bfloat16, by autocast
    too), output and gradients are by Winograd's F(2x2, 3x3), in this package's kernels; elsewhere, and for second
    derivatives, they are PyTorch's. What an infinity reaches may be NaN where PyTorch has an infinity.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = trained_dtype(input, self.weight, self.bias)
        if dtype is not None and _is_for_winograd(self, input):
            out: Tensor = _Winograd.apply(input.to(dtype), self.weight, self.bias)  # type: ignore[no-untyped-call]
            return out
        return super().forward(input)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return _convolve(x, pack_winograd(weight, x.dtype), bias, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not is_plain(grad, x, weight):  # has a derivative
            gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
                *(grad, x, weight.to(x.dtype), ctx.bias_sizes, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed)
            )
            return gradients
        grad_x = grad_weight = grad_bias = None
        if needed[0]:
            grad_x = _convolve(grad, pack_winograd(weight, x.dtype, flipped=True), None, x.shape[1])
        if needed[1] or needed[2]:
            grad_weight, grad_bias = _weight_gradients(x, grad, ctx.bias_sizes is not None)
        return grad_x, grad_weight, grad_bias


def _convolve(x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
    x, bias = x.contiguous(memory_format=torch.channels_last), None if bias is None else plain_bias(bias)
    height, width = x.shape[2:]
    return convolve(x, None, None, False, packed, bias, None, 1.0, "winograd", out_channels, height, width, 3, 1, 1)


def _weight_gradients(x: Tensor, grad: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """In float32, whatever the dtype of the maps."""
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    (n, channels, height, width), out_channels = x.shape, grad.shape[1]
    shape = (out_channels, channels, 3, 3)
    grad_weight = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    grad_bias = x.new_empty(out_channels, dtype=torch.float32) if has_bias else None
    native().cpu.conv_winograd_weights(
        *(dtype_code(x), grad_weight.data_ptr(), pointer(grad_bias), x.data_ptr(), grad.data_ptr()),
        *(n, height, width, channels, out_channels, torch.get_num_threads()),
    )
    return grad_weight, grad_bias


# ---------------------------------------------------------------------------------------------------- the kernels' own form


def plain_bias(bias: Tensor) -> Tensor:
    """As the kernels read it."""
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
    out_channels: int,
    out_height: int,
    out_width: int,
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    """A convolution of channels_last maps, with the weights that `ddpm_fast.nn.packed.pack` packs for this method."""
    n, channels, height, width = x.shape
    y = empty((n, out_channels, out_height, out_width), x.dtype, x.device)
    kernels = native().cpu
    run = kernels.conv_winograd if method == "winograd" else kernels.conv_direct
    run(
        *(dtype_code(x), y.data_ptr(), x.data_ptr(), pointer(skip), pointer(lines), silu, weights.data_ptr()),
        *(pointer(bias), pointer(added), divisor, n, height, width, channels, 0 if skip is None else skip.shape[1]),
        *(out_height, out_width, out_channels, kernel, stride, padding, method == "upsample", torch.get_num_threads()),
    )
    keep(weights, bias)
    return y
