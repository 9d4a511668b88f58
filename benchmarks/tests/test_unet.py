"""Benchmarks of the network: whose results count, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_unet
import idioms
import numpy as np
import pytest
import torch
from benchmark_unet import Point
from peers import NETWORKS, OURS, Peer
from processes import Job, PeerFailed
from small_unets import SMALL

import ddpm_fast


class FakeProcess:
    first_image, load, first_call = 4.0, 1.0, 1.0

    def __init__(self, name: str, job: Job) -> None:
        if name == "OpenVINO":
            raise PeerFailed("it crashed")
        self.name, self.job = name, job
        self.first_image = 2.0 if name == OURS else 4.0
        self.closed = False

    def output(self) -> Any:
        right = benchmark_unet.outputs(self.job, torch.float32)
        return right * (1.01 if self.name == "ONNX Runtime" else 1)

    def calls_per_turn(self) -> int:
        return 1

    def seconds(self, calls: int) -> float:
        return self.first_image

    def peak(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(benchmark_unet, "Process", FakeProcess)
    monkeypatch.setattr(benchmark_unet, "export", lambda name, job: None)
    for name in NETWORKS:
        monkeypatch.setitem(NETWORKS, name, Peer(print, ("no_such_module",) if name == "torch.compile" else ()))
    with benchmark_unet.network_folder(SMALL, tmp_path) as folder:
        return Job(folder, 3, SMALL["sample_size"], threads=torch.get_num_threads())


def test_peers_that_are_missing_wrong_or_crash_are_left_out(job: Job) -> None:
    missing: dict[str, str] = {}
    rows = benchmark_unet.compare(list(NETWORKS), job, 2, missing)
    assert [row["contestant"] for row in rows] == [OURS, "diffusers"]
    assert [row["best peer"] for row in rows] == ["", "*"]
    assert rows[1]["ddpm_fast is faster by"].median == 2
    assert missing["torch.compile"] == "no_such_module not installed"
    assert missing["OpenVINO"] == "it crashed"
    assert missing["ONNX Runtime"].startswith("wrong: its relative error is 0.01")


def test_errors_are_relative_and_of_the_images_that_both_have() -> None:
    truth = np.array([[3.0, 4.0]])
    assert benchmark_unet.relative_error(np.array([[3.0, 4.5], [9, 9]], dtype=np.float32), truth) == pytest.approx(0.1)
    assert benchmark_unet.relative_error(np.array([[np.nan, 4.0]]), truth) == float("inf")


def test_the_first_start_of_a_compiler_is_a_row_of_its_own(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "torch.compile", Peer(print, ()))
    missing: dict[str, str] = {}
    rows = benchmark_unet.measure_starts([OURS, "torch.compile", "OpenVINO"], job, 3, missing)
    assert {row["contestant"]: row[f"times {OURS}"] for row in rows} == {
        OURS: 1,
        "torch.compile, nothing cached": 2,
        "torch.compile": 2,
    }
    assert missing == {"OpenVINO": "it crashed"}


def test_growth_of_a_small_network() -> None:
    assert [Point(line, 64, 1).work for line in ("batch", "size", "steps")] == [64, 4, 64]
    model = ddpm_fast.freeze(idioms.random_unet({**SMALL, "out_channels": 2}), torch.float32)
    for line in ("batch", "size", "steps"):
        values = (16, 32) if line == "size" else (1, 3)
        points = [Point(line, value, torch.get_num_threads()) for value in values]
        rows = benchmark_unet.measure_growth(model, points, 2)
        assert [row["of"] for row in rows] == list(values)
        assert min(row["cost"] for row in rows) == 1


def test_a_line_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = ddpm_fast.freeze(idioms.random_unet(SMALL), torch.float32)
    monkeypatch.setattr(benchmark_unet, "memory_of", lambda call: 1000)
    monkeypatch.setattr(benchmark_unet, "available", lambda: 3000.0)
    rows = benchmark_unet.measure_growth(model, [Point("batch", value, 1) for value in (1, 2, 8)], 1)
    assert [row["of"] for row in rows] == [1, 2]
    assert "left out: batch 8 and more" in capsys.readouterr().out


@pytest.mark.slow
def test_peers_that_are_installed_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark_unet, "CIFAR10_32", SMALL)
    monkeypatch.setattr(benchmark_unet, "SIZE", SMALL["sample_size"])
    names = [name for name in NETWORKS if name != "torch.compile" and NETWORKS[name].why_not() is None]
    out = tmp_path / "results.json"
    settings = ["--batches", "2", "--rounds", "2", "--dtypes", "float32", "--plot", "--out", str(out)]
    benchmark_unet.main(["speed", *settings, "--peers", *names])
    assert "left out" not in capfd.readouterr().out
    sections = json.loads(out.read_text(encoding="utf-8"))
    assert [row["contestant"] for row in sections["unet_speed float32 batch 2"]["rows"]] == names
    assert out.with_name("results_unet_speed.png").is_file()
