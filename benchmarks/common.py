"""Parts that all benchmarks share: parity before speed, interleaved timing, and the record of a run.

Peers take turns in one process, round by round, so a machine that changes its speed changes it for all of them.
A reported ratio is the median over the rounds of (peer's time / our time), with its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from processes import seconds_of, versions
from torch import Tensor, nn

from ddpm_fast.files.writing import replacing, write_json
from ddpm_fast.inference import cuda_graph
from ddpm_fast.ops import backend

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT.parent / "tests" / "helpers"))  # for op_cases and op_calls, which tests use too
RECORDED = ROOT / "results"  # stands for the file of the device in it
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SAME_IMAGES = 1e-3  # largest difference of images
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def require_parity(what: str, got: Tensor, baseline: Tensor, truth: Tensor, *, factor: float = 2) -> None:
    """Raise an AssertionError unless `got` is as accurate as `baseline`: wrong results have no speed.

    The root-mean-square error against `truth` (float64) may be `factor` times the baseline's, or a rounding of the largest
    value.
    """
    error, allowed = (float((x.double() - truth).square().mean().sqrt()) for x in (got, baseline))
    limit = max(factor * allowed, torch.finfo(got.dtype).eps * float(truth.abs().max()))
    if not error <= limit:
        raise AssertionError(f"{what}: error {error:.3g} against float64, at most {limit:.3g} expected: no speed is reported")


def require_same_images(what: str, before: Tensor, after: Tensor) -> None:
    """Raise an AssertionError unless images from the same random numbers are the same up to rounding."""
    difference = float((after - before).abs().max())
    if not difference <= SAME_IMAGES:
        raise AssertionError(
            f"{what}: images differ by {difference:.3g}, at most {SAME_IMAGES:g} expected: no speed is reported"
        )
    print(f"{what}: the same images, to {difference:.2g}", flush=True)


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
    """Seconds per call, one value per round."""

    rounds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.rounds)

    @property
    def ms(self) -> Spread:
        return Spread.of([1e3 * seconds for seconds in self.rounds])

    def per_second(self, things: float) -> Spread:
        """Return how many things a second calls make that each make `things`."""
        return Spread.of([things / seconds for seconds in self.rounds])

    def speedup_over(self, peer: Times) -> Spread:
        """Return how many times faster this is than `peer`, from the ratio of each round."""
        return Spread.of([theirs / ours for theirs, ours in zip(peer.rounds, self.rounds, strict=True)])


Name = TypeVar("Name", bound=Hashable)


def turns(timers: Mapping[Name, Callable[[], float]], rounds: int) -> Iterator[dict[Name, Times]]:
    """Call each timer once a round, in an order that rotates from round to round. Yield all times so far after each round."""
    names = list(timers)
    times = {name: Times(()) for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name] = Times((*times[name].rounds, timers[name]()))
        yield times


def take_turns(timers: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, Times]:
    """Return the times of all rounds."""
    *_, times = turns(timers, rounds)
    return times


def compare(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 1.0,
    min_rounds: int = 9,
    max_rounds: int = 99,
    warm: bool = False,
) -> dict[str, Times]:
    """Time every function once a round, in an order that rotates.

    Args:
        functions: Calls by name. Each is warmed up first.
        device: CPU calls are repeated for about a millisecond a round, so caches are as warm as the tensors are small.
            CUDA calls are timed one by one by events, with a cold L2.
        seconds: Time for all rounds together.
        min_rounds: The least number of rounds.
        max_rounds: The largest number of rounds.
        warm: Skip the warm-up and make `min_rounds` calls, for calls that take long.
    """
    device = torch.device(device)
    calls = dict.fromkeys(functions, 1)
    rounds = min_rounds
    if not warm:
        expected = 0.0
        for name, function in functions.items():
            _time(function, 1, device)
            estimate = min(_time(function, 1, device) for _ in range(4))
            calls[name] = 1 if device.type == "cuda" else math.ceil(1e-3 / estimate)
            expected += calls[name] * estimate
        rounds = int(min(max(seconds / expected, min_rounds), max_rounds))
    gc.collect()
    gc.disable()
    try:
        return take_turns({name: partial(_time, call, calls[name], device) for name, call in functions.items()}, rounds)
    finally:
        gc.enable()


def fastest_format(
    make: Callable[..., Callable[[], object]], network: nn.Module, *inputs: Any
) -> tuple[str, Callable[[], object]]:
    """Return the memory format in which the call that `make` returns for a network and its inputs is fastest, and that call."""
    candidates = {}
    for name, memory_format in FORMATS.items():
        is_map = [isinstance(each, Tensor) and each.dim() == 4 for each in inputs]
        placed = [x.contiguous(memory_format=memory_format) if yes else x for x, yes in zip(inputs, is_map, strict=True)]
        copied = copy.deepcopy(network).to(memory_format=memory_format)  # type: ignore[call-overload]
        candidates[name] = make(copied, *placed)
        candidates[name]()
    times = compare(candidates, inputs[0].device, warm=True, min_rounds=3)
    best = min(times, key=lambda name: times[name].ms)
    return best, candidates[best]


def use_faster_format(network: nn.Module, *inputs: Any) -> str:
    """Put a network in the memory format in which one evaluation is faster, and return the format's name."""
    with torch.inference_mode():
        name, _ = fastest_format(partial, network, *inputs)
    network.to(memory_format=FORMATS[name])  # type: ignore[call-overload]
    return name


def _time(function: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        _evict(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    return seconds_of(function, calls)


_eviction: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _evict(device: torch.device) -> None:
    """Read a buffer larger than L2, which keeps the GPU busy while the host enqueues the call.

    Writing it would leave dirty lines, and the timed call would pay for their write-back.
    """
    if device not in _eviction:
        _eviction[device] = torch.ones(1 << 26, device=device), torch.empty((), device=device)
    buffer, target = _eviction[device]
    torch.sum(buffer, 0, out=target)


def graphed(function: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    """Return a replay of the call as a CUDA graph: its time is the GPU's alone.

    Raises:
        CaptureError: The call cannot be captured.
    """
    return cuda_graph.capture(function, function, stream, torch.cuda.graph_pool_handle())


def megabytes(size: int | None) -> int | str:
    return "" if size is None else round(size / 1e6)


def synchronize(device: torch.device | str) -> None:
    """Wait for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def copy_of(num_bytes: int, device: torch.device | str = "cpu") -> Callable[[], object]:
    """Return a call that reads and writes `num_bytes` in all: the floor of an op that must move as many."""
    source = torch.zeros(max(1, num_bytes // 8), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


# ------------------------------------------------------------------------------------------------------------- record


def visible_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*:\s*(.*\S)", _cpuinfo(), re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    # Clouds call every generation of it by one name.
    generation = backend.FULL_RATE_BFLOAT16.get(backend.BUILD.get("processor", "")) if has_bf16() else None
    return f"{name} ({generation})" if generation else name


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """Return the instruction set of the native kernels, or without them of PyTorch's."""
    isa: str = (
        backend.native().build_info()["isa"] if backend.native_error() is None else torch.backends.cpu.get_cpu_capability()
    )
    return isa.lower()


def has_bf16() -> bool:
    """Return whether this CPU has instructions that multiply bf16 (Linux)."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpuinfo().split())


@functools.cache
def _cpuinfo() -> str:
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return ""


@functools.cache
def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a figure depends on."""
    missing = backend.native_error()
    bandwidth = {}
    for name, size in {"256 MB": 2 << 27, "1 MB": 1 << 20}.items():
        taken = compare({"copy": copy_of(size, device)}, device, seconds=0.2)["copy"]
        bandwidth[name] = round(size / taken.spread.median / 1e9, 1)
    return {
        "device": device_name(device),
        "cpu_cores": cores(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "processor": backend.BUILD.get("processor"),
        "instruction_set": instruction_set(),
        **({"no native kernels": missing} if missing else {}),
        **(_card(device) if torch.device(device).type == "cuda" else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions(("torch", "triton", "diffusers", "openvino", "onnxruntime")),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "copy_gb_per_s": bandwidth,
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
    """Return the commit of the sources, with "+" if they changed since (results aside). Without git, their digest."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..", ":!results") else "")
    except (OSError, subprocess.CalledProcessError):
        files = [path for folder in ("csrc", "ddpm_fast") for path in (ROOT.parent / folder).rglob("*")]
        text = b"".join(path.read_bytes() for path in sorted(files) if path.suffix in {".py", ".cpp", ".cu", ".h"})
        return f"sources {hashlib.sha256(text).hexdigest()[:12]}"


def default_output(device: torch.device | str) -> Path:
    """Return benchmarks/results/<device>.json. A CPU goes by model, cores and instruction set."""
    name = device_name(device)
    if torch.device(device).type == "cpu":
        name = f"{name} {cores()} cores {instruction_set()}"
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm)\)|@.*?ghz", " ", name.lower()))
    return ROOT / "results" / f"{'-'.join(words)}.json"


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows that have the same keys, which head the columns."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    print(f"\n{title}")
    cells.insert(1, ["-" * width for width in widths])
    for first, *others in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> Any:
    """Return a value for JSON, with four digits of each number."""
    value = value._asdict() if isinstance(value, Spread) else value
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_json(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_results(path: Path | None) -> dict[str, Any]:
    """Return the sections of a JSON file, none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


class Run:
    """Results of a benchmark: the machine that they depend on, and the JSON file that holds them.

    Args:
        device: Device that is measured.
        out: JSON file. `RECORDED`: benchmarks/results/<device>.json. None: what has a title is printed, and nothing is written.
    """

    def __init__(self, device: torch.device | str = "cpu", out: Path | None = None) -> None:
        self.machine = dict(machine(device))
        self.path = default_output(device) if out == RECORDED else out
        self.failures: list[str] = []
        for key, value in self.machine.items():
            print(f"{key:>16}  {value}")
        load = self.machine["load_average"] or 0
        if load > cores() / 4:
            print(f"warning: other programs kept {load} of {cores()} processors busy in the last minute: times may be too long")

    def has(self, section: str, **wanted: object) -> bool:
        """Return whether the file has a table of this commit, with these values beside the machine's.

        Sources that changed since their commit are known by no name, so nothing is theirs.
        """
        kept = read_results(self.path).get(section, {"machine": {}})["machine"]
        wanted = wanted | {"commit": self.machine["commit"]}
        return not self.machine["commit"].endswith("+") and all(kept.get(key) == value for key, value in wanted.items())

    def save(self, section: str, rows: Sequence[Mapping[str, object]], title: str = "", **more: object) -> None:
        """Write a table beside those of other benchmarks, and print it if it has a title. `more` joins the machine's keys."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            section_of_run = {"machine": self.machine | more, "rows": _json(list(rows))}
            write_json(self.path, read_results(self.path) | {section: section_of_run})
        if title and rows:
            print_table(title, rows)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Keep an error as a failure and go on, whatever it is."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
            print(f"failed: {self.failures[-1]}", flush=True)

    def finish(self, message: str = "") -> None:
        """Print the last line, and exit with status 1 if something failed."""
        words = [message] if message else []
        if self.failures:
            words.append(f"{len(self.failures)} failed, first: {self.failures[0].splitlines()[0]}")
        where = f"results: {self.path}" if self.path else "no file was written: --out FILE writes the results"
        print("; ".join([*words, where]))
        if self.failures:
            sys.exit(1)

    def picture(self, figure: Any, name: str) -> None:
        """Write a figure of matplotlib's pyplot beside the results, if they are written."""
        if self.path is not None:
            save_picture(self.path.with_name(f"{self.path.stem}_{name}.png"), figure)


def save_picture(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib's pyplot as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot().close(figure)
    print(f"written: {path}")


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws to files alone. Exit if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is missing: install it with pip install 'ddpm_fast[bench]'") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot as plot

    return plot


def errors(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return the error bars of medians, as pyplot takes them."""
    return [[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]]


def parse(
    doc: str | None, arguments: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]], *, device: bool = True
) -> argparse.Namespace:
    """Parse the command line of a script: --out, --device and its own options, which `add_argument` takes by keyword."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "write the results to this JSON file, and pictures next to it; without a name, to benchmarks/results/<device>.json"
    shared: dict[str, dict[str, Any]] = {
        "--out": {"nargs": "?", "metavar": "FILE", "type": Path, "const": RECORDED, "help": help}
    }
    if device:
        shared["--device"] = {"default": "cpu", "help": "run on this device (cpu)"}
    for name, option in (shared | dict(options)).items():
        parser.add_argument(name, **option)
    args = parser.parse_args(arguments)
    if args.out not in (None, RECORDED) and args.out.is_dir():
        parser.error(f"argument --out: expected a JSON file, got the folder {args.out}")
    if getattr(args, "plot", None):
        pyplot()  # before any work
    return args
