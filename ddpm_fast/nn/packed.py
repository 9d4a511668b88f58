"""Layers of the inference form on a CPU: convolutions with packed weights and fused norms.

A norm and its activation are applied while a convolution reads its input. Feature maps are
channels_last. "x and skip" are the channels of x followed by those of skip, each read in place.
"""

from __future__ import annotations

import mmap
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._library import define, dtype_code, is_plain, pointer, typed
from ..ops.backend import native
from .conv import WINOGRAD_TILES, convolve, float_bias, pack_winograd, step_of, winograd_tiles
from .layers import Attention, Downsample, GroupNormSiLU, ResnetBlock, Upsample
from .replay import empty, keep

# After upsampling by 2, the three taps of an even or odd output row fall on two input rows in these ways.
_UPSAMPLED: Final = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64, device="cpu")

# With fewer on either side, as in a network's first and last convolution, the direct sum serves: of the network of Ho et al. it
# takes 0.05 ms more at batch 1, of 19, and in bfloat16 the whole network's error is smaller by a twentieth.
WINOGRAD_CHANNELS: Final = 16

_HUGE_PAGE: Final = 2 << 20

loads = 0  # of weights into layers that are packed: a recording of calls from before has the weights from before


class PackedConv(nn.Module):
    """A convolution with the operations around it fused.

        (conv(act(norm(x and skip))) + added) / divisor

    Weights are packed at first use, for the method that suits the map's size. They are packed again after
    `load_state_dict`. Other writes to the weights have no effect.

    Args:
        conv: 3x3 or 1x1 convolution of stride 1 or 2 with zero padding that keeps the size. A linear layer is
            a 1x1 convolution.
        norm: Norm and activation of the input, or None.
        dtype: Dtype of feature maps and packed weights, float32 or bfloat16.
        upsample: Upsample the input by 2 (nearest) before the convolution.
        asymmetric: Pad one row below and one column on the right only.

    Raises:
        ValueError: `conv` is of another geometry.
    """

    def __init__(
        self,
        conv: nn.Conv2d | nn.Linear,
        norm: GroupNormSiLU | None = None,
        *,
        dtype: torch.dtype,
        upsample: bool = False,
        asymmetric: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm
        weight = conv.weight[:, :, None, None] if isinstance(conv, nn.Linear) else conv.weight
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out, in, kernel, kernel], as it came
        self.dtype = dtype  # of maps and packed weights
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.kernel = weight.shape[-1]
        if isinstance(conv, nn.Conv2d):
            padding = (0 if asymmetric else self.kernel // 2,) * 2
            geometry = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
            if geometry != ((self.kernel,) * 2, padding, (1, 1), 1, "zeros") or self.kernel not in (1, 3):
                raise ValueError(f"PackedConv: expected conv to be 1x1 or 3x3, padded with zeros to as many pixels, got {conv}")
        self.stride = conv.stride[0] if isinstance(conv, nn.Conv2d) else 1
        self.padding = 0 if asymmetric else self.kernel // 2
        self.upsample, self.asymmetric = upsample, asymmetric
        self._packed: dict[str, tuple[Tensor, Tensor]] = {}  # weights and bias, by method

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        *,
        shift: Tensor | None = None,
        scale_shift: tuple[Tensor, Tensor] | None = None,
        added: Tensor | None = None,
        divisor: float = 1.0,
    ) -> Tensor:
        """Return the convolution's output, channels_last.

        Args:
            x: [N, C, H, W] in `dtype`.
            skip: Further input channels [N, S, H, W], or None.
            shift: [N, C + S] of the norm, as in `group_norm_silu`.
            scale_shift: Two [N, C + S] of the norm, as in `group_norm_silu`.
            added: Residual, shaped like the output, or None.
            divisor: Divides the sum.

        Returns:
            [N, out, H', W'] in `dtype`.

        Raises:
            TypeError: x has another dtype.
        """
        if x.dtype != self.dtype:
            raise TypeError(f"PackedConv: expected x to be {self.dtype}, got {x.dtype}")
        x = x.contiguous(memory_format=torch.channels_last)
        skip, added = [None if m is None else m.contiguous(memory_format=torch.channels_last) for m in (skip, added)]
        norm_lines, conv = (_norm_lines, convolve) if is_plain(x) else _REGISTERED
        lines, silu = None, False
        if self.norm is not None:
            norm, silu = self.norm, self.norm.activation == "silu"
            scale, shift_2 = (None, None) if scale_shift is None else scale_shift
            shift, scale, shift_2 = [None if value is None else value.contiguous() for value in (shift, scale, shift_2)]
            small = (norm.weight, norm.bias, shift, scale, shift_2)
            lines = norm_lines(x, skip, *small, norm.num_groups, norm.eps, silu)
        n, _, height, width = x.shape
        worth = winograd_tiles(n, height, width) >= WINOGRAD_TILES and min(self.weight.shape[:2]) >= WINOGRAD_CHANNELS
        method = "winograd" if self.kernel == 3 and self.stride == 1 and worth else "direct"
        both, doubling = 1 if self.asymmetric else 2 * self.padding, 2 if self.upsample else 1
        height, width = [(doubling * size + both - self.kernel) // self.stride + 1 for size in (height, width)]
        out: Tensor = conv(
            *(x, skip, lines, silu, *self._weights(method), added, divisor, method, self.upsample),
            *(self.weight.shape[0], height, width, self.kernel, self.stride, self.padding),
        )
        return out

    def _weights(self, method: str) -> tuple[Tensor, Tensor]:
        if method not in self._packed:
            packed = _in_huge_pages(pack(self.weight, method, self.dtype, upsample=self.upsample))
            self._packed[method] = (packed, float_bias(self.bias).clone())
        return self._packed[method]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        global loads
        loads += 1
        self._packed.clear()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the weights that were packed for this CPU."""
        return self.__dict__ | {"_packed": {}}


def pack(weight: Tensor, method: str, dtype: torch.dtype, *, upsample: bool = False) -> Tensor:
    """Return weights in the order in which a kernel reads them: [panels, taps, in / step, panel, step].

    A panel is as many output channels as there are sums in registers. A step is the number of input
    channels per multiply-add, 2 in bfloat16. Incomplete panels and steps are filled with 0.

    Args:
        weight: [out, in, k, k].
        method: "direct": taps are the k k pixels of the kernel. With `upsample`, they are the 4 pixels of the
            small map behind each pixel of a 2x2 output square. "winograd": see `pack_winograd`.
        dtype: Dtype of the result.
        upsample: Pack for a convolution after an upsampling by 2.
    """
    if method == "winograd":
        return pack_winograd(weight, dtype, upsample=upsample)
    wide = weight.double()
    if upsample:
        taps = torch.einsum("pak,qbl,oikl->pqabio", _UPSAMPLED, _UPSAMPLED, wide).flatten(0, 3)
    else:
        taps = wide.permute(2, 3, 1, 0).flatten(0, 1)
    panel, step = native().cpu.panel, step_of(dtype)
    taps = F.pad(taps, (0, -taps.shape[2] % panel, 0, -taps.shape[1] % step)).to(dtype)  # [taps, in, out]
    panels = taps.view(len(taps), taps.shape[1] // step, step, -1, panel)
    return panels.permute(3, 0, 1, 4, 2).contiguous()


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy in 2 MB pages if Linux provides them and the tensor is large, else the tensor.

    At batch 1 a network's weights are read from memory, and address translation of 4 KB pages takes longer
    than reading them.
    """
    if tensor.nbytes < _HUGE_PAGE // 2 or not is_plain(tensor) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    try:
        memory = mmap.mmap(-1, tensor.nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them, or no room for a copy
        return tensor
    room = torch.frombuffer(memory, dtype=torch.uint8)
    start = -room.data_ptr() % _HUGE_PAGE
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class PackedResnetBlock(nn.Module):
    """`FrozenResnetBlock` with packed convolutions. `place` has the same meaning."""

    def __init__(self, block: ResnetBlock, place: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.place, self.scale_shift = place, block.scale_shift
        self.output_scale_factor = block.output_scale_factor
        if not self.scale_shift:
            block.conv1.bias = None  # it is part of the shift
        self.conv1 = PackedConv(block.conv1, block.norm1, dtype=dtype)
        self.conv2 = PackedConv(block.conv2, block.norm2, dtype=dtype)
        self.shortcut = None if block.conv_shortcut is None else PackedConv(block.conv_shortcut, dtype=dtype)

    def forward(self, x: Tensor, modulations: list[Tensor], skip: Tensor | None = None) -> Tensor:
        """Return the block's output: [N, C, H, W] -> [N, out_channels, H, W]."""
        h: Tensor = self.conv1(x, skip)
        added = x if self.shortcut is None else self.shortcut(x, skip)
        if self.scale_shift:
            scale_shift = (modulations[self.place], modulations[self.place + 1])
            modulation: dict[str, Any] = {"scale_shift": scale_shift}
        else:
            modulation = {"shift": modulations[self.place]}
        h = self.conv2(h, added=added, divisor=self.output_scale_factor, **modulation)
        return h


class PackedAttention(nn.Module):
    """`FrozenAttention` with packed products."""

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.output_scale_factor = attention.num_heads, attention.output_scale_factor
        qkv, out = attention.joined_projections(), attention.to_out[0]
        assert isinstance(out, nn.Linear)
        self.scale = (out.in_features / self.num_heads) ** -0.5
        _fill_heads(qkv, out, self.num_heads, step_of(dtype))
        self.to_qkv = PackedConv(qkv, attention.group_norm, dtype=dtype)
        self.to_out = PackedConv(out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: [N, C, H, W] -> [N, C, H, W]."""
        attend = _attention if is_plain(x) else torch.ops.ddpm_fast.attention
        h: Tensor = attend(self.to_qkv(x), self.num_heads, self.scale)
        out: Tensor = self.to_out(h, added=x, divisor=self.output_scale_factor)
        return out


def _fill_heads(qkv: nn.Linear, out: nn.Linear, heads: int, step: int) -> None:
    """Pad each head with zero channels to whole steps. Zeros change no product."""
    missing = -(out.in_features // heads) % step
    if missing:
        qkv.weight = nn.Parameter(F.pad(qkv.weight.unflatten(0, (3 * heads, -1)), (0, 0, 0, missing)).flatten(0, 1))
        qkv.bias = nn.Parameter(F.pad(qkv.bias.view(3 * heads, -1), (0, missing)).flatten())
        out.weight = nn.Parameter(F.pad(out.weight.unflatten(1, (heads, -1)), (0, missing)).flatten(1))


def packed_downsample(downsample: Downsample, dtype: torch.dtype) -> PackedConv:
    """Return `downsample` as a packed convolution."""
    return PackedConv(downsample.conv, dtype=dtype, asymmetric=downsample.asymmetric)


def packed_upsample(upsample: Upsample, dtype: torch.dtype) -> PackedConv:
    """Return `upsample` as a packed convolution."""
    return PackedConv(upsample.conv, dtype=dtype, upsample=True)


# -------------------------------------------------------------------------------------------------------------------- ops


def _norm_lines(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Return the norm of x and skip as affine coefficients, [N, 3, C]: center, slope and intercept."""
    n, channels, height, width = x.shape
    skip_channels = 0 if skip is None else skip.shape[1]
    lines = empty((n, 3, channels + skip_channels), torch.float32, x.device)
    small = [word for value in (shift, scale, scale_shift) for word in typed(value)]
    native().cpu.group_norm_lines(
        *(dtype_code(x), lines.data_ptr(), x.data_ptr(), pointer(skip)),
        *(*typed(weight), *typed(bias), *small),
        *(n, channels, skip_channels, height * width, num_groups, eps, silu, torch.get_num_threads()),
    )
    keep(weight, bias)
    return lines


def _norm_lines_fake(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    return empty((x.shape[0], 3, len(weight)), torch.float32, x.device)


def _conv_fake(
    x: Tensor,
    skip: Tensor | None,
    lines: Tensor | None,
    silu: bool,
    weights: Tensor,
    bias: Tensor,
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
    return empty((x.shape[0], out_channels, out_height, out_width), x.dtype, x.device)


def _attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Return softmax(q k^T scale) v over all pixels: [N, 3 C, H, W] -> [N, C, H, W], channels_last."""
    h = _attention_fake(qkv, num_heads, scale)
    n, channels, height, width = h.shape
    sizes = (n, num_heads, height * width, channels // num_heads)
    native().cpu.attention(dtype_code(qkv), h.data_ptr(), 0, qkv.data_ptr(), *sizes, scale, torch.get_num_threads())
    return h


def _attention_fake(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    n, channels, height, width = qkv.shape
    return empty((n, channels // 3, height, width), qkv.dtype, qkv.device)


define("attention", "(Tensor qkv, int num_heads, float scale) -> Tensor", _attention, _attention_fake)
define(
    "norm_lines",
    "(Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? shift, Tensor? scale, Tensor? scale_shift, "
    "int num_groups, float eps, bool silu) -> Tensor",
    _norm_lines,
    _norm_lines_fake,
)
define(
    "conv",
    "(Tensor x, Tensor? skip, Tensor? lines, bool silu, Tensor weights, Tensor bias, Tensor? added, float divisor, "
    "str method, bool upsample, int out_channels, SymInt out_height, SymInt out_width, int kernel, int stride, int padding) "
    "-> Tensor",
    convolve,
    _conv_fake,
)
_REGISTERED: Final = (torch.ops.ddpm_fast.norm_lines, torch.ops.ddpm_fast.conv)
