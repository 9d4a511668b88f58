"""Measure what the ops of a training step hold: peak memory of q_sample, the loss and its gradient.

    python benchmarks/benchmark_memory.py

The unit is a tensor of the images' size. x_0 and the network's output exist before, and x_t is kept, as a network keeps it.
No implementation can do with less than two: x_t, and the output's gradient. The usual way adds the noise, which lives from x_t
to the loss, and the temporaries of eager PyTorch.
Each way is a process of its own: on a CPU this reads the high-water mark of resident memory (Linux), on CUDA the allocator's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import idioms
import torch
import torch.nn.functional as F
from peers import DIFFUSERS, OURS, installed
from processes import proc_status
from torch import Tensor

from ddpm_fast import denoising_loss, q_sample, sample_seeds


def _ours(x_0: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    seeds = sample_seeds(0, len(x_0)).to(x_0.device)
    x_t = q_sample(x_0, t, idioms.SCHEDULE, seeds=seeds)
    return x_t, denoising_loss(output, x_0, t, idioms.SCHEDULE, seeds=seeds)


def _eager(x_0: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x_0)
    return idioms.add_noise(x_0, t, idioms.SCHEDULE.alpha_bars.float().to(x_0.device), noise), F.mse_loss(output, noise)


def _diffusers(x_0: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x_0)
    return idioms.diffusers_scheduler(idioms.SCHEDULE).add_noise(x_0, noise, t), F.mse_loss(output, noise)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    OURS: _ours,
    "eager PyTorch": _eager,
    f"{DIFFUSERS} + eager PyTorch": _diffusers,
}


def in_use(on_gpu: bool) -> int:
    return torch.cuda.memory_allocated() if on_gpu else proc_status("VmRSS") or 0


def measure_ops(way: str, shape: tuple[int, ...], device: str) -> dict[str, float]:
    """Return tensors of the images' size, on top of x_0 and the output: held for the backward pass, and at the peak."""

    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x_0 = torch.rand(n, *shape[1:], device=device) * 2 - 1
        output = torch.randn_like(x_0).requires_grad_()
        return x_0, torch.randint(idioms.SCHEDULE.num_timesteps, (n,), device=device), output

    WAYS[way](*inputs(1))[1].backward()  # what is loaded or allocated at the first call is not counted
    x_0, t, output = inputs(shape[0])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak becomes what is resident
    before = in_use(on_gpu)
    x_t, loss = WAYS[way](x_0, t, output)
    held = in_use(on_gpu) - before
    loss.backward()
    peak = (torch.cuda.max_memory_allocated(device) if on_gpu else proc_status("VmHWM") or 0) - before
    assert x_t.shape == x_0.shape  # alive until here
    assert output.grad is not None
    return {"held": held / x_0.nbytes, "peak": peak / x_0.nbytes}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="use this many images (64)")
    parser.add_argument("--size", type=int, default=512, help="use images of this many pixels a side (512)")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)  # one way, in this process
    args = parser.parse_args(arguments)
    shape = (args.batch, 3, args.size, args.size)
    if args.only:
        print(json.dumps(measure_ops(args.only, shape, args.device)))
        return
    run = common.Run(args.device, args.out)
    rows: list[dict[str, object]] = []
    for way in WAYS:
        if way.startswith(DIFFUSERS) and not installed("diffusers"):
            continue
        words = [__file__, "--only", way, "--batch", args.batch, "--size", args.size, "--device", args.device]
        command = [sys.executable, *map(str, words)]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        row: dict[str, object] = {"q_sample + loss + backward": way, "shape": "x".join(map(str, shape))}
        row |= {"a tensor, MB": 4 * args.batch * 3 * args.size**2 / 1e6}
        row |= {"held for backward, tensors": round(figures["held"], 2), "peak, tensors": round(figures["peak"], 2)}
        rows.append(row)
        run.save("memory", rows)  # kept if a later one is killed
        if way == OURS and args.size >= 512 and (figures["held"] > 1.1 or figures["peak"] > 2.1):
            run.failures.append("ddpm_fast holds more than x_t and the output's gradient: something stores the noise")
    run.save("memory", rows, "memory on top of x_0 and the network's output, in tensors of their size")
    run.finish()


if __name__ == "__main__":
    main()
