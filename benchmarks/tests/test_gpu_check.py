"""The check on a GPU, as far as it goes without one: the plan, the clock, what is kept, and a rehearsal of all phases."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cards
import common
import gpu_check
import peers
import pytest
import torch
import traced
from gpu_check import PHASES, TOTAL_SECONDS, TUNING, TUNING_SECONDS, Check, Outcome, Phase
from works import Work, deciding

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def says(log: Path, word: str) -> Callable[[], float]:
    """A clock whose time is up once a log has a word."""
    return lambda: 1e9 if log.exists() and word in log.read_text() else 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: Any) -> None:
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().out.startswith("nothing was run: torch ")


def test_a_rehearsal_goes_through_all_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With torch and numpy alone, as on a machine without diffusers."""
    for module in (peers, gpu_check):
        monkeypatch.setattr(module, "installed", lambda name: name in ("torch", "pytest"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as the rehearsal sets it
    for module in ("sample_speed", "benchmark_training"):
        monkeypatch.setattr(f"{module}.installed", lambda name: False)
    for module in ("PIL", "click", "diffusers", "matplotlib", "msgspec", "safetensors", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    out = tmp_path / "out.json"
    status = gpu_check.main(["--dry-run", "--out", str(out)])
    sections, said = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    outcomes = {row["phase"]: row["is"] for row in sections["gpu_check"]["rows"]}
    assert list(outcomes) == [phase.name for phase in PHASES]
    assert set(outcomes.values()) <= {"passed", "skipped"}, said
    assert status == 0
    expected = {  # in the order of the phases
        **{f"profile tiny {what}": "" for what in ("sampling, batch 1", "training, batch 1", "convolutions")},
        "benchmark_ops deciding": "native",
        "sample_speed tiny float32 batch 1": "plain PyTorch",
        "train_speed tiny bf16": "ddpm_fast Trainer",
        "benchmark_ops deciding-compiled": "compile",
        "sample_speed tiny float32 batch 1 reduce-overhead": "plain + torch.compile reduce-overhead",
        "train_speed tiny bf16 compiled": "plain PyTorch + torch.compile",
    }
    assert [name for name in sections if name in expected] == list(expected)
    for name, contestant in expected.items():
        values = {str(row.get(key, "")) for row in sections[name]["rows"] for key in ("by", "sampler", "training step")}
        assert contestant in values
    assert "goals" in sections
    assert "missing: diffusers: plain PyTorch stands in for it" in said
    assert said.count("parity: the same images") == 2  # two networks, and each is compared once
    assert said.count("parity: loss") == 1
    assert (tmp_path / "out_logs" / "tests-0.jsonl").is_file()


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
import benchmark_ops, common

class Run(common.Run):
    def save(self, *arguments, **more):
        super().save(*arguments, **more)
        print("measured something", flush=True)
        {then}

common.Run = Run
benchmark_ops.main()
"""


@pytest.mark.parametrize(
    ("then", "outcome"),
    [("time.sleep(600)", "out of time"), ("os.kill(os.getpid(), signal.SIGKILL)", "failed")],
)
def test_a_phase_that_is_killed_keeps_its_results(
    then: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A rehearsal in processes, on a simulated clock: the time of `ops` ends once it has measured something."""
    (tmp_path / "benchmark_ops.py").write_text(KILLED.format(benchmarks=str(gpu_check.HERE), then=then))
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    out = tmp_path / "out.json"
    started, has_measured = time.monotonic(), says(tmp_path / "out_logs" / "ops.log", "measured something")
    limit = TOTAL_SECONDS - sum(phase.seconds for phase in PHASES if phase.name in ("goals", "sanitizer"))

    def clock() -> float:
        return started + (limit if has_measured() and outcome == "out of time" else 0)

    monkeypatch.setattr(
        gpu_check, "Check", lambda *a, **k: Check(*a, **k | {"began": started, "in_process": False, "clock": clock})
    )
    gpu_check.main(["--dry-run", "--only", "ops", "goals", "sanitizer", "--out", str(out)])
    sections = json.loads(out.read_text(encoding="utf-8"))
    outcomes = {row["phase"]: row["is"] for row in sections["gpu_check"]["rows"]}
    assert outcomes == {"ops": outcome, "goals": "passed", "sanitizer": "passed"}, capsys.readouterr().out
    assert {row["by"] for row in sections["benchmark_ops deciding"]["rows"]} == {"native", "eager", "copy"}


# ---------------------------------------------------------------------------------------------------------------- time


def test_phases_take_what_others_left_and_results_are_kept_after_each() -> None:
    assert sum(phase.seconds for phase in PHASES) <= TOTAL_SECONDS == 540
    assert sum(phase.seconds for phase in TUNING) <= TUNING_SECONDS
    kept: list[int] = []
    now = iter(range(0, 1000, 5))  # a phase takes 5 s

    def act(check: Check, allowed: float) -> Outcome:
        return Outcome("passed", f"{allowed:.0f}" if check.phase == "a" else str(1 / 0))

    check = Check(Path("unused"), began=-20, clock=lambda: next(now))  # 20 s before the first phase
    phases = [Phase("a", 100, act, ""), Phase("crash", 100, act, ""), Phase("a", TOTAL_SECONDS - 230, act, "")]
    rows = gpu_check.run(check, phases, lambda rows: kept.append(len(rows)))
    assert [row["note"] for row in rows] == ["110", "ZeroDivisionError: division by zero", f"{TOTAL_SECONDS - 40:.0f}"]
    assert kept == [1, 2, 3]
    check.began = -TOTAL_SECONDS
    assert gpu_check.run(check, phases[:1], list)[0]["is"] == "out of time"


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it reads Linux's /proc")
def test_processes_are_few_at_once_and_stopped_with_their_children(tmp_path: Path) -> None:
    grandchild = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    log = tmp_path / "log"
    starters = [
        lambda: gpu_check.start([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "quick"),
        lambda: gpu_check.start([sys.executable, "-c", child], log),
        lambda: pytest.fail("started without a free slot"),
    ]
    assert gpu_check.run_all(starters, 1, 60, says(log, "\n")) == [3, None, None]

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while alive(log.read_text().strip()):  # the system takes a moment to end it
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- phases


def test_a_driver_older_than_the_toolkit_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    versions = iter((12040, 13000, 13010, 0))
    driver = SimpleNamespace(cuDriverGetVersion=lambda number: setattr(number._obj, "value", next(versions)))
    monkeypatch.setattr(gpu_check.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(gpu_check, "program", lambda name: str(nvcc))
    monkeypatch.setattr(gpu_check, "why_no_kernels", lambda device: "it has none")
    outcome = gpu_check.build(Check(tmp_path / "out.json"), 60)
    said = "the driver supports CUDA 12.4, older than the toolkit's 13.0: update it or use nvcc 12.4"
    assert outcome == Outcome("failed", said)
    assert [gpu_check.why_old_driver(str(nvcc)) for _ in range(3)] == [None] * 3


def test_a_module_of_other_sources_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.why_no_kernels("cpu") is None
    other = "import digest\ndigest.digest = lambda: 'other'\n" + gpu_check.ASK
    monkeypatch.setattr(gpu_check, "ASK", other)
    assert gpu_check.why_no_kernels("cpu") == "its sources have changed"


PASSED, SKIPPED, FAILED = (
    json.dumps({"test": "a", "outcome": outcome, "tail": tail})
    for outcome, tail in (("passed", ""), ("skipped", ""), ("failed", "E assert 0"))
)


@pytest.mark.parametrize(
    ("lines", "status", "outcome"),
    [
        ([PASSED, SKIPPED], 0, ("passed", "1 passed, 1 skipped")),
        ([PASSED, '{"test": "hal'], None, ("out of time", "1 passed; 1 processes were stopped")),
        ([FAILED], None, ("failed", "1 failed; first: a")),
        ([], -11, ("failed", "; first: log ended with status -11")),
    ],
)
def test_what_the_tests_came_to(lines: list[str], status: int | None, outcome: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    (tmp_path / "log.log").write_text("Fatal Python error\n")
    check = Check(tmp_path / "out.json")
    assert gpu_check.verdict(check, [tmp_path / "log.jsonl"], [status]) == outcome
    if outcome[0] == "failed":
        assert list(check.failed_tests.values()) == ["E assert 0" if lines else "Fatal Python error"]


SANITIZER = "#!/bin/sh\necho ========= COMPUTE-SANITIZER\necho launched noise-odd-sizes\n{}\n"


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("exit 0", Outcome("passed", "memcheck: 1 calls without an error")),
        ("sleep 600", Outcome("out of time", "memcheck: 1 calls without an error")),
        ("echo ========= Invalid __global__ read of size 16 bytes; exit 9", Outcome("failed", "memcheck: 1 errors")),
        ("echo ========= Error: Device not supported; exit 1", Outcome("skipped", "compute-sanitizer does not support")),
    ],
)
def test_what_the_sanitizer_found(body: str, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER.format(body))
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu_check, "program", lambda name: str(sanitizer))
    monkeypatch.setattr(gpu_check, "why_no_kernels", lambda device: None)
    check = Check(tmp_path / "out.json")
    if "sleep" in body:
        check.clock = says(check.log("sanitizer.log"), "launched")
    got = gpu_check.sanitizer(check, 60)
    assert (got.status, got.note[: len(outcome.note)]) == outcome


# --------------------------------------------------------------------------------------------------------------- goals


H100 = "NVIDIA H100 80GB HBM3"


def results(share: float, ratio: float, device: str = H100, scale: Callable[[Work], float] | None = None) -> Any:
    """Return results in which every op reaches a share of copy, or of `scale` of the op."""

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    ops = [
        work.columns()
        | {"by": by, "beyond L2": True, "share of copy": share * (scale(work) if scale else 1)}
        | {"native is faster by": spread(ratio)}
        for work in deciding()
        for by in ("native", "compile", "copy")
    ]
    peer = "diffusers" if gpu_check.installed("diffusers") else "plain"
    sampled = {"model": "cifar10-32", "batch": 128, "ms a step": 5.0}
    sampled |= {f"times {peer} pipeline": spread(3), f"times {peer} + torch.compile max-autotune": spread(ratio)}
    rows: dict[str, list[dict[str, Any]]] = {
        "benchmark_ops deciding": ops,
        "sample_speed cifar10-32 bf16 batch 64": [{"sampler": "ddpm_fast"} | sampled, {"sampler": "other"}],
        "train_speed bf16": [
            {"training step": name, f"times {peer} + eager PyTorch": spread(ratio), "times ddpm_fast Trainer": spread(0.1)}
            for name in ("ddpm_fast", "ddpm_fast Trainer")
        ],
    }
    return {name: {"machine": {"device": device}, "rows": of} for name, of in rows.items()}


def allowed(work: Work) -> float:
    return cards.allowed_share(work, cards.CARDS[1], json.loads(cards.BUDGETS.read_text())["native"]["kernels"])


@needs_gpp
def test_goals_are_met_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy's speed is out of reach of the loss and of noise in channels_last, and of norms that read their input twice."""
    monkeypatch.setattr(gpu_check, "ask", lambda *_: [(4.5, 1.125)])
    assert {goal["is"] for goal in gpu_check.goals({})} == {"not measured"}
    reached = gpu_check.goals(results(0.86, 1.6, scale=allowed))
    assert [goal["is"] for goal in reached] == ["met"] * 9
    shares = [goal["measured"] for goal in reached if "instructions" in str(goal["goal"])]
    assert shares == [pytest.approx(0.86)] * 3
    missing = gpu_check.goals(results(0.68, 0.9, scale=allowed))
    missed = [str(goal["goal"]).split(":")[0] for goal in missing if goal["is"] == "NOT MET"]
    norm, step = "group_norm_silu", "a training step, ddpm_fast"
    assert [name.removesuffix(" forward").removesuffix(" backward") for name in missed] == [
        *("elementwise ops, float32", norm, norm, norm, norm, "sampling, batch 128", step, f"{step} Trainer")
    ]


@needs_gpp
def test_what_is_predicted_of_a_step_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio to torch.compile is that of the two sums, and the sum is printed beside the measured time."""
    monkeypatch.setattr(gpu_check, "SMALL", "tiny")
    budgets = json.loads(cards.BUDGETS.read_text())["native"]["kernels"]
    ((ours, ratio),) = traced.expected("tiny", cards.CARDS[1], [128], budgets)
    found = results(0.9, 1.6)
    for row in found["sample_speed cifar10-32 bf16 batch 64"]["rows"][:1]:
        row["model"] = "tiny"
    (goal,) = (goal for goal in gpu_check.goals(found) if "batch 128" in str(goal["goal"]))
    assert goal["wanted"] == f"at least {ratio:g}"
    assert goal["a step, ms (predicted)"] == f"5 ({ours:.3g})"


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GH200 480GB", "cpu"])
def test_what_a_card_allows_is_known_of_few(device: str) -> None:
    found = gpu_check.goals(results(0.9, 1.6, device=device))
    assert [goal["is"] for goal in found if "instructions" in str(goal["goal"])] == ["not measured"] * 3
    assert [goal["is"] for goal in found if str(goal["goal"]).startswith("sampling")] == ["met", "met"]
    assert [goal["is"] for goal in found].count("met") == 6


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(common.ROOT)!r})\nimport gpu_check, pathlib, pytest\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_tests_that_run_on_a_gpu_are_shared_out(tmp_path: Path) -> None:
    """Every test that is marked is in one share."""
    code = f"""
import torch
torch.cuda.is_available = lambda: True
class Names:
    def pytest_collection_finish(self, session):
        print(*(item.nodeid for item in session.items), sep=chr(10))
for step in (1, 2):
    for first in range(step):
        print("share", step)
        share = gpu_check.Share(first, step, pathlib.Path({str(tmp_path / "log")!r}))
        options = "-qq -p no:cacheprovider -p no:randomly -m gpu --collect-only tests/ops/test_noise.py"
        pytest.main(options.split(), plugins=[share, Names()])
"""
    done = run_python(code, gpu_check.ROOT)
    shares = [set(re.findall(r"^tests/\S+::.*\S$", part, re.MULTILINE)) for part in done.stdout.split("share ")[1:]]
    assert len(shares) == 3, done.stderr
    assert shares[0] == shares[1] | shares[2]
    assert not shares[1] & shares[2]
    assert all("[cuda" in name for name in shares[0] if "[" in name)
    assert shares[0]


def test_every_file_of_tests_is_collected_where_packages_are_missing(tmp_path: Path) -> None:
    """One that imports a missing package at its top would be a failure, and its tests would not run."""
    log = tmp_path / "log"
    code = f"""
sys.modules |= dict.fromkeys(["msgspec", "diffusers", "denoising_diffusion_pytorch", "ddpm_fast._native"])
class Files:
    def pytest_collection_finish(self, session):
        print(*sorted({{item.nodeid.partition("::")[0] for item in session.items}}), sep=chr(10))
options = "-qq -p no:cacheprovider -p no:randomly --collect-only --continue-on-collection-errors tests"
pytest.main(options.split(), plugins=[gpu_check.Share(0, 1, pathlib.Path({str(log)!r})), Files()])
"""
    done = run_python(code, gpu_check.ROOT)
    assert log.read_text() == "", done.stdout
    assert {"tests/ops/test_parity.py", "tests/sampling/test_sampler.py", "tests/inference/test_frozen.py"} < set(
        done.stdout.splitlines()
    ), done.stderr


def test_a_file_that_wants_a_missing_package_is_no_failure(tmp_path: Path) -> None:
    for name, imported in {"missing": "no_such_package.part", "broken": "json.no_such_part"}.items():
        (tmp_path / f"test_{name}.py").write_text(f"import {imported}\n")
    options = ["-q", "--continue-on-collection-errors", "."]
    run_python(f"pytest.main({options}, plugins=[gpu_check.Share(0, 1, pathlib.Path('log'))])", tmp_path)
    (failed,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (failed["test"], failed["outcome"]) == ("test_broken.py", "failed")


def test_a_warning_fails_no_test_on_a_gpu(tmp_path: Path) -> None:
    """The settings of pyproject.toml make it an error."""
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    (tmp_path / "pyproject.toml").symlink_to(gpu_check.ROOT / "pyproject.toml")
    (tmp_path / "tests" / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--full', action='store_true')\n"
    )
    (tmp_path / "tests" / "ops" / "test_noise.py").write_text("import warnings\ndef test_it(): warnings.warn('of torch')\n")
    done = run_python("sys.exit(gpu_check.run_share(0, 1, 'cpu', pathlib.Path('log')))", tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "log").read_text())["outcome"] == "passed"
