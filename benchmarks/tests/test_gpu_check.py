"""benchmarks/gpu_check.py and what it runs, as far as that goes without a GPU: the plan, the clock, what is kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import contestants
import gpu_check
import gpu_ops
import gpu_report
import gpu_sampling
import pytest
import torch
from gpu_check import Check, Outcome, Phase
from kernel_calls import MATRIX_OPS

from ddpm_fast.ops import OPS
from ddpm_fast.testing import CASES, Case


class Clock:
    """Time passes when a phase says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Until:
    """Time stands still until something has happened, however long that takes; then it is up."""

    def __init__(self, happened: Callable[[], bool]) -> None:
        self.happened = happened
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        if self.calls == 1:  # the time from which `finish` counts
            return 0.0
        while not self.happened():
            time.sleep(0.01)
        return 1e9


def says(log: Path, word: str) -> Callable[[], bool]:
    return lambda: log.exists() and word in log.read_text()


def phase(name: str, seconds: float, clock: Clock, takes: float, outcome: Outcome | None = None, greedy: bool = False) -> Phase:
    def run(check: Check, allowed: float) -> Outcome:
        clock.now += takes
        if outcome is None:
            raise RuntimeError("a crash")
        return outcome._replace(note=f"{allowed:.0f}")

    return Phase(name, seconds, greedy, "", run)


PASSED, FAILED = Outcome("passed", ""), Outcome("failed", "")


def run(clock: Clock, phases: Sequence[Phase]) -> tuple[list[dict[str, object]], list[int]]:
    kept: list[int] = []
    check = Check(Path("unused"), (9, 0), clock(), clock)
    rows = gpu_check.run(check, phases, lambda rows: kept.append(len(rows)))
    return rows, kept


def test_without_a_gpu_it_says_so_and_what_it_would_do(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: "none was found")
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().out
    assert "there is no GPU here: none was found" in said
    assert all(phase.what in said for phase in gpu_check.PHASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_reason_why_there_is_no_gpu() -> None:
    reason = gpu_check.why_no_gpu()
    assert reason is not None
    assert torch.__version__ in reason


def test_the_plan_fits_in_ten_minutes() -> None:
    assert sum(phase.seconds for phase in gpu_check.PHASES) <= gpu_check.TOTAL_SECONDS < 600


def test_greedy_phases_take_what_others_left() -> None:
    clock = Clock()
    total = gpu_check.TOTAL_SECONDS
    phases = [
        phase("a", 100, clock, 10, PASSED),
        phase("b", 100, clock, 10, PASSED),
        phase("c", 100, clock, 10, PASSED, greedy=True),
        phase("d", total - 300, clock, 10, PASSED),
    ]
    rows, kept = run(clock, phases)
    assert [row["note"] for row in rows] == ["100", "100", "280", f"{total - 300:.0f}"]
    assert [row["seconds"] for row in rows] == [10] * 4
    assert kept == [1, 2, 3, 4]


def test_a_phase_that_fails_or_takes_too_long_does_not_stop_the_others() -> None:
    clock = Clock()
    phases = [
        phase("crash", 10, clock, 1, None),
        phase("long", 10, clock, gpu_check.TOTAL_SECONDS - 10, FAILED),
        phase("late", 10, clock, 1, PASSED),
        phase("never", 3, clock, 1, PASSED),
    ]
    rows, _ = run(clock, phases)
    assert [row["is"] for row in rows] == ["failed", "failed", "passed", "out of time"]
    assert rows[0]["note"] == "RuntimeError: a crash"


def test_nothing_runs_beside_what_is_timed(tmp_path: Path) -> None:
    check = Check(tmp_path / "out.json", (9, 0))
    beside = gpu_check.start([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    check.background.append(beside)
    alive: list[bool] = []

    def look(check: Check, seconds: float) -> Outcome:
        alive.append(beside.poll() is None)
        return PASSED

    gpu_check.run(check, [Phase("a", 10, False, "", look), Phase("b", 10, True, "", look)], lambda rows: None)
    assert alive == [True, False]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it reads Linux's /proc")
def test_a_process_is_stopped_with_its_children(tmp_path: Path) -> None:
    grandchild = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    log = tmp_path / "log"
    process = gpu_check.start([sys.executable, "-c", child], log)
    quick = gpu_check.start([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "quick")
    clock = Until(lambda: says(log, "\n")() and quick.poll() is not None)
    assert gpu_check.finish([process, quick], 60, clock) == [None, 3]
    assert process.poll() is not None

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while alive(log.read_text().strip()):  # the system takes a moment to end it
        time.sleep(0.01)


def test_time_before_the_first_phase_counts() -> None:
    clock = Clock()
    check = Check(Path("unused"), (9, 0), clock() - 20, clock)
    rows = gpu_check.run(check, [phase("a", 0, clock, 10, PASSED, greedy=True)], lambda rows: None)
    assert rows[0]["note"] == f"{gpu_check.TOTAL_SECONDS - 20:.0f}"


def test_nothing_stays_behind_when_it_is_stopped(tmp_path: Path) -> None:
    """A child is the first phase: SIGTERM has to reach it, which is in a group of its own."""
    child, log = "import os, time; print(os.getpid(), flush=True); time.sleep(600)", tmp_path / "log"
    script = f"""
import sys, types
from pathlib import Path
import common, gpu_check, torch
gpu_check.why_no_gpu = lambda: None
gpu_check.missing = lambda: []
common.machine = lambda device: {{}}
torch.cuda.get_device_capability = lambda: (9, 0)

def run(check, seconds):
    gpu_check.finish([gpu_check.start([sys.executable, "-c", {child!r}], Path({str(log)!r}))], seconds, check.clock)

gpu_check.PHASES = [gpu_check.Phase("a", 60, False, "", run)]
gpu_check.main(["--out", {str(tmp_path / "out.json")!r}])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(gpu_check.HERE), str(gpu_check.ROOT)])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while not says(log, "\n")():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_module_older_than_its_sources_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for age, name in enumerate(("ddpm_fast/_native.so", "csrc/cuda/noise.cu", "CMakeLists.txt")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 - age, 100 - age))
    assert gpu_check.why_old() is None
    os.utime(tmp_path / "csrc/cuda/noise.cu", (101, 101))
    assert gpu_check.why_old() == "csrc/cuda/noise.cu is newer than the module"
    (tmp_path / "ddpm_fast/_native.so").unlink()
    assert gpu_check.why_old() is None  # it is absent: another reason


def test_what_a_stopped_benchmark_had_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import sys, time; open(sys.argv[-1], 'w').write('{}'); print('half', flush=True); time.sleep(600)"
    (tmp_path / "slow.py").write_text(body)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    check = Check(tmp_path / "out.json", (9, 0), 0.0, Until(says(tmp_path / "slow.log", "half")))
    assert gpu_check.script(check, "slow", seconds=60).status == "out of time"
    assert check.out.read_text() == "{}"
    check = Check(tmp_path / "out.json", (9, 0))
    (tmp_path / "slow.py").write_text("print('all of it')")
    assert gpu_check.script(check, "slow", seconds=600) == Outcome("passed", "all of it")
    (tmp_path / "slow.py").write_text("raise SystemExit(4)")
    assert gpu_check.script(check, "slow", seconds=600).status == "failed"


LOGS = {
    "passed": "tests/a.py::test[cuda-x y] PASSED [ 50%]\ntests/a.py::test_b SKIPPED (no GPU) [100%]\n",
    "failed": "tests/a.py::test_c FAILED [ 50%]\nFAILED tests/a.py::test_c - assert 0\n",
    "stopped": "tests/a.py::test_d PASSED [ 10%]\ntests/a.py::test_e ",
    "failed and stopped": "tests/a.py::test_f FAILED [ 10%]\ntests/a.py::test_g ",
    "crashed": "tests/a.py::test_h Fatal Python error\n",
}


@pytest.mark.parametrize(
    ("jobs", "outcome"),
    [
        ({"passed": 0}, ("passed", "1 passed, 1 skipped")),
        ({"passed": 5}, ("passed", "1 passed, 1 skipped")),
        ({"passed": 0, "stopped": None}, ("out of time", "2 passed, 1 skipped; stopped: stopped")),
        ({"failed": 1}, ("failed", "1 failed; first: FAILED tests/a.py::test_c - assert 0")),
        ({"failed and stopped": None}, ("failed", "1 failed; first: FAILED tests/a.py::test_f")),
        ({"crashed": -11}, ("failed", f"; first: see {gpu_check.LOGS}")),
    ],
)
def test_what_the_tests_came_to(jobs: dict[str, int | None], outcome: tuple[str, str], tmp_path: Path) -> None:
    logs = {name: tmp_path / name for name in jobs}
    for name, log in logs.items():
        log.write_text(LOGS[name])
    assert gpu_check.verdict(jobs, logs) == outcome


def test_tests_that_run_on_a_gpu_are_marked() -> None:
    """Those with device cuda, and those that need one."""
    script = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
sys.exit(pytest.main([*options, "tests/test_sampler.py", "tests/ops/test_noise.py"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=gpu_check.ROOT, check=True, capture_output=True, text=True)
    tests = set(re.findall(r"::(\w+)", done.stdout))
    assert {"test_captured_steps_give_the_bits_of_eager_ones", "test_more_than_2_31_elements"} <= tests
    assert "test_the_loop_runs_on_the_cuda_kernels" not in tests  # emulated ones
    assert "[cuda" in done.stdout
    assert "[cpu" not in done.stdout


def test_every_test_is_in_one_job() -> None:
    names = [f"test_parity[cuda-{op}-odd-sizes-{backend}-float32]" for op in OPS for backend in ("native", "triton")]
    names += ["test_parity[cuda-q_sample-given-noise-triton]", "test_graph[cuda]", "test_triton_grid", "test_noise[cuda]"]
    for name in names:
        matching = [
            job
            for job, expression in gpu_check.test_jobs(OPS).items()
            if all((part.removeprefix("not ") in name) != part.startswith("not ") for part in expression.split(" and "))
        ]
        assert len(matching) == 1, (name, matching)


SANITIZER = """#!/bin/sh
echo ========= COMPUTE-SANITIZER
echo launched noise-odd-sizes
{}
"""


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("exit 0", Outcome("passed", "memcheck: 1 calls without an error")),
        ("sleep 600", Outcome("out of time", "memcheck: 1 calls without an error")),
        ("echo ========= Invalid __global__ read of size 16 bytes; sleep 600", Outcome("failed", "memcheck: 1 errors")),
        ("echo ========= Error: Device not supported; exit 1", Outcome("skipped", "compute-sanitizer does not support")),
        ("exit 9", Outcome("failed", "memcheck: 0 errors, exit status 9")),
    ],
)
def test_what_the_sanitizer_found(body: str, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER.format(body))
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    monkeypatch.setattr(gpu_check, "program", lambda _: str(sanitizer))
    monkeypatch.setattr(gpu_check, "why_no_kernels", lambda: None)
    # Those that sleep are stopped once their last line is there; the others end by themselves.
    last = "read of size" if "Invalid" in body else "launched"
    clock = Until(says(tmp_path / "sanitizer.log", last)) if "sleep" in body else time.monotonic
    got = gpu_check.sanitizer(Check(tmp_path / "out.json", (9, 0), 0.0, clock), 60)
    assert got.status == outcome.status
    assert got.note.startswith(outcome.note)


def test_every_case_can_be_launched_for_the_sanitizer(capsys: Any) -> None:
    gpu_check.launch_every_op(torch.device("cpu"))
    launched = set(re.findall(r"^launched (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert launched == {str(case) for case in CASES if not case.benchmark}


# -------------------------------------------------------------------------------------------------- the benchmarks it runs


def test_ops_are_measured_and_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    works = [
        gpu_ops.Work(Case("q_sample", "small", (2, 3, 8, 8)), "bf16"),
        gpu_ops.Work(Case("q_sample", "uint8", (2, 3, 8, 8), {"uint8": True}), "float32"),
        gpu_ops.Work(Case("group_norm_silu", "small", (2, 64, 4, 4), {"shift": True}), "float32", True, "backward"),
    ]
    monkeypatch.setattr(contestants, "PEERS", ("eager",))  # compilation takes seconds
    monkeypatch.setattr(gpu_ops, "BACKENDS", ("native",))  # and so does Triton's interpreter
    monkeypatch.setattr(gpu_ops, "LISTS", {"some": lambda: iter(works)})
    monkeypatch.setattr(common, "machine", lambda device: {"device": "none"})
    measure = gpu_ops.measure
    sections: list[int] = []

    def measure_and_look(work: gpu_ops.Work, device: str) -> tuple[list[dict[str, object]], list[str]]:
        sections.append(len(json.loads(out.read_text())["gpu_ops some"]["rows"]) if out.is_file() else 0)
        return measure(work, device, 0.001)

    monkeypatch.setattr(gpu_ops, "measure", measure_and_look)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu_ops.py", "some", "--device", "cpu", "--out", str(out)])
    gpu_ops.main()
    rows = json.loads(out.read_text())["gpu_ops some"]["rows"]
    assert {row["by"] for row in rows} >= {"eager", "copy"}
    assert next(row for row in rows if row["by"] == "copy")["share of copy"] == pytest.approx(1)
    assert sections[0] == 0 < sections[1] < sections[2] < len(rows)
    assert "3 of 3 comparisons made" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seconds", "0"])
    gpu_ops.main()
    assert "0 of 3 comparisons made" in capsys.readouterr().out


def test_what_fails_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    works = [gpu_ops.Work(Case("q_sample", name, (2, 3, 8, 8)), "float32") for name in ("first", "second")]
    contestant, inputs = contestants.contestant, gpu_ops.inputs

    def wrong_inputs(work: gpu_ops.Work, device: str, samples: int) -> Any:
        return 1 / 0 if work.case.name == "first" else inputs(work, device, samples)

    def wrong(call: Any, case: Case, by: str) -> Any:
        function = contestant(call, case, by)
        return (lambda **tensors: 1.01 * function(**tensors)) if by == "native" else function

    monkeypatch.setattr(contestants, "PEERS", ("eager",))
    monkeypatch.setattr(contestants, "contestant", wrong)
    monkeypatch.setattr(gpu_ops, "BACKENDS", ("native",))
    monkeypatch.setattr(gpu_ops, "LISTS", {"some": lambda: iter(works)})
    monkeypatch.setattr(gpu_ops, "inputs", wrong_inputs)
    monkeypatch.setattr(common, "machine", lambda device: {"device": "none"})
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu_ops.py", "some", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit, match="1"):
        gpu_ops.main()
    rows = json.loads(out.read_text())["gpu_ops some"]["rows"]
    assert [row["by"] for row in rows] == ["eager", "copy"]
    assert {row["native is faster by"] for row in rows} == {None}
    said = capsys.readouterr().out
    assert "by native: AssertionError: q_sample-second by native: error" in said
    assert "2 of 2 comparisons made; written: " in said
    assert "; 2 failed, first: q_sample-first 2x3x8x8 float32 contiguous forward: ZeroDivisionError" in said.splitlines()[-1]


def test_more_samples_are_copies() -> None:
    for work in (*gpu_ops.elementwise(), *list(gpu_ops.norms())[:1]):
        shape = (5, work.case.shape[1], 8, 8)
        small = work._replace(case=replace(work.case, shape=shape))
        case, call = gpu_ops.inputs(small, "cpu", 5)
        assert case.shape == shape
        run = contestants.forward(contestants.contestant(call, case, "reference"), call)
        result = run()
        assert isinstance(result, torch.Tensor)
        if result.dim() == 4:
            assert result.shape == shape
            assert torch.equal(result[0], result[2])
            assert not torch.equal(result[0], result[1])
        memory_format = torch.channels_last if work.channels_last else torch.contiguous_format
        images = [tensor for tensor in call.tensors.values() if tensor.dim() == 4]
        assert all(image.shape[0] == 5 and image.is_contiguous(memory_format=memory_format) for image in images)


def test_the_lists_have_both_networks_and_every_op_with_cuda_kernels() -> None:
    assert {work.case.op for work in gpu_ops.elementwise()} == set(OPS) - {"group_norm_silu", *MATRIX_OPS}
    assert any(work.moved > 2 * 126 * 2**20 for work in gpu_ops.elementwise())  # beyond a B200's L2
    norms = list(gpu_ops.norms())
    assert {work.case.name.split()[0].rstrip(",") for work in norms} == {"cifar10-32", "256x256"}
    assert len(set(map(str, norms))) == len(norms)
    assert (norms[0].dtype, norms[0].channels_last) == ("bf16", True)  # as in sampling
    assert {work.case.options["groups"] for work in norms} == {32}


TINY = {"sample_size": 8, "block_out_channels": [32, 32], "down_block_types": ["DownBlock2D"] * 2} | {
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1,
}


@pytest.mark.slow
def test_sampling_is_compared_and_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(gpu_sampling, "NETWORKS", {"tiny": TINY})
    monkeypatch.setattr(gpu_sampling, "CONFIGURATIONS", [("tiny", 2)])
    monkeypatch.setattr(gpu_sampling, "MODES", {})  # compilation takes minutes
    monkeypatch.setattr(gpu_sampling, "RUN_SECONDS", 0.01)
    monkeypatch.setattr(common, "machine", lambda device: {"device": "none"})
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu_sampling.py", "--device", "cpu", "--out", str(out)])
    gpu_sampling.main()
    rows = json.loads(out.read_text())["gpu_sampling"]["rows"]
    assert [row["sampler"] for row in rows[:2]] == ["ddpm_fast", "diffusers, eager"]
    assert rows[0]["which is"] == "scaled from 10 steps"
    assert rows[0]["1000 steps, s"] == pytest.approx(rows[0]["ms a step"]["median"], rel=2e-3)
    assert rows[0]["ddpm_fast is faster by"]["median"] == 1
    assert "1 of 1 comparisons made" in capsys.readouterr().out


class PretendNetwork:
    peer_name = "a peer"

    def __init__(self, name: str, device: str) -> None: ...

    def choose_format(self, batch: int) -> str:
        return "contiguous"

    def set_format(self, name: str) -> None: ...

    def sample_ours(self, batch: int) -> gpu_sampling.Sampler:
        return lambda steps: None

    def sample_peer(self, batch: int, mode: str | None = "eager") -> gpu_sampling.Sampler:
        return lambda steps: 1 / (batch - (1 if mode == "eager" else 2))


def test_samplers_that_fail_do_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_sampling, "NETWORKS", {"tiny": TINY})
    monkeypatch.setattr(gpu_sampling, "CONFIGURATIONS", [("tiny", 1), ("tiny", 2), ("tiny", 3)])
    monkeypatch.setattr(gpu_sampling, "MODES", {"compiled": None})
    monkeypatch.setattr(gpu_sampling, "Network", PretendNetwork)
    monkeypatch.setattr(common, "machine", lambda device: {"device": "none"})
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu_sampling.py", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit, match="1"):
        gpu_sampling.main()
    rows = json.loads(out.read_text())["gpu_sampling"]["rows"]
    compared = [(row["batch"], row["sampler"]) for row in rows if row["sampler"] != "ddpm_fast"]
    assert compared == [(2, "a peer, eager"), (3, "a peer, eager"), (3, "a peer, compiled")]
    said = capsys.readouterr().out
    assert "failed: tiny, batch 2, compiled: ZeroDivisionError" in said
    assert "3 of 6 comparisons made" in said
    assert said.splitlines()[-1].endswith("2 failed, first: tiny, batch 1, eager: ZeroDivisionError: division by zero")


def spread(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value}


def results(share: float, ratio: float, compiled: float) -> dict[str, Any]:
    op = {"op": "q_sample", "by": "native", "beyond L2": True, "dtype": "float32", "ms": spread(1.0), "GB/s": 3000.0}
    norm = {"op": "group_norm_silu", "beyond L2": True, "dtype": "bf16", "ms": spread(1.0), "GB/s": 2000.0}
    norms = [
        norm | {"direction": direction, "by": by, "share of copy": share, "native is faster by": spread(ratio)}
        for direction in ("forward", "backward")
        for by in ("native", "compile", "copy")
    ]
    sampler = {"network": "cifar10-32", "batch": 16}
    return {
        "gpu_ops elementwise": {"machine": {"device": "a card"}, "rows": [op | {"share of copy": share}]},
        "gpu_ops norms": {"machine": {"device": "a card"}, "rows": norms},
        "gpu_sampling": {
            "machine": {"device": "a card"},
            "rows": [
                sampler | {"sampler": "ddpm_fast", "ddpm_fast is faster by": spread(1.0)},
                sampler | {"sampler": "diffusers, eager", "ddpm_fast is faster by": spread(3.0)},
                sampler | {"sampler": "diffusers, torch.compile", "ddpm_fast is faster by": spread(2.0)},
                sampler | {"sampler": "diffusers, torch.compile reduce-overhead", "ddpm_fast is faster by": spread(compiled)},
            ],
        },
    }


def test_goals_are_met_or_not() -> None:
    assert {goal["verdict"] for goal in gpu_report.goals({})} == {"not measured"}
    assert [goal["verdict"] for goal in gpu_report.goals(results(0.9, 1.6, 1.2))] == ["pass"] * 7
    verdicts = [goal["verdict"] for goal in gpu_report.goals(results(0.75, 1.4, 1.1))]
    assert verdicts == ["FAIL", "FAIL", "pass", "FAIL", "FAIL", "pass", "FAIL"]


def test_the_report_is_recorded_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "card.json"
    path.write_text(json.dumps(results(0.9, 1.6, 1.2)))
    gpu_report.report(path)
    assert len(json.loads(path.read_text())["goals"]["rows"]) == 7
    assert (tmp_path / "card_roofline.png").stat().st_size > 1000
