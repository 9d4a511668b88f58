"""Profile a step of sampling and of training: the kernels and their time, and how fast each convolution is.

    python benchmarks/benchmark_profile.py --device cuda

kernels:      calls and microseconds of each kernel in a captured step of ancestral sampling, in bf16, at three batches, and in
              a step of the trainer
convolutions: TFLOP/s of each convolution of the network in bf16, with the algorithm that cuDNN expects to be fastest, and with
              the one that cudnn.benchmark finds
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import idioms
import torch
import torch.nn.functional as F
import traced
from torch.profiler import ProfilerActivity, profile
from trainer_step import trainer_step

import ddpm_fast

STEPS = 10  # for the images that are profiled
SHOWN, WIDTH = 16, 96  # kernels and letters of a table; the file has all


def kernels(call: Callable[[], object], steps: int, device: str) -> list[dict[str, object]]:
    """Return the kernels of a call of so many steps, per step. On a CPU they are PyTorch's ops."""
    call()
    common.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA]) as profiler:
        call()
        common.synchronize(device)
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    found = sorted(((getattr(each, key) / steps, each) for each in profiler.key_averages()), key=lambda pair: -pair[0])
    rows = [{"kernel": each.key, "calls": each.count / steps, "us": us} for us, each in found if us]
    return [{"kernel": "all", "calls": sum(row["calls"] for row in rows), "us": sum(row["us"] for row in rows)}, *rows]


def speed(geometry: traced.Geometry, batch: int, device: str, benchmark: bool) -> float:
    """Return the TFLOP/s of a convolution."""
    of = {"dtype": torch.bfloat16, "device": device}
    x, weight = (torch.randn(shape, **of) for shape in ((batch, *geometry.shape), geometry.weight))  # type: ignore[call-overload]
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    call = partial(F.conv2d, x, weight, None, geometry.stride, geometry.padding)
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False), torch.inference_mode():
        flops = 2 * call().numel() * weight[0].numel()
        replay = call if device == "cpu" else common.graphed(call, torch.cuda.Stream())
        return flops / common.compare({"": replay}, device, seconds=0.02)[""].spread.median / 1e12


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "--network": {"choices": idioms.NETWORKS, "default": "cifar10-32", "help": "profile this (cifar10-32)"},
        "--batches": {
            "nargs": "+",
            "type": int,
            "default": traced.BATCHES,
            "help": "images of a step (1 16 128); the trainer takes the last",
        },
    }
    args = common.parse(__doc__, arguments, options)
    run, config = common.Run(args.device, args.out), idioms.NETWORKS[args.network]
    plan = ddpm_fast.ddpm_plan(idioms.SCHEDULE, STEPS)
    sampler = ddpm_fast.Sampler(idioms.random_unet(config), plan, dtype=torch.bfloat16, device=args.device)
    calls = {f"sampling, batch {n}": (partial(sampler, n, progress=False), STEPS) for n in args.batches}
    calls[f"training, batch {args.batches[-1]}"] = trainer_step(config, args.batches[-1], args.device), 1
    for name, (call, steps) in calls.items():
        with run.going_on(name):
            rows = kernels(call, steps, args.device)
            run.save(f"profile {args.network} {name}", rows)
            common.print_table(f"{name}: a step", [row | {"kernel": str(row["kernel"])[:WIDTH]} for row in rows[:SHOWN]])
    geometries = Counter(call.geometry for call in traced.sampling_step(config) if call.geometry)
    rows = []
    for batch in reversed(args.batches):
        for geometry, count in geometries.items():
            with run.going_on(f"{geometry}, batch {batch}"):
                found = {f"TFLOP/s{', cudnn.benchmark' * on}": speed(geometry, batch, args.device, on) for on in (False, True)}
                rows.append({"convolution": str(geometry), "of them": count, "batch": batch} | found)
        run.save(f"profile {args.network} convolutions", rows, "convolutions" * (batch == args.batches[0]))
    run.finish()


if __name__ == "__main__":
    main()
