"""Build for the GPU at hand, test on it and measure, in nine minutes: `make gpu-check`.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --tune             # `make gpu-tune`: sampling beside max-autotune, in at most an hour
    python benchmarks/gpu_check.py --tune --seconds 600
    python benchmarks/gpu_check.py --only ops goals
    python benchmarks/gpu_check.py --dry-run          # all phases on a CPU with tiny shapes

Correctness comes first, then our own figures, then comparisons with torch.compile, which may lack the time, and last
compute-sanitizer. Each phase is a process with a time limit: a crash or a hang costs that phase alone. What it has measured
is in benchmarks/results/<card>.json at once, and logs lie in <card>_logs/. torch and numpy are enough to start, and no network
is needed. What is missing is said first.
The exit status is 0 if no phase failed, also if goals are not met, 1 if one did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL_SECONDS = 540.0  # the rest of ten minutes is for copying the results
TUNING_SECONDS = 3600.0
COMPILED = ROOT / "build" / "inductor"  # what torch.compile has compiled and tuned: a second call goes on
sys.path.insert(0, str(ROOT))  # the package need not be installed

UNBUILT = "an old or missing native module is not built"
OPTIONAL = {  # modules, programs and a header, and what happens without them
    **dict.fromkeys(("nvcc", "g++", "setuptools", "Python.h", "cmake", "ninja", "pybind11"), UNBUILT),
    "pytest": "no test runs",
    "triton": "its kernels are neither tested nor timed",
    "diffusers": "plain PyTorch stands in for it",
    "msgspec": "no model is loaded from a folder; the trainer is timed without one",
    "compute-sanitizer": "accesses to memory are not checked",
}
SAMPLED = {"cifar10-32": (128, 16, 1), "256x256": (8,)}  # network -> batches
SMALL, LARGE = SAMPLED
FAST, TUNED = "reduce-overhead", "max-autotune"  # modes of torch.compile


class Outcome(NamedTuple):
    status: str  # passed, failed, skipped, out of time
    note: str


@dataclass
class Check:
    """State that the phases share.

    Attributes:
        out: JSON file of the results.
        since: Date of the oldest section that counts.
        began: When the time began, by `clock`.
        seconds: The time for all phases.
        in_process: Run benchmarks in this process, without a limit.
        phase: The phase that runs.
        failed_tests: The end of each failing test's report.
        compared: What has been compared with the peers: training, and networks by their images.
    """

    out: Path
    dry_run: bool = False
    since: str = ""
    began: float = field(default_factory=time.monotonic)
    seconds: float = TOTAL_SECONDS
    in_process: bool = False
    phase: str = ""
    clock: Callable[[], float] = time.monotonic
    failed_tests: dict[str, str] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def log(self, name: str) -> Path:
        return self.out.with_name(f"{self.out.stem}_logs") / name


# ---------------------------------------------------------------------------------------------------------- processes


def start(command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, so that its children end with it. Its output goes to a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    words, both = [str(word) for word in command], {**os.environ, **ours, **(environment or {})}
    with log.open("wb") as output:
        return subprocess.Popen(words, cwd=ROOT, env=both, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its children."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    starters: Iterable[Callable[[], subprocess.Popen[bytes]]], slots: int, seconds: float, clock: Callable[[], float]
) -> list[int | None]:
    """Run processes, at most `slots` at once. Return their exit statuses, None for those that the time did not suffice for."""
    end = clock() + seconds
    waiting = list(starters)
    started: list[subprocess.Popen[bytes]] = []
    try:
        while clock() < end and (waiting or any(process.poll() is None for process in started)):
            if waiting and sum(process.poll() is None for process in started) < slots:
                started.append(waiting.pop(0)())
            else:
                time.sleep(0.02)
        return [process.poll() for process in started] + [None] * len(waiting)
    finally:
        for process in started:
            stop(process)


def run_one(
    check: Check, seconds: float, command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
) -> int | None:
    """Run a process, beside which nothing runs. Return its exit status, or None if the time did not suffice."""
    (status,) = run_all([lambda: start(command, log, environment)], 1, seconds, check.clock)
    return status


def ask(code: str, *arguments: str) -> Any:
    """Return what code prints last, from JSON. It runs in a new process: the module may have been built after this one began.

    Raises:
        RuntimeError: The process failed. The text is its last line.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, ROOT / "csrc")))}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError([f"exit status {done.returncode}", *done.stderr.strip().splitlines()][-1])
    return json.loads(done.stdout.splitlines()[-1])


def tail(log: Path, lines: int = 1) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if log.is_file() else ""


def script(check: Check, seconds: float, module: str, *arguments: object) -> Outcome:
    """Run a benchmark of this folder."""
    import common

    words = [*map(str, arguments), "--device", check.device, "--out", str(check.out)]
    if check.in_process:
        try:
            importlib.import_module(module).main(words)
        except SystemExit as error:
            return Outcome("failed", f"exit status {error.code}")
        return Outcome("passed", f"{module} {words[0]}")
    log = check.log(f"{check.phase.replace(' ', '_')}.log")
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), "TORCHINDUCTOR_COMPILE_THREADS": str(common.cores())}
    status = run_one(check, seconds, [sys.executable, HERE / f"{module}.py", *words], log, environment)
    print(tail(log, 200))
    if status is None:
        return Outcome("out of time", "stopped; what it had measured is kept")
    return Outcome("passed", tail(log)) if status == 0 else Outcome("failed", f"exit status {status}: {tail(log)}; see {log}")


# -------------------------------------------------------------------------------------------------------------- phases


ASK = """
import digest, json, sys, torch
from ddpm_fast.ops import backend, why_not
old = backend.BUILD and backend.BUILD.get("sources") != digest.digest()
print(json.dumps("its sources have changed" if old else why_not("native", "q_sample", torch.device(sys.argv[1]))))
"""


def why_no_kernels(device: str) -> str | None:
    """Return why the native module cannot run on the device, or is old."""
    try:
        reason: str | None = ask(ASK, device)
    except RuntimeError as error:
        return str(error)
    return reason


def why_old_driver(nvcc: str) -> str | None:
    """Return why the driver cannot run what the toolkit compiles: it is of an earlier CUDA generation."""
    toolkit = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    number = ctypes.c_int()
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    major, driver = number.value // 1000, f"{number.value // 1000}.{number.value % 1000 // 10}"
    if toolkit is None or major == 0 or major >= int(toolkit[1]):
        return None
    newer = f"{toolkit[1]}.{toolkit[2]}"
    return f"the driver supports CUDA {driver}, older than the toolkit's {newer}: update it or use nvcc {driver}"


def build(check: Check, seconds: float) -> Outcome:
    reason, nvcc = why_no_kernels(check.device), program("nvcc")
    if reason is None:
        return Outcome("skipped", "the module has kernels for this device")
    lacking = [name for name, effect in OPTIONAL.items() if effect == UNBUILT and not has(name)]
    if check.dry_run:
        return Outcome("skipped", f"{reason}; a rehearsal builds nothing")
    if nvcc is None or lacking:
        return Outcome("failed", f"the native kernels are not measured: {reason}; missing: {', '.join(lacking)}")
    old = why_old_driver(nvcc)
    if old is not None:
        return Outcome("failed", old)
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}"  # CMake knows what this nvcc can compile for it
    print(f"building for {architecture}, because: {reason}")
    log = check.log("build.log")
    # The build is in place and installs nothing, so any Python will do.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", ROOT / "build" / "gpu_check_native"]
    path = os.pathsep.join([os.environ["PATH"], str(Path(nvcc).parent)])
    environment = {"DDPM_FAST_CUDA_ARCHS": "", "TORCH_CUDA_ARCH_LIST": architecture, "PATH": path}
    status = run_one(check, seconds, command, log, environment)
    if status is None:
        return Outcome("out of time", f"the build took more than {seconds:.0f} s")
    reason = why_no_kernels(check.device) if status == 0 else f"exit status {status}; see {log}"
    if reason is not None:
        print(tail(log, 40))
        return Outcome("failed", reason)
    return Outcome("passed", f"built for {architecture}")


def ops(check: Check, seconds: float, which: str) -> Outcome:
    tiny = ["--tiny", "--each", 0.001] if check.dry_run else []
    return script(check, seconds, "benchmark_ops", which, "--seconds", max(seconds - 15, 1), *tiny)


def tests(check: Check, seconds: float) -> Outcome:
    """Run the tests of the GPU in as many processes as are free, each a share of the tests."""
    import common

    if not installed("pytest"):
        return Outcome("skipped", "pytest is not installed")
    shares, running = (100, 1) if check.dry_run else (common.cores(), common.cores())  # a rehearsal runs a hundredth
    logs = [check.log(f"tests-{i}.jsonl") for i in range(running)]
    commands = [[sys.executable, HERE / "gpu_check.py", "--tests", i, shares, check.device, log] for i, log in enumerate(logs)]
    starters = [lambda c=c, log=log: start(c, log.with_suffix(".log")) for c, log in zip(commands, logs, strict=True)]
    return verdict(check, logs, run_all(starters, running, seconds, check.clock))


class Share:
    """A pytest plugin: every n-th test, with its outcome in a file of JSON lines."""

    def __init__(self, first: int, step: int, log: Path) -> None:
        self.first, self.step, self.log = first, step, log.open("w", encoding="utf-8", buffering=1)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(items, key=lambda item: item.nodeid)[self.first :: self.step]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(report)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure, unless it wants a module that is not there."""
        lacking = re.search(r"No module named '(\w+)", report.longreprtext) if report.failed else None
        if report.failed and (lacking is None or installed(lacking[1])):
            self.write(report)

    def write(self, report: Any) -> None:
        end = "\n".join(report.longreprtext.splitlines()[-12:]) if report.failed else ""
        print(json.dumps({"test": report.nodeid, "outcome": report.outcome, "tail": end}), file=self.log)


def run_share(first: int, step: int, device: str, log: Path) -> int:
    import pytest

    marks, path = ("gpu and not slow", "tests") if device == "cuda" else ("not gpu and not slow", "tests/ops/test_noise.py")
    # Warnings are errors elsewhere. Here a new one of torch would fail every test.
    options = ["--full", "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", marks, path]
    options.append("--continue-on-collection-errors")
    status = int(pytest.main(options, plugins=[Share(first, step, log)]))
    return 0 if status == 5 else status  # 5: this share has no test


def verdict(check: Check, logs: Sequence[Path], statuses: Sequence[int | None]) -> Outcome:
    """Judge what the processes of the tests wrote. `check` keeps the end of each failure."""
    lines = [line for log in logs if log.is_file() for line in log.read_text(encoding="utf-8").splitlines()]
    reports = [json.loads(line) for line in lines if line.endswith("}")]
    counts = {name: sum(each["outcome"] == name for each in reports) for name in ("passed", "failed", "skipped")}
    check.failed_tests |= {each["test"]: each["tail"] for each in reports if each["outcome"] == "failed"}
    for log, status in zip(logs, statuses, strict=True):
        if status not in (0, 1, None):
            check.failed_tests[f"{log.stem} ended with status {status}"] = tail(log.with_suffix(".log"), 12)
    note = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if check.failed_tests:
        return Outcome("failed", f"{note}; first: {next(iter(check.failed_tests))}")
    if None in statuses:
        return Outcome("out of time", f"{note}; {sum(status is None for status in statuses)} processes were stopped")
    return Outcome("passed", note)


def profile(check: Check, seconds: float) -> Outcome:
    tiny = ["--network", "tiny", "--batches", 1] if check.dry_run else []
    return script(check, seconds, "benchmark_profile", *tiny)


def sanitizer(check: Check, seconds: float) -> Outcome:
    if check.dry_run:
        return Outcome("passed", f"{launch_every_op('cpu')} calls, without compute-sanitizer")
    found = program("compute-sanitizer")
    if found is None or why_no_kernels(check.device) is not None:
        return Outcome("skipped", "there is no compute-sanitizer" if found is None else "there are no native kernels")
    log = check.log("sanitizer.log")
    # Callers answer for calls of the API that fail, torch's own among them.
    command = [found, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, HERE / "gpu_check.py", "--launch-every-op"]
    # Without torch's caching, every tensor is an allocation with known ends.
    status = run_one(check, seconds, command, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    text = log.read_text(encoding="utf-8", errors="replace")
    if re.search(r"^=+ .*not supported", text, re.MULTILINE):  # some virtual machines
        return Outcome("skipped", "compute-sanitizer does not support this device here")
    launched, errors = (len(re.findall(line, text, re.MULTILINE)) for line in (r"^launched ", r"^=+ (Invalid|Misaligned) "))
    if errors or status not in (0, None):
        return Outcome("failed", f"memcheck: {errors} errors, exit status {status}; see {log}")
    return Outcome("passed" if status == 0 else "out of time", f"memcheck: {launched} calls without an error")


def launch_every_op(device: str) -> int:
    """Call every case's native kernels once, forward and backward, and return how many calls there were."""
    import common
    from benchmark_ops import DIRECTIONS, why_missing
    from op_calls import make_call
    from op_cases import CASES
    from peers import OPS
    from works import product

    calls = 0
    for work in product(case for case in CASES if not case.benchmark):
        is_empty = work.direction == "backward" and not work.case.shape[0]
        if is_empty or why_missing(work, "native", device) is not None:
            continue
        call = make_call(work.case, common.DTYPES[work.dtype], device, channels_last=work.layout == "channels_last")
        DIRECTIONS[work.direction](OPS["native"].build(call, work.case), call)()
        common.synchronize(device)
        calls += 1
        print(f"launched {work}")
    return calls


def sampling(check: Check, seconds: float, network: str, mode: str = "") -> Outcome:
    batches = SAMPLED[network][: 1 if mode == TUNED else None]
    words = ["--model", network, "--batch", *batches, "--dtype", "bf16", "--steps", 50, "--seconds", max(seconds - 15, 1)]
    if check.dry_run:
        words = ["--model", "tiny", "--batch", 1, "--steps", 2, "--rounds", 1]
    words += ["--compile", mode] if mode else []
    words += ["--go-on"] if mode == TUNED else []
    return compared(check, network, seconds, "sample_speed", *words)


def training(check: Check, seconds: float, compiled: bool = False) -> Outcome:
    base = "diffusers" if installed("diffusers") else "plain PyTorch"
    eager = "diffusers + eager PyTorch" if base == "diffusers" else base
    peers = [f"{base} + torch.compile", "ddpm_fast"] if compiled else ["ddpm_fast Trainer", "ddpm_fast", eager]
    size = ["--batch", 128]
    if check.dry_run:
        size, peers = ["--network", "tiny", "--batch", 2, "--rounds", 1], peers[:1]  # a process takes seconds to start
    words = ["speed", "--precision", "bf16", *size, "--peers", *peers, "--formats", "channels_last"]
    return compared(check, "training", seconds, "benchmark_training", *words)


def compared(check: Check, what: str, seconds: float, module: str, *words: object) -> Outcome:
    """Run a benchmark that compares results before it times them, which once is enough for."""
    outcome = script(check, seconds, module, *words, *(["--trusted"] if what in check.compared else []))
    check.compared |= {what} if outcome.status == "passed" else set()
    return outcome


def goals_phase(check: Check, seconds: float) -> Outcome:
    import common

    from ddpm_fast.files.writing import write_json

    results = common.read_results(check.out)
    # Measurements of earlier runs do not count.
    now = {name: each for name, each in results.items() if each.get("machine", {}).get("date", "") >= check.since}
    found = goals(now)
    common.print_table("goals (in a rehearsal the figures mean nothing)" if check.dry_run else "goals", found)
    if results:
        write_json(check.out, results | {"goals": {"rows": found}})
    met, measured = (sum(goal["is"] in words for goal in found) for words in (["met"], ["met", "NOT MET"]))
    return Outcome("passed", f"{met} of {measured} goals met, {len(found) - measured} not measured")


# Wanted shares of what a kernel's instructions allow. An elementwise kernel is to fill 85 % of its issue slots, as cards.py
# assumes. In a norm, the threads of a block wait for each other between the sweeps over their elements.
SHARES = {"elementwise": 0.85, "forward": 0.80, "backward": 0.70}


def goals(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Compare results with the project's goals for an H100 or H200. On another card those of single ops are not measured."""
    import cards
    from works import deciding

    found: list[dict[str, object]] = []
    works = {tuple(work.columns().values()): work for work in deciding()}
    known_cards = {card.device: card for card in cards.CARDS}
    budgets = json.loads(cards.BUDGETS.read_text(encoding="utf-8"))["native"]["kernels"]

    def rows(prefix: str, **wanted: object) -> list[dict[str, Any]]:
        sections = [section for name, section in results.items() if name.startswith(prefix)]
        every = [row | {"device": section.get("machine", {}).get("device")} for section in sections for row in section["rows"]]
        return [row for row in every if all(row.get(key) == value for key, value in wanted.items())]

    def of_allowed(rows: list[dict[str, Any]]) -> list[float]:
        """Return measured shares of copy, of the shares that the instructions allow on a card with known figures."""
        shares = []
        for row in rows:
            card = known_cards.get(row["device"])
            work = works.get(tuple(row.get(key) for key in ("op", "case", "shape", "dtype", "layout", "direction")))
            # cards.py asks a program that it compiles how a norm is cut.
            if card is not None and work is not None and (row["op"] != "group_norm_silu" or program("g++")):
                shares.append(row["share of copy"] / cards.allowed_share(work, card, budgets))
        return shares

    def ratios(rows: list[dict[str, Any]], peer: str = "", *, compiled: bool = False) -> list[float]:
        """Return how many times as fast rows are as a peer, which our Trainer is not."""
        of_peer = re.compile(rf"times (?!.*ddpm_fast).*{peer}")
        wanted = {key for row in rows for key in row if of_peer.match(key) and ("torch.compile" in key) == compiled}
        return [row[key]["median"] for key in sorted(wanted) for row in rows if key in row]

    def goal(what: str, bound: float, values: list[float], pick: Callable[[list[float]], float] = min, step: str = "") -> None:
        value = pick(values) if values else None
        row = {"goal": what, "wanted": f"at least {bound:g}", "measured": value}
        row |= {"which is": f"{'lowest' if pick is min else 'geometric mean'} of {len(values)}"}
        row |= {"is": "not measured" if value is None else "met" if value >= bound else "NOT MET"}
        found.append(row | {"a step, ms (predicted)": step})

    beyond = rows("benchmark_ops deciding", **{"by": "native", "beyond L2": True})
    simple = [row for row in beyond if row["op"] != "group_norm_silu" and row["dtype"] == "float32"]
    allowed = "share of what the instructions allow"
    goal(f"elementwise ops, float32: {allowed}", SHARES["elementwise"], of_allowed(simple))
    for direction in ("forward", "backward"):
        norms = [row for row in beyond if row["op"] == "group_norm_silu" and row["direction"] == direction]
        goal(f"group_norm_silu {direction}: {allowed}", SHARES[direction], of_allowed(norms))
        compiled = rows("benchmark_ops deciding", by="compile", op="group_norm_silu", direction=direction)
        faster = [row["native is faster by"]["median"] for row in compiled if row["native is faster by"] is not None]
        goal(f"group_norm_silu {direction}: times faster than torch.compile", 1.5, faster, statistics.geometric_mean)
    peer = "diffusers" if installed("diffusers") else "plain"
    sampled = rows("sample_speed", sampler="ddpm_fast")
    goal(f"sampling: times faster than {peer}, eager", 2.0, ratios(sampled, peer))
    compiled = [row for row in sampled if row["model"] == SMALL and ratios([row], compiled=True)]
    # The prediction for a card asks a compiled program, too.
    known = [row for row in compiled if row["device"] in known_cards] if program("g++") else []
    steps = ask(EXPECT, SMALL, known[0]["device"], *(str(row["batch"]) for row in known)) if known else []
    for row, (predicted, ratio) in zip(known, steps, strict=True):
        what = f"sampling, batch {row['batch']}: times faster than torch.compile"
        goal(what, ratio, ratios([row], compiled=True), step=f"{row['ms a step']:.3g} ({predicted:.3g})")
    if not known:
        goal("sampling: times faster than torch.compile", 1.0, ratios(compiled, compiled=True))
    for name in ("ddpm_fast", "ddpm_fast Trainer"):
        trained = ratios(rows("train_speed", **{"training step": name}))
        goal(f"a training step, {name}: times faster than eager", 1.0, trained)
    return found


# Prints the milliseconds that a step should take on a card at some batches, and torch.compile as a multiple of them.
EXPECT = """
import cards, json, sys, traced
network, device, *batches = sys.argv[1:]
card, budgets = next(card for card in cards.CARDS if card.device == device), json.loads(cards.BUDGETS.read_text())
print(json.dumps(traced.expected(network, card, [int(n) for n in batches], budgets["native"]["kernels"])))
"""


class Phase(NamedTuple):
    """A step of the check.

    Attributes:
        seconds: Its share of the time. It may also take what earlier phases left.
    """

    name: str
    seconds: float
    run: Callable[[Check, float], Outcome]
    what: str


PHASES = (
    Phase("build", 100, build, "build the native module for this card, if it is missing or old"),
    Phase("tests", 90, tests, "run the tests on the GPU, with the native and Triton backends"),
    Phase("profile", 45, profile, "find the kernels of a step of sampling and of training, and the speed of convolutions"),
    Phase(
        "ops", 40, partial(ops, which="deciding"), "time the ops at the shapes that decide, and check them at the full batch"
    ),
    Phase("sampling", 35, partial(sampling, network=SMALL), "time sampling beside diffusers"),
    Phase("large sampling", 25, partial(sampling, network=LARGE), "time it with the network for 256x256 images"),
    Phase("training", 35, training, "time a training step, and its peak memory"),
    Phase("compiled ops", 20, partial(ops, which="deciding-compiled"), "time the norms beside torch.compile"),
    Phase("compiled sampling", 50, partial(sampling, network=SMALL, mode=FAST), f"time sampling beside {FAST}"),
    Phase("compiled training", 70, partial(training, compiled=True), "time a training step beside torch.compile"),
    Phase("goals", 15, goals_phase, "say which goals are met"),
    Phase("sanitizer", 15, sanitizer, "run every case's native kernels under compute-sanitizer"),
)
TUNING = (
    Phase("tuned sampling", 1800, partial(sampling, network=SMALL, mode=TUNED), f"time sampling beside {TUNED}"),
    Phase(
        "large tuned sampling",
        1800,
        partial(sampling, network=LARGE, mode=TUNED),
        "time it with the network for 256x256 images",
    ),
)


def run(check: Check, phases: Sequence[Phase], keep: Callable[[list[dict[str, object]]], None]) -> list[dict[str, object]]:
    """Run the phases, and keep their outcomes after each."""
    end = check.began + check.seconds
    rows: list[dict[str, object]] = []
    for place, phase in enumerate(phases):
        check.phase, began = phase.name, check.clock()
        seconds = max(0.0, end - began - sum(later.seconds for later in phases[place + 1 :]))
        print(f"\n=== {phase.name}: {phase.what} (at most {seconds:.0f} s)", flush=True)
        try:
            outcome = phase.run(check, seconds) if seconds >= 3 else Outcome("out of time", "not begun")
        except Exception as error:  # whatever it is, the other phases go on
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        taken = round(check.clock() - began)
        rows.append({"phase": phase.name, "is": outcome.status, "seconds": taken, "note": outcome.note})
        print(f"=== {phase.name}: {outcome.status}: {outcome.note}", flush=True)
        keep(rows)
    return rows


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def has(name: str) -> bool:
    if name.endswith(".h"):
        return Path(sysconfig.get_path("include"), name).is_file()
    return installed(name) or program(name) is not None


def program(name: str) -> str | None:
    """Return the path of a program, from PATH or the CUDA toolkit's folder."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=str(folder))


def why_no_gpu() -> str | None:
    lacking = [module for module in ("torch", "numpy") if not installed(module)]
    if lacking:
        return f"{' and '.join(lacking)} cannot be imported by {sys.executable}"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no NVIDIA GPU that it can use"


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [phase.name for phase in PHASES]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help='run these phases (all); "large sampling" is one'
    )
    parser.add_argument(
        "--tune", action="store_true", help="time sampling beside torch.compile's max-autotune, and nothing else"
    )
    parser.add_argument("--seconds", type=float, help="take at most this long (540; with --tune 3600)")
    parser.add_argument("--out", type=Path, help="write this JSON file (benchmarks/results/<card>.json)")
    parser.add_argument("--dry-run", action="store_true", help="go through the phases on a CPU, with tiny shapes")
    parser.add_argument("--launch-every-op", action="store_true", help=argparse.SUPPRESS)  # for compute-sanitizer
    parser.add_argument("--tests", nargs=4, help=argparse.SUPPRESS)  # a share of the tests
    args = parser.parse_args(arguments)
    if args.tune and args.only != names:
        parser.error("--only selects phases of the check, and --tune has its own")
    reason = None if args.dry_run or args.tests else why_no_gpu()
    if reason is not None:
        print(f"nothing was run: {reason}. `python benchmarks/gpu_check.py --dry-run` goes through all phases on a CPU.")
        return 2
    if args.launch_every_op:
        return 0 if launch_every_op("cuda") else 1
    if args.tests:
        first, step, device, log = args.tests
        return run_share(int(first), int(step), device, Path(log))

    import common

    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no process of ours stays behind
        signal.signal(number, lambda *_: sys.exit("gpu-check: stopped"))
    out = args.out or (ROOT / "build" / "gpu_check_dry_run.json" if args.dry_run else common.default_output("cuda"))
    usual = TUNING_SECONDS if args.tune else TOTAL_SECONDS
    seconds = args.seconds or usual
    phases = TUNING if args.tune else [phase for phase in PHASES if phase.name in args.only]
    phases = [phase._replace(seconds=phase.seconds * seconds / usual) for phase in phases]
    check = Check(out.resolve(), args.dry_run, began=began, seconds=seconds, in_process=args.dry_run)
    if args.dry_run:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # to compile takes minutes on a CPU: what would be compiled runs as it is
    absent = [name for name in OPTIONAL if not has(name)]
    for name in absent:
        print(f"missing: {name}: {OPTIONAL[name]}", flush=True)
    result = common.Run(check.device, check.out)
    check.since = "" if args.only == ["goals"] else result.machine["date"]
    section = "gpu_tune" if args.tune else "gpu_check"

    def keep(rows: list[dict[str, object]]) -> None:
        result.save(section, rows, **{"missing": absent, "failed tests": check.failed_tests})

    rows = run(check, phases, keep)
    common.print_table(f"gpu-check on {result.machine['device']}", rows)
    print(f"\nresults: {check.out}")
    return int(any(row["is"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
