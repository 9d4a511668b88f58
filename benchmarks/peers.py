"""What ddpm_fast is measured against: each op in the eager PyTorch that people write, and networks and samplers made of it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import runtimes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, SamplingPlan
from ddpm_fast.nn import CIFAR10_32, UNet
from ddpm_fast.nn.layers import GroupNormSiLU


def q_sample(x_0: Tensor, t: Tensor, alpha_bars: Tensor, noise: Tensor | None = None) -> Tensor:
    """torch.randn and `add_noise`, as in diffusers."""
    if noise is None:
        noise = torch.randn_like(x_0)
    alpha_bar = alpha_bars.to(x_0.dtype)[t].view(-1, *[1] * (x_0.dim() - 1))
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def reverse_step(x_t: Tensor, epsilon: Tensor, row: list[float], noise: Tensor | None = None) -> Tensor:
    """One step of ancestral sampling through a clipped x_0^ (Ho et al. 2020, eq. 7); `row` of `SamplingPlan.coefficients`."""
    p, q, k0, k1, _, _, sigma, _, _, clip = row
    x_0 = (p * x_t + q * epsilon).clamp(-clip, clip)
    mean = k0 * x_0 + k1 * x_t
    if sigma == 0:
        return mean
    return mean + sigma * (torch.randn_like(x_t) if noise is None else noise)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """The time embedding added, F.group_norm, F.silu."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return y if activation is None else F.silu(y)


def denoising_loss(model_output: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(model_output, noise)


class PlainGroupNormSiLU(GroupNormSiLU):
    """The same parameters, the eager idiom."""

    def forward(self, input: Tensor, shift: Tensor | None = None, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if scale_shift is None:
            arguments = (self.num_groups, self.weight, self.bias, self.eps, shift, self.activation)
            return group_norm_silu(input, *arguments)
        scale, scale_shift_ = (value[:, :, None, None] for value in scale_shift)
        y = group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, shift, None) * (1 + scale) + scale_shift_
        return y if self.activation is None else F.silu(y)


def plain(model: nn.Module) -> nn.Module:
    """Makes every norm of the network the eager idiom, in place."""
    for module in model.modules():
        if type(module) is GroupNormSiLU:
            module.__class__ = PlainGroupNormSiLU
    return model


def cifar10_unet() -> UNet:
    """The CIFAR-10 network of Ho et al., 35.7 M parameters."""
    return random_unet(CIFAR10_32)


def random_unet(config: dict[str, Any]) -> UNet:
    """With reproducible random weights.

    Those that training starts from zero are random too, or its output and most of its gradients would be zero.
    """
    torch.manual_seed(0)
    model = UNet(**config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    return model


@torch.no_grad()
def sample(
    model: nn.Module,
    plan: SamplingPlan,
    shape: tuple[int, ...],
    labels: Tensor | None = None,
    *,
    draw: Callable[[int | None, Tensor], Tensor] | None = None,
) -> Tensor:
    """Algorithm 2 of Ho et al. in plain PyTorch: the state stays float32 (float64 for a float64 network), as in `ddpm_fast`.

    Args:
        draw: noise for a step (None: x_T), like a tensor; by default `torch.randn_like`.
    """
    parameter = next(model.parameters())
    state = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    like = torch.empty(shape, dtype=state, device=parameter.device)
    x = torch.randn_like(like) if draw is None else draw(None, like)
    for step, (t, row) in enumerate(zip(plan.timesteps.tolist(), plan.coefficients.tolist(), strict=True)):
        timesteps = torch.full((len(x),), t, device=x.device)
        epsilon = model(x.to(parameter.dtype), timesteps, labels).to(state)
        x = reverse_step(x, epsilon, row, None if draw is None else draw(step, x))
    return x


def have_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def diffusers_scheduler(schedule: NoiseSchedule, num_steps: int | None = None) -> Any:
    """Diffusers' DDPMScheduler for the same betas."""
    scheduler = runtimes.diffusers().DDPMScheduler(
        num_train_timesteps=schedule.num_timesteps, trained_betas=schedule.betas.tolist()
    )
    scheduler.set_timesteps(num_steps or schedule.num_timesteps)
    return scheduler


def diffusers_unet(model: UNet) -> Any:
    """Diffusers' UNet2DModel with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return runtimes.diffusers().UNet2DModel.from_pretrained(folder)


def diffusers_pipeline(network: Any, schedule: NoiseSchedule) -> Any:
    """Diffusers' DDPMPipeline, without its progress bar."""
    pipeline = runtimes.diffusers().DDPMPipeline(unet=network, scheduler=diffusers_scheduler(schedule))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
