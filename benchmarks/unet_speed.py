"""Milliseconds of one evaluation of the CIFAR-10 network of Ho et al. on this CPU: ddpm_fast beside what else runs it.

    python benchmarks/unet_speed.py
    python benchmarks/unet_speed.py --batches 1 16 --dtypes float32 --contestants ddpm_fast OpenVINO --repetitions 30

Peers: diffusers' UNet2DModel in eager channels_last, torch.compile of it with frozen weights, OpenVINO and ONNX Runtime. All
have the same weights, inputs and threads, each in a process of its own; they take turns. Beside them a floor of libraries:
the network's convolutions and matrix products alone, by oneDNN with weights packed beforehand, each hot in cache. It does
nothing else; convolutions by a faster algorithm can go below it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers
import torch
from runtimes import DTYPES, FLOOR, OURS, RUNTIMES, Array, Job, Process, RuntimeFailed, export

from ddpm_fast.nn import CIFAR10_32, UNet

CHECKED = 4  # images whose output is compared with float64: enough, and float64 is slow
ALLOWED = 10  # times the error of plain PyTorch in the dtype: convolutions by Winograd's algorithm round a few times more
TURN_SECONDS = 0.1  # calls shorter than that are repeated


@contextmanager
def network_folder(config: dict[str, Any], keep: Path | None) -> Iterator[str]:
    """A folder with a random network of that configuration; a temporary one unless it is to be kept."""
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "network").is_dir():
            peers.random_unet(config).save_pretrained(folder / "network")
        yield str(folder)


def outputs(job: Job, dtype: torch.dtype) -> Array:
    """Plain PyTorch's, of the first images."""
    x, t = map(torch.from_numpy, replace(job, batch=min(job.batch, CHECKED)).inputs())
    network = peers.plain(UNet.from_pretrained(job.network, dtype=dtype))
    with torch.no_grad():
        return network(x, t).double().numpy()  # type: ignore[no-any-return]


def relative_error(got: Array, truth: Array) -> float:
    """Of the images that both have; infinite where something is not a number."""
    n = min(len(got), len(truth))
    error = float(np.linalg.norm(got[:n].astype(np.float64) - truth[:n]) / np.linalg.norm(truth[:n]))
    return error if math.isfinite(error) else math.inf


def start(names: Sequence[str], job: Job, left_out: dict[str, str]) -> dict[str, Process]:
    """The contestants that can run; `left_out` gets why others cannot."""
    processes = {}
    for name in names:
        reason = RUNTIMES[name].why_not(job.dtype)
        if reason is None:
            try:
                export(name, job)
                processes[name] = Process(name, job)
            except RuntimeFailed as error:
                reason = str(error)
        if reason is not None:
            left_out[name] = reason
    return processes


def check(processes: dict[str, Process], job: Job, left_out: dict[str, str]) -> dict[str, float]:
    """Relative errors against float64; who is wrong is left out: no speed of wrong results."""
    truth = outputs(job, torch.float64)
    limit = ALLOWED * relative_error(outputs(job, common.DTYPES[job.dtype]), truth)
    errors = {}
    for name, process in list(processes.items()):
        output = process.output()
        if output is None:
            continue
        errors[name] = relative_error(output, truth)
        if errors[name] > limit:
            left_out[name] = f"wrong: its relative error is {errors[name]:.2g}, at most {limit:.2g} was expected"
            processes.pop(name).close()
    return errors


def calls_a_turn(process: Process) -> int:
    return math.ceil(TURN_SECONDS / process.seconds(1))


def compare(names: Sequence[str], job: Job, repetitions: int, left_out: dict[str, str]) -> list[dict[str, object]]:
    """The table's rows of one batch size and dtype."""
    with ExitStack() as stack:
        processes = start(names, job, left_out)
        for process in processes.values():
            stack.callback(process.close)
        errors = check(processes, job, left_out)
        timers: dict[str, Callable[[], float]] = {
            name: partial(process.seconds, calls_a_turn(process)) for name, process in processes.items()
        }
        times = common.take_turns(timers, repetitions)
        peaks = {name: process.peak() for name, process in processes.items()}
    rows = rows_of(times, job)
    for row in rows:
        name = str(row["contestant"])
        peak = peaks[name]
        row["relative error"] = errors.get(name, "")
        row["first call, s"] = processes[name].first_call
        row["first image, s"] = processes[name].first_image
        row["peak memory, MB"] = "" if peak is None else round(peak / 1e6)
    return rows


def best_peer(times: dict[str, common.Times]) -> str | None:
    """The fastest of the others that compute the network; None if there is none."""
    others = [name for name in times if name not in (OURS, FLOOR)]
    return min(others, key=lambda name: times[name].ms, default=None)


def rows_of(times: dict[str, common.Times], job: Job) -> list[dict[str, object]]:
    best = best_peer(times)
    return [
        {
            "contestant": name,
            "best peer": "*" if name == best else "",
            "batch": job.batch,
            "dtype": job.dtype,
            "ms": common.Spread(*(1e3 * value for value in taken.spread)),
            "images/s": taken.per_second(job.batch),
            f"{OURS} is faster by": times[OURS].speedup_over(taken) if OURS in times else "",
        }
        for name, taken in times.items()
    ]


def plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Images per second over batch sizes, a panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(6 * len(dtypes), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        for place, name in enumerate(RUNTIMES):
            mine = sorted(
                (row for row in rows if row["dtype"] == dtype and row["contestant"] == name), key=lambda row: row["batch"]
            )
            if not mine:
                continue
            speeds = [row["images/s"] for row in mine]
            error = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
            style = {"linestyle": ":", "color": "black"} if name == FLOOR else {"color": f"C{place}"}
            style["linewidth"] = 2.5 if name == OURS else 1.2
            batches = [row["batch"] for row in mine]
            axes.errorbar(batches, [s.median for s in speeds], error, marker="o", markersize=4, capsize=3, label=name, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["batch"] for row in rows})
        axes.set_xticks(ticks, [str(batch) for batch in ticks])
        axes.set_xlabel("batch size")
        axes.set_title(f"{title}, {dtype}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylim(bottom=0)  # of all panels, which have been drawn
    panels[0][0].set_ylabel("images per second and step (median, quartiles)")
    panels[0][0].legend(frameon=False)  # float32, which all have
    common.save_picture(figure, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks of a network on the CPU have in common."""
    parser.add_argument("--contestants", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: those that this CPU has instructions for")
    parser.add_argument("--folder", type=Path, help="where exported networks and compiled code are kept; default: nowhere")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 4 16 64")
    parser.add_argument("--repetitions", type=int, help="turns of each contestant; default: 15")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 4, 5 repetitions, no torch.compile: a few minutes")
    parser.add_argument("--plot", type=Path, help="picture; default: benchmarks/results/<device>_unet_speed.png")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    batches = args.batches or ([1, 4] if args.quick else [1, 4, 16, 64])
    repetitions = args.repetitions or (5 if args.quick else 15)
    names = [name for name in args.contestants if not (args.quick and name == "torch.compile")]
    dtypes = args.dtypes or (DTYPES if common.has_bf16() else DTYPES[:1])

    machine = common.machine()
    common.print_machine(machine)
    out = args.out or common.default_output("cpu")
    everything: list[dict[str, object]] = []
    failures: list[str] = []
    with network_folder(CIFAR10_32, args.folder) as folder:
        for dtype, batch in itertools.product(dtypes, batches):
            job = Job(folder, batch, CIFAR10_32["sample_size"], dtype, torch.get_num_threads())
            left_out: dict[str, str] = {}
            try:
                rows = compare(names, job, repetitions, left_out)
            except RuntimeFailed as error:  # one that ran before; other comparisons go on
                failures.append(f"{dtype}, batch {batch}: {error}")
                continue
            if rows:
                common.print_table(f"cifar10-32, {dtype}, batch {batch}: median [quartiles]", rows)
                common.record(out, f"unet_speed {dtype} batch {batch}", {**machine, "left out": left_out}, rows, quiet=True)
            for name, reason in left_out.items():
                print(f"left out: {name}: {reason}")
            if OURS in left_out:
                failures.append(f"{dtype}, batch {batch}: {OURS}: {left_out[OURS]}")
            everything += rows
    if everything:
        plot(args.plot or out.with_name(f"{out.stem}_unet_speed.png"), everything, f"cifar10-32, {machine['device']}")
    else:
        failures.append("no contestant could run")
    common.finish(f"results: {out}", failures)


if __name__ == "__main__":
    main()
