"""Weights of guided-diffusion's and improved-diffusion's `UNetModel`, loaded into `UNet`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import check_dtype, check_int, check_number, check_type, checked_device
from ..errors import InvalidValue
from ..nn import UNet
from ..nn.checkpoint import check_weights, load_tensors

# script_util's widths by image size, in units of num_channels, one per resolution.
_CHANNEL_MULT: Final[dict[int, tuple[float, ...]]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
# Layers outside the blocks, and those within a block, under their names there and here.
_OUTER: Final = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_INNER: Final = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
_NAME: Final = re.compile(r"((?:input_blocks|output_blocks)\.\d+\.\d+|(?:middle_block|time_embed|out)\.\d+|label_emb)\.(.+)")


def load_guided_diffusion(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    image_size: int = 64,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    channel_mult: str | Sequence[float] = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    attention_resolutions: str = "16,8",
    num_heads: int = 4,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = True,
    dropout: float = 0.0,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    use_checkpoint: bool = False,
    use_fp16: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> UNet:
    """Load a model of guided-diffusion or improved-diffusion as a `UNet` in eval mode.

    Keywords are script_util's flags of the model with their defaults. Pass the flags of the training.

    Args:
        path_or_state_dict: A .pt file, read without running code from it, or its contents.
        image_size: Height and width of the images.
        num_channels: Channels at the highest resolution.
        num_res_blocks: Residual blocks per resolution.
        channel_mult: Channels per resolution in units of num_channels. Empty: the default of the image size.
        learn_sigma: The output has variance channels.
        class_cond: The model has classes.
        attention_resolutions: Heights at which blocks have attention.
        num_heads: Heads of every attention layer.
        num_head_channels: Channels per head. -1: num_heads counts.
        num_heads_upsample: Must be -1 or num_heads, unless num_head_channels is set.
        use_scale_shift_norm: Time is a scale and a shift after the norm.
        dropout: Dropout probability.
        resblock_updown: Residual blocks resample.
        use_new_attention_order: guided-diffusion's projections list queries, keys and values before heads.
        use_checkpoint: Ignored, it saves memory only.
        use_fp16: Ignored, see dtype.
        dtype: Dtype of the weights. None: float32, whatever the file holds.
        device: Device of the weights. None: the CPU.

    Returns:
        The network, called as model(x, t) or, with class_cond, model(x, t, class_labels). It has the classes
        of the weights and no "no label" class. Super-resolution models take the upsampled image as
        further channels of x.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A flag is out of range, the file is no state dict, or the weights do not fit the flags.
    """
    op = "load_guided_diffusion"
    for name, value in (
        *(("image_size", image_size), ("num_channels", num_channels), ("num_res_blocks", num_res_blocks)),
        ("num_heads", num_heads),
    ):
        check_int(op, name, value, 1, 1 << 16)
    check_int(op, "num_head_channels", num_head_channels, -1, 1 << 16)
    if num_head_channels == 0:
        raise InvalidValue(op, "num_head_channels", "to be -1 or positive", "0")
    check_int(op, "num_heads_upsample", num_heads_upsample, -1, 1 << 16)
    for name, flag in (
        *(("learn_sigma", learn_sigma), ("class_cond", class_cond), ("use_scale_shift_norm", use_scale_shift_norm)),
        *(("resblock_updown", resblock_updown), ("use_new_attention_order", use_new_attention_order)),
        *(("use_checkpoint", use_checkpoint), ("use_fp16", use_fp16)),
    ):
        check_type(op, name, flag, bool)
    check_number(op, "dropout", dropout, 0, below=1)
    check_dtype(op, "dtype", dtype, optional=True)
    device = None if device is None else checked_device(op, device)
    if num_head_channels == -1 and num_heads_upsample not in (-1, num_heads):
        raise InvalidValue(op, "num_heads_upsample", f"to be -1 or num_heads, {num_heads}", num_heads_upsample)
    widths = [int(num_channels * mult) for mult in _mults(channel_mult, image_size)]
    strides = _attended(attention_resolutions, image_size)
    attended = [2**level in strides for level in range(len(widths))]
    weights = _read(path_or_state_dict)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resblock_updown else ("DownBlock2D", "UpBlock2D")
    sampler = "resnet" if resblock_updown else "conv"
    config: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": _size(weights, "input_blocks.0.0.weight", 1),
        "out_channels": 6 if learn_sigma else 3,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attended)],
        "downsample_type": sampler,
        "upsample_type": sampler,
        "layers_per_block": num_res_blocks,
        "time_input_dim": None if widths[0] == num_channels else num_channels,
        "time_embedding_dim": 4 * num_channels,
        "dropout": dropout,
        "attention_head_dim": None if num_head_channels == -1 else num_head_channels,
        "num_attention_heads": num_heads if num_head_channels == -1 else None,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if use_scale_shift_norm else "default",
        "num_class_embeds": _size(weights, "label_emb.weight", 0) if class_cond else None,
    }
    with torch.device("meta"):
        model = UNet(**config)
    blocks = _blocks(attended, num_res_blocks)
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in blocks:
            renamed[name] = weight  # belongs to another network: see check_weights
            continue
        block, layer = blocks[match[1]], match[2]
        if layer in ("qkv.weight", "qkv.bias"):
            heads = weight.shape[0] // 3 // num_head_channels if num_head_channels != -1 else num_heads
            for to, part in zip("qkv", _queries_keys_values(weight, heads, use_new_attention_order), strict=True):
                renamed[f"{block}.to_{to}.{layer[4:]}"] = part
        elif layer in ("weight", "bias"):
            renamed[f"{block}.{layer}"] = weight
        else:
            inner, _, kind = layer.rpartition(".")
            renamed[f"{block}.{_INNER.get(inner, inner)}.{kind}"] = (
                weight.flatten(1) if inner == "proj_out" and kind == "weight" else weight
            )
    path = path_or_state_dict if isinstance(path_or_state_dict, str | os.PathLike) else "path_or_state_dict"
    owner = "a UNetModel with the given flags, which must be those of its training"
    check_weights(op, path, owner, model.state_dict(), renamed)
    dtype = torch.float32 if dtype is None else dtype
    model.load_state_dict({name: renamed[name].to(device, dtype) for name in model.state_dict()}, assign=True)
    return model.eval()


def _blocks(attended: Sequence[bool], num_res_blocks: int) -> dict[str, str]:
    """Return this package's names of layers and blocks, by the original's."""
    names = dict(_OUTER)
    place = 1
    for i, attention in enumerate(attended):
        for j in range(num_res_blocks):
            names[f"input_blocks.{place}.0"] = f"down_blocks.{i}.resnets.{j}"
            if attention:
                names[f"input_blocks.{place}.1"] = f"down_blocks.{i}.attentions.{j}"
            place += 1
        if i < len(attended) - 1:
            names[f"input_blocks.{place}.0"] = f"down_blocks.{i}.downsamplers.0"
            place += 1
    place = 0
    for i, attention in enumerate(reversed(attended)):
        for j in range(num_res_blocks + 1):
            names[f"output_blocks.{place}.0"] = f"up_blocks.{i}.resnets.{j}"
            if attention:
                names[f"output_blocks.{place}.1"] = f"up_blocks.{i}.attentions.{j}"
            if j == num_res_blocks and i < len(attended) - 1:
                names[f"output_blocks.{place}.{1 + attention}"] = f"up_blocks.{i}.upsamplers.0"
            place += 1
    return names


def _queries_keys_values(weight: Tensor, heads: int, new_order: bool) -> list[Tensor]:
    """Return the rows of queries, keys and values in a joined projection, heads one after another."""
    channels = weight.shape[0] // 3
    if weight.shape[0] % (3 * heads):
        raise InvalidValue("load_guided_diffusion", "heads", f"to divide {channels} channels of an attention", f"{heads} heads")
    rows = weight.reshape(channels * 3, *weight.shape[1:2])
    if new_order:
        return list(rows.chunk(3))
    by_head = rows.reshape(heads, 3, channels // heads, *rows.shape[1:])
    return [by_head[:, i].reshape(channels, *rows.shape[1:]) for i in range(3)]


def _mults(channel_mult: str | Sequence[float], image_size: int) -> tuple[float, ...]:
    if isinstance(channel_mult, str) and not channel_mult:
        if image_size not in _CHANNEL_MULT:
            sizes = ", ".join(map(str, sorted(_CHANNEL_MULT)))
            raise InvalidValue(
                "load_guided_diffusion", "channel_mult", f"to be given, or image_size to be one of {sizes}", image_size
            )
        return _CHANNEL_MULT[image_size]
    try:
        if isinstance(channel_mult, bytes):
            raise TypeError("bytes are numbers too")
        mults = tuple(float(mult) for mult in (channel_mult.split(",") if isinstance(channel_mult, str) else channel_mult))
    except (TypeError, ValueError):
        mults = ()
    if not mults or min(mults) <= 0:
        raise InvalidValue("load_guided_diffusion", "channel_mult", 'to be positive numbers as "1,2,3,4"', repr(channel_mult))
    return mults


def _attended(attention_resolutions: str, image_size: int) -> list[int]:
    """Return the reductions of the image size at which there is attention."""
    try:
        resolutions = [int(resolution) for resolution in attention_resolutions.split(",")]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        resolutions = [0]
    if min(resolutions) < 1:
        raise InvalidValue(
            "load_guided_diffusion", "attention_resolutions", 'to be heights as "32,16,8"', repr(attention_resolutions)
        )
    return [image_size // resolution for resolution in resolutions]


def _read(path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    weights: Any = path_or_state_dict
    if isinstance(path_or_state_dict, str | os.PathLike):
        weights = load_tensors("load_guided_diffusion", path_or_state_dict)
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InvalidValue(
            "load_guided_diffusion", "path_or_state_dict", "to be or to hold tensors by name", type(weights).__name__
        )
    return weights


def _size(weights: Mapping[str, Tensor], name: str, dim: int) -> int:
    if name not in weights:
        raise InvalidValue("load_guided_diffusion", "", "weights of a UNetModel with the given flags", f"none named {name}")
    return weights[name].shape[dim]
