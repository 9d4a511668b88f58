"""The elementwise ops beside diffusers and eager PyTorch: noise, q_sample, reverse_step, denoising_loss.

    python benchmarks/ops_speed.py

`reverse_step` and `q_sample` draw their noise, as they do when sampling and training; so do their peers, with torch.randn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import common
import peers
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, ddpm_plan, denoising_loss, noise, q_sample, reverse_step, sample_seeds
from ddpm_fast.reference import STREAM_Q_SAMPLE

SCHEDULE = NoiseSchedule.linear()
PLAN = ddpm_plan(SCHEDULE)
STEP = 400  # of 1000; t = 599


class Inputs:
    """A batch of images, what a network might say about them, and the seeds of their noise."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.x_0, self.x_t, self.output = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(3))
        self.seeds = sample_seeds(0, shape[0]).to(device)
        self.t = torch.randint(SCHEDULE.num_timesteps, shape[:1]).to(device)
        self.alpha_bars = SCHEDULE.alpha_bars.float().to(device)
        self.step = PLAN.steps(device)[STEP]


def check(i: Inputs) -> None:
    """Both sides compute the same for the same noise, each to the rounding of its dtype."""
    x_0, x_t, output = (x.double() for x in (i.x_0, i.x_t, i.output))
    z, epsilon = (noise(x_0.shape, i.seeds, stream=s, dtype=torch.float64, device=x_0.device) for s in (STEP, STREAM_Q_SAMPLE))
    row = PLAN.coefficients[STEP].tolist()
    low, low_epsilon = z.to(i.x_t.dtype), epsilon.to(i.x_t.dtype)

    truth = peers.reverse_step(x_t, output, row, z)
    got = reverse_step(i.x_t, i.output, i.step, PLAN, seeds=i.seeds)
    assert isinstance(got, Tensor)
    common.require_parity("reverse_step", got, peers.reverse_step(i.x_t, i.output, row, low), truth)

    truth = peers.q_sample(x_0, i.t, SCHEDULE.alpha_bars.to(x_0.device), epsilon)
    got = q_sample(i.x_0, i.t, SCHEDULE, seeds=i.seeds)
    common.require_parity("q_sample", got, peers.q_sample(i.x_0, i.t, i.alpha_bars, low_epsilon), truth)

    truth = peers.denoising_loss(output, epsilon)
    got = denoising_loss(i.output, i.x_0, i.t, SCHEDULE, seeds=i.seeds)
    common.require_parity("denoising_loss", got, peers.denoising_loss(i.output, low_epsilon), truth)

    if peers.have_diffusers():
        scheduler = peers.diffusers_scheduler(SCHEDULE)
        t = scheduler.timesteps[STEP]
        x_0_hat = scheduler.step(i.output, t, i.x_t, generator=torch.Generator(i.x_t.device)).pred_original_sample
        p, q, *_, clip = row
        truth = (p * x_t + q * output).clamp(-clip, clip)
        baseline = (p * i.x_t + q * i.output).clamp(-clip, clip)
        common.require_parity("DDPMScheduler.step", x_0_hat, baseline, truth)


def with_gradient(loss: Callable[[Tensor], Tensor], output: Tensor) -> Callable[[], object]:
    leaf = output.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(leaf), leaf)


def rows(shape: tuple[int, ...], dtype: torch.dtype, device: str, seconds: float) -> list[dict[str, object]]:
    torch.manual_seed(0)
    i = Inputs(shape, dtype, device)
    check(i)
    row = PLAN.coefficients[STEP].tolist()
    size = i.x_0.nbytes
    given = torch.randn_like(i.x_0)

    def ours_in_training(output: Tensor) -> Tensor:
        q_sample(i.x_0, i.t, SCHEDULE, seeds=i.seeds)
        return denoising_loss(output, i.x_0, i.t, SCHEDULE, seeds=i.seeds)

    def eager_in_training(output: Tensor) -> Tensor:
        epsilon = torch.randn_like(i.x_0)
        peers.q_sample(i.x_0, i.t, i.alpha_bars, epsilon)
        return peers.denoising_loss(output, epsilon)

    ops: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {
        "noise": (
            size,
            {
                "ddpm_fast": lambda: noise(shape, i.seeds, dtype=dtype, device=device),
                "torch.randn": lambda: torch.randn(shape, dtype=dtype, device=device),
            },
        ),
        "q_sample": (
            2 * size,
            {
                "ddpm_fast": lambda: q_sample(i.x_0, i.t, SCHEDULE, seeds=i.seeds),
                "eager PyTorch": lambda: peers.q_sample(i.x_0, i.t, i.alpha_bars),
            },
        ),
        "reverse_step": (
            3 * size,
            {
                "ddpm_fast": lambda: reverse_step(i.x_t, i.output, i.step, PLAN, seeds=i.seeds),
                "eager PyTorch": lambda: peers.reverse_step(i.x_t, i.output, row),
            },
        ),
        "q_sample + denoising_loss + backward": (
            4 * size,
            {
                "ddpm_fast": with_gradient(ours_in_training, i.output),
                "eager PyTorch": with_gradient(eager_in_training, i.output),
            },
        ),
        # The peer's noise was drawn before, for add_noise, and is read again; ours is drawn again.
        "denoising_loss + backward": (
            3 * size,
            {
                "ddpm_fast": with_gradient(lambda m: denoising_loss(m, i.x_0, i.t, SCHEDULE, seeds=i.seeds), i.output),
                "eager PyTorch": with_gradient(lambda m: peers.denoising_loss(m, given), i.output),
            },
        ),
    }
    if peers.have_diffusers():
        scheduler = peers.diffusers_scheduler(SCHEDULE)
        t = scheduler.timesteps[STEP]
        ops["q_sample"][1]["diffusers"] = lambda: scheduler.add_noise(i.x_0, torch.randn_like(i.x_0), i.t)
        ops["reverse_step"][1]["diffusers"] = lambda: scheduler.step(i.output, t, i.x_t).prev_sample
    table: list[dict[str, object]] = []
    for op, (num_bytes, contestants) in ops.items():
        floor = {"floor (copy of as many bytes)": common.copy_of(num_bytes, device)}
        times = common.compare(contestants | floor, device, seconds=seconds)
        for name, taken in times.items():
            table.append(
                {
                    "op": op,
                    "by": name,
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": common.Spread(*(1e3 * value for value in taken.spread)),
                    "GB/s": num_bytes / taken.spread.median / 1e9,
                    "ddpm_fast is faster by": times["ddpm_fast"].speedup_over(taken),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--size", type=int, default=32, help="pixels a side, of images with 3 channels")
    parser.add_argument("--dtype", choices=common.DTYPES, nargs="+", default=list(common.DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each comparison")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    machine = common.machine(args.device)
    common.print_machine(machine)
    table: list[dict[str, object]] = []
    for batch in args.batch:
        for dtype in args.dtype:
            shape = (batch, 3, args.size, args.size)
            table += rows(shape, common.DTYPES[dtype], args.device, args.seconds)
    common.print_table("median [quartiles]; floor: the share of a copy's speed", table)
    common.record(args.out or common.default_output(args.device), "ops_speed", machine, table)


if __name__ == "__main__":
    main()
