"""The layers of a `UNet` as plain values, copied from a model when it is frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv import Conv3x3
from ..nn.layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    timestep_embedding,
)
from ..nn.unet import DownBlock, MidBlock, UNet, UpBlock

Resample = Literal["down", "up"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A group norm and its activation. weight and bias are [C], or None."""

    num_groups: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    silu: bool


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with zero padding. A linear layer is a 1x1 convolution.

    Attributes:
        weight: [out, in, k, k], k = 1 or 3.
        bias: [out], or None.
        stride: 1 or 2.
        asymmetric: Pad one row below and one column on the right only. Otherwise k // 2 on each side.
    """

    weight: Tensor
    bias: Tensor | None
    stride: int = 1
    asymmetric: bool = False

    @property
    def kernel(self) -> int:
        """Height and width of the kernel."""
        return self.weight.shape[-1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output for an input of this height and width."""
        padding = 1 if self.asymmetric else 2 * (self.kernel // 2)
        return (height + padding - self.kernel) // self.stride + 1, (width + padding - self.kernel) // self.stride + 1


@dataclass(frozen=True, eq=False)
class Resnet:
    """A residual block.

    Attributes:
        terms: Indices of its time terms: the shift before norm2, or scale and shift after it.
        shortcut: 1x1 convolution of the residual, or None.
        divisor: Divides the output.
        resample: Resampling of the input, or None.
    """

    norm1: Norm
    conv1: Conv
    terms: tuple[int, ...]
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None
    divisor: float
    resample: Resample | None


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """Self-attention. `qkv` computes queries, keys and values in one product."""

    norm: Norm | None
    qkv: Conv
    out: Conv
    num_heads: int
    divisor: float


@dataclass(frozen=True, eq=False)
class Block:
    """One resolution. `attentions` is empty, or has one layer per residual block. `resampler` may be None."""

    resnets: list[Resnet]
    attentions: list[SelfAttention]
    resampler: Resnet | Conv | None


@dataclass(frozen=True, eq=False)
class Network:
    """All layers of a U-Net."""

    conv_in: Conv
    down: list[Block]
    mid: Block
    up: list[Block]
    norm_out: Norm
    conv_out: Conv
    time_terms: TimeTerms


class TimeTerms:
    """Time (and class) terms of all residual blocks: one [N, channels] tensor per projection.

    Projections of the same width are stacked. One lookup computes each stack, or one batched product if
    there are classes. Every term is contiguous, as the norms need it.

    Args:
        model: The U-Net.
        num_timesteps: T.
        projections: Weight [W, E] and bias [W] of each projection, applied after the embedding's SiLU.
        dtype: Dtype of weights and activations.
        device: Device of the tables.
    """

    def __init__(
        self,
        model: UNet,
        num_timesteps: int,
        projections: list[tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            bias = None if layer.bias is None else layer.bias.detach().to(device).double()
            weight = layer.weight.detach().to(device).double()
            return F.linear(x, weight, bias)

        cfg = model._config
        t = torch.arange(num_timesteps, device=device)
        emb = timestep_embedding(t, cfg.sinusoid_dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        emb = linear(model.time_embedding.linear_2, F.silu(linear(model.time_embedding.linear_1, emb.double())))  # [T, E]
        widths = [len(bias) for _, bias in projections]
        distinct = sorted(set(widths))
        # Stack and row of each projection.
        self.rows = [(distinct.index(width), widths[:i].count(width)) for i, width in enumerate(widths)]
        stacks = []
        for width in distinct:
            weights, biases = zip(*(pair for pair in projections if len(pair[1]) == width), strict=True)
            stacks.append((torch.stack(weights).double().transpose(1, 2), torch.stack(biases).double()[:, None]))
        wide = wide_dtype(dtype)
        if model.class_embedding is None:
            emb = F.silu(emb)
            self._tables = [(torch.matmul(emb, weight) + bias).to(wide) for weight, bias in stacks]  # [B, T, W] each
        else:
            classes = model.class_embedding.weight.detach().to(device, wide, copy=True)
            self._embeddings = (emb.to(wide), classes)  # [T, E], [classes, E]
            self._weights = [weight.to(dtype) for weight, _ in stacks]  # [B, E, W] each
            self._biases = [bias.to(dtype) for _, bias in stacks]  # [B, 1, W] each

    def stacks(self, t: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """Return the stacks, [B, N, W] each, for timesteps [N] and labels [N] or None."""
        if class_labels is None:
            return [table.index_select(1, t) for table in self._tables]
        time, classes = self._embeddings
        emb = F.silu(time.index_select(0, t) + classes.index_select(0, class_labels)).to(self._weights[0].dtype)
        return [
            torch.baddbmm(bias, emb.expand(len(weight), *emb.shape), weight)
            for weight, bias in zip(self._weights, self._biases, strict=True)
        ]


def read_network(
    model: UNet, dtype: torch.dtype, device: torch.device, num_timesteps: int, convert: Callable[[Tensor], Tensor]
) -> Network:
    """Copy the layers of a U-Net for which `why_not_frozen` returns None.

    Args:
        model: The model.
        dtype: Dtype of weights and activations.
        device: Device of the copy.
        num_timesteps: T.
        convert: Function that stores the weights of a convolution. It may return its argument.
    """
    projections: list[tuple[Tensor, Tensor]] = []
    wide = wide_dtype(dtype)

    def copied(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.detach().to(device, copy=True)

    def norm(layer: GroupNormSiLU) -> Norm:
        weight, bias = (None if p is None else p.detach().to(device, wide, copy=True) for p in (layer.weight, layer.bias))
        return Norm(layer.num_groups, layer.eps, weight, bias, layer.activation == "silu")

    def conv(layer: nn.Conv2d, *, has_bias: bool = True) -> Conv:
        weight, own_bias = cast("Tensor", copied(layer.weight)), copied(layer.bias) if has_bias else None
        asymmetric = layer.padding == (0, 0) and layer.kernel_size == (3, 3)
        return Conv(convert(weight), own_bias, layer.stride[0], asymmetric)

    def resnet(layer: ResnetBlock) -> Resnet:
        first = len(projections)
        weight, bias = copied(layer.time_emb_proj.weight), copied(layer.time_emb_proj.bias)
        assert weight is not None
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if layer.scale_shift:
            projections.extend(zip(weight.chunk(2), bias.chunk(2), strict=True))
        else:
            # The shift is added to the output of conv1 before the norm, and so is the bias of conv1.
            own = copied(layer.conv1.bias)
            projections.append((weight, bias.double() if own is None else bias.double() + own.double()))
        return Resnet(
            norm(layer.norm1),
            conv(layer.conv1, has_bias=layer.scale_shift),
            tuple(range(first, len(projections))),
            norm(layer.norm2),
            conv(layer.conv2),
            None if layer.conv_shortcut is None else conv(layer.conv_shortcut),
            layer.output_scale_factor,
            layer.resample,
        )

    def attention(layer: Attention) -> SelfAttention:
        def linear(*layers: nn.Linear) -> Conv:
            weights, biases = [copied(each.weight) for each in layers], [copied(each.bias) for each in layers]
            zeros = [cast("Tensor", weight).new_zeros(len(cast("Tensor", weight))) for weight in weights]
            bias = torch.cat([zero if own is None else own for own, zero in zip(biases, zeros, strict=True)])
            return Conv(convert(torch.cat(cast("list[Tensor]", weights))[:, :, None, None]), bias)

        group_norm = None if layer.group_norm is None else norm(layer.group_norm)
        qkv, out = linear(layer.to_q, layer.to_k, layer.to_v), linear(cast("nn.Linear", layer.to_out[0]))
        return SelfAttention(group_norm, qkv, out, layer.num_heads, layer.output_scale_factor)

    def block(layer: Any) -> Block:
        resnets, attentions = [resnet(each) for each in layer.resnets], [attention(each) for each in layer.attentions]
        resampler: Resnet | Conv | None = None
        for each in (*getattr(layer, "downsamplers", ()), *getattr(layer, "upsamplers", ())):
            resampler = resnet(each) if isinstance(each, ResnetBlock) else conv(each.conv)
        return Block(resnets, attentions, resampler)

    down, mid, up = (
        [block(each) for each in model.down_blocks],
        block(model.mid_block),
        [block(each) for each in model.up_blocks],
    )
    conv_in, norm_out, conv_out = conv(model.conv_in), norm(model.conv_norm_out), conv(model.conv_out)
    time_terms = TimeTerms(model, num_timesteps, projections, dtype, device)
    return Network(conv_in, down, mid, up, norm_out, conv_out, time_terms)


# ----------------------------------------------------------------------------------------------- reasons not to freeze

_BLOCKS: Final = (DownBlock, MidBlock, UpBlock)
# An adapter or another layer in place of one of these would be lost.
_LAYERS: Final = (
    *(UNet, *_BLOCKS, ResnetBlock, Attention, GroupNormSiLU, Downsample, Upsample, TimeEmbedding),
    *(nn.ModuleList, Conv3x3, nn.Conv2d, nn.Linear, nn.Embedding),
)


def why_not_frozen(model: nn.Module) -> str | None:
    """Return why `model` cannot be frozen, or None if it can.

    The inference form reads every attribute that an unmodified layer's forward reads. Anything else that would
    change an output is a reason.
    """
    if type(model) is not UNet:
        return f"the model is a {type(model).__name__}"
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "torch has global forward hooks"
    for name, module in model.named_modules(remove_duplicate=False):
        reason = _why_not(module)
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    return _why_not_joined(model)


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in _LAYERS:
        return f"is a {kind.__name__} of another make"
    patched = [name for name in vars(module) if callable(getattr(kind, name, None))]
    if patched:
        return f"has a patched {patched[0]}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    for parameter in module.parameters(recurse=False):
        if (
            type(parameter) not in (nn.Parameter, Tensor)
            or not parameter.is_floating_point()
            or parameter.layout != torch.strided
        ):
            return f"has a parameter that is a {type(parameter).__name__} of {parameter.dtype} and {parameter.layout}"
        if parameter.is_meta:
            return "has a parameter on the meta device, without values"
    if isinstance(module, nn.Conv2d):
        return _why_not_convolution(module)
    if isinstance(module, GroupNormSiLU) and module.activation not in ("silu", None):
        return f"has the activation {module.activation!r}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "renormalizes its embeddings (max_norm)"
    return None


def _why_not_convolution(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode} values"
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    known = (
        *(((3, 3), stride, (1, 1), (1, 1), 1) for stride in ((1, 1), (2, 2))),
        *(((3, 3), (2, 2), (0, 0), (1, 1), 1), ((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    )
    if geometry not in known:
        return f"has kernel, stride, padding, dilation and groups {geometry}"
    if tuple(conv.weight.shape[2:]) != conv.kernel_size:
        return f"has weights of shape {list(conv.weight.shape)} and a kernel of {conv.kernel_size}"
    return None


def _why_not_joined(model: UNet) -> str | None:
    """Return which layers do not fit together, or None.

    Kernels read weights without bounds, so the shapes of all neighbours have to agree.
    """
    cfg = model._config
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GroupNormSiLU):
            wanted: int = module.num_channels
            sizes = {len(p) for p in (module.weight, module.bias) if p is not None}
            if sizes - {wanted} or module.num_groups < 1 or wanted % module.num_groups:
                return f"{name} has {wanted} channels, {module.num_groups} groups and weights of {sorted(sizes)}"
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None and len(module.bias) != len(module.weight):
            return f"{name} has {len(module.bias)} biases and {len(module.weight)} outputs"
    emb_dim = len(model.time_embedding.linear_2.weight)
    embeddings = model.class_embedding
    if (embeddings is None) != (cfg.num_class_embeds is None):
        return "class_embedding does not fit the configuration"
    if embeddings is not None and tuple(embeddings.weight.shape) != (cfg.num_class_embeds, emb_dim):
        return f"class_embedding has shape {list(embeddings.weight.shape)}"
    linear_1 = model.time_embedding.linear_1.weight
    if linear_1.shape[1] != cfg.sinusoid_dim or model.time_embedding.linear_2.weight.shape[1] != len(linear_1):
        return "time_embedding has layers that do not fit together"
    for name, module in model.named_modules(remove_duplicate=False):
        reason = None
        if isinstance(module, ResnetBlock):
            reason = _why_not_resnet(module, emb_dim)
        elif isinstance(module, Attention):
            reason = _why_not_attention(module)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _why_not_resnet(block: ResnetBlock, emb_dim: int) -> str | None:
    out, channels = block.conv1.weight.shape[:2]
    width = 2 * out if block.scale_shift else out
    shortcut = block.conv_shortcut
    fits = (
        block.norm1.num_channels == channels
        and block.norm2.num_channels == out
        and tuple(block.conv2.weight.shape[:2]) == (out, out)
        and tuple(block.time_emb_proj.weight.shape) == (width, emb_dim)
        and (channels == out if shortcut is None else tuple(shortcut.weight.shape) == (out, channels, 1, 1))
        and all(conv.stride == (1, 1) and conv.kernel_size == (3, 3) for conv in (block.conv1, block.conv2))
    )
    if not fits:
        return "has layers that do not fit together"
    if block.resample not in (None, "down", "up"):
        return f"resamples by {block.resample!r}"
    return _why_not_divisor(block.output_scale_factor)


def _why_not_attention(layer: Attention) -> str | None:
    channels = len(layer.to_q.weight)
    linears = (layer.to_q, layer.to_k, layer.to_v, cast("nn.Linear", layer.to_out[0]))
    if any(tuple(linear.weight.shape) != (channels, channels) for linear in linears):
        return "has projections that are not square"
    if layer.group_norm is not None and layer.group_norm.num_channels != channels:
        return "has a norm of another width"
    if layer.num_heads < 1 or channels % layer.num_heads:
        return f"has {layer.num_heads} heads and {channels} channels"
    return _why_not_divisor(layer.output_scale_factor)


def _why_not_divisor(divisor: float) -> str | None:
    return None if isinstance(divisor, int | float) and divisor != 0 else f"has the output_scale_factor {divisor!r}"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norm parameters and time terms."""
    return torch.float64 if dtype == torch.float64 else torch.float32
