"""Blocks with the class names, attributes and arithmetic of guided-diffusion, improved-diffusion and EDM, and a `UNetModel`.

Those libraries are on no package index. The blocks are written from what they compute, as far as it matters to a block.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Statistics of half precision in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


def in_float64(network: Any) -> Any:
    """Return a copy that computes in float64, its `GroupNorm32` too."""
    wide = copy.deepcopy(network).double()
    for layer in wide.modules():
        if type(layer) is GroupNorm32:
            layer.__class__ = nn.GroupNorm
    return wide


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
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm32(groups, channels), silu(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.updown = resample is not None
        self.h_upd = nn.Identity() if resample is None else Resample(resample == "up")
        self.x_upd = nn.Identity() if resample is None else Resample(resample == "up")
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(silu(), nn.Linear(emb_channels, width))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)  # a new block is its skip connection
        self.out_layers = nn.Sequential(GroupNorm32(groups, out_channels), silu(), nn.Dropout(dropout), last)
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
        self.blocks = TimestepEmbedSequential(
            TimestepEmbedSequential(nn.Conv2d(3, 16, 3, padding=1)),
            TimestepEmbedSequential(ResBlock(16, 12, out_channels=32, **block)),
            TimestepEmbedSequential(ResBlock(32, 12, out_channels=32, resample="down", **block)),
            TimestepEmbedSequential(ResBlock(32, 12, out_channels=32, resample="up", **block)),
        )
        self.out = nn.Sequential(GroupNorm32(8, 32), block.get("silu", nn.SiLU)(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.out(self.blocks(x, emb))


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


class Downsample(nn.Module):
    """guided-diffusion's, with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """guided-diffusion's, with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class QKVAttention(nn.Module):
    """guided-diffusion's new order: all queries, all keys, all values."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)  # each [N, heads, C / heads, HW]

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = self.split(qkv)
        weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
        return torch.einsum("nhqk,nhck->nhcq", weights, v).flatten(1, 2)


class QKVAttentionLegacy(QKVAttention):
    """guided-diffusion's old order and improved-diffusion's: queries, keys and values of one head after another."""

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(1, (self.n_heads, 3, -1)).unbind(2)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, num_head_channels: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.norm = GroupNorm32(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)
        self.attention = (QKVAttention if new_order else QKVAttentionLegacy)(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.attention(self.qkv(self.norm(x.flatten(2))))).view_as(x)


class UNetModel(nn.Module):
    """guided-diffusion's, with its arguments and the attributes that it keeps of them."""

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        channel_mult: tuple[float, ...] = (1, 2, 4, 8),
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_res_blocks, self.channel_mult = model_channels, num_res_blocks, channel_mult
        self.attention_resolutions, self.dropout, self.num_classes = attention_resolutions, dropout, num_classes
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        emb = 4 * model_channels

        def res(ins: int, outs: int, resample: str | None = None) -> nn.Module:
            options = {"use_scale_shift_norm": use_scale_shift_norm, "resample": resample, "groups": 32}
            return ResBlock(ins, emb, dropout, out_channels=outs, **options)

        def attention(width: int, heads: int) -> nn.Module:
            return AttentionBlock(width, heads, num_head_channels, use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        widths = [int(mult * model_channels) for mult in channel_mult]
        width = widths[0]
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, width, 3, padding=1))])
        skips = [width]
        for level, out in enumerate(widths):
            for _ in range(num_res_blocks):
                attended = [attention(out, num_heads)] if 2**level in attention_resolutions else []
                self.input_blocks.append(TimestepEmbedSequential(res(width, out), *attended))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                down = res(width, width, "down") if resblock_updown else Downsample(width)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(width)
        self.middle_block = TimestepEmbedSequential(res(width, width), attention(width, num_heads), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res(width + skips.pop(), out)]
                if 2**level in attention_resolutions:
                    layers.append(attention(out, self.num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(res(out, out, "up") if resblock_updown else Upsample(out))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
                width = out
        self.out = nn.Sequential(GroupNorm32(32, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.time_embed[0].weight.dtype))
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.to(self.input_blocks[0][0].weight.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))


class ForkedUNetModel(UNetModel):
    """A copy of the class with other arithmetic, under the same name."""

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x, timesteps + 1, y)


ForkedUNetModel.__name__ = "UNetModel"
