"""The command line with data that are no RGB squares: many channels, grey, rectangles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import run
from items import write
from PIL import Image
from runs import pictures

from ddpm_fast import load_folder

SMALL = ["--channels", "8,16", "--layers", "1", "--steps", "2", "--batch-size", "2", "--no-progress", "--sample-every", "2"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_five_channels_of_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    fields = np.random.default_rng(0).uniform(-3, 5, (4, 10, 14, 5))
    write(Path("fields"), {f"{index}.npy": values for index, values in enumerate(fields)})
    each = [argument for channel in range(5) for argument in ("--data-range", -4 - channel, 6)]
    run("train", "each", "--data=fields", "--image-size=12x8", *each, *SMALL)
    assert load_folder("each").model.config["data_range"] == [[-4.0 - channel, 6.0] for channel in range(5)]
    assert "5 channels, resized from 14x10, the range of each channel as -1 to 1" in caplog.text
    run("train", "run", "--data=fields", "--image-size=12x8", "--data-range", "-4", "6", *SMALL)
    assert "images   12x8 pixels, 5 channels, resized from 14x10, -4 to 6 as -1 to 1" in caplog.text
    assert load_folder("run").interface.shape == (5, 8, 12)
    with Image.open("run/samples/step-00000002.png") as grid:
        assert (grid.mode, grid.size) == ("L", (8 * (12 * 10 + 2) + 2, 4 * (8 * 10 + 2) + 2))
    sample = ["sample", "--model=run", "--steps=2", "--num=2"]
    assert "Shown channels: 0." in run(*sample, "--out=a.png", "--gif=a.gif")
    assert "Shown channels: 3, 2, 1." in run(*sample, "--out=b.png", "--show-channels=3,2,1")
    with Image.open("a.png") as grey, Image.open("b.png") as colours:
        assert (grey.mode, colours.mode, grey.size) == ("L", "RGB", colours.size)
    assert "expected shape to be (C, H, W) with C one of 1, 3, 4" in run(*sample, "--out=dir/", code=2)


def test_grey_rectangles(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    pictures(Path("grey"), size=(30, 20), mode="L")
    run("train", "run", "--data=grey", "--image-size=12x8", *SMALL)
    assert "images   12x8 pixels, 1 channel, cropped and resized, in grey as all files are" in caplog.text
    run("train", "run", "--resume", "--steps=3", "--no-progress")
    common = ["--model=run", "--steps=2", "--out=a.png", "--quiet"]
    run("edit", "vary", "grey/1.png", "--num=2", *common)
    with Image.open("a.png") as grid:
        assert grid.size == (3 * (12 * 8 + 2) + 2, 8 * 8 + 4)
    run("edit", "inpaint", "grey/1.png", "--box=8,0,4,8", "--jump-samples=1", *common)
    assert "expected --box to be X,Y,W,H within 12x8 pixels" in run(
        "edit", "inpaint", "grey/1.png", "--box=0,8,4,4", *common, code=2
    )
    run("sample", "--num=1", *common)
    with Image.open("a.png") as one:
        assert (one.mode, one.size) == ("L", (12, 8))
    run("train", "rgb", "--data=grey", "--colors=rgb", "--image-size=12x8", *SMALL)
    assert load_folder("rgb").interface.shape == (3, 8, 12)
