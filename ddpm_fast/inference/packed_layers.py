"""Layers as calls of this package's CPU kernels, on weights that are packed once.

A norm and its activation are applied while a convolution reads its input. Skip connections are read in place, and
residuals are added while the output is written. Feature maps are channels_last.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention_op, attention_tiles_op
from ..ops.backend import BFLOAT16, Bfloat16, product_dtype
from ..ops.group_norm_affine import group_norm_affine_op
from ..ops.modes import runs_eagerly
from ..ops.packed_conv import conv_ops, float_bias, method_of, pack_weights, step_of
from ..ops.resample import resample_op
from .network import Conv, Norm, Resample, SelfAttention
from .program import Buffer, Builder, Value

# Fewest input channels and fewest output channels for Winograd's method. A network's first and last convolution have fewer and
# use the direct sum. In the network of Ho et al. that takes 0.05 of 19 ms more in bfloat16 at batch 1, and the whole
# network's error is 5% smaller.
WINOGRAD_CHANNELS: Final = 16

_HUGE_PAGE: Final = 2 << 20


class PackedLayers:
    """Layers by CPU kernels.

    A layer's weights are packed when a program first needs them, for the method that suits the map's size. All
    programs of a network share them.

    Args:
        dtype: Dtype of feature maps, float32 or bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._products = dtype, product_dtype(dtype)
        self._by_tiles = dtype == torch.bfloat16 and BFLOAT16 is Bfloat16.MATRIX_UNITS
        self._packed: dict[tuple[Conv, str, bool], tuple[Tensor, Tensor | None]] = {}
        self._padded: dict[SelfAttention, tuple[Conv, Conv]] = {}

    def stored(self, weight: Tensor) -> Tensor:
        """Return the weights of a convolution as they are kept until they are packed."""
        return weight

    def joined(self, builder: Builder, maps: tuple[Value, ...]) -> tuple[Value, ...]:
        """Return maps to be read as one, one after the other. The kernels can read two, so nothing is copied."""
        return maps

    def conv(
        self,
        builder: Builder,
        conv: Conv,
        maps: tuple[Value, ...],
        *,
        norm: Norm | None = None,
        shift: Buffer | None = None,
        scale_shift: tuple[Buffer, Buffer] | None = None,
        residual: tuple[Value, ...] | None = None,
        shortcut: Conv | None = None,
        divisor: float = 1.0,
        resample: Resample | None = None,
    ) -> Buffer:
        """Append a convolution and the operations around it.

            (conv(resample(act(norm(maps)))) + shortcut(residual)) / divisor

        Args:
            builder: Receives the calls.
            conv: The convolution.
            maps: Feature maps [N, C, H, W] whose channels follow each other.
            norm: Norm and activation of the input, or None.
            shift: [N, C] of the norm, as in `group_norm_silu`.
            scale_shift: Two [N, C] of the norm, as in `group_norm_silu`.
            residual: Maps that are added, or None.
            shortcut: 1x1 convolution of the residual, or None.
            divisor: Divides the sum.
            resample: Resampling of the input, or None.
        """
        if shortcut is not None:
            assert residual is not None
            residual = (self.conv(builder, shortcut, residual),)
        affine = None if norm is None else self._affine(builder, norm, maps, shift, scale_shift)
        silu = norm is not None and norm.silu
        if resample == "down":
            maps = (self._resampled(builder, maps, affine, silu, up=False),)
            affine, silu = None, False
        x, skip = _pair(maps)
        n, _, height, width = x.shape
        upsample = resample == "up"
        if self._by_tiles:
            method = "tiles"
        elif conv.kernel == 3 and conv.stride == 1 and min(conv.weight.shape[:2]) >= WINOGRAD_CHANNELS:
            method = method_of(n, conv.weight.shape[1], height, width, self._products, upsample=upsample)
        else:
            method = "direct"
        packed, bias = self._weights(conv, method, upsample)
        scale = 2 if upsample else 1
        shape = (conv.weight.shape[0], *conv.size(scale * height, scale * width))
        (added,) = (None,) if residual is None else residual
        return builder.call(
            *(conv_ops[method], x, skip, affine, silu, packed, bias, added, divisor, upsample),
            *(*shape, conv.kernel, conv.stride, conv.padding),
            shape=(n, *shape),
            dtype=self._dtype,
        )

    def resampled(self, builder: Builder, maps: tuple[Value, ...], resample: Resample) -> tuple[Buffer, ...]:
        """Append a resampling and return its result."""
        return (self._resampled(builder, maps, None, False, up=resample == "up"),)

    def attention(self, builder: Builder, layer: SelfAttention, x: Buffer) -> Buffer:
        """Append a self-attention layer with its residual connection."""
        n, _, height, width = x.shape
        if layer not in self._padded:
            self._padded[layer] = _padded_heads(layer.qkv, layer.out, layer.num_heads, step_of(self._dtype))
        to_qkv, to_out = self._padded[layer]
        qkv = self.conv(builder, to_qkv, (x,), norm=layer.norm).as_pixels()  # [N, H W, 3 C]
        scale = (len(layer.out.weight) / layer.num_heads) ** -0.5
        shape = (n, height * width, qkv.shape[2] // 3)
        op = attention_tiles_op if self._by_tiles else attention_op
        h = builder.call(op, qkv, layer.num_heads, scale, shape=shape, dtype=self._dtype)
        return self.conv(builder, to_out, (h.as_map(height, width),), residual=(x,), divisor=layer.divisor)

    def _affine(
        self,
        builder: Builder,
        norm: Norm,
        maps: tuple[Value, ...],
        shift: Buffer | None,
        scale_shift: tuple[Buffer, Buffer] | None,
    ) -> Buffer:
        x, skip = _pair(maps)
        shape = (x.shape[0], 3, sum(each.shape[1] for each in maps))
        scale, shift_2 = (None, None) if scale_shift is None else scale_shift
        arguments = (x, skip, norm.num_groups, norm.weight, norm.bias, norm.eps, shift, scale, shift_2)
        return builder.call(group_norm_affine_op, *arguments, shape=shape, dtype=torch.float32)

    def _resampled(self, builder: Builder, maps: tuple[Value, ...], affine: Buffer | None, silu: bool, *, up: bool) -> Buffer:
        (x,) = maps
        n, channels, height, width = x.shape
        size = (2 * height, 2 * width) if up else (height // 2, width // 2)
        return builder.call(resample_op, x, affine, silu, up, shape=(n, channels, *size), dtype=self._dtype)

    def _weights(self, conv: Conv, method: str, upsample: bool) -> tuple[Tensor, Tensor | None]:
        key = (conv, method, upsample)
        if key not in self._packed:
            dtype = self._dtype if method == "tiles" else self._products
            packed = _in_huge_pages(pack_weights(conv.weight, method, dtype, upsample=upsample))
            self._packed[key] = (packed, None if conv.bias is None else float_bias(conv.bias))
        return self._packed[key]


def _pair(maps: tuple[Value, ...]) -> tuple[Value, Value | None]:
    """Return one or two maps as x and skip."""
    x, *rest = maps
    (skip,) = rest or (None,)
    return x, skip


def _padded_heads(qkv: Conv, out: Conv, heads: int, step: int) -> tuple[Conv, Conv]:
    """Pad each head with zero channels to whole steps. Zeros change no product."""
    missing = -(len(out.weight) // heads) % step
    if not missing:
        return qkv, out
    assert qkv.bias is not None
    weight = F.pad(qkv.weight.flatten(1).unflatten(0, (3 * heads, -1)), (0, 0, 0, missing)).flatten(0, 1)
    bias = F.pad(qkv.bias.view(3 * heads, -1), (0, missing)).flatten()
    out_weight = F.pad(out.weight.flatten(1).unflatten(1, (heads, -1)), (0, missing)).flatten(1)
    return Conv(weight[:, :, None, None], bias), Conv(out_weight[:, :, None, None], out.bias)


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
