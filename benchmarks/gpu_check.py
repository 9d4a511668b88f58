"""`make gpu-check`: builds for the GPU that is there, tests on it, and measures, all within ten minutes.

Every phase is a process of its own with a time limit: a crash or a hang costs that phase alone. Results are written as they
come, to benchmarks/results/<card>.json, so what was measured stays when the rest is interrupted. What is not installed is
named and left out. The exit status is 0 where every phase passed or was left out, 1 where one failed, 2 without a GPU.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only tests norms
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOGS = ROOT / "build" / "gpu_check"
TOTAL_SECONDS = 590.0
sys.path.insert(0, str(ROOT))  # the package need not be installed

# What the package cannot do without, and what is left out where something is missing.
NEEDED = ("torch", "numpy", "safetensors", "PIL", "click", "tqdm")
OPTIONAL = {
    "triton": "no Triton backend",
    "pytest": "no tests",
    "diffusers": "sampling is compared with eager PyTorch written by hand",
    "matplotlib": "no roofline picture",
    "apex": "not among the peers of group_norm_silu",
    "liger_kernel": "not among the peers of group_norm_silu",
}
PROGRAMS = {"nvcc": "the native module is not built", "compute-sanitizer": "no kernel runs under it"}


class Outcome(NamedTuple):
    status: str  # passed, failed, skipped, out of time
    note: str


@dataclass(frozen=True)
class Phase:
    """A step of the check.

    Attributes:
        seconds: its share of the ten minutes.
        greedy: takes the time that earlier phases left, too.
        what: what it does, for a reader.
    """

    name: str
    seconds: float
    greedy: bool
    what: str
    run: Callable[[Check, float], Outcome]


@dataclass
class Check:
    """What the phases share."""

    out: Path
    capability: tuple[int, int]
    began: float = field(default_factory=time.monotonic)  # when the ten minutes began
    clock: Callable[[], float] = time.monotonic
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------- processes


def surroundings() -> dict[str, str]:
    """This process's environment, with the package in it."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


def start(command: Sequence[object], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process of its own group, so that its children end with it; its output goes to a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=surroundings() | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """With its children; one that has ended by itself has none."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(processes: Sequence[subprocess.Popen[bytes]], seconds: float, clock: Callable[[], float]) -> list[int | None]:
    """Exit statuses; None for those that were stopped when the time was up."""
    end = clock() + seconds
    statuses: list[int | None] = []
    try:
        for process in processes:
            try:
                statuses.append(process.wait(max(end - clock(), 0.1)))
            except subprocess.TimeoutExpired:
                statuses.append(None)
    finally:
        for process in processes:
            stop(process)
    return statuses


def tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def script(check: Check, name: str, *arguments: object, seconds: float) -> Outcome:
    """A benchmark of this folder, which watches its own time and is stopped where it does not."""
    log = LOGS / f"{'-'.join([name, *map(str, arguments)])}.log"
    margin = min(15.0, seconds / 3)  # for its start, and for the comparison that it is in when the time is up
    command = [sys.executable, HERE / f"{name}.py", *arguments, "--seconds", seconds - margin, "--out", check.out]
    (status,) = finish([start(command, log)], seconds, check.clock)
    print(log.read_text(encoding="utf-8", errors="replace"))
    last = tail(log, 1)
    if status is None:
        return Outcome("out of time", "stopped; what it had measured is kept")
    return Outcome("passed", last) if status == 0 else Outcome("failed", f"exit status {status}: {last}; see {log}")


# -------------------------------------------------------------------------------------------------------------- phases


def why_no_kernels() -> str | None:
    """Why the native module cannot run on this card; None where it can. Asked in a process of its own: it may be rebuilt."""
    code = (
        "import json, torch; from ddpm_fast.ops import why_not; "
        "print(json.dumps(why_not('native', 'q_sample', torch.device('cuda', 0))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=surroundings())
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    reason: str | None = json.loads(done.stdout.splitlines()[-1])
    return reason


def why_old() -> str | None:
    """A source that has changed since the native module was built."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import build_age

    return build_age.why_old(ROOT)


def build(check: Check, seconds: float) -> Outcome:
    reason = why_no_kernels() or why_old()
    if reason is None:
        return Outcome("skipped", "the module has kernels for this card")
    if program("nvcc") is None:
        return Outcome("skipped", f"{reason}; and there is no nvcc")
    major, minor = check.capability
    architecture = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"
    print(f"building for sm_{architecture.removesuffix('-real')}, because: {reason}")
    log = LOGS / "build.log"
    # In place, and nothing is installed: whose Python this is does not matter.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", LOGS.parent / "gpu_check_native"]
    path = os.pathsep.join([os.environ["PATH"], str(Path(str(program("nvcc"))).parent)])
    (status,) = finish([start(command, log, {"DDPM_FAST_CUDA_ARCHS": architecture, "PATH": path})], seconds, check.clock)
    reason = why_no_kernels() if status == 0 else None
    if status == 0 and reason is None:
        return Outcome("passed", f"built for {architecture}")
    print(tail(log, 40))
    if status is None:
        return Outcome("out of time", f"the build took more than {seconds:.0f} s")
    return Outcome("failed", reason or f"exit status {status}; see {log}")


def test_jobs(ops: Sequence[str]) -> dict[str, str]:
    """Name -> pytest's -k: the tests that run on a GPU in parts, for Triton compiles every kernel that it runs."""
    jobs = {"native": "not triton"}
    taken: list[str] = []
    for op in reversed(ops):  # "noise", which other ops' cases are named after too, comes last
        jobs[f"triton {op}"] = " and ".join(["triton", op, *(f"not {other}" for other in taken)])
        taken.append(op)
    jobs["triton"] = " and ".join(["triton", *(f"not {op}" for op in ops)])
    return jobs


def tests(check: Check, seconds: float) -> Outcome:
    if not installed("pytest"):
        return Outcome("skipped", "pytest is not installed")
    from ddpm_fast.ops import OPS

    # pytest-benchmark, which the project's own options name, may be missing.
    options = [
        "-v",
        "--full",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=-ra --strict-markers --strict-config -m 'gpu and not slow'",
    ]
    jobs = test_jobs(OPS)
    logs = {name: LOGS / f"tests-{name.replace(' ', '-')}.log" for name in jobs}
    run = [sys.executable, "-m", "pytest", *options, "-k"]
    processes = [start([*run, k], logs[name], {"OMP_NUM_THREADS": "2"}) for name, k in jobs.items()]
    compile_in_background(check)  # the tests are not timed
    statuses = dict(zip(jobs, finish(processes, seconds, check.clock), strict=True))
    return verdict(statuses, logs)


def verdict(statuses: dict[str, int | None], logs: dict[str, Path]) -> Outcome:
    """What the exit statuses and logs of pytest's jobs amount to."""
    counts: dict[str, int] = {}
    failed: list[str] = []
    for name, log in logs.items():
        text = log.read_text(encoding="utf-8", errors="replace")
        # The summary has why a test failed, but not where pytest was stopped.
        failed += re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
        for test, word in re.findall(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", text, re.MULTILINE):
            counts[word.lower()] = counts.get(word.lower(), 0) + 1
            failed += [f"{word} {test}"] if word in ("FAILED", "ERROR") else []
        if statuses[name] not in (0, 5, None):  # 5: there is no such test
            print(f"--- {name}\n{tail(log, 30)}")
    note = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    late = [name for name, status in statuses.items() if status is None]
    if failed or any(status not in (0, 5, None) for status in statuses.values()):
        return Outcome("failed", f"{note}; first: {failed[0] if failed else 'see ' + str(LOGS)}")
    if late:
        return Outcome("out of time", f"{note}; stopped: {', '.join(late)}")
    return Outcome("passed", note)


def sanitizer(check: Check, seconds: float) -> Outcome:
    found = program("compute-sanitizer")
    if found is None:
        return Outcome("skipped", "there is no compute-sanitizer")
    if why_no_kernels() is not None:
        return Outcome("skipped", "there are no native kernels")
    log = LOGS / "sanitizer.log"
    every = [sys.executable, Path(__file__).resolve(), "--launch-every-op"]
    # Of calls that fail, torch's own among them, it is for the callers to say something.
    command = [found, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", *every]
    # Without torch's own caching, every tensor is an allocation whose ends are known.
    (status,) = finish([start(command, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})], seconds, check.clock)
    text = log.read_text(encoding="utf-8", errors="replace")
    launched, errors = (len(re.findall(start, text, re.MULTILINE)) for start in (r"^launched ", r"^=+ (Invalid|Misaligned) "))
    if re.search(r"^=+ .*not supported", text, re.MULTILINE):  # some virtual machines
        return Outcome("skipped", "compute-sanitizer does not support this device here")
    if errors or status not in (0, None):
        print(tail(log, 40))
        return Outcome("failed", f"memcheck: {errors} errors, exit status {status}; see {log}")
    return Outcome("passed" if status == 0 else "out of time", f"memcheck: {launched} calls without an error")


def launch_every_op(device: torch.device) -> None:
    """Every case's native kernels once, forward and backward, a line each: what compute-sanitizer watches."""
    import contestants
    import torch

    from ddpm_fast.ops import why_not
    from ddpm_fast.testing import CASES, make_call

    for case in CASES:
        if case.benchmark or why_not("native", case.op, device) is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True) if len(case.shape) == 4 else (False,):
                call = make_call(case, dtype, device, channels_last=channels_last)
                function = contestants.contestant(call, case, "native")
                contestants.forward(function, call)()
                if case.op in ("group_norm_silu", "denoising_loss"):
                    contestants.backward(function, call)()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                print(f"launched {case} {dtype} {'channels_last' if channels_last else 'contiguous'}")


def compile_in_background(check: Check) -> None:
    """Fills torch.compile's cache on disk while the GPU is not being timed."""
    shards = 3
    commands: dict[str, list[object]] = {
        **{f"norms-{i}": [HERE / "gpu_ops.py", "norms", "--compile-only", i, shards] for i in range(shards)},
        "elementwise": [HERE / "gpu_ops.py", "elementwise", "--compile-only", 0, 1],
        "cifar10-32": [HERE / "gpu_sampling.py", "--network", "cifar10-32", "--compile-only"],
        "256x256": [HERE / "gpu_sampling.py", "--network", "256x256", "--compile-only"],
    }
    check.background += [start([sys.executable, *words], LOGS / f"compile-{name}.log") for name, words in commands.items()]


def elementwise(check: Check, seconds: float) -> Outcome:
    return script(check, "gpu_ops", "elementwise", seconds=seconds)


def norms(check: Check, seconds: float) -> Outcome:
    return script(check, "gpu_ops", "norms", seconds=seconds)


def sampling(check: Check, seconds: float) -> Outcome:
    return script(check, "gpu_sampling", seconds=seconds)


def report(check: Check, seconds: float) -> Outcome:
    import gpu_report

    if not check.out.is_file():
        return Outcome("skipped", "nothing was measured")
    found = gpu_report.report(check.out)
    met = sum(goal["verdict"] == "pass" for goal in found)
    measured = sum(goal["verdict"] != "not measured" for goal in found)
    return Outcome("passed", f"{met} of {measured} goals met, {len(found) - measured} not measured")


PHASES = (
    Phase("build", 110, False, "build the native module for this card, where it lacks it", build),
    Phase("tests", 140, False, "run the test suite on device cuda, native and triton backends", tests),
    Phase("sanitizer", 30, False, "run every case's native kernels under compute-sanitizer", sanitizer),
    Phase("elementwise", 50, True, "time the elementwise ops beside eager PyTorch and torch.compile", elementwise),
    Phase("norms", 120, True, "time group_norm_silu over both networks' shapes beside them, apex and Liger", norms),
    Phase("sampling", 130, True, "time sampling with both networks beside diffusers, eager and compiled", sampling),
    Phase("report", 10, False, "say which goals are met, and draw the roofline picture", report),
)


# --------------------------------------------------------------------------------------------------------------- plan


def allowed(phase: Phase, later: Sequence[Phase], left: float) -> float:
    """Seconds for a phase, when `left` are left for it and the later ones."""
    spare = left - sum(other.seconds for other in later)
    return max(0.0, spare if phase.greedy else min(spare, phase.seconds))


def run(check: Check, phases: Sequence[Phase], keep: Callable[[list[dict[str, object]]], None]) -> list[dict[str, object]]:
    """Runs the phases and keeps what became of them after each."""
    end = check.began + TOTAL_SECONDS
    rows: list[dict[str, object]] = []
    try:
        for place, phase in enumerate(phases):
            began = check.clock()
            seconds = allowed(phase, phases[place + 1 :], end - began)
            print(f"\n=== {phase.name}: {phase.what} (at most {seconds:.0f} s)", flush=True)
            if phase.greedy:  # it is timed: nothing else may run
                while check.background:
                    stop(check.background.pop())
            if seconds < 5:
                outcome = Outcome("out of time", "not begun")
            else:
                try:
                    outcome = phase.run(check, seconds)
                except Exception as error:  # whatever it is, the other phases go on
                    outcome = Outcome("failed", f"{type(error).__name__}: {error}")
            rows.append(
                {"phase": phase.name, "is": outcome.status, "seconds": round(check.clock() - began), "note": outcome.note}
            )
            print(f"=== {phase.name}: {outcome.status}: {outcome.note}", flush=True)
            keep(rows)
    finally:
        while check.background:
            stop(check.background.pop())
    return rows


# ------------------------------------------------------------------------------------------------------------ machine


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def program(name: str) -> str | None:
    """On the PATH or in the CUDA toolkit's folder."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=str(folder))


def missing() -> Iterator[str]:
    for module, consequence in OPTIONAL.items():
        if not installed(module):
            yield f"{module} is not installed: {consequence}"
    for name, consequence in PROGRAMS.items():
        if program(name) is None:
            yield f"there is no {name}: {consequence}"


def why_no_gpu() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no NVIDIA GPU that it can use"
    return None


def describe(phases: Sequence[Phase]) -> str:
    return "\n".join(f"  {number}. {phase.what} ({phase.seconds:.0f} s)" for number, phase in enumerate(phases, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in PHASES], help="these phases")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<card>.json")
    parser.add_argument("--launch-every-op", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer runs
    args = parser.parse_args(arguments)
    phases = [phase for phase in PHASES if args.only is None or phase.name in args.only]
    lacking = [module for module in NEEDED if not installed(module)]
    if lacking:
        print(f"gpu-check: ddpm_fast needs {', '.join(lacking)}, which this Python ({sys.executable}) does not have")
        return 2
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu-check: there is no GPU here: {reason}.\nOn a machine with one it would, within ten minutes:")
        print(f"{describe(phases)}\nand write benchmarks/results/<card>.json. Nothing was run or written.")
        return 2
    import torch

    if args.launch_every_op:
        launch_every_op(torch.device("cuda", 0))
        return 0

    import common

    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no process of ours stays behind
        signal.signal(number, lambda *_: sys.exit("gpu-check: stopped"))

    out = args.out or common.default_output("cuda")
    machine: dict[str, Any] = common.machine("cuda")
    machine["missing"] = list(missing())
    common.print_machine(machine)
    for line in machine["missing"]:
        print(f"{line}")
    check = Check(out.resolve(), torch.cuda.get_device_capability(), began)
    rows = run(check, phases, lambda rows: common.record(out, "gpu_check", machine, rows, quiet=True))
    common.print_table(f"gpu-check on {machine['device']}", rows)
    print(f"\nwritten: {out}")
    return int(any(row["is"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
