"""Seconds from the start of a program to the end of its first denoising step, on a CPU: ddpm_fast and its peers.

    python benchmarks/first_image.py

Every start is a process of its own: it imports, loads the CIFAR-10 network of Ho et al. from disk, makes its own form of it
and evaluates it for one image; what else a step does takes microseconds. OpenVINO and ONNX Runtime load what was exported
beforehand. torch.compile has two rows: the first start ever, and starts with what that left in its cache. Contestants take
turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import common
import torch
from runtimes import FLOOR, OURS, RUNTIMES, Job, Process, RuntimeFailed, export
from unet_speed import network_folder

from ddpm_fast.nn import CIFAR10_32

CACHES = "torch.compile"  # whose first start ever is another matter
PARTS = ("first_image", "load", "first_call")


def start(name: str, job: Job) -> dict[str, float]:
    """Seconds of one start, by its parts."""
    with closing(Process(name, job)) as process:
        return {part: getattr(process, part) for part in PARTS}


def measure(names: Sequence[str], job: Job, starts: int, left_out: dict[str, str]) -> list[dict[str, object]]:
    firsts: dict[str, dict[str, float]] = {}
    for name in names:
        reason = RUNTIMES[name].why_not(job.dtype)
        if reason is None:
            try:
                export(name, job)
                firsts[name] = start(name, job)  # then what it reads is in the system's file cache
            except RuntimeFailed as error:
                reason = str(error)
        if reason is not None:
            left_out[name] = reason
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in firsts}

    def timed(name: str) -> float:
        taken[name].append(start(name, job))
        return taken[name][-1]["first_image"]

    timers: dict[str, Callable[[], float]] = {name: partial(timed, name) for name in firsts}
    common.take_turns(timers, starts)
    if CACHES in taken:
        taken = {f"{CACHES}, nothing cached": [firsts[CACHES]], **taken}
    return rows_of(taken, job)


def rows_of(taken: dict[str, list[dict[str, float]]], job: Job) -> list[dict[str, object]]:
    def spread(name: str, part: str) -> common.Spread:
        return common.Spread.of([each[part] for each in taken[name]])

    mine = spread(OURS, "first_image").median if taken.get(OURS) else None
    return [
        {
            "contestant": name,
            "dtype": job.dtype,
            "first image, s": spread(name, "first_image"),
            "import and load, s": spread(name, "load").median,
            "first call, s": spread(name, "first_call").median,
            f"times {OURS}": "" if mine is None else spread(name, "first_image").median / mine,
        }
        for name in taken
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in RUNTIMES if name != FLOOR]
    parser.add_argument("--contestants", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32")
    parser.add_argument("--starts", type=int, default=5, help="of each contestant")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args(arguments)

    machine = common.machine()
    common.print_machine(machine)
    left_out: dict[str, str] = {}
    with network_folder(CIFAR10_32, None) as folder:
        job = Job(folder, 1, CIFAR10_32["sample_size"], args.dtype, torch.get_num_threads())
        rows = measure(args.contestants, job, args.starts, left_out)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if not rows:
        raise SystemExit("first_image: no contestant could run")
    common.print_table("from the start of the process to the first step of one image: median [quartiles]", rows)
    out = args.out or common.default_output("cpu")
    common.record(out, f"first_image {args.dtype}", {**machine, "left out": left_out}, rows)


if __name__ == "__main__":
    main()
