"""The layers of a `UNet` as plain values, copied from a model when it is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import opmath
from ..nn.conv import Conv3x3
from ..nn.layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    timestep_embedding,
)
from ..nn.unet import UNet
from ..ops.step_parts import time_terms_op
from .program import Buffer, Builder

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

    @property
    def padding(self) -> int:
        """Zeros above and on the left."""
        return 0 if self.asymmetric else self.kernel // 2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output for an input of this height and width."""
        padding = 1 if self.asymmetric else 2 * self.padding
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
    there are classes or timesteps between the integers. Every term is contiguous, as the norms need it.

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
        self._config = model._config
        layers: list[tuple[Tensor, Tensor | None]] = []
        for layer in (model.time_embedding.linear_1, model.time_embedding.linear_2):
            weight, bias = layer.weight.detach().to(device), None if layer.bias is None else layer.bias.detach().to(device)
            layers.append((weight.double(), None if bias is None else bias.double()))
        emb = self._embedding(torch.arange(num_timesteps, device=device), layers)  # [T, E]
        widths = [len(bias) for _, bias in projections]
        distinct = sorted(set(widths))
        # Stack and row of each projection.
        self.rows = [(distinct.index(width), widths[:i].count(width)) for i, width in enumerate(widths)]
        stacks = []
        for width in distinct:
            weights, biases = zip(*(pair for pair in projections if len(pair[1]) == width), strict=True)
            stacks.append((torch.stack(weights).double().transpose(1, 2), torch.stack(biases).double()[:, None]))
        wide = opmath(dtype)
        self._layers = [
            (weight.to(wide, copy=True), None if bias is None else bias.to(wide, copy=True)) for weight, bias in layers
        ]
        self._weights = [weight.to(dtype) for weight, _ in stacks]  # [B, E, W] each
        self._biases = [bias.to(dtype) for _, bias in stacks]  # [B, 1, W] each
        if model.class_embedding is None:
            self._tables = [(torch.matmul(F.silu(emb), weight) + bias).to(wide) for weight, bias in stacks]  # [B, T, W] each
        else:
            classes = model.class_embedding.weight.detach().to(device, wide, copy=True)
            self._embeddings = (emb.to(wide), classes)  # [T, E], [classes, E]

    def _embedding(self, t: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the embedding of timesteps [N], [N, E] in the dtype of the layers."""
        cfg = self._config
        emb = timestep_embedding(t, cfg.sinusoid_dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        (first, first_bias), (second, second_bias) = layers
        return F.linear(F.silu(F.linear(emb.to(first.dtype), first, first_bias)), second, second_bias)

    def stacks(self, t: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """Return the stacks, [B, N, W] each, for timesteps [N], int64 or floating, and labels [N] or None."""
        between = t.is_floating_point()
        if class_labels is None and not between:
            return [table.index_select(1, t) for table in self._tables]
        emb = self._embedding(t, self._layers) if between else self._embeddings[0].index_select(0, t)
        if class_labels is not None:
            emb = emb + self._embeddings[1].index_select(0, class_labels)
        emb, dtype = F.silu(emb).to(self._weights[0].dtype), self._biases[0].dtype if class_labels is not None else emb.dtype
        return [_projected(emb, weight, bias).to(dtype) for weight, bias in zip(self._weights, self._biases, strict=True)]

    def append(self, builder: Builder, timesteps: Tensor, step: Tensor, n: int, class_labels: Tensor | None) -> list[Buffer]:
        """Append the calls that compute the stacks of a step of a plan, and return them.

        Args:
            builder: Receives the calls.
            timesteps: int64 [S], the t of each step.
            step: int64 [1], the number of the step.
            n: Number of samples.
            class_labels: int64 with n elements, or None.
        """
        if class_labels is None:
            tables = self._tables
            return [
                builder.call(time_terms_op, table, timesteps, step, n, shape=(len(table), n, table.shape[2]), dtype=table.dtype)
                for table in tables
            ]
        times, classes = self._embeddings
        dtype = self._weights[0].dtype
        emb = builder.call(
            *(_embedded, times, classes, timesteps, step, class_labels, dtype), shape=(n, times.shape[1]), dtype=dtype
        )
        return [
            builder.call(_projected, emb, weight, bias, shape=(len(weight), n, weight.shape[2]), dtype=dtype)
            for weight, bias in zip(self._weights, self._biases, strict=True)
        ]


def _embedded(
    times: Tensor,
    classes: Tensor,
    timesteps: Tensor,
    step: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the activated embedding of a step's timestep and of labels, [N, E]."""
    emb = times.index_select(0, timesteps.index_select(0, step)) + classes.index_select(0, labels.flatten())
    emb = F.silu(emb)
    return emb.to(dtype) if out is None else out.copy_(emb)


def _projected(emb: Tensor, weights: Tensor, biases: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return emb [N, E] times each of the weights [B, E, W], plus biases [B, 1, W]."""
    return torch.baddbmm(biases, emb.expand(len(weights), *emb.shape), weights, out=out)


def held_tensors(part: object) -> list[Tensor]:
    """Return the tensors of a `Network` or a part of one, always in the same order."""
    if isinstance(part, Tensor):
        return [part]
    inner = part if isinstance(part, list | tuple) else getattr(part, "__dict__", {}).values()
    return [tensor for each in inner for tensor in held_tensors(each)]


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
    wide = opmath(dtype)

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

# Attributes that must be those of a new network of the same configuration. `read_network` reads all others that a
# layer's forward reads.
_FIXED: Final[dict[type[nn.Module], tuple[str, ...]]] = {
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups"),
    GroupNormSiLU: ("num_channels",),
    ResnetBlock: ("scale_shift", "resample"),
    Downsample: ("asymmetric",),
    nn.Embedding: ("max_norm",),
}


def why_not_frozen(model: nn.Module) -> str | None:
    """Return why `model` cannot be frozen, or None if it can.

    Layers, the shapes of their weights and their geometry must be those of a new `UNet` of the same configuration.
    Kernels read weights without bounds, so this has to hold. Biases, norms of attention and the weights of norms
    may be absent.
    """
    if type(model) is not UNet:
        return f"the model is a {type(model).__name__}"
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "torch has global forward hooks"
    with torch.device("meta"):
        expected = dict(UNet(**model._config.to_dict()).named_modules())
    layers = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in expected if name not in layers and not name.endswith(".group_norm")]  # may be None
    if missing:
        return f"{missing[0]} is missing"
    for name, layer in layers.items():
        if name not in expected:
            return f"{name} is not in the configuration"
        reason = _why_not_kind(layer, expected[name]) or _why_not_weights(layer, expected[name]) or _why_not_values(layer)
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    return None


def _why_not_kind(layer: nn.Module, expected: nn.Module) -> str | None:
    kind = type(expected)
    if type(layer) is not kind and not (kind is Conv3x3 and type(layer) is nn.Conv2d):  # they compute the same
        return f"is a {type(layer).__name__} of another make, not a {kind.__name__}"
    patched = [name for name in vars(layer) if callable(getattr(kind, name, None))]
    if patched:
        return f"has a patched {patched[0]}"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has forward hooks"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"pads with {layer.padding_mode} values"
    for name in (name for base, names in _FIXED.items() if issubclass(kind, base) for name in names):
        if getattr(layer, name) != getattr(expected, name):
            return f"has {name} {getattr(layer, name)!r}, and its configuration means {getattr(expected, name)!r}"
    return None


def _why_not_weights(layer: nn.Module, expected: nn.Module) -> str | None:
    for name, wanted in expected.named_parameters(recurse=False):
        weight = getattr(layer, name)
        if weight is None:
            if name != "bias" and not isinstance(layer, GroupNormSiLU):
                return f"has no {name}"
            continue
        if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or weight.layout != torch.strided:
            return f"has a {name} that is a {type(weight).__name__} of {weight.dtype} and {weight.layout}"
        if weight.is_meta:
            return f"has a {name} on the meta device, without values"
        if weight.shape != wanted.shape:
            return f"has a {name} of shape {list(weight.shape)}, and its configuration means {list(wanted.shape)}"
    return None


def _why_not_values(layer: nn.Module) -> str | None:
    if isinstance(layer, GroupNormSiLU):
        if not _is_number(layer.num_groups, int) or layer.num_groups < 1 or layer.num_channels % layer.num_groups:
            return f"has {layer.num_channels} channels and {layer.num_groups!r} groups"
        if not _is_number(layer.eps, int | float) or not math.isfinite(layer.eps) or layer.eps <= 0:
            return f"has the eps {layer.eps!r}"
        if layer.activation not in ("silu", None):
            return f"has the activation {layer.activation!r}"
    elif isinstance(layer, Attention):
        channels = len(layer.to_q.weight)
        if not _is_number(layer.num_heads, int) or layer.num_heads < 1 or channels % layer.num_heads:
            return f"has {layer.num_heads!r} heads and {channels} channels"
    if isinstance(layer, Attention | ResnetBlock):
        factor = layer.output_scale_factor
        if not _is_number(factor, int | float) or not math.isfinite(factor) or factor == 0:
            return f"has the output_scale_factor {factor!r}"
    return None


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
