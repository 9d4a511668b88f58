"""Parts that the pages of docs/migrating/ take as given."""

from __future__ import annotations

import types
from typing import Any

import torch
from other_blocks import UNetModel
from torch import Tensor, nn


def save_pipeline(folder: str) -> None:
    """Write a small DDPMPipeline of diffusers with random weights."""
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32), **blocks)
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)


def save_checkpoint(diffusion: nn.Module) -> None:
    """Write model-10.pt as the Trainer of denoising-diffusion-pytorch does."""
    weights = {f"ema_model.{name}": weight for name, weight in diffusion.state_dict().items()}
    torch.save({"step": 1, "model": diffusion.state_dict(), "ema": weights}, "model-10.pt")


class GaussianDiffusion:
    """A process with the attributes of guided-diffusion's. Its loop has one step."""

    betas, num_timesteps, rescale_timesteps = torch.linspace(1e-4, 0.02, 4), 4, False
    model_mean_type, model_var_type = (types.SimpleNamespace(name=name) for name in ("EPSILON", "LEARNED_RANGE"))

    def p_sample_loop(self, model: Any, shape: tuple[int, ...], model_kwargs: dict[str, Tensor]) -> Tensor:
        return model(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64), **model_kwargs)


def create_model_and_diffusion(**flags: Any) -> tuple[nn.Module, GaussianDiffusion]:
    """Return a small class-conditional UNetModel and a process, and write the weights to 64x64_diffusion.pt."""
    model = UNetModel(64, 3, 32, 6, 1, (4,), channel_mult=(1, 1, 1), num_classes=10, num_heads=4)
    torch.save(model.state_dict(), "64x64_diffusion.pt")
    return model, GaussianDiffusion()
