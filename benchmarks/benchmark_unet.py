"""Time one evaluation of a network on this CPU, beside its peers. The usual one is that of Ho et al. for CIFAR-10.

    python benchmarks/benchmark_unet.py
    python benchmarks/benchmark_unet.py --batches 1 16 --dtypes float32 --peers ddpm_fast OpenVINO
    python benchmarks/benchmark_unet.py --batches 1 4 --network guided-64
    python benchmarks/benchmark_unet.py --batches 1 --sizes 32 64 128 256 --threads 1 2 --peers ddpm_fast      # growth

Peers have the same weights, inputs and threads, each in a process of its own, and take turns. The first image takes the time
from the start of the process to the end of its first evaluation.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import idioms
import numpy as np
import torch
from peers import NETWORKS, OURS, split
from processes import Array, Job, PeerFailed, Process, export

from ddpm_fast.nn import UNet

CHECKED = 4  # images whose output is compared with float64: enough, and float64 is slow
ALLOWED = 10  # times the error of plain PyTorch in the dtype: convolutions by Winograd's algorithm round a few times more


def start(names: Sequence[str], job: Job, missing: dict[str, str]) -> dict[str, Process]:
    """Return the processes of peers that can run. `missing` gets why others cannot."""
    able, reasons = split(NETWORKS, names, job.dtype)
    missing |= reasons
    processes: dict[str, Process] = {}
    for name in able:
        try:
            export(name, job)
            processes[name] = Process(name, job)
        except PeerFailed as error:
            missing[name] = str(error)
    return processes


def outputs(job: Job, dtype: torch.dtype) -> Array:
    """Return plain PyTorch's output for the first images."""
    inputs = [torch.from_numpy(each) for each in replace(job, batch=min(job.batch, CHECKED)).inputs()]
    network = idioms.plain(UNet.from_pretrained(job.network, dtype=dtype))
    with torch.no_grad():
        return network(*inputs).double().numpy()  # type: ignore[no-any-return]


def relative_error(got: Array, truth: Array) -> float:
    """Return the error on the images that both have, infinite if something is not a number."""
    n = min(len(got), len(truth))
    error = float(np.linalg.norm(got[:n].astype(np.float64) - truth[:n]) / np.linalg.norm(truth[:n]))
    return error if math.isfinite(error) else math.inf


def check(processes: dict[str, Process], job: Job, missing: dict[str, str]) -> dict[str, float]:
    """Return relative errors against float64, and leave out peers that are wrong."""
    truth = outputs(job, torch.float64)
    limit = ALLOWED * relative_error(outputs(job, common.DTYPES[job.dtype]), truth)
    errors = {name: relative_error(process.output(), truth) for name, process in processes.items()}
    for name, error in errors.items():
        if error > limit:
            missing[name] = f"wrong: its relative error is {error:.2g}, at most {limit:.2g} was expected"
            processes.pop(name).close()
    return errors


def compare(names: Sequence[str], job: Job, rounds: int, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Return the rows of one batch size and dtype. `missing` is filled."""
    with ExitStack() as stack:
        processes = {name: stack.enter_context(closing(each)) for name, each in start(names, job, missing).items()}
        errors = check(processes, job, missing)
        timers = {name: partial(process.seconds, process.calls_per_turn()) for name, process in processes.items()}
        times = common.take_turns(timers, rounds)
    return [
        {"contestant": name, "batch": job.batch, "size": job.size}
        | {"threads": job.threads, "dtype": job.dtype, "ms": taken.ms, "images/s": taken.per_second(job.batch)}
        | {"32x32 pixels/s": taken.per_second(job.batch * job.size**2 / 1024).median}
        | {f"{OURS} is faster by": times[OURS].speedup_over(taken) if OURS in times else "", "relative error": errors[name]}
        | {"first image, s": processes[name].first_image}
        | {f"{part}, s": processes[name].about[part] for part in ("import and load", "first call")}
        | {"peak memory, MB": common.megabytes(processes[name].peak), "versions": processes[name].about["versions"]}
        for name, taken in times.items()
    ]


def plot(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Draw images per second over batch sizes, a panel per dtype."""
    dtypes = [dtype for dtype in common.DTYPES if any(row["dtype"] == dtype for row in rows)]
    size = {"figsize": (6 * len(dtypes), 4), "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = common.pyplot().subplots(1, len(dtypes), **size)
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        for name in NETWORKS:
            mine = [row for row in rows if (row["dtype"], row["contestant"]) == (dtype, name)]
            mine.sort(key=lambda row: row["batch"])
            speeds, width = [row["images/s"] for row in mine], 2.5 if name == OURS else 1.2
            style = {"label": name if mine else None, "linewidth": width, "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar([row["batch"] for row in mine], [s.median for s in speeds], common.errors(speeds), **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="batch size", title=f"{title}, {dtype}")
    # After all panels, which share the axis. From here on it is no longer fitted to what is drawn.
    panels[0][0].set(ylim=(0, None), ylabel="images per second and step (median, quartiles)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    dtypes = list(common.DTYPES) if common.has_bf16() else ["float32"]
    threads = [torch.get_num_threads()]
    options: dict[str, dict[str, Any]] = {
        "--peers": {"nargs": "+", "choices": NETWORKS, "default": list(NETWORKS), "help": "compare these (all)"},
        "--dtypes": {
            "nargs": "+",
            "choices": common.DTYPES,
            "default": dtypes,
            "help": "compute in these (those that this CPU has instructions for)",
        },
        "--batches": {"type": int, "nargs": "+", "help": "use these batch sizes (1 4 16 64)"},
        "--network": {"choices": idioms.NETWORKS, "default": "cifar10-32", "help": "evaluate this (cifar10-32)"},
        "--sizes": {"type": int, "nargs": "+", "help": "use images of these pixels a side (the network's)"},
        "--threads": {"type": int, "nargs": "+", "default": threads, "help": "use these numbers of threads (PyTorch's)"},
        "--rounds": {"type": int, "help": "take this many turns of each (15)"},
        "--quick": {"action": "store_true", "help": "use batches 1 and 4, 5 rounds and no torch.compile"},
        "--plot": {"action": "store_true", "help": "draw the picture that docs/benchmarks.md shows"},
    }
    args = common.parse(__doc__, arguments, options, device=False)
    names = [name for name in args.peers if not (args.quick and name == "torch.compile")]
    batches = args.batches or ([1, 4] if args.quick else [1, 4, 16, 64])
    rounds = args.rounds or (5 if args.quick else 15)

    run = common.Run(out=args.out)
    everything: list[dict[str, Any]] = []
    config = idioms.NETWORKS[args.network]
    usual, other = config["sample_size"], "" if args.network == "cifar10-32" else args.network
    with tempfile.TemporaryDirectory() as folder:
        idioms.random_unet(config).save_pretrained(Path(folder, "network"))
        for dtype, size, threads, batch in itertools.product(args.dtypes, args.sizes or [usual], args.threads, batches):
            missing: dict[str, str] = {}
            words = f"{dtype} batch {batch}" + ("" if size == usual else f" size {size}")
            words += "" if len(args.threads) == 1 else f" threads {threads}"
            with run.going_on(words):
                rows = compare(names, Job(folder, batch, size, dtype, threads), rounds, missing)
                versions = {row["contestant"]: row.pop("versions") for row in rows}
                section = " ".join(filter(None, ["unet_speed", other, words]))
                record = {"left out": missing, "versions": versions}
                run.save(section, rows, f"{args.network} {words}: median [quartiles]", **record)
                everything += rows
            for name, reason in missing.items():
                print(f"left out: {name}: {reason}")
            if OURS in missing:
                run.failures.append(f"{words}: {OURS}: {missing[OURS]}")
    if everything and args.plot:
        name = "_".join(filter(None, ["unet_speed", other]))
        run.picture(plot(everything, f"{args.network}, {run.machine['device']}"), name)
    run.finish()


if __name__ == "__main__":
    main()
