"""Small U-Nets that between them have everything that a configuration can ask for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.nn import UNet

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 2,
    "out_channels": 3,
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
# One reason each; every other key has diffusers' default, which is then compared too.
VARIANTS: dict[str, dict[str, Any]] = {
    "class-conditional": {"num_class_embeds": 11},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},  # no norm in the middle attention
    "scale-shift-mid-norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "heads": {"attention_head_dim": 16, "layers_per_block": 1},
    "one-head-asymmetric": {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    "no-mid-attention": {"add_attention": False, "center_input_sample": True, "time_embedding_dim": 40, "norm_eps": 1e-3},
    "mid-scale": {"mid_block_scale_factor": 1.5, "layers_per_block": 3},
    "attention-everywhere": {
        "down_block_types": ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3,
        "attention_head_dim": 16,
        "layers_per_block": 1,
    },
    "resampling": {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "downsample_type": "resnet",
    },
    "resampling-scale-shift": {  # as Dhariwal and Nichol (2021)
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
    },
}


def randomise(model: torch.nn.Module) -> None:
    """No weight keeps a value at which a layer would be the identity or zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm_weight = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if norm_weight else noise * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))


def make_unet(variant: str = "heads", **changes: Any) -> tuple[UNet, dict[str, Any]]:
    """Return a network with random weights in eval mode, and its configuration."""
    config = SMALL | VARIANTS[variant] | changes
    model = UNet(**config).eval()
    randomise(model)
    return model, config


def make_inputs(config: dict[str, Any], n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size, classes = config["sample_size"], config.get("num_class_embeds")
    x = torch.randn(n, config.get("in_channels", 3), size, size, generator=generator, dtype=dtype)
    t = torch.randint(0, 1000, (n,), generator=generator)
    return x, t, None if classes is None else torch.randint(0, classes, (n,), generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_as_right(out: Tensor, model: torch.nn.Module, *inputs: Tensor | None) -> None:
    """Expect an error, against the model in float64, of at most twice the model's own in the dtype of `out`.

    A wrong constant or a lost term cannot hide in the rounding of float64.
    """
    with torch.no_grad():
        exact, own = (copy.deepcopy(model).eval().to(dtype)(*inputs) for dtype in (torch.float64, out.dtype))
    assert relative_error(out, exact) <= (1e-13 if out.dtype == torch.float64 else 2 * relative_error(own, exact))
