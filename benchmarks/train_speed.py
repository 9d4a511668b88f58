"""Training steps per second of the CIFAR-10 network of Ho et al. (35.7 M parameters), beside diffusers and eager PyTorch.

    python benchmarks/train_speed.py

One step is Algorithm 1 under bf16 autocast: noise, x_t, the network, the loss, the gradient, AdamW. The peer does it with
torch.randn, DDPMScheduler.add_noise, UNet2DModel and F.mse_loss. Weights, images, timesteps and optimizer are the same, and
each network is in the memory format that is the faster for it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import common
import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, denoising_loss, noise, q_sample, sample_seeds
from ddpm_fast.nn import CIFAR10_32
from ddpm_fast.reference import STREAM_Q_SAMPLE

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCHEDULE = NoiseSchedule.linear()
DIFFUSERS, OURS = "diffusers + eager PyTorch", "ddpm_fast"


class Batch:
    """Images, timesteps, and the seeds of the noise; reproducible."""

    def __init__(self, n: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        size = CIFAR10_32["sample_size"]
        self.x_0 = (torch.rand(n, 3, size, size, generator=generator) * 2 - 1).to(device)
        self.t = torch.randint(SCHEDULE.num_timesteps, (n,), generator=generator).to(device)
        self.seeds = sample_seeds(0, n).to(device)

    def epsilon(self) -> Tensor:
        """The noise that the seeds stand for."""
        return noise(self.x_0.shape, self.seeds, stream=STREAM_Q_SAMPLE, device=self.x_0.device)


def loss_ours(model: nn.Module, batch: Batch, autocast: bool) -> Tensor:
    x_t = q_sample(batch.x_0, batch.t, SCHEDULE, seeds=batch.seeds)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, batch.t)
    return denoising_loss(output.float(), batch.x_0, batch.t, SCHEDULE, seeds=batch.seeds)


def loss_diffusers(model: nn.Module, batch: Batch, autocast: bool, epsilon: Tensor | None = None) -> Tensor:
    epsilon = torch.randn_like(batch.x_0) if epsilon is None else epsilon
    x_t = _scheduler.add_noise(batch.x_0, epsilon, batch.t)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, batch.t).sample
    return F.mse_loss(output.float(), epsilon)


_scheduler = peers.diffusers_scheduler(SCHEDULE)


def train_step(loss: Callable[[nn.Module, Batch, bool], Tensor], model: nn.Module, batch: Batch) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    def step() -> None:
        loss(model, batch, True).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def networks(device: str) -> dict[str, nn.Module]:
    ours = peers.cifar10_unet()
    return {DIFFUSERS: peers.diffusers_unet(ours).to(device).train(), OURS: ours.to(device).train()}


def check(models: dict[str, nn.Module], device: str) -> None:
    """The same noise gives the same loss and gradient, in float32."""
    batch = Batch(2, device)
    gradients, losses = {}, {}
    for name, model in models.items():
        ours = name == OURS
        loss = loss_ours(model, batch, False) if ours else loss_diffusers(model, batch, False, batch.epsilon())
        parameters = dict(sorted(model.named_parameters()))
        gradients[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
        losses[name] = loss.item()
    error = float((gradients[OURS] - gradients[DIFFUSERS]).norm() / gradients[DIFFUSERS].norm())
    loss_error = abs(losses[OURS] / losses[DIFFUSERS] - 1)
    if not (loss_error < 1e-5 and error < 1e-4):
        raise AssertionError(f"loss differs by {loss_error:.2g}, the gradient by {error:.2g}: no speed is reported")
    print(f"parity: loss equal to {loss_error:.1g}, gradient to {error:.1g} (relative, float32)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each, in turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    machine = common.machine(args.device)
    common.print_machine(machine)
    models = networks(args.device)
    check(models, args.device)
    losses = {DIFFUSERS: loss_diffusers, OURS: loss_ours}
    steps, formats = {}, {}
    for name, model in models.items():
        batch = Batch(args.batch, args.device)
        candidates = {}
        for key, memory_format in FORMATS.items():
            candidate = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
            placed = copy.copy(batch)
            placed.x_0 = batch.x_0.contiguous(memory_format=memory_format)
            candidates[key] = train_step(losses[name], candidate, placed)
            candidates[key]()
        trial = common.compare(candidates, args.device, warm=True, min_rounds=3)
        formats[name] = min(trial, key=lambda key: trial[key].ms)
        steps[name] = candidates[formats[name]]
    times = common.compare(steps, args.device, warm=True, min_rounds=args.rounds)
    rows: list[dict[str, object]] = [
        {
            "training step": name,
            "batch": args.batch,
            "precision": "bf16 autocast",
            "memory format": formats[name],
            "steps/s": taken.per_second(1),
            "images/s": taken.per_second(args.batch).median,
            f"times {DIFFUSERS}": taken.speedup_over(times[DIFFUSERS]),
        }
        for name, taken in times.items()
    ]
    common.print_table("cifar10-32, 35.7 M parameters: median [quartiles]", rows)
    common.record(args.out or common.default_output(args.device), "train_speed", machine, rows)


if __name__ == "__main__":
    main()
