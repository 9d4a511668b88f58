"""The layers of a `UNet` as plain values, copied from a model when it is frozen."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import opmath
from ..nn.comparison import why_opaque
from ..nn.layers import (
    Attention,
    GroupNormSiLU,
    ResnetBlock,
    timestep_embedding,
)
from ..nn.unet import UNet, WithoutDraws
from ..ops.step_parts import time_terms_op
from .program import Buffer, Builder

Resample = Literal["down", "up"]
_INERT: Final = {  # attributes that are not read in eval mode
    *vars(nn.Module()),
    *("_compiled_call_impl", "_is_hf_initialized", "dropout", "dropout_stream", "gradient_checkpointing"),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """A group norm and its activation. weight and bias are [C]."""

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
        layers = [
            (layer.weight.detach().to(device).double(), layer.bias.detach().to(device).double())
            for layer in (model.time_embedding.linear_1, model.time_embedding.linear_2)
        ]
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
        self._layers = [(weight.to(wide, copy=True), bias.to(wide, copy=True)) for weight, bias in layers]
        self._weights = [weight.to(dtype) for weight, _ in stacks]  # [B, E, W] each
        self._biases = [bias.to(dtype) for _, bias in stacks]  # [B, 1, W] each
        if model.class_embedding is None:
            self._tables = [(torch.matmul(F.silu(emb), weight) + bias).to(wide) for weight, bias in stacks]  # [B, T, W] each
        else:
            self._times = emb.to(wide)  # [T, E]
            self._labels = deepcopy(model.class_embedding).requires_grad_(False).to(device, wide)

    def _embedding(self, t: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the embedding of timesteps [N], [N, E] in the dtype of the layers."""
        cfg = self._config
        emb = timestep_embedding(t, cfg.sinusoid_dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        (first, first_bias), (second, second_bias) = layers
        return F.linear(F.silu(F.linear(emb.to(first.dtype), first, first_bias)), second, second_bias)

    def stacks(self, t: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """Return the stacks, [B, N, W] each, for timesteps [N], int64 or floating, and labels or None."""
        between = t.is_floating_point()
        if class_labels is None and not between:
            return [table.index_select(1, t) for table in self._tables]
        emb = self._embedding(t, self._layers) if between else self._times.index_select(0, t)
        if class_labels is not None:
            emb = emb + self._labels(class_labels)
        emb, dtype = F.silu(emb).to(self._weights[0].dtype), self._biases[0].dtype if class_labels is not None else emb.dtype
        return [_projected(emb, weight, bias).to(dtype) for weight, bias in zip(self._weights, self._biases, strict=True)]

    def append(self, builder: Builder, timesteps: Tensor, step: Tensor, n: int, class_labels: Tensor | None) -> list[Buffer]:
        """Append the calls that compute the stacked time terms of a plan's step, and return the stacks.

        Args:
            builder: Receives the calls.
            timesteps: int64 [S], the t of each step.
            step: int64 [1], the number of the step.
            n: Number of samples.
            class_labels: Labels of `StepState` for n samples, or None.
        """
        if class_labels is None:
            return [
                builder.call(time_terms_op, table, timesteps, step, n, shape=(len(table), n, table.shape[2]), dtype=table.dtype)
                for table in self._tables
            ]
        dtype, width = self._weights[0].dtype, self._times.shape[1]
        emb = builder.call(
            *(_embedded, self._times, self._labels, timesteps, step, class_labels, dtype), shape=(n, width), dtype=dtype
        )
        return [
            builder.call(_projected, emb, weight, bias, shape=(len(weight), n, weight.shape[2]), dtype=dtype)
            for weight, bias in zip(self._weights, self._biases, strict=True)
        ]


def _embedded(
    times: Tensor,
    embedding: nn.Module,
    timesteps: Tensor,
    step: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the activated embedding of a step's timestep and of labels [copies, n, ...], [N, E]."""
    emb = F.silu(times.index_select(0, timesteps.index_select(0, step)) + embedding(labels.flatten(0, 1)))
    return emb.to(dtype) if out is None else out.copy_(emb)


def _projected(emb: Tensor, weights: Tensor, biases: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return emb [N, E] times each of the weights [B, E, W], plus biases [B, 1, W]."""
    return torch.baddbmm(biases, emb.expand(len(weights), *emb.shape), weights, out=out)


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

    def copied(parameter: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        assert parameter is not None
        return parameter.detach().to(device, dtype, copy=True)

    def norm(layer: GroupNormSiLU) -> Norm:
        weight, bias = copied(layer.weight, wide), copied(layer.bias, wide)
        return Norm(layer.num_groups, layer.eps, weight, bias, layer.activation == "silu")

    def conv(layer: nn.Conv2d, *, has_bias: bool = True) -> Conv:
        asymmetric = layer.padding == (0, 0) and layer.kernel_size == (3, 3)
        bias = copied(layer.bias) if has_bias else None
        return Conv(convert(copied(layer.weight)), bias, layer.stride[0], asymmetric)

    def resnet(layer: ResnetBlock) -> Resnet:
        first = len(projections)
        weight, bias = copied(layer.time_emb_proj.weight), copied(layer.time_emb_proj.bias)
        if layer.scale_shift:
            projections.extend(zip(weight.chunk(2), bias.chunk(2), strict=True))
        else:
            # The shift is added to the output of conv1 before the norm, and so is the bias of conv1.
            projections.append((weight, bias.double() + copied(layer.conv1.bias).double()))
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
            weight, bias = (torch.cat([copied(getattr(each, name)) for each in layers]) for name in ("weight", "bias"))
            return Conv(convert(weight[:, :, None, None]), bias)

        group_norm = None if layer.group_norm is None else norm(layer.group_norm)
        qkv, out = linear(layer.to_q, layer.to_k, layer.to_v), linear(cast("nn.Linear", layer.to_out[0]))
        return SelfAttention(group_norm, qkv, out, layer.num_heads, layer.output_scale_factor)

    def block(layer: Any) -> Block:
        resnets, attentions = [resnet(each) for each in layer.resnets], [attention(each) for each in layer.attentions]
        resampler: Resnet | Conv | None = None
        for each in (*getattr(layer, "downsamplers", ()), *getattr(layer, "upsamplers", ())):
            resampler = resnet(each) if isinstance(each, ResnetBlock) else conv(each.conv)
        return Block(resnets, attentions, resampler)

    return Network(
        conv(model.conv_in),
        [block(each) for each in model.down_blocks],
        block(model.mid_block),
        [block(each) for each in model.up_blocks],
        norm(model.conv_norm_out),
        conv(model.conv_out),
        TimeTerms(model, num_timesteps, projections, dtype, device),  # last: the blocks have appended their projections
    )


def why_not_frozen(model: nn.Module) -> str | None:
    """Return why `model` cannot be frozen, or None if it can.

    Its layers must be those of a new `UNet` of the same configuration. Kernels read weights without bounds, so this has
    to hold.
    """
    if type(model) is not UNet:
        return f"the model is a {type(model).__name__}"
    if (why := why_opaque(model)) is not None:
        return why
    with torch.device("meta"), WithoutDraws():
        expected = _facts(UNet(**model._config.to_dict()))
    facts = _facts(model)
    for name in {**expected, **facts}:
        got, wanted = facts.get(name, "missing"), expected.get(name, "missing")
        if got != wanted:
            return f"{name} is {got}, by its configuration it is {wanted}"
    return None


def _facts(model: UNet) -> dict[str, str]:
    """Return by name what the layers of a network are: their classes, attributes, and the shapes of their weights."""
    facts: dict[str, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if name:  # the network itself has its configuration
            facts[name] = f"a layer of class {type(layer).__name__}"
            facts |= {f"{name}.{key}": repr(value) for key, value in vars(layer).items() if key not in _INERT}
        weights = {**layer._parameters, **layer._buffers}
        facts |= {f"{name}.{key}": f"of shape {tuple(each.shape)}" for key, each in weights.items() if each is not None}
    return facts
