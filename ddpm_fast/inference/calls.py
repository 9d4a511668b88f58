"""The calls of a network, and those of a whole sampling step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..nn.config import UNetConfig
from ..ops.reverse_step import reverse_step_op
from ..ops.step_parts import count_step_op, network_input_op
from ..plan import SamplingPlan
from ..reference import VARIANCES
from .network import Conv, Network, Resnet
from .packed_layers import PackedLayers
from .program import Buffer, Builder, Value
from .pytorch_layers import PyTorchLayers

Layers: TypeAlias = PackedLayers | PyTorchLayers


@dataclass(frozen=True)
class StepTensors:
    """Tensors that a sampling step reads and writes. A program is bound to their memory.

    Attributes:
        x_t: [n, C, H, W], replaced by x_{t-1}.
        x_0_prev: Like x_t: x_0^ of the step before, replaced by that of this step. None: the plan does not use it.
        seeds: int64 [n].
        class_labels: int64 [1, n], or [2, n] with guidance: of the conditional half, then of the other. None: no labels.
        step: int64 [1], the number of the step. It is counted up.
    """

    x_t: Tensor
    x_0_prev: Tensor | None
    seeds: Tensor
    class_labels: Tensor | None
    step: Tensor


def append_step(
    builder: Builder,
    network: Network,
    layers: Layers,
    config: UNetConfig,
    plan: SamplingPlan,
    tensors: StepTensors,
    guidance_scale: float | None,
    dtype: torch.dtype,
    images_at_once: int,
) -> None:
    """Append a step of a plan: the network, guidance and `reverse_step`.

    A batch is split by image. Both halves of guidance are evaluated together.

    Args:
        builder: Receives the calls.
        network: The layers.
        layers: Their implementation.
        config: The network's configuration.
        plan: The plan.
        tensors: What the step reads and writes.
        guidance_scale: None: no guidance.
        dtype: Dtype of the network.
        images_at_once: Number of images per pass through the network.
    """
    x_t, x_0_prev, labels, step = tensors.x_t, tensors.x_0_prev, tensors.class_labels, tensors.step
    copies = 1 if guidance_scale is None else 2
    timesteps, table = plan.timesteps.to(x_t.device), plan.table(x_t.device)
    parts = [slice(i, min(i + images_at_once, len(x_t))) for i in range(0, len(x_t), images_at_once)]
    # PyTorch computes the terms of networks with classes, so these calls come before those of kernels.
    stacks = [
        network.time_terms.append(
            *(builder, timesteps, step, copies * len(x_t[part]), None if labels is None else labels[:, part])
        )
        for part in parts
    ]
    for part, of_part in zip(parts, stacks, strict=True):
        x, x_0 = x_t[part], None if x_0_prev is None else x_0_prev[part]
        read: Value = x
        if copies > 1 or config.center_input_sample or dtype != x.dtype:
            arguments = (x, dtype, copies, config.center_input_sample)
            read = builder.call(network_input_op, *arguments, shape=(copies * len(x), *x.shape[1:]), dtype=dtype)
        model_output = append_network(builder, network, layers, read, of_part)
        builder.update(
            *(reverse_step_op, x, model_output, table, step, None, tensors.seeds[part] if plan.is_random else None),
            *(x_0, guidance_scale, VARIANCES.index(plan.variance), x_0 is not None),
            out=(x,) if x_0 is None else (x, x_0),
        )
    builder.update(count_step_op, step, out=(step,))


def append_network(builder: Builder, network: Network, layers: Layers, x: Value, stacks: list[Buffer]) -> Buffer:
    """Append the calls of all layers, in the order of `UNet.forward`, and return the network's output.

    Args:
        builder: Receives the calls.
        network: The layers.
        layers: Their implementation.
        x: [N, in_channels, H, W].
        stacks: Time terms of the residual blocks, as `TimeTerms` has them.
    """
    rows = [stack.rows() for stack in stacks]
    terms = [rows[stack][row] for stack, row in network.time_terms.rows]

    def resnet(block: Resnet, *inputs: Value) -> Buffer:
        maps = layers.joined(builder, inputs)
        h = layers.conv(builder, block.conv1, maps, norm=block.norm1, resample=block.resample)
        shift, scale_shift = None, None
        if len(block.terms) == 2:
            scale_shift = (terms[block.terms[0]], terms[block.terms[1]])
        else:
            shift = terms[block.terms[0]]
        return layers.conv(
            builder,
            block.conv2,
            (h,),
            norm=block.norm2,
            shift=shift,
            scale_shift=scale_shift,
            residual=maps if block.resample is None else layers.resampled(builder, maps, block.resample),
            shortcut=block.shortcut,
            divisor=block.divisor,
        )

    def resampled(layer: Resnet | Conv, x: Buffer, *, up: bool) -> Buffer:
        if isinstance(layer, Resnet):
            return resnet(layer, x)
        return layers.conv(builder, layer, (x,), resample="up" if up else None)  # a stride of 2 on the way down

    h = layers.conv(builder, network.conv_in, (x,))
    skips = [h]
    for block in network.down:
        for i, layer in enumerate(block.resnets):
            h = resnet(layer, h)
            if block.attentions:
                h = layers.attention(builder, block.attentions[i], h)
            skips.append(h)
        if block.resampler is not None:
            h = resampled(block.resampler, h, up=False)
            skips.append(h)
    h = resnet(network.mid.resnets[0], h)
    for attention in network.mid.attentions:
        h = layers.attention(builder, attention, h)
    h = resnet(network.mid.resnets[1], h)
    for block in network.up:
        for i, layer in enumerate(block.resnets):
            h = resnet(layer, h, skips.pop())
            if block.attentions:
                h = layers.attention(builder, block.attentions[i], h)
        if block.resampler is not None:
            h = resampled(block.resampler, h, up=True)
    return layers.conv(builder, network.conv_out, (h,), norm=network.norm_out)
