"""The command line with data that are no RGB squares: many channels, grey, rectangles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddpm_fast import load_folder
from ddpm_fast.cli import main

SMALL = ["--channels", "8,16", "--layers", "1", "--steps", "2", "--batch-size", "2", "--no-progress", "--sample-every", "2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_five_channels_of_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    data = tmp_path / "fields"
    data.mkdir()
    for index, values in enumerate(np.random.default_rng(0).uniform(-3, 5, (4, 10, 14, 5))):
        np.save(data / f"{index}.npy", values)
    size = ["--data", data, "--image-size", "12x8"]
    each = [argument for channel in range(5) for argument in ("--data-range", -4 - channel, 6)]
    succeed("train", tmp_path / "each", *size, *each, *SMALL)
    assert load_folder(tmp_path / "each").model.config["data_range"] == [[-4.0 - channel, 6.0] for channel in range(5)]
    assert "5 channels, resized from 14x10, the range of each channel as -1 to 1" in caplog.text
    succeed("train", tmp_path / "run", *size, "--data-range", "-4", "6", *SMALL)
    assert "images   12x8 pixels, 5 channels, resized from 14x10, -4 to 6 as -1 to 1" in caplog.text
    assert load_folder(tmp_path / "run").interface.shape == (5, 8, 12)
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as grid:
        assert (grid.mode, grid.size) == ("L", (8 * (12 * 10 + 2) + 2, 4 * (8 * 10 + 2) + 2))
    sample = ["sample", "--model", tmp_path / "run", "--steps", 2, "--num", 2]
    assert "Shown channels: 0." in succeed(*sample, "--out", tmp_path / "a.png", "--gif", tmp_path / "a.gif")
    assert "Shown channels: 3, 2, 1." in succeed(*sample, "--out", tmp_path / "b.png", "--show-channels", "3,2,1")
    with Image.open(tmp_path / "a.png") as grey, Image.open(tmp_path / "b.png") as colours:
        assert (grey.mode, colours.mode, grey.size) == ("L", "RGB", colours.size)
    succeed(*sample, "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        assert (archive["arr_0"].dtype, archive["arr_0"].shape) == (np.float32, (2, 8, 12, 5))
        assert -4 <= archive["arr_0"].min() < archive["arr_0"].max() <= 6
    result = run(*sample, "--out", f"{tmp_path}/dir/")
    assert "expected shape to be (C, H, W) with C one of 1, 3, 4" in result.output
    assert (
        "expected --model to be one that draws grey, RGB or RGBA"
        in run("edit", "vary", "digits:0", "--model", sample[2]).output
    )


def test_grey_rectangles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    data = tmp_path / "grey"
    data.mkdir()
    for index in range(3):
        Image.fromarray(np.full((20, 30), 80 * index, dtype=np.uint8)).save(data / f"{index}.png")
    succeed("train", tmp_path / "run", "--data", data, "--image-size", "12x8", *SMALL)
    assert "images   12x8 pixels, 1 channel, cropped and resized, in grey as all files are" in caplog.text
    succeed("train", tmp_path / "run", "--resume", "--steps", "3", "--no-progress")
    image = next(data.iterdir())
    common = ["--model", tmp_path / "run", "--out", tmp_path / "a.png", "--quiet"]
    succeed("edit", "vary", image, "--num", 2, "--steps", 2, *common)
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (3 * (12 * 8 + 2) + 2, 8 * 8 + 4)
    succeed("edit", "inpaint", image, "--box", "8,0,4,8", "--steps", 2, "--jump-samples", 1, *common)
    assert (
        "expected --box to be X,Y,W,H within 12x8 pixels" in run("edit", "inpaint", image, "--box", "0,8,4,4", *common).output
    )
    succeed("sample", "--steps", 2, "--num", 1, *common)
    with Image.open(tmp_path / "a.png") as one:
        assert (one.mode, one.size) == ("L", (12, 8))
    succeed("train", tmp_path / "rgb", "--data", data, "--colors", "rgb", "--image-size", "12x8", *SMALL)
    assert load_folder(tmp_path / "rgb").interface.shape == (3, 8, 12)


@pytest.mark.parametrize("value", ["x", "12x", "x8", "12x8x3", "-4", "1.5"])
def test_sizes_are_a_width_and_a_height(value: str, tmp_path: Path) -> None:
    result = run("train", tmp_path / "run", "--image-size", value)
    assert result.exit_code == 2
    assert "is not a width and height such as 64 or 48x32" in result.output
