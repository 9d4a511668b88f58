"""Layers as calls of PyTorch's convolutions and matrix products, with this package's norms.

They serve GPUs, and CPUs or dtypes for which there are no kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.conv import doubled
from ..ops.group_norm_silu import group_norm_silu
from .network import Conv, Norm, Resample, SelfAttention
from .program import Buffer, Builder, Value


class PyTorchLayers:
    """Layers by PyTorch. Weights are cast once and stored channels_last.

    Args:
        dtype: Dtype of feature maps and weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # A captured CUDA graph reads these as long as the network exists.
        self._biases: dict[tuple[Conv, Conv | None], Tensor | None] = {}

    def stored(self, weight: Tensor) -> Tensor:
        """Return the weights of a convolution as it reads them."""
        return weight.to(self._dtype).contiguous(memory_format=torch.channels_last)

    def joined(self, builder: Builder, maps: tuple[Value, ...]) -> tuple[Value, ...]:
        """Append a concatenation of maps along the channels, if there are several."""
        if len(maps) == 1:
            return maps
        n, _, height, width = maps[0].shape
        channels = sum(each.shape[1] for each in maps)
        return (builder.call(_concatenated, *maps, shape=(n, channels, height, width), dtype=self._dtype),)

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
        """Append a convolution and the operations around it. See `PackedLayers.conv`."""
        (x,) = maps
        if norm is not None:
            arguments = (x, norm, shift, *(scale_shift or (None, None)))
            x = builder.call(_normed, *arguments, shape=x.shape, dtype=self._dtype)
        if resample is not None:
            (x,) = self.resampled(builder, (x,), resample)
        shape = (x.shape[0], len(conv.weight), *conv.size(*x.shape[2:]))
        bias = self._bias(conv, shortcut)
        (added,) = (None,) if residual is None else residual
        h = builder.call(_convolved, x, conv, bias, shape=shape, dtype=self._dtype)
        if added is None:
            return h
        weight = None if shortcut is None else shortcut.weight.flatten(1)
        return builder.call(_with_residual, h, added, weight, divisor, shape=shape, dtype=self._dtype)

    def resampled(self, builder: Builder, maps: tuple[Value, ...], resample: Resample) -> tuple[Buffer, ...]:
        """Append a resampling and return its result."""
        (x,) = maps
        n, channels, height, width = x.shape
        if resample == "up":
            return (builder.call(doubled, x, shape=(n, channels, 2 * height, 2 * width), dtype=self._dtype),)
        return (builder.call(F.avg_pool2d, x, 2, shape=(n, channels, height // 2, width // 2), dtype=self._dtype),)

    def attention(self, builder: Builder, layer: SelfAttention, x: Buffer) -> Buffer:
        """Append a self-attention layer with its residual connection."""
        h = x
        if layer.norm is not None:
            h = builder.call(_normed, x, layer.norm, None, None, None, shape=x.shape, dtype=self._dtype)
        (qkv, qkv_bias), (out, out_bias) = ((conv.weight.flatten(1), self._bias(conv)) for conv in (layer.qkv, layer.out))
        return builder.call(
            *(_attended, h, x, qkv, qkv_bias, out, out_bias, layer.num_heads, layer.divisor), shape=x.shape, dtype=self._dtype
        )

    def _bias(self, conv: Conv, shortcut: Conv | None = None) -> Tensor | None:
        """Return the bias of a convolution, to which that of a shortcut is added."""
        key = (conv, shortcut)
        if key not in self._biases:
            bias = conv.bias
            if shortcut is not None and shortcut.bias is not None:
                bias = shortcut.bias.double() + (0 if bias is None else bias.double())
            self._biases[key] = None if bias is None else bias.to(self._dtype)
        return self._biases[key]


def _concatenated(*maps: Tensor) -> Tensor:
    return torch.cat(maps, dim=1)


def _normed(x: Tensor, norm: Norm, shift: Tensor | None, scale: Tensor | None, scale_shift: Tensor | None) -> Tensor:
    return group_norm_silu(
        *(x, norm.num_groups, norm.weight, norm.bias, norm.eps),
        shift=shift,
        scale_shift=None if scale is None or scale_shift is None else (scale, scale_shift),
        activation="silu" if norm.silu else None,
    )


def _convolved(x: Tensor, conv: Conv, bias: Tensor | None) -> Tensor:
    if conv.asymmetric:
        x = F.pad(x, (0, 1, 0, 1))
    return F.conv2d(x, conv.weight, bias, conv.stride, conv.padding)


def _with_residual(h: Tensor, residual: Tensor, weight: Tensor | None, divisor: float) -> Tensor:
    """Return (h + residual) / divisor in the memory of h. `weight` multiplies the channels of the residual."""
    if weight is None:
        h += residual
    else:
        # A 1x1 convolution is a matrix product over channels. addmm_ adds it in place.
        n, c, height, width = h.shape
        pixels = h.permute(0, 2, 3, 1).reshape(n * height * width, c)  # views if h and residual are channels_last
        pixels.addmm_(residual.permute(0, 2, 3, 1).reshape(n * height * width, residual.shape[1]), weight.t())
        h = pixels.view(n, height, width, c).permute(0, 3, 1, 2)
    return _divided(h, divisor)


def _attended(
    h: Tensor,
    residual: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    out: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    divisor: float,
) -> Tensor:
    n, c, height, width = h.shape
    h = F.linear(h.flatten(2).transpose(1, 2), qkv, qkv_bias)  # [N, HW, 3 C]
    # Each [N, heads, HW, C / heads].
    q, k, v = h.view(n, height * width, 3, num_heads, c // num_heads).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v)
    h = F.linear(h.transpose(1, 2).flatten(2), out, out_bias).transpose(1, 2).view(n, c, height, width)
    h += residual
    return _divided(h, divisor)


def _divided(x: Tensor, divisor: float) -> Tensor:
    return x if divisor == 1 else x.div_(divisor)
