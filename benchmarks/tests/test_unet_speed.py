"""Benchmarks of a network on the CPU: who takes part, whose results count, what is said about them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import first_image
import numpy as np
import peers
import pytest
import runtimes
import torch
import unet_growth
import unet_speed
from runtimes import FLOOR, OURS, RUNTIMES, Job, Process, Runtime, RuntimeFailed
from small_unets import SMALL
from unet_growth import Point

import ddpm_fast
from ddpm_fast.nn.layers import Attention

EXPORTED = ("OpenVINO", "ONNX Runtime")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    with unet_speed.network_folder(SMALL, tmp_path) as folder:
        return Job(folder, 3, SMALL["sample_size"], threads=torch.get_num_threads())


def spread(times: dict[str, float]) -> dict[str, common.Times]:
    return {name: common.Times((seconds,)) for name, seconds in times.items()}


# ------------------------------------------------------------------------------------------------------------ who runs


def test_an_image_is_the_same_in_any_batch(job: Job) -> None:
    x, t = job.inputs()
    assert x.dtype == np.float32
    assert x.shape == (3, 2, 16, 16)
    first_x, first_t = Job(job.folder, 1, 16).inputs()
    assert np.array_equal(x[:1], first_x)
    assert np.array_equal(t[:1], first_t)


def test_why_a_runtime_cannot_take_part() -> None:
    runtime = Runtime(runtimes.ours, ("torch", "no_such_module"), ("float32",))
    assert runtime.why_not("float32") == "no_such_module not installed"
    assert Runtime(runtimes.ours, ("torch",), ("float32",)).why_not("bf16") == "has no bf16"
    assert RUNTIMES[OURS].why_not("bf16") is None


def test_the_floor_has_every_product_but_those_of_time(job: Job) -> None:
    model = ddpm_fast.UNet.from_pretrained(job.network)
    found = runtimes.products(model, job)
    counts = dict.fromkeys((torch.nn.Conv2d, torch.nn.Linear, Attention), 0)
    for (_, shape), (module, count) in found.items():
        counts[next(kind for kind in counts if isinstance(module, kind))] += count
        assert shape[0] == job.batch
    modules = list(model.modules())
    attentions = sum(isinstance(module, Attention) for module in modules)
    assert counts[torch.nn.Conv2d] == sum(isinstance(module, torch.nn.Conv2d) for module in modules)
    assert counts[torch.nn.Linear] == 4 * attentions
    assert counts[Attention] == attentions


@pytest.mark.skipif(not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"), reason="torch without oneDNN")
@pytest.mark.parametrize(
    "layer", [torch.nn.Conv2d(8, 16, 3, stride=2, padding=1), torch.nn.Conv2d(8, 16, 1)], ids=["3x3", "1x1"]
)
def test_a_packed_convolution_is_the_convolution(layer: torch.nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 8, 12, 12)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: x)
    with torch.no_grad():
        torch.testing.assert_close(runtimes.prepacked("", x.shape, layer)(), layer(x))


# ---------------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the program that a contestant's process runs, instead of the contestant."""

    def use(source: str) -> None:
        def start(name: str, job: Job, errors: Path, *mode: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", source, name, json.dumps(vars(job)), *mode]
            with errors.open("w", encoding="utf-8") as said:
                return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)

        monkeypatch.setattr(runtimes, "_start", start)

    monkeypatch.setenv("PYTHONPATH", str(common.ROOT))
    return use


FAKE = """
import runtimes, numpy
class Fake:
    calls = 0
    def output(self):
        print("what a library prints")
        return numpy.ones(3)
    def seconds(self, calls):
        self.calls += calls
        return float(self.calls)
runtimes.serve({"fake": runtimes.Runtime(lambda job: Fake())}, runtimes.Job)
"""


def test_a_process_answers(program: Any, job: Job) -> None:
    program(FAKE)
    process = Process("fake", job)
    assert 0 < process.load + process.first_call < process.first_image
    output = process.output()
    assert output is not None
    assert output.tolist() == [1, 1, 1]
    assert process.seconds(1) == 1
    assert process.seconds(4) == 1 + 1 + 4  # of which one is to wake up
    peak = process.peak()
    assert peak is None or peak > 1 << 20
    process.close()


@pytest.mark.parametrize(
    ("source", "words"), [("print(1 // 0)", "ZeroDivisionError"), ("raise SystemExit(3)", "ended with status 3")]
)
def test_a_process_that_fails_says_why(program: Any, job: Job, source: str, words: str) -> None:
    program(source)
    with pytest.raises(RuntimeFailed, match=words):
        Process("fake", job)


def test_a_failed_export_leaves_no_file(program: Any, job: Job) -> None:
    path = job.exported(".onnx")
    program(f"open({str(path)!r}, 'w').write('half'); 1 / 0")
    with pytest.raises(RuntimeFailed, match="ZeroDivisionError"):
        runtimes.export("ONNX Runtime", job)
    assert not path.exists()
    path.touch()
    runtimes.export("ONNX Runtime", job)  # it is there
    runtimes.export(OURS, job)  # it needs none


# ---------------------------------------------------------------------------------------------------------- unet_speed


class FakeProcess:
    def __init__(self, output: Any) -> None:
        self.output = lambda: output
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_errors_are_relative_and_of_the_images_that_both_have() -> None:
    truth = np.array([[3.0, 4.0]])
    assert unet_speed.relative_error(np.array([[3.0, 4.5], [9, 9]], dtype=np.float32), truth) == pytest.approx(0.1)
    assert unet_speed.relative_error(np.array([[np.nan, 4.0]]), truth) == float("inf")


def test_wrong_results_are_left_out(job: Job) -> None:
    right = unet_speed.outputs(job, torch.float32)
    processes: dict[str, Any] = {"right": FakeProcess(right), "wrong": FakeProcess(right * 1.01), FLOOR: FakeProcess(None)}
    wrong = processes["wrong"]
    left_out: dict[str, str] = {}
    errors = unet_speed.check(processes, job, left_out)
    assert set(processes) == {"right", FLOOR}
    assert set(left_out) == {"wrong"}
    assert wrong.closed
    assert 0 < errors["right"] < 1e-5


def test_who_cannot_start_is_left_out(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(name: str, job: Job) -> str:
        if name == "diffusers":
            raise RuntimeFailed("it crashed")
        return name

    monkeypatch.setattr(unet_speed, "Process", process)
    monkeypatch.setattr(unet_speed, "export", lambda name, job: None)
    monkeypatch.setitem(RUNTIMES, "absent", Runtime(runtimes.ours, ("no_such_module",)))
    monkeypatch.setitem(RUNTIMES, "diffusers", Runtime(runtimes.eager, ()))
    left_out: dict[str, str] = {}
    assert unet_speed.start([OURS, "diffusers", "absent"], job, left_out) == {OURS: OURS}
    assert left_out == {"diffusers": "it crashed", "absent": "no_such_module not installed"}


def test_the_best_peer_computes_the_network(job: Job) -> None:
    times = spread({OURS: 1, "slow": 4, "fast": 3, FLOOR: 2})
    assert unet_speed.best_peer(times) == "fast"
    assert unet_speed.best_peer(spread({OURS: 1, FLOOR: 2})) is None
    rows = unet_speed.rows_of(times, job)
    assert [row["contestant"] for row in rows if row["best peer"]] == ["fast"]
    faster = {row["contestant"]: row[f"{OURS} is faster by"] for row in rows}
    assert faster["fast"].median == 3  # type: ignore[attr-defined]


@pytest.mark.slow
def test_all_that_are_installed_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(unet_speed, "CIFAR10_32", SMALL)
    names = [name for name in (OURS, "diffusers", *EXPORTED, FLOOR) if RUNTIMES[name].why_not("float32") is None]
    out = tmp_path / "results.json"
    settings = ["--batches", "2", "--repetitions", "2", "--dtypes", "float32", "--out", str(out)]
    unet_speed.main([*settings, "--contestants", *names])
    assert "left out" not in capfd.readouterr().out
    sections = json.loads(out.read_text(encoding="utf-8"))
    assert [row["contestant"] for row in sections["unet_speed float32 batch 2"]["rows"]] == names
    assert out.with_name("results_unet_speed.png").is_file()


# --------------------------------------------------------------------------------------------------------- first_image


def test_the_first_start_of_a_compiler_is_a_row_of_its_own(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(name: str, job: Job) -> dict[str, float]:
        if name == "OpenVINO":
            raise RuntimeFailed("it crashed")
        started.append(name)
        return dict.fromkeys(first_image.PARTS, 60.0 if started.count(name) == 1 else 2.0 if name == OURS else 4.0)

    monkeypatch.setattr(first_image, "start", start)
    monkeypatch.setattr(first_image, "export", lambda name, job: None)
    for name in ("torch.compile", "OpenVINO"):
        monkeypatch.setitem(RUNTIMES, name, Runtime(runtimes.ours))
    left_out: dict[str, str] = {}
    rows = first_image.measure([OURS, "torch.compile", "OpenVINO"], job, 3, left_out)
    ratios = {row["contestant"]: row[f"times {OURS}"] for row in rows}
    assert ratios == {"torch.compile, nothing cached": 30, OURS: 1, "torch.compile": 2}
    assert left_out == {"OpenVINO": "it crashed"}


# --------------------------------------------------------------------------------------------------------- unet_growth


def test_work_is_what_a_cost_is_relative_to() -> None:
    assert [Point(line, 64, 1).work for line in ("batch", "size", "steps")] == [64, 4, 64]


def test_a_cost_jumps_where_it_is_well_above_the_one_before() -> None:
    assert unet_growth.jumps([1.0, 1.1, 1.2, 1.5, 1.0]) == [False, False, False, True, False]


def test_growth_of_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ddpm_fast.freeze(peers.random_unet({**SMALL, "out_channels": 2}), torch.float32)
    threads = torch.get_num_threads()
    for line in ("batch", "size", "steps"):
        values = (16, 32) if line == "size" else (1, 3)
        rows = unet_growth.measure(model, [Point(line, value, threads) for value in values], 2)
        assert [row["of"] for row in rows] == list(values)
        assert min(row["cost"] for row in rows) == 1


def test_a_line_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = ddpm_fast.freeze(peers.random_unet(SMALL), torch.float32)
    monkeypatch.setattr(unet_growth, "memory_of", lambda call: 1000)
    monkeypatch.setattr(unet_growth, "available", lambda: 3000.0)
    rows = unet_growth.measure(model, [Point("batch", value, 1) for value in (1, 2, 8)], 1)
    assert [row["of"] for row in rows] == [1, 2]
    assert "left out: batch 8 and more" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- common


def test_everybody_takes_a_turn_in_every_round() -> None:
    order: list[str] = []

    def timer(name: str) -> Any:
        return lambda: float(len(order.append(name) or order))  # type: ignore[func-returns-value]

    times = common.take_turns({name: timer(name) for name in "abc"}, 2)
    assert order == list("abcbca")
    assert times["a"].rounds == (1, 6)


def test_results_of_a_cpu_go_by_model_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "device_name", lambda device: "Some(R) CPU 9 @ 2.40GHz")
    monkeypatch.setattr(common, "cores", lambda: 2)
    monkeypatch.setattr(common, "instruction_set", lambda: "avx512_bf16")
    assert common.default_output("cpu").name == "some-cpu-9-2-cores-avx512-bf16.json"


def test_libraries_that_the_benchmarks_name_are_in_the_extra() -> None:
    text = (common.ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    extra = text.partition("\nbench = [")[2].partition("\n]")[0]
    needed = {module for runtime in RUNTIMES.values() for module in runtime.needs} - {"torch"}
    assert all(f'"{module}' in extra for module in needed)
