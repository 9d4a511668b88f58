"""Who takes a training step of the CIFAR-10 network of Ho et al.: ddpm_fast and diffusers, eager and compiled.

One step is Algorithm 1: noise, x_t, the network, the loss, the gradient, fused AdamW. The peers do it with torch.randn,
DDPMScheduler.add_noise, UNet2DModel and F.mse_loss. Weights, images, timesteps and optimizer are the same. As in runtimes.py,
each is a process of its own, as memory that one keeps is no business of others'.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import peers
import runtimes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, denoising_loss, kept_memory, noise, q_sample, sample_seeds
from ddpm_fast.nn import CIFAR10_32
from ddpm_fast.reference import STREAM_Q_SAMPLE

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCHEDULE = NoiseSchedule.linear()
DIFFUSERS, COMPILED, OURS = "diffusers + eager PyTorch", "diffusers + torch.compile", "ddpm_fast"
WARM_UP = 2  # steps


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
    x_t = _scheduler().add_noise(batch.x_0, epsilon, batch.t)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, batch.t).sample
    return F.mse_loss(output.float(), epsilon)


@functools.cache
def _scheduler() -> Any:
    return peers.diffusers_scheduler(SCHEDULE)


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


# -------------------------------------------------------------------------------------------------------- contestants


class Contestant(NamedTuple):
    """Who trains, whether inside of `kept_memory`, and the memory format (of FORMATS) of images and weights."""

    library: str
    kept: bool
    memory_format: str

    @property
    def name(self) -> str:
        return f"{self.library}, {'memory kept, ' if self.kept else ''}{self.memory_format}"


@dataclass(frozen=True)
class TrainingJob(runtimes.Job):
    """Its dtype bf16 is by autocast. The network comes from a seed, not from the folder."""

    program: ClassVar[str] = __file__
    device: str = "cpu"


@dataclass(frozen=True)
class Steps:
    """A Runner: steps of training, one after another."""

    step: Callable[[], float]
    keeping: AbstractContextManager[None]  # entered; while it lives, memory is kept

    def output(self) -> None:
        self.seconds(WARM_UP)

    def seconds(self, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            self.step()
        return (time.perf_counter() - began) / calls


def load(contestant: Contestant, job: runtimes.Job) -> Steps:
    assert isinstance(job, TrainingJob)
    torch.set_num_threads(job.threads)
    keeping = kept_memory() if contestant.kept else nullcontext()
    keeping.__enter__()
    memory_format = FORMATS[contestant.memory_format]
    ours = contestant.library == OURS
    model: Any = peers.cifar10_unet()
    if not ours:
        model = peers.diffusers_unet(model)
    model = model.to(job.device, memory_format=memory_format).train()
    if contestant.library == COMPILED:
        model = torch.compile(model)
    batch = Batch(job.batch, job.device)
    batch.x_0 = batch.x_0.contiguous(memory_format=memory_format)
    return Steps(train_step(loss_ours if ours else loss_diffusers, model, batch, job.dtype == "bf16"), keeping)


CONTESTANTS = {
    contestant.name: runtimes.Runtime(functools.partial(load, contestant))
    for contestant in itertools.starmap(Contestant, itertools.product((DIFFUSERS, COMPILED, OURS), (False, True), FORMATS))
}


if __name__ == "__main__":
    runtimes.serve(CONTESTANTS, TrainingJob)
