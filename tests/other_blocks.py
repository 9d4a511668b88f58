"""Residual blocks with the class names, attributes and arithmetic of guided-diffusion, improved-diffusion and EDM.

Those libraries are on no package index. The blocks are written from what they compute, as far as it matters to a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Statistics of half precision in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class SiLU(nn.Module):
    """improved-diffusion's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x


class Resample(nn.Module):
    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2)


class TimestepBlock(nn.Module):
    pass


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class ResBlock(TimestepBlock):
    """guided-diffusion's; improved-diffusion's with its own `silu` and no `resample`."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        *,
        out_channels: int,
        use_scale_shift_norm: bool,
        resample: str | None = None,
        silu: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm32(8, channels), silu(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.updown = resample is not None
        self.h_upd = nn.Identity() if resample is None else Resample(resample == "up")
        self.x_upd = nn.Identity() if resample is None else Resample(resample == "up")
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(silu(), nn.Linear(emb_channels, width))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)  # a new block is its skip connection
        self.out_layers = nn.Sequential(GroupNorm32(8, out_channels), silu(), nn.Dropout(dropout), last)
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self._forward, x, emb, use_reentrant=False)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        time = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + time)
        return self.skip_connection(x) + h


class GroupNorm(nn.Module):
    """EDM's: weights of the input's dtype, whatever they are stored in."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = 4, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Conv2d(nn.Module):
    """EDM's: a convolution in the input's dtype, and resampling without one."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, resample: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) / (in_channels * 9) ** 0.5)
        self.bias = nn.Parameter(torch.randn(out_channels))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        if self.resample is not None:
            x = F.interpolate(x, scale_factor=2.0) if self.resample == "up" else F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)


class UNetBlock(nn.Module):
    """EDM's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        adaptive_scale: bool,
        num_heads: int = 0,
        dropout: float = 0.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.adaptive_scale, self.num_heads, self.dropout, self.skip_scale = adaptive_scale, num_heads, dropout, 0.5**0.5
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        plain = in_channels == out_channels and resample is None
        self.skip = None if plain else Conv2d(in_channels, out_channels, 1, resample)
        if num_heads:
            self.norm2 = GroupNorm(out_channels)
            self.qkv, self.proj = Conv2d(out_channels, 3 * out_channels, 1), Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        time = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = time.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h.add_(time)))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            n, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, -1).unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q.float(), k.float() / (c // self.num_heads) ** 0.5).softmax(2).to(q.dtype)
            h = torch.einsum("nqk,nck->ncq", weights, v).reshape(n, c, height, width)
            x = (self.proj(h) + x) * self.skip_scale
        return x


class GuidedUNet(nn.Module):
    """The shape of guided-diffusion's network: blocks behind blocks, and a head."""

    def __init__(self, **block: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(3, 16, 3, padding=1)),
                TimestepEmbedSequential(ResBlock(16, 12, out_channels=32, **block)),
                TimestepEmbedSequential(ResBlock(32, 12, out_channels=32, resample="down", **block)),
                TimestepEmbedSequential(ResBlock(32, 12, out_channels=32, resample="up", **block)),
            ]
        )
        self.out = nn.Sequential(GroupNorm32(8, 32), block.get("silu", nn.SiLU)(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return self.out(x)


class EDMUNet(nn.Module):
    def __init__(self, **block: Any) -> None:
        super().__init__()
        self.conv_in = Conv2d(3, 16, 3)
        self.blocks = nn.ModuleList(
            [
                UNetBlock(16, 32, 12, num_heads=2, **block),
                UNetBlock(32, 32, 12, resample="down", **block),
                UNetBlock(32, 16, 12, resample="up", **block),
                UNetBlock(16, 16, 12, **block),
            ]
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x, emb)
        return x
