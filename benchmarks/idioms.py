"""The PyTorch that people write: ops, the network, sampling and training in eager PyTorch and with diffusers."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, SamplingPlan, denoising_loss, noise, q_sample, sample_seeds
from ddpm_fast.nn import CIFAR10_32, HO_256, UNet
from ddpm_fast.nn.layers import GroupNormSiLU
from ddpm_fast.plan import COLUMNS
from ddpm_fast.reference import STREAM_Q_SAMPLE

SCHEDULE = NoiseSchedule.linear()
_BLOCKS: dict[str, Any] = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10-32": CIFAR10_32,
    "64x64": CIFAR10_32
    | {"sample_size": 64, "block_out_channels": [128, 128, 256, 256]}
    | {"down_block_types": ["DownBlock2D"] * 2 + ["AttnDownBlock2D", "DownBlock2D"]}
    | {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 2},
    # The blocks of guided-diffusion: classes, scale and shift, residual blocks that resample, heads of 64 channels.
    "guided-64": CIFAR10_32
    | {"sample_size": 64, "block_out_channels": [128, 256, 384, 512], "attention_head_dim": 64, "num_class_embeds": 1001}
    | {"down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3, "downsample_type": "resnet"}
    | {"up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"], "upsample_type": "resnet"}
    | {"resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-5},
    "256x256": HO_256,
    "small": CIFAR10_32 | _BLOCKS | {"block_out_channels": [32, 64, 128]},
    "tiny": CIFAR10_32 | _BLOCKS | {"block_out_channels": [32, 32, 32], "sample_size": 8, "layers_per_block": 1},
}

# --------------------------------------------------------------------------------------------------------------- ops


def add_noise(x_0: Tensor, t: Tensor, alpha_bars: Tensor, noise: Tensor | None = None) -> Tensor:
    """Compute x_t as `add_noise` of diffusers does, from torch.randn unless `noise` is given."""
    if noise is None:
        noise = torch.randn_like(x_0)
    alpha_bar = alpha_bars.to(x_0.dtype)[t].view(-1, *[1] * (x_0.dim() - 1))
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def rows_of(plan: SamplingPlan) -> list[dict[str, float]]:
    """Return the coefficients of each step by name."""
    return [dict(zip(COLUMNS, row, strict=True)) for row in plan.coefficients.tolist()]


def reverse_step(x_t: Tensor, epsilon: Tensor, row: dict[str, float], noise: Tensor | None = None) -> Tensor:
    """Take one step of ancestral sampling through a clipped x_0^ (Ho et al. 2020, eq. 7), from a row of coefficients."""
    x_0 = (row["p"] * x_t + row["q"] * epsilon).clamp(-row["clip"], row["clip"])
    mean = row["k0"] * x_0 + row["k1"] * x_t
    if row["sigma"] == 0:
        return mean
    return mean + row["sigma"] * (torch.randn_like(x_t) if noise is None else noise)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Add the time embedding, then normalize and activate."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return y if activation is None else F.silu(y)


# ----------------------------------------------------------------------------------------------------------- networks


class PlainGroupNormSiLU(GroupNormSiLU):
    """The same parameters in eager PyTorch."""

    def forward(self, input: Tensor, shift: Tensor | None = None, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if scale_shift is None:
            arguments = (self.num_groups, self.weight, self.bias, self.eps, shift, self.activation)
            return group_norm_silu(input, *arguments)
        scale, scale_shift_ = (value[:, :, None, None] for value in scale_shift)
        y = group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, shift, None) * (1 + scale) + scale_shift_
        return y if self.activation is None else F.silu(y)


def plain(model: nn.Module) -> nn.Module:
    """Replace every norm of the network by eager PyTorch, in place."""
    for module in model.modules():
        if type(module) is GroupNormSiLU:
            module.__class__ = PlainGroupNormSiLU
    return model


def random_unet(config: dict[str, Any]) -> UNet:
    """Return a network with reproducible random weights.

    Weights that training starts from zero are random too, or the output and most gradients would be zero.
    """
    torch.manual_seed(0)
    model = UNet(**config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    return model


def fill_zeros(network: nn.Module, std: float) -> None:
    """Draw the weights that another library starts from zero."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


@functools.cache
def diffusers() -> Any:
    """Return the library, silent and offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def diffusers_unet(model: UNet) -> Any:
    """Return diffusers' UNet2DModel with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return diffusers().UNet2DModel.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------- sampling and training


@torch.no_grad()
def sample(
    network: Callable[..., Any],
    plan: SamplingPlan,
    like: Tensor,
    labels: Tensor | None = None,
    *,
    draw: Callable[[int | None, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sample by Algorithm 2 of Ho et al. The state is float32, or float64 for a float64 network, as in `ddpm_fast`.

    Args:
        network: A U-Net of this package or of diffusers.
        plan: The sampler.
        like: A tensor with the shape of the images, the dtype of the network and its device.
        labels: Class labels.
        draw: Noise like a tensor for a step (None: x_T). By default torch.randn_like.
    """
    x = like.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    x = torch.randn_like(x) if draw is None else draw(None, x)
    timesteps = plan.timesteps.to(like.device)[:, None].expand(-1, len(like)).contiguous()  # no step waits for the host
    for step, row in enumerate(rows_of(plan)):
        output = network(x.to(like.dtype), timesteps[step], labels)
        epsilon = (output if isinstance(output, Tensor) else output.sample).to(x.dtype)
        x = reverse_step(x, epsilon, row, None if draw is None else draw(step, x))
    return x


class Batch:
    """Reproducible images, timesteps and seeds of the noise."""

    def __init__(
        self, n: int, size: int, device: str = "cpu", memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(n, 3, size, size, generator=generator) * 2 - 1
        self.x_0 = images.to(device).contiguous(memory_format=memory_format)
        self.t = torch.randint(SCHEDULE.num_timesteps, (n,), generator=generator).to(device)
        self.seeds = sample_seeds(0, n).to(device)


def loss_ours(model: nn.Module, batch: Batch, autocast: bool) -> Tensor:
    x_t = q_sample(batch.x_0, batch.t, SCHEDULE, seeds=batch.seeds)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, batch.t)
    return denoising_loss(output.float(), batch.x_0, batch.t, SCHEDULE, seeds=batch.seeds)


def loss_peer(model: nn.Module, batch: Batch, autocast: bool, epsilon: Tensor | None = None) -> Tensor:
    """Compute the loss as people do with diffusers' network. A plain `UNet` may stand in for it."""
    epsilon = torch.randn_like(batch.x_0) if epsilon is None else epsilon
    x_t = add_noise(batch.x_0, batch.t, _alpha_bars(batch.x_0.device), epsilon)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, batch.t)
    output = output if isinstance(output, Tensor) else output.sample
    return F.mse_loss(output.float(), epsilon)


def loss_peer_of_seeds(model: nn.Module, batch: Batch, autocast: bool) -> Tensor:
    """Compute the same with the noise that the seeds stand for, which is that of `loss_ours`."""
    epsilon = noise(batch.x_0.shape, batch.seeds, stream=STREAM_Q_SAMPLE, device=batch.x_0.device)
    return loss_peer(model, batch, autocast, epsilon)


@functools.cache
def _alpha_bars(device: torch.device) -> Tensor:
    return SCHEDULE.alpha_bars.float().to(device)


def train_step(loss: Callable[[nn.Module, Batch, bool], Tensor], model: nn.Module, autocast: bool) -> Callable[[Batch], float]:
    """Return a step of Algorithm 1 with fused AdamW, which returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)

    def step(batch: Batch) -> float:
        value = loss(model, batch, autocast)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step
