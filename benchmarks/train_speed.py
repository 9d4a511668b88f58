"""Training steps per second of the CIFAR-10 network of Ho et al. (35.7 M parameters), beside diffusers, eager and compiled.

    python benchmarks/train_speed.py

One step is Algorithm 1: noise, x_t, the network, the loss, the gradient, fused AdamW. The peers do it with torch.randn,
DDPMScheduler.add_noise, UNet2DModel and F.mse_loss. Weights, images, timesteps and optimizer are the same, and each network
is in the memory format that is the faster for it.
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
DIFFUSERS, COMPILED, OURS = "diffusers + eager PyTorch", "diffusers + torch.compile", "ddpm_fast"
PRECISIONS = {"float32": False, "bf16": True}  # by autocast


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


def train_step(
    loss: Callable[[nn.Module, Batch, bool], Tensor], model: nn.Module, batch: Batch, autocast: bool
) -> Callable[[], float]:
    """A step of training, which returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)

    def step() -> float:
        value = loss(model, batch, autocast)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def networks(device: str) -> dict[str, nn.Module]:
    ours = peers.cifar10_unet()
    return {DIFFUSERS: peers.diffusers_unet(ours).to(device).train(), OURS: ours.to(device).train()}


def check(models: dict[str, nn.Module], device: str) -> None:
    """The same noise gives the same loss and gradient, in float32 and the memory format that has convolutions of our own."""
    batch = Batch(2, device)
    gradients, losses = {}, {}
    for name, model in models.items():
        ours = name == OURS
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = loss_ours(model, batch, False) if ours else loss_diffusers(model, batch, False, batch.epsilon())
        parameters = dict(sorted(model.named_parameters()))
        gradients[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
        losses[name] = loss.item()
    error = float((gradients[OURS] - gradients[DIFFUSERS]).norm() / gradients[DIFFUSERS].norm())
    loss_error = abs(losses[OURS] / losses[DIFFUSERS] - 1)
    if not (loss_error < 1e-5 and error < 1e-4):
        raise AssertionError(f"loss differs by {loss_error:.2g}, the gradient by {error:.2g}: no speed is reported")
    print(f"parity: loss equal to {loss_error:.1g}, gradient to {error:.1g} (relative, float32)")


def fastest_format(name: str, model: nn.Module, batch: Batch, autocast: bool) -> tuple[str, Callable[[], float]]:
    """The memory format that suits the contestant, and its step in it, warmed up."""
    candidates = {}
    for key, memory_format in FORMATS.items():
        candidate = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
        placed = copy.copy(batch)
        placed.x_0 = batch.x_0.contiguous(memory_format=memory_format)
        network = torch.compile(candidate) if name == COMPILED else candidate
        candidates[key] = train_step(loss_ours if name == OURS else loss_diffusers, network, placed, autocast)
        for _ in range(2):
            candidates[key]()
    trial = common.compare(candidates, batch.x_0.device, warm=True, min_rounds=3)
    best = min(trial, key=lambda key: trial[key].ms)
    return best, candidates[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each, in turns")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    machine = common.machine(args.device)
    common.print_machine(machine)
    models = networks(args.device)
    check(models, args.device)
    contestants = [DIFFUSERS, *([] if args.no_compile else [COMPILED]), OURS]
    for precision in args.precision:
        steps, formats = {}, {}
        for name in contestants:
            model = models[OURS if name == OURS else DIFFUSERS]
            batch = Batch(args.batch, args.device)
            formats[name], steps[name] = fastest_format(name, model, batch, PRECISIONS[precision])
        times = common.compare(steps, args.device, warm=True, min_rounds=args.rounds)
        rows: list[dict[str, object]] = [
            {
                "training step": name,
                "batch": args.batch,
                "precision": "bf16 autocast" if PRECISIONS[precision] else precision,
                "memory format": formats[name],
                "seconds": taken.spread,
                "images/s": taken.per_second(args.batch).median,
                **{f"times {peer}": taken.speedup_over(times[peer]) for peer in contestants if peer != OURS},
            }
            for name, taken in times.items()
        ]
        common.print_table("cifar10-32, 35.7 M parameters: median [quartiles]", rows)
        output = args.out or common.default_output(args.device)
        common.record(output, f"train_speed {precision}", machine, rows)


if __name__ == "__main__":
    main()
