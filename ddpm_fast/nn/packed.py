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

from ..ops._op import FusedOp, runs_eagerly
from ..ops.attention import attention_op
from ..ops.conv3x3 import WINOGRAD_TILES, conv_kernels, float_bias, pack_weights, step_of, winograd_tiles
from ..ops.group_norm_affine import affine_op
from .layers import Attention, Downsample, GroupNormSiLU, ResnetBlock, Upsample
from .replay import empty, hold_reference

# Fewest input and output channels for Winograd's method. A network's first and last convolution have fewer and use the
# direct sum. In the network of Ho et al. it takes 0.05 of 19 ms more at batch 1, and in bfloat16 the whole network's
# error is 5% smaller.
WINOGRAD_CHANNELS: Final = 16

_HUGE_PAGE: Final = 2 << 20

loads = 0  # calls of load_state_dict of packed layers; a recording is valid for one count


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
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out, in, kernel, kernel], not packed
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
        n, _, height, width = x.shape
        affine, silu = None, False
        arguments: tuple[Any, ...]
        if self.norm is not None:
            norm, silu = self.norm, self.norm.activation == "silu"
            scale, shift_2 = (None, None) if scale_shift is None else scale_shift
            arguments = (x, skip, norm.num_groups, norm.weight, norm.bias, norm.eps, shift, scale, shift_2)
            affine = run_kernel(
                affine_op, arguments, (n, 3, self.weight.shape[1]), torch.float32, constants=(norm.weight, norm.bias)
            )
        worth = winograd_tiles(n, height, width) >= WINOGRAD_TILES and min(self.weight.shape[:2]) >= WINOGRAD_CHANNELS
        method = "winograd" if self.kernel == 3 and self.stride == 1 and worth else "direct"
        both, doubling = 1 if self.asymmetric else 2 * self.padding, 2 if self.upsample else 1
        height, width = [(doubling * size + both - self.kernel) // self.stride + 1 for size in (height, width)]
        packed, bias = self._weights(method)
        shape = (self.weight.shape[0], height, width)
        geometry = (*shape, self.kernel, self.stride, self.padding)
        arguments = (x, skip, affine, silu, packed, bias, added, divisor, self.upsample, *geometry)
        return run_kernel(conv_kernels[method], arguments, (n, *shape), x.dtype, constants=(packed, bias))

    def _weights(self, method: str) -> tuple[Tensor, Tensor]:
        if method not in self._packed:
            packed = _in_huge_pages(pack_weights(self.weight, method, self.dtype, upsample=self.upsample))
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


def run_kernel(
    op: FusedOp,
    arguments: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    constants: tuple[Tensor, ...] = (),
) -> Tensor:
    """Return the result of a kernel, in memory that a recording plans.

    Args:
        op: The kernel.
        arguments: Its arguments.
        shape: Shape of the result.
        dtype: Dtype of the result.
        constants: Arguments to which a recording has to hold a reference.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if not runs_eagerly(*tensors):
        result: Tensor = op(*arguments, backend="native")
        return result
    out = empty(shape, dtype, tensors[0].device)
    op.run("native", arguments, saves=False, out=out)
    hold_reference(*constants)
    return out


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy in 2 MB pages if Linux provides them and the tensor is large, else the tensor.

    At batch 1 a network's weights are read from memory, and address translation of 4 KB pages takes longer
    than reading them.
    """
    if not runs_eagerly(tensor) or tensor.nbytes < _HUGE_PAGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    try:
        memory = mmap.mmap(-1, tensor.nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # Linux without huge pages, or not enough memory for a copy
        return tensor
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    start = -pages.data_ptr() % _HUGE_PAGE
    return pages[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class PackedResnetBlock(nn.Module):
    """`FrozenResnetBlock` with packed convolutions. `first_term` has the same meaning."""

    def __init__(self, block: ResnetBlock, first_term: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first_term, self.scale_shift = first_term, block.scale_shift
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
            scale_shift = (modulations[self.first_term], modulations[self.first_term + 1])
            modulation: dict[str, Any] = {"scale_shift": scale_shift}
        else:
            modulation = {"shift": modulations[self.first_term]}
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
        _pad_heads(qkv, out, self.num_heads, step_of(dtype))
        self.to_qkv = PackedConv(qkv, attention.group_norm, dtype=dtype)
        self.to_out = PackedConv(out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: [N, C, H, W] -> [N, C, H, W]."""
        n, _, height, width = x.shape
        qkv = self.to_qkv(x).permute(0, 2, 3, 1).flatten(1, 2)  # [N, H W, 3 C], a view
        channels = qkv.shape[2] // 3
        h = run_kernel(attention_op, (qkv, self.num_heads, self.scale), (n, height * width, channels), x.dtype)
        h = h.view(n, height, width, channels).permute(0, 3, 1, 2)
        out: Tensor = self.to_out(h, added=x, divisor=self.output_scale_factor)
        return out


def _pad_heads(qkv: nn.Linear, out: nn.Linear, heads: int, step: int) -> None:
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
