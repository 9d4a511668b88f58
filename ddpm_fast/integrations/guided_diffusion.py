"""guided-diffusion and improved-diffusion: `UNetModel`, live or as a file, and plans of `GaussianDiffusion`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, cast

import torch
from torch import Tensor, nn

from ..checks import check_choice, checked_device
from ..errors import expect
from ..nn import UNet
from ..nn.checkpoint import load_tensors
from ..nn.unet import unet_on_weights
from ..options import checked, within
from ..plan import PlanPrediction, SamplingPlan, ddim_plan, ddpm_plan
from ..schedule import NoiseSchedule
from .foreign import check_unpatched, frozen_foreign
from .frozen_module import FrozenModule

# Names of layers and blocks there and here. Blocks of input_blocks and output_blocks are added by their kinds.
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
# Layers within a block.
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
_HEADS: Final = ("num_heads", "num_head_channels", "use_new_attention_order")
_PREDICTIONS: Final[dict[str, PlanPrediction]] = {"PREVIOUS_X": "previous_sample", "START_X": "sample", "EPSILON": "epsilon"}


@checked()
def load_guided_diffusion(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    num_heads: Annotated[int, within(1, 1 << 16)] = 4,
    num_head_channels: Annotated[int, within(-1, 1 << 16)] = -1,
    use_new_attention_order: bool = False,
    image_size: Annotated[int | None, within(1, 1 << 16)] = None,
    dropout: Annotated[float, within(0, below=1)] = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> UNet:
    """Load weights of a `UNetModel` of guided-diffusion or improved-diffusion as a `UNet` in eval mode.

    Names and shapes of the weights tell widths, blocks, classes and learned variances. The keywords are the flags of
    script_util that they do not tell, with its defaults. Wrong heads give bad images, without an error.

    Args:
        path_or_state_dict: A .pt file, read without running code from it, or its contents.
        num_heads: Heads of every attention layer.
        num_head_channels: Channels per head. -1: num_heads counts.
        use_new_attention_order: The projections list queries, keys and values before heads.
        image_size: Height and width of the images, from which `sample` takes its shape. None: unknown.
        dropout: Dropout probability, for training on.
        dtype: Dtype of the weights. None: float32, whatever the file holds.
        device: Device of the weights. None: the CPU.

    Returns:
        The network, called as model(x, t) or model(x, t, class_labels). It has the classes of the weights and no "no label"
        class. Super-resolution models take the upsampled image as further channels of x.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A flag is out of range, or the weights are not those of a UNetModel with 2D convolutions.
    """
    expect(num_head_channels != 0, "num_head_channels", "to be -1 or positive", 0)
    device = None if device is None else checked_device(device)
    path, weights = "path_or_state_dict", cast(Any, path_or_state_dict)
    if isinstance(path_or_state_dict, str | os.PathLike):
        path, weights = os.fspath(path_or_state_dict), load_tensors(path_or_state_dict)
    expect(
        isinstance(weights, Mapping) and weights and all(isinstance(each, Tensor) for each in weights.values()),
        "path_or_state_dict",
        "to be or to hold tensors by name",
        type(weights).__name__,
    )
    model = _converted(
        *(path, weights, num_heads, num_head_channels, use_new_attention_order), sample_size=image_size, dropout=dropout
    )
    return model.to(device, torch.float32 if dtype is None else dtype).eval()


def frozen_model(model: nn.Module, dtype: torch.dtype | None, device: Any, num_timesteps: int | None) -> FrozenModule:
    """Freeze a live `UNetModel`. Arguments and errors are those of `ddpm_fast.freeze`."""
    kind, source = type(model), cast(Any, model)
    expect(
        kind.__name__ == "UNetModel",
        "x",
        "to be a UNetModel itself",
        f"a {kind.__name__}: load_guided_diffusion takes weights of super-resolution models",
    )
    attention = source.middle_block[1]
    known = {
        "num_head_channels": -1,
        "conv_resample": True,
        **vars(model),
        # improved-diffusion has one order, the old one, under this name
        "use_new_attention_order": type(attention.attention).__name__ == "QKVAttention"
        and "n_heads" in vars(attention.attention),
    }
    heads, upsample = known["num_heads"], known["num_heads_upsample"]
    expect(
        known["num_head_channels"] != -1 or upsample in (-1, heads),
        "x.num_heads_upsample",
        f"to be num_heads, {heads}",
        upsample,
    )
    expect(known["conv_resample"], "x.conv_resample", "to be True", "False")
    config = {
        "norm_num_groups": attention.norm.num_groups,
        "norm_eps": attention.norm.eps,
        "sample_size": known.get("image_size"),
        "dropout": known["dropout"],
    }

    def read(weights: Mapping[str, Tensor]) -> UNet:
        unet = _converted("x", weights, *(known[name] for name in _HEADS), **config)
        return unet.to(torch.promote_types(unet.conv_in.weight.dtype, torch.float32)).eval()

    torso = source.input_blocks[0][0].weight.dtype  # convert_to_fp16 leaves the embedding and the head in float32
    return FrozenModule(model, frozen_foreign("x", model, read, dtype or torso, device, num_timesteps))


def plan_of_diffusion(diffusion: Any, num_steps: int | None, eta: float | None) -> SamplingPlan:
    """Return the plan of a process. Arguments and errors are those of `ddpm_fast.plan_of`."""
    name, itself = type(diffusion).__name__, "to be a GaussianDiffusion or SpacedDiffusion itself, whose steps are known"
    expect(name in ("GaussianDiffusion", "SpacedDiffusion"), "x", itself, f"a {name}")
    check_unpatched("x", diffusion)
    check_choice("x.model_mean_type.name", diffusion.model_mean_type.name, _PREDICTIONS)
    prediction, variance = _PREDICTIONS[diffusion.model_mean_type.name], diffusion.model_var_type.name.lower()
    betas, total = torch.as_tensor(diffusion.betas), getattr(diffusion, "original_num_steps", diffusion.num_timesteps)
    timesteps = list(getattr(diffusion, "timestep_map", range(total)))
    expect(num_steps is None, "num_steps", f"to be None, as the process has {len(timesteps)}", num_steps)
    expect(
        not getattr(diffusion, "rescale_timesteps", False) or total == 1000,
        "x.rescale_timesteps",
        "to be False, or x to have 1000 timesteps",
        f"True and {total}, which gives timesteps between integers",
    )
    steps: dict[str, Any] = {"spacing": timesteps[::-1], "prediction": prediction, "clip": 1.0}
    schedule = NoiseSchedule.from_betas(betas if len(timesteps) == total else _between(betas, timesteps, total))
    if eta is None:
        return ddpm_plan(schedule, variance=variance, **steps)
    steps |= {"use_clipped_model_output": True, "learned_variance": variance in ("learned", "learned_range")}
    return ddim_plan(schedule, None, eta=eta, **steps)


def _between(betas: Tensor, timesteps: list[int], total: int) -> Tensor:
    """Return betas of all timesteps, float64 [T], whose abar at `timesteps` are those of a respaced process.

    It has kept no others, and no step reads them. log abar is linear between and goes on so.
    """
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas.double()).cumsum(0)])
    ends = torch.tensor([-1, *timesteps])
    slopes = (levels.diff() / ends.diff()).repeat_interleave(ends.diff())  # one for each timestep up to the last
    return -torch.expm1(torch.cat([slopes, slopes[-1:].expand(total - len(slopes))]))


# ---------------------------------------------------------------------------------------------------------------- weights


def _converted(
    path: str, weights: Mapping[str, Tensor], num_heads: int, head_width: int, new_order: bool, **config: Any
) -> UNet:
    """Return a `UNet` on the weights of a UNetModel. Heads and `config` are what they do not tell."""

    def size(name: str, dim: int) -> int:
        expect(name in weights, path, "to have the weights of a UNetModel", f"none named {name}")
        return weights[name].shape[dim]

    def kinds(block: str) -> list[str]:
        leaves = {"in_layers.2.weight": "res", "qkv.weight": "attention", "conv.weight": "conv"}
        return [kind for j in range(3) for leaf, kind in leaves.items() if f"{block}.{j}.{leaf}" in weights]

    count = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    outputs = [kinds(f"output_blocks.{i}") for i in range(count)]
    levels = 1 + sum(block[-1:] == ["conv"] or block.count("res") == 2 for block in outputs)
    depth = max(count // levels, 1)  # residual blocks of a level on the way up
    lowest = range(0, depth * levels, depth)
    widths = [size(f"output_blocks.{i}.0.in_layers.2.weight", 0) for i in lowest][::-1]  # highest resolution first
    attended = ["attention" in outputs[i] for i in lowest][::-1]
    by_resnet = any(block.count("res") == 2 for block in outputs)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if by_resnet else ("DownBlock2D", "UpBlock2D")
    channels = size("time_embed.0.weight", 1)
    config |= {
        "in_channels": size("input_blocks.0.0.weight", 1),
        "out_channels": size("out.2.weight", 0),
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attended)],
        "downsample_type": "resnet" if by_resnet else "conv",
        "upsample_type": "resnet" if by_resnet else "conv",
        "layers_per_block": max(depth - 1, 1),
        "time_input_dim": None if widths[0] == channels else channels,
        "time_embedding_dim": size("time_embed.0.weight", 0),
        "num_attention_heads": num_heads if head_width == -1 else None,
        "attention_head_dim": None if head_width == -1 else head_width,
        "attn_norm_num_groups": config.get("norm_num_groups", 32),
        "resnet_time_scale_shift": "scale_shift"
        if size("middle_block.0.emb_layers.1.weight", 0) == 2 * size("middle_block.0.out_layers.3.weight", 0)
        else "default",
        "num_class_embeds": size("label_emb.weight", 0) if "label_emb.weight" in weights else None,
    }
    blocks = _OUTER | _block_names(attended, depth - 1)
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in blocks:
            renamed[name] = weight  # belongs to another network: see check_weights
            continue
        block, layer = blocks[match[1]], match[2]
        if layer in ("qkv.weight", "qkv.bias"):
            heads = num_heads if head_width == -1 else weight.shape[0] // 3 // head_width
            for to, part in zip("qkv", _queries_keys_values(weight, heads, new_order), strict=True):
                renamed[f"{block}.to_{to}.{layer[4:]}"] = part
        elif layer in ("weight", "bias"):
            renamed[f"{block}.{layer}"] = weight
        else:
            inner, _, kind = layer.rpartition(".")
            is_product = inner == "proj_out" and kind == "weight"
            renamed[f"{block}.{_INNER.get(inner, inner)}.{kind}"] = weight.flatten(1) if is_product else weight
    return unet_on_weights(path, "a UNetModel with 2D convolutions", config, renamed)


def _block_names(attended: list[bool], num_res_blocks: int) -> dict[str, str]:
    """Return this package's names of blocks, by the original's."""
    names, down, up = {}, 1, 0
    for i in range(len(attended)):
        for j in range(num_res_blocks):
            names[f"input_blocks.{down}.0"] = f"down_blocks.{i}.resnets.{j}"
            names[f"input_blocks.{down}.1"] = f"down_blocks.{i}.attentions.{j}"
            down += 1
        names[f"input_blocks.{down}.0"] = f"down_blocks.{i}.downsamplers.0"
        down += 1
    for i, attention in enumerate(reversed(attended)):
        for j in range(num_res_blocks + 1):
            names[f"output_blocks.{up}.0"] = f"up_blocks.{i}.resnets.{j}"
            names[f"output_blocks.{up}.{1 + attention}"] = f"up_blocks.{i}.upsamplers.0"
            if attention:
                names[f"output_blocks.{up}.1"] = f"up_blocks.{i}.attentions.{j}"
            up += 1
    return names


def _queries_keys_values(weight: Tensor, heads: int, new_order: bool) -> list[Tensor]:
    """Return the rows of queries, keys and values in a joined projection, heads one after another."""
    channels = weight.shape[0] // 3
    expect(
        weight.shape[0] % (3 * heads) == 0,
        "heads",
        f"to divide {channels} channels of an attention",
        f"{heads} heads",
    )
    rows = weight.reshape(channels * 3, *weight.shape[1:2])
    if new_order:
        return list(rows.chunk(3))
    by_head = rows.reshape(heads, 3, channels // heads, *rows.shape[1:])
    return [by_head[:, i].reshape(channels, *rows.shape[1:]) for i in range(3)]
