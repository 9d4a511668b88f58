"""What the benchmarks share: parity before speed, interleaved timing, and the record of a run.

Contestants take turns in one process, round by round, so that a machine that changes its speed changes it for all of them.
What is quoted is a ratio: the median over the rounds of (peer's time / our time), with its quartiles.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.atomic import write_json
from ddpm_fast.inference import cuda_graph
from ddpm_fast.ops import backend

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- parity


def require_parity(what: str, got: Tensor, baseline: Tensor, truth: Tensor, *, factor: float = 2) -> None:
    """Stops the benchmark unless `got` is as right as `baseline`: no speed of wrong results.

    The root-mean-square error against `truth` (float64) may be `factor` times the baseline's, or a rounding of the largest
    value.
    """
    error, allowed = (float((x.double() - truth).square().mean().sqrt()) for x in (got, baseline))
    limit = max(factor * allowed, torch.finfo(got.dtype).eps * float(truth.abs().max()))
    if not error <= limit:
        raise AssertionError(f"{what}: error {error:.3g} against float64, at most {limit:.3g} expected: no speed is reported")


# ------------------------------------------------------------------------------------------------------------- timing


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Times:
    """Seconds a call, one value a round."""

    rounds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.rounds)

    @property
    def ms(self) -> float:
        return 1e3 * self.spread.median

    def per_second(self, things: int) -> Spread:
        """Of calls that make `things` each."""
        return Spread.of([things / seconds for seconds in self.rounds])

    def speedup_over(self, peer: Times) -> Spread:
        """How many times faster than `peer`, from the ratio of each round."""
        return Spread.of([theirs / ours for theirs, ours in zip(peer.rounds, self.rounds, strict=True)])


def compare(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 1.0,
    min_rounds: int = 9,
    max_rounds: int = 99,
    warm: bool = False,
) -> dict[str, Times]:
    """Times every contestant once a round, in an order that rotates.

    Args:
        contestants: name -> a call. Each is warmed up first (compilation, threads, caches).
        device: CPU calls are repeated for about a millisecond a round, so caches are as warm as the tensors are small. CUDA
            calls are timed singly by events, with a cold L2.
        seconds: what all rounds should take together; there are at least `min_rounds`.
        warm: all is warmed up already, and a call takes long: no more than `min_rounds` calls are made.
    """
    device = torch.device(device)
    calls = dict.fromkeys(contestants, 1)
    rounds = min_rounds
    if not warm:
        expected = 0.0
        for name, function in contestants.items():
            _time(function, 1, device)
            estimate = min(_time(function, 1, device) for _ in range(4))
            calls[name] = 1 if device.type == "cuda" else math.ceil(1e-3 / estimate)
            expected += calls[name] * estimate
        rounds = int(min(max(seconds / expected, min_rounds), max_rounds))
    gc.collect()
    gc.disable()
    try:
        timers = {name: partial(_time, function, calls[name], device) for name, function in contestants.items()}
        return take_turns(timers, rounds)
    finally:
        gc.enable()


def warn_if_unsteady(times: Mapping[str, Times]) -> bool:
    """Say so if the quartiles of any contestant are far apart: medians of different rounds then contradict the ratios."""
    spreads = {name: taken.spread for name, taken in times.items()}
    unsteady = [name for name, spread in spreads.items() if spread.high > 1.3 * spread.low]
    if unsteady:
        print(
            f"\nThese times are unsteady ({', '.join(unsteady)}): another program probably used the machine. "
            "Close it and repeat. The ratios, taken round by round, are more reliable than the speeds."
        )
    return bool(unsteady)


def take_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    """What every contestant says it took, once a round, in an order that rotates."""
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(timers[name]())
    return {name: Times(tuple(values)) for name, values in times.items()}


def _time(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds a call, of `calls` calls in a row."""
    if device.type == "cuda":
        # Writing a buffer larger than L2 evicts the inputs, and keeps the GPU busy while the host enqueues the call.
        _eviction_buffer(device).zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def graphed(function: Callable[[], object], stream: torch.cuda.Stream, calls: int = 1) -> Callable[[], object]:
    """Replays `calls` calls in a row, recorded as a CUDA graph: the time is the GPU's alone, however slow the host.

    Raises:
        CaptureError: they cannot be recorded.
    """

    def run() -> None:
        for _ in range(calls):
            function()

    return cuda_graph.capture(run, run, stream, torch.cuda.graph_pool_handle())


def host_seconds(function: Callable[[], object], calls: int = 100) -> float:
    """What the host spends on a call, the GPU aside."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = (time.perf_counter() - began) / calls
    torch.cuda.synchronize()
    return seconds


_eviction_buffers: dict[torch.device, Tensor] = {}


def _eviction_buffer(device: torch.device) -> Tensor:
    if device not in _eviction_buffers:
        _eviction_buffers[device] = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    return _eviction_buffers[device]


def copy_of(num_bytes: int, device: torch.device | str = "cpu") -> Callable[[], object]:
    """A call that moves `num_bytes`, half of them read and half written: the floor of an op that has to move as many."""
    source = torch.zeros(max(1, num_bytes // 8), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(num_bytes: int, device: torch.device | str = "cpu") -> float:
    """Bytes a second of a copy that moves `num_bytes`."""
    return num_bytes / compare({"copy": copy_of(num_bytes, device)}, device, seconds=0.2)["copy"].spread.median


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


# ------------------------------------------------------------------------------------------------------------- record


def device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """Of the native kernels; without them, of PyTorch's."""
    isa: str = (
        backend.native().build_info()["isa"] if backend.native_error() is None else torch.backends.cpu.get_cpu_capability()
    )
    return isa.lower()


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16 (Linux)."""
    with suppress(OSError):
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)
    return False


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure depends on."""
    missing = backend.native_error()
    libraries = {}
    for name in ("torch", "triton", "diffusers", "openvino", "onnxruntime"):
        with suppress(PackageNotFoundError):
            libraries[name] = version(name)
    bandwidth = {"256 MB": 2 << 27, "1 MB": 1 << 20}
    return {
        "device": device_name(device),
        "cpu_cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        **({"no native kernels": missing} if missing else {}),
        **(_card(device) if torch.device(device).type == "cuda" else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **libraries,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "copy_gb_per_s": {name: round(copy_bandwidth(size, device) / 1e9, 1) for name, size in bandwidth.items()},
    }


def _card(device: torch.device | str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    card = {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": round(properties.L2_cache_size / 2**20, 1),
        "memory_gib": round(properties.total_memory / 2**30),
    }
    with suppress(OSError, subprocess.CalledProcessError):
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        card["driver, clocks, power limit"] = lines[torch.device(device).index or 0]
    return card


def commit() -> str:
    """Of the source that runs; "+" if it was changed since (results aside)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..", ":!results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_output(device: torch.device | str) -> Path:
    """benchmarks/results/<device>.json; a CPU goes by its model, its cores, and the instruction set that is used."""
    name = device_name(device)
    if torch.device(device).type == "cpu":
        name = f"{name} {cores()} cores {instruction_set()}"
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm)\)|@.*?ghz", " ", name.lower()))
    return ROOT / "results" / f"{'-'.join(words)}.json"


def print_machine(description: Mapping[str, Any]) -> None:
    for key, value in description.items():
        print(f"{key:>16}  {value}")


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows with the same keys, which head the columns."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    print(f"\n{title}")
    cells.insert(1, ["-" * width for width in widths])
    for first, *others in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def record(
    path: Path,
    benchmark: str,
    description: Mapping[str, Any],
    rows: Sequence[Mapping[str, object]],
    *,
    quiet: bool = False,
) -> None:
    """Puts one benchmark's table into a JSON file, beside those of the others; the file is never half written."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    results[benchmark] = {"machine": dict(description), "rows": [_json(row) for row in rows]}
    write_json(path, results)
    if not quiet:
        print(f"\nwritten: {path}")


def save_picture(figure: Any, path: Path) -> None:
    """Of matplotlib's pyplot, which forgets it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written: {path}")


def finish(message: str, failures: Sequence[str]) -> None:
    """The last words of a benchmark that goes on where something fails; then its exit status is 1."""
    for failure in failures:
        print(f"failed: {failure}")
    if failures:
        print(f"{message}; {len(failures)} failed, first: {failures[0].splitlines()[0]}")
        sys.exit(1)
    print(message)


def _json(row: Mapping[str, object]) -> dict[str, object]:
    def value(cell: object) -> object:
        if isinstance(cell, Spread):
            return {key: float(f"{number:.4g}") for key, number in cell._asdict().items()}
        return float(f"{cell:.4g}") if isinstance(cell, float) else cell

    return {key: value(cell) for key, cell in row.items()}
