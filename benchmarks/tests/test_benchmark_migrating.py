"""Benchmark of other libraries before and after `freeze`: every part runs, and wrong images have no times."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_migrating
import common
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")


def test_every_installed_library_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_migrating, "installed", lambda module: module != "guided_diffusion")
    out = tmp_path / "results.json"
    benchmark_migrating.main(["--quick", "--out", str(out)])
    sections = json.loads(out.read_text(encoding="utf-8"))
    assert list(sections) == ["migrating_speed diffusers", "migrating_speed denoising-diffusion-pytorch"]
    rows = sections["migrating_speed diffusers"]["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bf16"]
    assert all(row["times as fast"]["median"] > 0 for row in rows)
    assert "left out: guided-diffusion: guided_diffusion is not installed: clone github.com" in capsys.readouterr().out


def test_other_images_are_an_error() -> None:
    image = torch.zeros(2)
    common.require_same_images("it", image, image + 9e-4)
    with pytest.raises(AssertionError, match=r"^it: images differ by 0\.01, at most 0\.001 expected"):
        common.require_same_images("it", image, image + 0.01)
