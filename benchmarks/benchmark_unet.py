"""Time the CIFAR-10 network of Ho et al. (35.7 million parameters) on this CPU, beside its peers and alone.

    python benchmarks/benchmark_unet.py speed
    python benchmarks/benchmark_unet.py speed --batches 1 16 --dtypes float32 --peers ddpm_fast OpenVINO
    python benchmarks/benchmark_unet.py first-image
    python benchmarks/benchmark_unet.py growth

Peers have the same weights, inputs and threads, each in a process of its own, and take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import idioms
import numpy as np
import torch
from peers import NETWORKS, OURS, split
from processes import Array, Job, PeerFailed, Process, export

import ddpm_fast
from ddpm_fast import FrozenUNet, ddpm_plan
from ddpm_fast.nn import CIFAR10_32, UNet

CHECKED = 4  # images whose output is compared with float64: enough, and float64 is slow
ALLOWED = 10  # times the error of plain PyTorch in the dtype: convolutions by Winograd's algorithm round a few times more
SIZE = CIFAR10_32["sample_size"]
JUMP = 1.15


@contextmanager
def network_folder(config: dict[str, Any], keep: Path | None = None) -> Iterator[str]:
    """Yield a folder with a random network. It is temporary unless `keep` names one."""
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "network").is_dir():
            idioms.random_unet(config).save_pretrained(folder / "network")
        yield str(folder)


def export_peers(names: Sequence[str], job: Job, missing: dict[str, str]) -> list[str]:
    """Return the peers that can run, with their files exported. `missing` gets why others cannot."""
    able, reasons = split(NETWORKS, names, job.dtype)
    missing |= reasons
    for name in able:
        with leaving_out(name, missing):
            export(name, job)
    return [name for name in able if name not in missing]


@contextmanager
def leaving_out(name: str, missing: dict[str, str]) -> Iterator[None]:
    """Note in `missing` that a peer failed."""
    try:
        yield
    except PeerFailed as error:
        missing[name] = str(error)


# -------------------------------------------------------------------------------------------------------------- speed


def outputs(job: Job, dtype: torch.dtype) -> Array:
    """Return plain PyTorch's output for the first images."""
    x, t = map(torch.from_numpy, replace(job, batch=min(job.batch, CHECKED)).inputs())
    network = idioms.plain(UNet.from_pretrained(job.network, dtype=dtype))
    with torch.no_grad():
        return network(x, t).double().numpy()  # type: ignore[no-any-return]


def relative_error(got: Array, truth: Array) -> float:
    """Return the error on the images that both have, infinite if something is not a number."""
    n = min(len(got), len(truth))
    error = float(np.linalg.norm(got[:n].astype(np.float64) - truth[:n]) / np.linalg.norm(truth[:n]))
    return error if math.isfinite(error) else math.inf


def check(processes: dict[str, Process], job: Job, missing: dict[str, str]) -> dict[str, float]:
    """Return relative errors against float64, and leave out peers that are wrong."""
    truth = outputs(job, torch.float64)
    limit = ALLOWED * relative_error(outputs(job, common.DTYPES[job.dtype]), truth)
    errors = {}
    for name, process in list(processes.items()):
        errors[name] = relative_error(process.output(), truth)
        if errors[name] > limit:
            missing[name] = f"wrong: its relative error is {errors[name]:.2g}, at most {limit:.2g} was expected"
            processes.pop(name).close()
    return errors


def compare(names: Sequence[str], job: Job, rounds: int, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Return the rows of one batch size and dtype."""
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name in export_peers(names, job, missing):
            with leaving_out(name, missing):
                processes[name] = stack.enter_context(closing(Process(name, job)))
        errors = check(processes, job, missing)
        timers = {name: partial(process.seconds, process.calls_per_turn()) for name, process in processes.items()}
        times = common.take_turns(timers, rounds)
        peaks = {name: process.peak() for name, process in processes.items()}
    best = min((name for name in times if name != OURS), key=lambda name: times[name].ms, default=None)
    return [
        {
            "contestant": name,
            "best peer": "*" if name == best else "",
            "batch": job.batch,
            "dtype": job.dtype,
            "ms": taken.ms,
            "images/s": taken.per_second(job.batch),
            f"{OURS} is faster by": times[OURS].speedup_over(taken) if OURS in times else "",
            "relative error": errors[name],
            "first call, s": processes[name].first_call,
            "first image, s": processes[name].first_image,
            "peak memory, MB": "" if (peak := peaks[name]) is None else round(peak / 1e6),
        }
        for name, taken in times.items()
    ]


def plot_speed(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Draw images per second over batch sizes, a panel per dtype."""
    dtypes = [dtype for dtype in common.DTYPES if any(row["dtype"] == dtype for row in rows)]
    size = {"figsize": (6 * len(dtypes), 4), "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = common.pyplot().subplots(1, len(dtypes), **size)
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        for place, name in enumerate(NETWORKS):
            mine = [row for row in rows if (row["dtype"], row["contestant"]) == (dtype, name)]
            if not mine:
                continue
            mine.sort(key=lambda row: row["batch"])
            speeds = [row["images/s"] for row in mine]
            error = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
            style = {"color": f"C{place}", "linewidth": 2.5 if name == OURS else 1.2}
            style |= {"marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar([row["batch"] for row in mine], [s.median for s in speeds], error, label=name, **style)
        log_axis(axes, [row["batch"] for row in rows], "batch size")
        axes.set_title(f"{title}, {dtype}", fontsize="medium")
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].set_ylabel("images per second and step (median, quartiles)")
    panels[0][0].legend(frameon=False)
    return figure


def log_axis(axes: Any, values: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(values)), [str(value) for value in sorted(set(values))])
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def speed(args: argparse.Namespace) -> None:
    names = [name for name in args.peers if not (args.quick and name == "torch.compile")]
    batches = args.batches or ([1, 4] if args.quick else [1, 4, 16, 64])
    run = common.Run(out=args.out)
    everything: list[dict[str, Any]] = []
    with network_folder(CIFAR10_32, args.folder) as folder:
        for dtype, batch in itertools.product(args.dtypes, batches):
            job = Job(folder, batch, SIZE, dtype, torch.get_num_threads())
            missing: dict[str, str] = {}
            with run.going_on(f"{dtype}, batch {batch}"):
                rows = compare(names, job, args.rounds or (5 if args.quick else 15), missing)
                title = f"cifar10-32, {dtype}, batch {batch}: median [quartiles]"
                run.save(f"unet_speed {dtype} batch {batch}", rows, title, **{"left out": missing})
                everything += rows
            for name, reason in missing.items():
                print(f"left out: {name}: {reason}")
            if OURS in missing:
                run.failures.append(f"{dtype}, batch {batch}: {OURS}: {missing[OURS]}")
    if everything and args.plot:
        run.picture(plot_speed(everything, f"cifar10-32, {run.machine['device']}"), "unet_speed")
    run.finish()


# -------------------------------------------------------------------------------------------------------- first image


def measure_starts(names: Sequence[str], job: Job, rounds: int, missing: dict[str, str]) -> list[dict[str, object]]:
    """Return a row per peer. torch.compile has two: the first start ever, and starts with what that left in its cache."""
    taken: dict[str, list[Process]] = {}

    def started(name: str, label: str) -> float:
        with closing(Process(name, job)) as process:
            taken.setdefault(label, []).append(process)
            return process.first_image

    for name in export_peers(names, job, missing):
        with leaving_out(name, missing):  # this also fills the system's file cache
            started(name, f"{name}, nothing cached")
    able = [label.removesuffix(", nothing cached") for label in taken]
    common.take_turns({name: partial(started, name, name) for name in able}, rounds)

    def spread(label: str, part: str) -> common.Spread:
        return common.Spread.of([getattr(process, part) for process in taken[label]])

    return [
        {
            "contestant": label,
            "dtype": job.dtype,
            "first image, s": spread(label, "first_image"),
            "import and load, s": spread(label, "load").median,
            "first call, s": spread(label, "first_call").median,
            f"times {OURS}": spread(label, "first_image").median / spread(OURS, "first_image").median if OURS in able else "",
        }
        for label in taken
        if label in able or label.startswith("torch.compile")
    ]


def first_image(args: argparse.Namespace) -> None:
    run = common.Run(out=args.out)
    missing: dict[str, str] = {}
    with network_folder(CIFAR10_32, args.folder) as folder:
        for dtype in args.dtypes:
            job = Job(folder, 1, SIZE, dtype, torch.get_num_threads())
            rows = measure_starts(args.peers, job, args.rounds or 5, missing)
            title = "from the start of the process to the first step of one image: median [quartiles]"
            run.save(f"first_image {dtype}", rows, title, **{"left out": missing})
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    run.finish()


# ------------------------------------------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class Point:
    """One measurement: `value` of the quantity that grows (batch, size or steps)."""

    line: str
    value: int
    threads: int

    @property
    def batch(self) -> int:
        return self.value if self.line == "batch" else 1

    @property
    def size(self) -> int:
        return self.value if self.line == "size" else SIZE

    @property
    def work(self) -> float:
        """The work in evaluations of one 32x32 image."""
        return self.batch * (self.size / SIZE) ** 2 * (self.value if self.line == "steps" else 1)

    def call(self, model: FrozenUNet) -> Callable[[], object]:
        if self.line == "steps":
            sampler = ddpm_fast.Sampler(model, ddpm_plan(idioms.SCHEDULE, self.value))
            return partial(self._run, partial(sampler, 1, progress=False))
        x = torch.randn(self.batch, model.config["in_channels"], self.size, self.size)
        return partial(self._run, partial(model, x, torch.full((self.batch,), 500)))

    def _run(self, function: Callable[[], object]) -> None:
        torch.set_num_threads(self.threads)
        function()


def memory_of(function: Callable[[], object]) -> int | None:
    """Return the bytes that a call needs at its peak, or None if the system does not tell."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the heap would hide what this one takes
        meter = common.Meter()
        function()
        return max(0, meter.peak())
    return None


def available() -> float:
    """Return the bytes of memory that are free for use, infinite if the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return math.inf


def measure_growth(model: FrozenUNet, points: Sequence[Point], rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one line. It ends before a point that memory may not hold."""
    calls: dict[str, Callable[[], object]] = {}
    memory: list[int | None] = []
    measured: list[Point] = []
    for point in points:
        if measured and memory[-1] is not None and point.line != "steps":
            expected = memory[-1] * point.work / measured[-1].work
            if expected > available():
                print(f"left out: {point.line} {point.value} and more: they need about {expected / 1e9:.0f} GB of memory")
                break
        call = point.call(model)
        call()  # what the first call prepares is not counted
        memory.append(memory_of(call))
        calls[str(point.value)] = call
        measured.append(point)
    times = common.compare(calls, warm=True, min_rounds=rounds)
    costs = [times[str(point.value)].spread.median / point.work for point in measured]
    return [
        {
            "growth in": point.line,
            "of": point.value,
            "threads": point.threads,
            "ms": times[str(point.value)].ms,
            "images/s": point.batch / times[str(point.value)].spread.median,
            "evaluations/s": 1 / cost,
            "cost": cost / min(costs),
            "jumps": "here" if i > 0 and cost > JUMP * costs[i - 1] else "",
            "memory, MB": "" if (needed := memory[i]) is None else round(needed / 1e6),
        }
        for i, (point, cost) in enumerate(zip(measured, costs, strict=True))
    ]


def plot_growth(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Draw a panel per line in one unit: a flat curve is growth in proportion."""
    labels = {"batch": "batch of 32x32 images", "size": "pixels a side of one image", "steps": "steps of one image"}
    lines = [line for line in labels if any(row["growth in"] == line for row in rows)]
    size = {"figsize": (4.5 * len(lines), 4), "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = common.pyplot().subplots(1, len(lines), **size)
    for line, axes in zip(lines, panels[0], strict=True):
        for place, threads in enumerate(sorted({row["threads"] for row in rows})):
            mine = [row for row in rows if (row["growth in"], row["threads"]) == (line, threads)]
            points = [(row["of"], row["evaluations/s"]) for row in mine]
            name = f"{threads} thread{'s' * (threads > 1)}"
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{place}", label=name)
            jumping = [point for point, row in zip(points, mine, strict=True) if row["jumps"]]
            if jumping:
                axes.scatter(*zip(*jumping, strict=True), s=90, facecolors="none", edgecolors="tab:red", zorder=3)
        log_axis(axes, [row["of"] for row in rows if row["growth in"] == line], labels[line])
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("evaluations of 1024 pixels a second")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"{title} (red: the cost jumps)", fontsize="medium")
    return figure


def growth(args: argparse.Namespace) -> None:
    """Time batches of 32x32 images, larger single images, and steps of `ddpm_fast.sample` for one image.

    Cost is time per image, pixel and step, relative to the cheapest point of the line. It jumps if it is more than 15 % above
    that of the point before.
    """
    threads_before = torch.get_num_threads()
    run = common.Run(out=args.out)
    for dtype in args.dtypes:
        model = ddpm_fast.freeze(idioms.random_unet(CIFAR10_32), common.DTYPES[dtype])
        rows: list[dict[str, Any]] = []
        for line in ("batch", "size", "steps"):
            for threads in args.threads or range(1, min(2, common.cores()) + 1):
                points = [Point(line, value, threads) for value in sorted(set(getattr(args, line)))]
                with torch.inference_mode():
                    rows += measure_growth(model, points, args.rounds or 5) if points else []
        torch.set_num_threads(threads_before)
        run.save(f"unet_growth {dtype}", rows, f"cifar10-32, {dtype}: median [quartiles]")
        if rows and args.plot:
            run.picture(plot_growth(rows, f"cifar10-32, {dtype}, {run.machine['device']}"), "unet_growth")
    run.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    commands = common.Commands(__doc__)
    dtypes = list(common.DTYPES) if common.has_bf16() else ["float32"]
    parsers = {
        "speed": commands.add("speed", speed, "time one evaluation beside the peers", device=False),
        "first-image": commands.add("first-image", first_image, "time programs to their first step", device=False),
        "growth": commands.add("growth", growth, "time larger batches, images and step counts", device=False),
    }
    for name, parser in parsers.items():
        chosen = ["float32"] if name == "first-image" else dtypes
        text = f"compute in these ({' '.join(chosen)}; by default those that this CPU has instructions for)"
        parser.add_argument("--dtypes", nargs="+", choices=common.DTYPES, default=chosen, help=text)
        parser.add_argument("--rounds", type=int, help="take this many turns of each (15 for speed, or else 5)")
        if name != "first-image":
            parser.add_argument("--plot", action="store_true", help="draw the picture that docs/benchmarks.md shows")
        if name != "growth":
            parser.add_argument("--peers", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="compare these (all)")
            parser.add_argument("--folder", type=Path, help="keep exported networks and compiled code here")
    parsers["speed"].add_argument("--batches", type=int, nargs="+", help="use these batch sizes (1 4 16 64)")
    text = "use batches 1 and 4, 5 rounds and no torch.compile, which takes a few minutes"
    parsers["speed"].add_argument("--quick", action="store_true", help=text)
    lines = {"batch": [1, 2, 4, 8, 16, 32, 64, 128], "size": [32, 64, 128, 256], "steps": [1, 2, 5, 10, 20, 50]}
    for line, values in lines.items():
        text = f"measure these ({' '.join(map(str, values))})"
        parsers["growth"].add_argument(f"--{line}", type=int, nargs="*", default=values, help=text)
    parsers["growth"].add_argument("--threads", type=int, nargs="+", help="use these numbers of threads (1 2)")
    commands.run(arguments)


if __name__ == "__main__":
    main()
