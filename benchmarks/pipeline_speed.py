"""Images per second of a diffusers pipeline before and after `ddpm_fast.accelerate`.

    python benchmarks/pipeline_speed.py
    python benchmarks/pipeline_speed.py --steps 1000 --batch 16 --dtype float32 bf16 --rounds 1
    python benchmarks/pipeline_speed.py --pipeline DDIM --steps 50 --device cuda

The network is the CIFAR-10 network of Ho et al. (35.7 million parameters) with random weights. The same generator is given to
both: in float32 the images have to be the same, and the largest difference of a pixel (of 0..1) is that of the run that was
timed. Both sides take turns in one process; diffusers' network is in the memory format in which it is the faster. bf16 before
is the pipeline cast to bfloat16 (`pipe.to`), bf16 after is `accelerate(pipe, dtype=torch.bfloat16)`, whose images stay
float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import peers
import runtimes
import torch
from torch import Tensor

from ddpm_fast import accelerate

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PARITY = {"float32": 1e-3}  # of pixels in 0..1: a 255th is 4e-3


def pipeline(kind: str, device: str) -> Any:
    """Diffusers' pipeline around the CIFAR-10 network, without its progress bar."""
    library = runtimes.diffusers()
    scheduler = getattr(library, f"{kind}Scheduler")()
    pipe = getattr(library, f"{kind}Pipeline")(unet=peers.diffusers_unet(peers.cifar10_unet()), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def fastest_format(pipe: Any, batch: int) -> str:
    """Puts the network in the memory format that suits it, by timing one evaluation of each."""
    x = torch.randn(batch, 3, 32, 32).to(pipe.device, pipe.unet.dtype)
    candidates: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        for key, memory_format in FORMATS.items():
            network = copy.deepcopy(pipe.unet).to(memory_format=memory_format)
            candidates[key] = lambda network=network: network(x, 500)  # type: ignore[misc]
            candidates[key]()
        times = common.compare(candidates, pipe.device, warm=True, min_rounds=3)
    best = min(times, key=lambda key: times[key].ms)
    pipe.unet.to(memory_format=FORMATS[best])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", choices=["DDPM", "DDIM"], default="DDPM")
    parser.add_argument("--batch", type=int, default=16, help="images of a call")
    parser.add_argument("--steps", type=int, default=20, help="num_inference_steps")
    parser.add_argument("--dtype", choices=common.DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each, in turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    machine = common.machine(args.device)
    common.print_machine(machine)
    for name in args.dtype:
        dtype = common.DTYPES[name]
        before, after = pipeline(args.pipeline, args.device), pipeline(args.pipeline, args.device)
        before.to(dtype=dtype)
        accelerate(after, dtype=dtype)
        memory_format = fastest_format(before, args.batch)
        images: dict[str, Tensor] = {}

        def call(which: str, pipe: Any, steps: int = args.steps, images: dict[str, Tensor] = images) -> None:
            generator = torch.Generator().manual_seed(0)
            result = pipe(args.batch, generator, num_inference_steps=steps, output_type="pt")
            images[which] = result.images

        contestants = {"before": before, "after": after}
        for which, pipe in contestants.items():
            call(which, pipe, 2)  # warms up
        calls = {which: (lambda which=which, pipe=pipe: call(which, pipe)) for which, pipe in contestants.items()}
        times = common.compare(calls, args.device, warm=True, min_rounds=args.rounds)
        difference = (images["after"].float() - images["before"].float()).abs()
        if not difference.max() <= PARITY.get(name, 1):
            raise AssertionError(f"images differ by {float(difference.max()):.3g}: no speed is reported")
        rows: list[dict[str, object]] = [
            {
                "pipeline": f"{args.pipeline}Pipeline {which}",
                "dtype": name,
                "batch": args.batch,
                "steps": args.steps,
                "memory format": memory_format if which == "before" else "channels_last",
                "images/s": taken.per_second(args.batch),
                "ms a step": 1e3 * taken.spread.median / args.steps,
                "times as fast": taken.speedup_over(times["before"]),
                "largest difference of a pixel": float(difference.max()),
                "mean difference": float(difference.mean()),
            }
            for which, taken in times.items()
        ]
        common.print_table("diffusers' pipeline before and after accelerate: median [quartiles]", rows)
        output = args.out or common.default_output(args.device)
        section = f"pipeline_speed {args.pipeline} {name} batch {args.batch}, {args.steps} steps"
        common.record(output, section, machine, rows)


if __name__ == "__main__":
    main()
