"""Peak memory of q_sample + denoising_loss, forward and backward, in images-sized tensors: the noise is never stored.

    python benchmarks/memory.py

x_0 and the network's output are there before; x_t is kept, as a network keeps it for its backward pass. So two tensors are
what no implementation can do without: x_t, and the gradient of the output. The usual path adds the noise, which must live
from x_t to the loss, and the temporaries of eager PyTorch. Each way is measured in a process of its own: on a CPU by the
high-water mark of resident memory (Linux), on CUDA by the allocator's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import common
import peers
import runtimes
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import NoiseSchedule, denoising_loss, q_sample, sample_seeds

SCHEDULE = NoiseSchedule.linear()
OURS, EAGER, DIFFUSERS = "ddpm_fast", "eager PyTorch", "diffusers + eager PyTorch"


def ours(x_0: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    seeds = sample_seeds(0, len(x_0)).to(x_0.device)
    x_t = q_sample(x_0, t, SCHEDULE, seeds=seeds)
    return x_t, denoising_loss(output, x_0, t, SCHEDULE, seeds=seeds)


def eager(x_0: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x_0)
    x_t = peers.q_sample(x_0, t, SCHEDULE.alpha_bars.float().to(x_0.device), noise)
    return x_t, F.mse_loss(output, noise)


def diffusers(x_0: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    scheduler = peers.diffusers_scheduler(SCHEDULE)
    noise = torch.randn_like(x_0)
    x_t = scheduler.add_noise(x_0, noise, t)
    return x_t, F.mse_loss(output, noise)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {OURS: ours, EAGER: eager, DIFFUSERS: diffusers}


class Meter:
    """Bytes in use, now and at most since `reset`."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if not self.cuda and sys.platform != "linux":
            raise SystemExit("memory.py: on a CPU it reads Linux's /proc, which this system lacks")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak becomes what is resident

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _bytes("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _bytes("VmHWM")


def _bytes(key: str) -> int:
    number = runtimes.proc_status(key)
    assert number is not None
    return number


def measure(way: str, shape: tuple[int, ...], device: str) -> dict[str, float]:
    """Full-size tensors on top of x_0 and the output: held between forward and backward, and at the peak."""

    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x_0 = torch.rand(n, *shape[1:], device=device) * 2 - 1
        output = torch.randn_like(x_0).requires_grad_()
        return x_0, torch.randint(SCHEDULE.num_timesteps, (n,), device=device), output

    WAYS[way](*inputs(1))[1].backward()  # what is loaded or allocated at the first call is not counted
    x_0, t, output = inputs(shape[0])
    meter = Meter(device)
    meter.reset()
    before = meter.now()
    x_t, loss = WAYS[way](x_0, t, output)
    held = meter.now() - before
    loss.backward()
    peak = meter.peak() - before
    assert x_t.shape == x_0.shape  # alive until here
    assert output.grad is not None
    return {"held": held / x_0.nbytes, "peak": peak / x_0.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=512, help="pixels a side, of images with 3 channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)  # what the process of one way is called with
    args = parser.parse_args()
    shape = (args.batch, 3, args.size, args.size)
    if args.only:
        print(json.dumps(measure(args.only, shape, args.device)))
        return

    machine = common.machine(args.device)
    common.print_machine(machine)
    rows: list[dict[str, object]] = []
    for way in WAYS:
        if way == DIFFUSERS and not peers.have_diffusers():
            continue
        command = [sys.executable, __file__, "--only", way, "--batch", args.batch, "--size", args.size, "--device", args.device]
        output = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout
        tensors = json.loads(output)
        rows.append(
            {
                "q_sample + loss + backward": way,
                "shape": "x".join(map(str, shape)),
                "a tensor, MB": 4 * args.batch * 3 * args.size**2 / 1e6,
                "held for backward, tensors": round(tensors["held"], 2),
                "peak, tensors": round(tensors["peak"], 2),
            }
        )
    common.print_table("memory on top of x_0 and the network's output, in tensors of their size", rows)
    mine = rows[0]
    if mine["held for backward, tensors"] > 1.1 or mine["peak, tensors"] > 2.1:  # type: ignore[operator]
        raise SystemExit("ddpm_fast holds more than x_t and the output's gradient: something stores the noise")
    common.record(args.out or common.default_output(args.device), "memory", machine, rows)


if __name__ == "__main__":
    main()
