"""The calls of a network, in the order of `UNet.forward`."""

from __future__ import annotations

from typing import TypeAlias

from .network import Conv, Network, Resnet
from .packed_layers import PackedLayers
from .program import Buffer, Builder, Value
from .pytorch_layers import PyTorchLayers

Layers: TypeAlias = PackedLayers | PyTorchLayers


def append_network(
    builder: Builder, network: Network, layers: Layers, inputs: tuple[Value, ...], stacks: list[Buffer]
) -> Buffer:
    """Append the calls of all layers, in the order of `UNet.forward`, and return the network's output.

    Args:
        builder: Receives the calls.
        network: The layers.
        layers: Their implementation.
        inputs: Maps [N, C, H, W] whose channels follow each other, in_channels together.
        stacks: Time terms of the residual blocks, as `TimeTerms` has them.
    """
    rows = [stack.rows() for stack in stacks]
    terms = [rows[stack][row] for stack, row in network.time_terms.rows]

    def resnet(block: Resnet, *inputs: Value) -> Buffer:
        maps = layers.joined(builder, inputs)
        h = layers.conv(builder, block.conv1, maps, norm=block.norm1, resample=block.resample)
        first, *second = (terms[index] for index in block.terms)
        return layers.conv(
            builder,
            block.conv2,
            (h,),
            norm=block.norm2,
            shift=None if second else first,
            scale_shift=(first, second[0]) if second else None,
            residual=maps if block.resample is None else layers.resampled(builder, maps, block.resample),
            shortcut=block.shortcut,
            divisor=block.divisor,
        )

    def resampled(layer: Resnet | Conv, x: Buffer, *, up: bool) -> Buffer:
        if isinstance(layer, Resnet):
            return resnet(layer, x)
        return layers.conv(builder, layer, (x,), resample="up" if up else None)  # a stride of 2 on the way down

    h = layers.conv(builder, network.conv_in, inputs)
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
