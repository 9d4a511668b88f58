"""Layers of the U-Net.

Parameter names are diffusers'. `emb` is the time (and class) embedding *after* its SiLU.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention, is_attention_native
from ..ops.autocast import in_autocast
from ..ops.group_norm_silu import group_norm_silu
from ..ops.modes import PLAIN_TYPES
from ..ops.noise import noise
from ..reference import STREAM_DROPOUT
from .conv import Conv3x3, added, doubled, is_untouched, rescaled, upsampled


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = False, freq_shift: int = 1) -> Tensor:
    """Return the sinusoidal embedding of timesteps (Ho et al. 2020, appendix B; Vaswani et al. 2017).

    Args:
        t: Timesteps [N] of any real dtype.
        dim: Width of the embedding, even.
        flip_sin_to_cos: Put the cosines first.
        freq_shift: Sets the lowest frequency, 10000^-((dim/2 - 1) / (dim/2 - freq_shift)).

    Returns:
        float32 [N, dim]. Half precision cannot hold t * frequency for t near 1000.
    """
    half = dim // 2
    # The order of roundings is that of published networks: an error in a frequency grows with t.
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * exponents.exp()  # [N, dim / 2]
    sin, cos = angles.sin(), angles.cos()
    return torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding.

    Args:
        in_dim: Width of the sinusoidal embedding.
        out_dim: Width of the time embedding.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the time embedding: [N, in_dim] -> [N, out_dim]."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class GroupNormSiLU(nn.GroupNorm):
    """Group normalization with modulation and SiLU in one pass; see `ddpm_fast.group_norm_silu`.

    Args:
        num_groups: Number of groups, a divisor of num_channels.
        num_channels: Channels of the input.
        eps: Added to the variance.
        activation: "silu" or None.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float, activation: Literal["silu"] | None = "silu") -> None:
        super().__init__(num_groups, num_channels, eps)
        self.activation: Literal["silu"] | None = activation

    def forward(self, input: Tensor, shift: Tensor | None = None, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the normalized input. Arguments are those of `ddpm_fast.group_norm_silu`."""
        return group_norm_silu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            shift=shift,
            scale_shift=scale_shift,
            activation=self.activation,
        )


class ResnetBlock(nn.Module):
    """Residual block: norm, SiLU, conv, time, norm, SiLU, dropout, conv, plus the input.

    Time is a shift before the second norm ("default", Ho et al. 2020), or a scale and a shift after it
    ("scale_shift", Nichol and Dhariwal 2021).

    Args:
        in_channels: Channels of the input, those of `skip` included.
        out_channels: Channels of the output.
        emb_dim: Width of the time embedding.
        num_groups: Groups of both norms.
        eps: Epsilon of both norms.
        dropout: Dropout probability before the second convolution.
        time_scale_shift: "default" or "scale_shift".
        output_scale_factor: Divides the output.
        resample: Resample the input, and the activation before the first convolution: "down" by the mean
            of 2x2 pixels, "up" by nearest neighbour (Song et al. 2021; BigGAN). None: keep the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        num_groups: int,
        eps: float,
        dropout: float,
        time_scale_shift: str,
        output_scale_factor: float = 1.0,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = time_scale_shift == "scale_shift"
        self.dropout = dropout
        self.dropout_stream = STREAM_DROPOUT  # a `UNet` gives each block another
        self.output_scale_factor = output_scale_factor
        self.resample = resample
        self.norm1 = GroupNormSiLU(num_groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, 2 * out_channels if self.scale_shift else out_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels, eps)
        self.conv2 = Conv3x3(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None, *, dropout_seeds: Tensor | None = None) -> Tensor:
        """Return the block's output.

        Args:
            x: [N, C, H, W].
            emb: [N, emb_dim].
            skip: Further input channels [N, S, H, W] with C + S = in_channels, or None.
            dropout_seeds: int64 [N], see `UNet.forward`. None: PyTorch's generator decides what is dropped.

        Returns:
            [N, out_channels, H', W'] with H', W' the resampled size.
        """
        if skip is not None:
            x = torch.cat((x, skip), dim=1)
        h = self.norm1(x)
        if self.resample == "up":
            x, h = doubled(x), upsampled(self.conv1, h)
        else:
            if self.resample == "down":
                x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
            h = self.conv1(h)
        time = self.time_emb_proj(emb)  # [N, out_channels] or [N, 2 * out_channels]
        h = self.norm2(h, scale_shift=time.chunk(2, dim=1)) if self.scale_shift else self.norm2(h, shift=time)
        if self.dropout > 0 and self.training:
            if dropout_seeds is None:
                h = F.dropout(h, self.dropout)
            else:
                h = _dropout(h, self.dropout, dropout_seeds, self.dropout_stream)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return added(self.conv2, h, x, self.output_scale_factor)


class Attention(nn.Module):
    """Self-attention over all pixels with a residual connection.

    Args:
        channels: Channels C of the input.
        head_dim: Channels per head. None: a single head.
        num_groups: Groups of the norm. None: no norm.
        eps: Epsilon of the norm.
        output_scale_factor: Divides the output.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None,
        num_groups: int | None,
        eps: float,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads = channels // head_dim if head_dim is not None else 1
        self.output_scale_factor = output_scale_factor
        self.group_norm = GroupNormSiLU(num_groups, channels, eps, activation=None) if num_groups is not None else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.to_q, self.to_k, self.to_v

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of queries, keys and values as one product."""
        projections = self._projections()
        return torch.cat([linear.weight for linear in projections]), torch.cat([linear.bias for linear in projections])

    def _can_join(self, channels: int) -> bool:
        """Return whether the projections are unmodified square nn.Linear layers with a bias."""
        return all(
            is_untouched(linear, nn.Linear) and linear.weight.shape == (channels, channels) and linear.bias is not None
            for linear in self._projections()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: [N, C, H, W] -> [N, C, H, W]."""
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.flatten(2).transpose(1, 2)  # [N, HW, C]; a view when x is channels_last

        parameters = [parameter for linear in self._projections() for parameter in linear.parameters()]
        to_out = self.to_out[0]
        if self._can_join(c) and is_attention_native(h, self.num_heads, *parameters):
            h = attention(_linear(h, *self._joined()), self.num_heads)
            h = _linear(h, to_out.weight, to_out.bias) if is_untouched(to_out, nn.Linear) else to_out(h)
        else:
            q, k, v = (
                linear(h).unflatten(2, (self.num_heads, c // self.num_heads)).transpose(1, 2) for linear in self._projections()
            )  # each [N, heads, HW, C / heads]
            h = to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return rescaled(x + h.transpose(1, 2).view(n, c, height, width), self.output_scale_factor)


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear: [N, L, in] -> [N, L, out].

    In float32 it is a 1x1 convolution of 16 maps. PyTorch computes that by oneDNN, and F.linear by MKL, which takes twice as
    long on an EPYC, and less time on a Xeon. On one thread, MKL would compute the convolution of fewer maps, too.
    """
    rows, channels = h.shape[:2].numel(), h.shape[2]
    is_plain = type(weight) in PLAIN_TYPES and h.dtype == weight.dtype == torch.float32 and not in_autocast(h)
    if not is_plain or rows % 16 or not rows:
        return F.linear(h, weight, bias)
    maps = h.reshape(16, rows // 16, 1, channels).permute(0, 3, 1, 2)  # [16, in, N L / 16, 1], channels_last
    y = F.conv2d(maps, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*h.shape[:2], len(weight))


class Downsample(nn.Module):
    """3x3 convolution of stride 2.

    Args:
        channels: Channels of input and output.
        padding: Padding on each side. 0 pads one row below and one column on the right instead.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.asymmetric = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        """Return x at half the size: [N, C, H, W] -> [N, C, H / 2, W / 2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class Upsample(nn.Module):
    """Upsampling by 2 (nearest), then a 3x3 convolution.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x at twice the size: [N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return upsampled(self.conv, x)


def _dropout(x: Tensor, p: float, seeds: Tensor, stream: int) -> Tensor:
    """Drop elements of x [N, C, H, W] with probability p. Sample i's depend on (seeds[i], stream) alone."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    normals = noise(x.shape, seeds, stream=stream, device=x.device, memory_format=layout)
    bound = torch.special.ndtri(torch.tensor(p, dtype=torch.float64, device="cpu"))  # normals are below it with probability p
    return (x * (1 / (1 - p))).masked_fill(normals < bound, 0)
