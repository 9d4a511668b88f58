"""Benchmarks of the network: whose results count, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import benchmark_unet
import idioms
import numpy as np
import pytest
import torch
from common import Spread
from peers import NETWORKS, OURS, Peer
from processes import Job, PeerFailed
from small_unets import SMALL


class FakeProcess:
    about: ClassVar = {"import and load": 1.0, "first call": 1.0, "versions": {"torch": "2.9"}}
    peak = None

    def __init__(self, name: str, job: Job) -> None:
        if name == "OpenVINO":
            raise PeerFailed("it crashed")
        self.name, self.job = name, job
        self.first_image = 2.0 if name == OURS else 4.0

    def output(self) -> Any:
        right = benchmark_unet.outputs(self.job, torch.float32)
        return right * (1.01 if self.name == "ONNX Runtime" else 1)

    def calls_per_turn(self) -> int:
        return 1

    def seconds(self, calls: int) -> float:
        return self.first_image

    def close(self) -> None: ...


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(benchmark_unet, "Process", FakeProcess)
    monkeypatch.setattr(benchmark_unet, "export", lambda name, job: None)
    missing = ("torch.compile", "zentorch", "ncnn")
    for name in NETWORKS:
        monkeypatch.setitem(NETWORKS, name, Peer(print, ("no_such_module",) if name in missing else ()))
    idioms.random_unet(SMALL).save_pretrained(tmp_path / "network")
    return Job(str(tmp_path), 3, SMALL["sample_size"])


def test_peers_that_are_missing_wrong_or_crash_are_left_out(job: Job) -> None:
    missing: dict[str, str] = {}
    rows = benchmark_unet.compare(list(NETWORKS), job, rounds=2, missing=missing)
    assert [row["contestant"] for row in rows] == [OURS, "diffusers"]
    assert rows[1]["ddpm_fast is faster by"].median == 2
    assert rows[1]["first image, s"] == 4
    assert missing["torch.compile"] == "no_such_module not installed"
    assert missing["OpenVINO"] == "it crashed"
    assert missing["ONNX Runtime"].startswith("wrong: its relative error is 0.01")


def test_errors_are_relative_and_of_the_images_that_both_have() -> None:
    truth = np.array([[3.0, 4.0]])
    assert benchmark_unet.relative_error(np.array([[3.0, 4.5], [9, 9]], dtype=np.float32), truth) == pytest.approx(0.1)
    assert benchmark_unet.relative_error(np.array([[np.nan, 4.0]]), truth) == float("inf")


@pytest.mark.slow
def test_peers_that_are_installed_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(idioms.NETWORKS, "cifar10-32", SMALL)
    names = [name for name in NETWORKS if name not in ("torch.compile", "zentorch") and NETWORKS[name].why_not() is None]
    out = tmp_path / "results.json"
    settings = ["--batches", "2", "--rounds", "2", "--dtypes", "float32", "--plot", "--out", str(out)]
    benchmark_unet.main([*settings, "--peers", *names])
    assert "left out" not in capfd.readouterr().out
    sections = json.loads(out.read_text(encoding="utf-8"))
    assert [row["contestant"] for row in sections["unet_speed float32 batch 2"]["rows"]] == names
    assert out.with_name("results_unet_speed.png").is_file()


def test_both_panels_of_the_plot_show_all_speeds() -> None:
    speeds = {"float32": 10.0, "bf16": 100.0}
    rows = [
        {"dtype": dtype, "contestant": OURS, "batch": batch, "images/s": Spread(speed, speed, speed)}
        for dtype, speed in speeds.items()
        for batch in (1, 4)
    ]
    figure = benchmark_unet.plot(rows, "a network")
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 100
