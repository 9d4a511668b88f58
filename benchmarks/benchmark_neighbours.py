"""Time frozen networks, their peers and training beside busy neighbours.

    python benchmarks/benchmark_neighbours.py

A neighbour is a Python process in an endless loop. As many of them as there are processors take half of the processors, so the
best possible time is then twice that of the idle machine. The network is that of Ho et al. for CIFAR-10.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import idioms
import torch
from peers import NETWORKS, OURS, split
from processes import Job, Process, export

EVALUATIONS, STEPS = 20, 4  # seconds of work, for 16 and for 32 images
TRAINS, PASSIVE = "training", "training-passive"  # without and with OMP_WAIT_POLICY=passive


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep this many processors busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def seconds(name: str, job: Job, rounds: int) -> dict[int, common.Spread]:
    """Return the seconds of a row's work, by number of neighbours."""
    peer, calls, policy = name, EVALUATIONS, os.environ.pop("OMP_WAIT_POLICY", None)
    if name in (TRAINS, PASSIVE):
        job, peer, calls = replace(job, batch=2 * job.batch, table="peers.TRAINING"), OURS, STEPS
    try:
        if peer == name:
            export(name, job)
        if name == PASSIVE:
            os.environ["OMP_WAIT_POLICY"] = "passive"
        process = Process(peer, job)
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)
        os.environ.update({} if policy is None else {"OMP_WAIT_POLICY": policy})
    taken = {}
    with closing(process):
        process.seconds(1)
        for count in range(common.cores() + 1):
            with neighbours(count):
                taken[count] = common.Spread.of([process.seconds(calls) * calls for _ in range(rounds)])
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "--precision": {
            "choices": common.DTYPES,
            "default": "float32",
            "help": "compute in this; training by autocast (float32)",
        },
        "--rounds": {"type": int, "default": 3, "help": "time each this often (3)"},
        "--peers": {"nargs": "+", "choices": (*NETWORKS, TRAINS, PASSIVE), "help": "time these (all that are installed)"},
    }
    args = common.parse(__doc__, arguments, options, device=False)
    run = common.Run(out=args.out)
    names = args.peers or (*NETWORKS, TRAINS, PASSIVE)
    able, missing = split(NETWORKS, [name for name in names if name in NETWORKS], args.precision)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = idioms.NETWORKS["cifar10-32"]
        idioms.random_unet(config).save_pretrained(Path(folder, "network"))
        job = Job(folder, 16, config["sample_size"], args.precision, torch.get_num_threads())
        for name in (*able, *(name for name in (TRAINS, PASSIVE) if name in names)):
            with run.going_on(name):
                taken = seconds(name, job, args.rounds)
                rows.append({"beside neighbours": name} | {f"{count} busy": spread for count, spread in taken.items()})
                print(f"{name}: {', '.join(f'{spread.median:.3g} s' for spread in taken.values())}", flush=True)
    run.save(
        f"neighbours {args.precision}", rows, "seconds beside busy neighbours: median [quartiles]", **{"left out": missing}
    )
    run.finish()


if __name__ == "__main__":
    main()
