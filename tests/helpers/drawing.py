"""Small models and plans to draw from."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import multistep
from torch import Tensor, nn

from ddpm_fast import FrozenUNet, NoiseSchedule, SamplingPlan, UNet, ddim_plan, ddpm_plan, dpm_solver_plan, sample

SCHEDULE = NoiseSchedule.linear(20, beta_start=5e-3, beta_end=0.3)
PLAN = ddpm_plan(SCHEDULE, 3)


class Gaussian(nn.Module):
    """The optimal network for data N(mean, std^2 I): E[epsilon | x_t], or E[x_0 | x_t], or E[v | x_t], in closed form."""

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float, prediction: str = "epsilon") -> None:
        super().__init__()
        self.register_buffer("alpha_bars", schedule.alpha_bars)
        self.mean, self.std, self.prediction = mean, std, prediction

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        abar = self.alpha_bars[t].reshape(-1, *[1] * (x_t.dim() - 1))
        deviation = (x_t.double() - abar.sqrt() * self.mean) / (abar * self.std**2 + 1 - abar)
        epsilon = (1 - abar).sqrt() * deviation
        x_0 = self.mean + abar.sqrt() * self.std**2 * deviation
        v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x_0
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[self.prediction].to(x_t.dtype)


class Recording(nn.Module):
    """Elementwise, so that nothing but the noise can differ from image to image; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9))
        self.calls: list[tuple[torch.Size, torch.dtype, Tensor, bool]] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x_t.shape, x_t.dtype, t, self.training))
        return self.weight * torch.tanh(x_t)


def tiny_unet(classes: int | None = None, learned_variance: bool = False, **changes: Any) -> UNet:
    """Return a network with random weights in every layer and a level with attention. `changes` are of its configuration."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2 if learned_variance else 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": None if classes is None else classes + 1,
        "no_label": classes,
    }
    model = UNet(**config | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


CASES: dict[str, tuple[dict[str, Any], SamplingPlan, dict[str, Any]]] = {
    "ddpm": ({}, ddpm_plan(SCHEDULE, 6), {}),
    "classes": ({"classes": 3}, ddpm_plan(SCHEDULE, 6), {"class_labels": [0, 1, 2, 0, 1]}),
    "guidance": ({"classes": 3}, ddim_plan(SCHEDULE, 4), {"class_labels": 1, "guidance_scale": 2.0}),
    "learned variance": ({"learned_variance": True}, ddpm_plan(SCHEDULE, 5, variance="learned_range"), {}),
    "multistep": ({}, multistep(ddim_plan(SCHEDULE, 4)), {}),
    "order 3": ({}, dpm_solver_plan(SCHEDULE, 6, order=3, eta=1.0), {}),
    "one step": ({}, ddpm_plan(SCHEDULE, 1), {}),
}


def draw(model: nn.Module | FrozenUNet, n: int = 2, plan: SamplingPlan = PLAN, **arguments: Any) -> Tensor:
    return sample(model, plan, n, progress=False, **arguments)
