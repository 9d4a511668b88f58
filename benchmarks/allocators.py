"""A training step on a CPU under several ways to allocate memory: glibc's, `kept_memory`, jemalloc, tcmalloc.

    apt-get install libjemalloc2 libtcmalloc-minimal4t64
    python benchmarks/allocators.py

Each contestant is a new process in each round, as most ways are settings of the environment. The contestants take turns.
CPU time is user and system time of all threads: other programs on the machine change it less than the time that passes.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import common
import torch
import training
from runtimes import DTYPES, proc_status

from ddpm_fast import kept_memory
from ddpm_fast.nn import CIFAR10_32, UNet

PLAIN, KEPT, TUNABLES = "glibc", "glibc, kept_memory", "glibc, GLIBC_TUNABLES"
JEMALLOC, UNDECAYED, TCMALLOC = "jemalloc", "jemalloc without decay", "tcmalloc"
_KEEP = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0xffffffffffffffff"
_LIBRARIES = {JEMALLOC: "jemalloc", UNDECAYED: "jemalloc", TCMALLOC: "tcmalloc_minimal"}
_VARIABLES: dict[str, dict[str, str]] = {
    TUNABLES: {"GLIBC_TUNABLES": _KEEP},
    UNDECAYED: {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"},
}
CONTESTANTS = (PLAIN, KEPT, TUNABLES, JEMALLOC, UNDECAYED, TCMALLOC)
SMALL = CIFAR10_32 | {
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
}
NETWORKS = {"small": (SMALL, 64, 8), "cifar10-32": (CIFAR10_32, 16, 4)}  # configuration, batch, steps
FIGURES = ("seconds", "cpu", "system", "faults", "peak")


def measure(contestant: str, network: str, precision: str) -> dict[str, float]:
    """Return a step's seconds and CPU seconds (medians), and its system seconds and page faults (means), in this process."""
    config, batch_size, steps = NETWORKS[network]
    with kept_memory() if contestant == KEPT else nullcontext():
        torch.manual_seed(0)
        model = UNet(**config).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        batch = training.Batch(batch_size, "cpu")
        batch.x_0 = batch.x_0.contiguous(memory_format=torch.channels_last)
        step = training.train_step(training.loss_ours, model, batch, precision == "bf16")
        for _ in range(training.WARM_UP):
            step()
        seconds, cpu = [], []
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(steps):
            began = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - began[0])
            cpu.append(time.process_time() - began[1])
        after = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": statistics.median(seconds),
            "cpu": statistics.median(cpu),
            "system": (after.ru_stime - before.ru_stime) / steps,
            "faults": (after.ru_minflt - before.ru_minflt) / steps,
            "peak": (proc_status("VmHWM") or 0) / 1e6,
        }


def environment(contestant: str) -> dict[str, str]:
    """The variables of a contestant's process. Idle threads sleep, so that CPU time is work."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))}
    library = _LIBRARIES.get(contestant)
    preload = {"LD_PRELOAD": str(ctypes.util.find_library(library))} if library else {}
    return {"OMP_WAIT_POLICY": "passive", **others, **_VARIABLES.get(contestant, {}), **preload}


def run(contestant: str, network: str, precision: str) -> dict[str, float]:
    """Return the figures of `measure` from a new process."""
    command = [sys.executable, __file__, "--only", contestant, "--network", network, "--precision", precision]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(contestant)).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def rows(runs: Mapping[str, list[dict[str, float]]], network: str, precision: str) -> list[dict[str, object]]:
    """The table of one network and precision."""

    def times(contestant: str, figure: str) -> common.Times:
        return common.Times(tuple(each[figure] for each in runs[contestant]))

    return [
        {
            "training step": contestant,
            "network": network,
            "batch": NETWORKS[network][1],
            "precision": "bf16 autocast" if precision == "bf16" else precision,
            "seconds": times(contestant, "seconds").spread,
            "CPU seconds": times(contestant, "cpu").spread,
            "times as fast as glibc": times(contestant, "seconds").speedup_over(times(PLAIN, "seconds")),
            "by CPU time": times(contestant, "cpu").speedup_over(times(PLAIN, "cpu")),
            "system seconds": times(contestant, "system").spread.median,
            "page faults": round(times(contestant, "faults").spread.median),
            "peak memory, MB": round(times(contestant, "peak").spread.median),
            "runs": {figure: [float(f"{each[figure]:.4g}") for each in runs[contestant]] for figure in FIGURES},
        }
        for contestant in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=list(DTYPES), help="bf16: by autocast")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contestant, in turns")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)  # what the process of one is called with
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.network[0], args.precision[0])))
        return

    machine = common.machine() | {"OMP_WAIT_POLICY": environment(PLAIN)["OMP_WAIT_POLICY"]}
    common.print_machine(machine)
    missing = [name for name, library in _LIBRARIES.items() if ctypes.util.find_library(library) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    contestants = [name for name in CONTESTANTS if name not in missing]
    output = args.out or common.default_output("cpu")
    for network in args.network:
        for precision in args.precision:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
            for i in range(args.rounds):
                turn = i % len(contestants)
                for name in contestants[turn:] + contestants[:turn]:
                    runs[name].append(run(name, network, precision))
                table = rows(runs, network, precision)  # after each round, as a run takes long and may be stopped
                common.record(output, f"allocators {network} {precision}", machine, table, quiet=True)
            common.print_table(
                f"{network}, {precision}: median [quartiles]",
                [{key: value for key, value in row.items() if key != "runs"} for row in table],
            )
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    main()
