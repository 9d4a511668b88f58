"""How sampling grows on this CPU with the batch, the resolution, the steps and the threads, and where its cost jumps.

    python benchmarks/unet_growth.py
    python benchmarks/unet_growth.py --batches 1 2 3 4 5 6 7 8 --sizes 32 --steps 1 --threads 2

The network is that of Ho et al. for CIFAR-10 in its inference form, at other sizes too. Along a line one thing grows: batches
are of 32x32 images, larger images come singly, and steps are those of `ddpm_fast.sample` for one image. Points of a line take
turns. Cost is time per image, pixel and step, relative to the cheapest point of the line: 1 all along is growth in proportion.
It jumps where it is more than 15 % above that of the point before.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import peers
import torch
from memory import Meter

import ddpm_fast
from ddpm_fast import FrozenUNet, NoiseSchedule, ddpm_plan
from ddpm_fast.nn import CIFAR10_32

SIZE = CIFAR10_32["sample_size"]
JUMP = 1.15


@dataclass(frozen=True)
class Point:
    """One measurement: `value` of what grows along `line`."""

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
        """In evaluations of one 32x32 image."""
        return self.batch * (self.size / SIZE) ** 2 * (self.value if self.line == "steps" else 1)

    def call(self, model: FrozenUNet) -> Callable[[], object]:
        if self.line == "steps":
            sampler = ddpm_fast.Sampler(model, ddpm_plan(NoiseSchedule.linear(), self.value))
            return partial(self._run, partial(sampler, 1, progress=False))
        x = torch.randn(self.batch, model.config["in_channels"], self.size, self.size)
        return partial(self._run, partial(model, x, torch.full((self.batch,), 500)))

    def _run(self, function: Callable[[], object]) -> None:
        torch.set_num_threads(self.threads)
        function()


def jumps(costs: Sequence[float]) -> list[bool]:
    """Where a cost is well above the one before."""
    return [i > 0 and cost > JUMP * costs[i - 1] for i, cost in enumerate(costs)]


def memory_of(function: Callable[[], object]) -> int | None:
    """Bytes that a call needs at its peak; None where the system does not tell."""
    with suppress(OSError, AttributeError, SystemExit):  # other systems
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the heap would hide what this one takes
        meter = Meter("cpu")
        meter.reset()
        before = meter.now()
        function()
        return max(0, meter.peak() - before)
    return None


def available() -> float:
    """Bytes of memory that are free for use; infinite where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def measure(model: FrozenUNet, points: Sequence[Point], repetitions: int) -> list[dict[str, Any]]:
    """The rows of one line; it ends before a point that the memory may not hold."""
    calls: dict[str, Callable[[], object]] = {}
    memory: list[int | None] = []
    measured = []
    for point in points:
        if measured and memory[-1] is not None and point.line != "steps":
            expected = memory[-1] * point.work / measured[-1].work
            if expected > available():
                print(
                    f"left out: {point.line} {point.value} and more: about {expected / 1e9:.0f} GB of memory, more than is free"
                )
                break
        call = point.call(model)
        call()  # what the first call prepares is not counted
        memory.append(memory_of(call))
        calls[str(point.value)] = call
        measured.append(point)
    times = common.compare(calls, warm=True, min_rounds=repetitions)
    costs = [times[str(point.value)].spread.median / point.work for point in measured]
    return [
        {
            "growth in": point.line,
            "of": point.value,
            "threads": point.threads,
            "ms": common.Spread(*(1e3 * value for value in times[str(point.value)].spread)),
            "images/s": point.batch / times[str(point.value)].spread.median,
            "evaluations/s": 1 / cost,
            "cost": cost / min(costs),
            "jumps": "here" if jump else "",
            "memory, MB": "" if needed is None else round(needed / 1e6),
        }
        for point, cost, jump, needed in zip(measured, costs, jumps(costs), memory, strict=True)
    ]


def plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """A panel for each line, in one unit: a flat curve is growth in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"batch": "batch of 32x32 images", "size": "pixels a side of one image", "steps": "steps of one image"}
    lines = [line for line in labels if any(row["growth in"] == line for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(lines), figsize=(4.5 * len(lines), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for line, axes in zip(lines, panels[0], strict=True):
        for place, threads in enumerate(sorted({row["threads"] for row in rows})):
            mine = [row for row in rows if row["growth in"] == line and row["threads"] == threads]
            values, speeds = [row["of"] for row in mine], [row["evaluations/s"] for row in mine]
            name = f"{threads} thread{'s' * (threads > 1)}"
            axes.plot(values, speeds, marker="o", markersize=4, color=f"C{place}", label=name)
            jumping = [(row["of"], row["evaluations/s"]) for row in mine if row["jumps"]]
            if jumping:
                axes.scatter(*zip(*jumping, strict=True), s=90, facecolors="none", edgecolors="tab:red", zorder=3)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["of"] for row in rows if row["growth in"] == line})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel(labels[line])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("evaluations of 1024 pixels a second")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"{title} (red: the cost jumps)", fontsize="medium")
    common.save_picture(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--sizes", type=int, nargs="*", default=[32, 64, 128, 256], help="multiples of 8")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2, as far as there are cores")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each point")
    parser.add_argument("--quick", action="store_true", help="batches and steps up to 8, sizes up to 64, 3 repetitions")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    parser.add_argument("--plot", type=Path, help="picture; default: benchmarks/results/<device>_unet_growth.png")
    args = parser.parse_args(arguments)
    lines = {"batch": args.batches, "size": args.sizes, "steps": args.steps}
    repetitions = args.repetitions
    if args.quick:
        largest = {"batch": 8, "size": 64, "steps": 8}
        lines = {line: [value for value in values if value <= largest[line]] for line, values in lines.items()}
        repetitions = min(3, repetitions)

    threads_before = torch.get_num_threads()
    machine = common.machine()
    common.print_machine(machine)
    model = ddpm_fast.freeze(peers.cifar10_unet(), common.DTYPES[args.dtype])
    rows: list[dict[str, Any]] = []
    try:
        for line, values in lines.items():
            for threads in args.threads or range(1, min(2, common.cores()) + 1):
                points = [Point(line, value, threads) for value in sorted(set(values))]
                with torch.inference_mode():
                    rows += measure(model, points, repetitions) if points else []
    finally:
        torch.set_num_threads(threads_before)
    if not rows:
        raise SystemExit("unet_growth: nothing is to be measured: --batches, --sizes and --steps are empty")
    common.print_table(f"cifar10-32, {args.dtype}: median [quartiles]", rows)
    for row in rows:
        if row["jumps"]:
            print(
                f"the cost jumps at {row['growth in']} {row['of']} ({row['threads']} threads): {row['cost']:.2f} of the least"
            )
    out = args.out or common.default_output("cpu")
    common.record(out, f"unet_growth {args.dtype}", machine, rows)
    plot(args.plot or out.with_name(f"{out.stem}_unet_growth.png"), rows, f"cifar10-32, {args.dtype}, {machine['device']}")


if __name__ == "__main__":
    main()
