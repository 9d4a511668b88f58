"""Training on pairs: conditions computed from the images, those of a second folder, and those of a data set's items."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import run as run_command
from items import read_data, whole
from launching import run_ranks
from PIL import Image
from refusals import by, refused
from runs import QUIET, TRAIN, assert_same_weights, pictures, resume_and_compare, train
from torch import Tensor

from ddpm_fast import DataOptions, NoiseSchedule, Sampler, Trainer, TrainOptions, load_folder, sample_seeds
from ddpm_fast.data import arrays
from ddpm_fast.data.condition import evaluated_images, examples, read_conditions
from ddpm_fast.data.degradation import Degradation
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.errors import InvalidValue

RUN: dict[str, Any] = QUIET | {"channels": [8, 16], "batch_size": 8, "micro_batch_size": 2, "steps": 3}


scenes = partial(pictures, count=6, size=(12, 8))


def images(n: int = 4, channels: int = 3, sides: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.rand(n, channels, *sides, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------- degradations


def test_degradations_have_names() -> None:
    for text in ("low-resolution:2", "low-resolution:64", "grey", "mask"):
        assert str(Degradation.named(text)) == text
    for text in ("", "blur", "low-resolution", "low-resolution:1", "low-resolution:x", "grey:2", "mask:"):
        assert Degradation.named(text) is None


def test_low_resolution_keeps_what_a_small_image_has() -> None:
    x_0, seeds = images(), sample_seeds(0, 4)
    condition = Degradation("low-resolution", 4)(x_0, seeds)
    # Pillow resizes floats in the same way.
    for plane, wanted in zip(condition.flatten(0, 1), x_0.flatten(0, 1), strict=True):
        small = Image.fromarray(wanted.numpy()).resize((3, 2), Image.Resampling.BICUBIC)
        large = np.asarray(Image.fromarray(np.asarray(small).clip(-1, 1)).resize((12, 8), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(plane.numpy(), large.clip(-1, 1), atol=2e-6)
    constant = torch.full((1, 1, 8, 8), 0.25)
    torch.testing.assert_close(Degradation("low-resolution", 2)(constant, seeds[:1]), constant)


def test_grey_is_the_luma() -> None:
    x_0 = images()
    condition = Degradation("grey")(x_0, sample_seeds(0, 4))
    expected = 0.299 * x_0[:, 0] + 0.587 * x_0[:, 1] + 0.114 * x_0[:, 2]
    torch.testing.assert_close(condition, expected[:, None])


def test_masks_cut_boxes_of_each_seed() -> None:
    x_0, seeds = images(500), sample_seeds(0, 500)
    condition = Degradation("mask")(x_0, seeds)
    holes = condition[:, 3:] > 0
    assert set(condition[:, 3].unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(condition[:, :3], x_0.masked_fill(holes, 0))
    assert torch.equal(condition[7:9], Degradation("mask")(x_0[7:9], seeds[7:9]))  # whatever the batch
    rows, columns = holes.any(dim=3).squeeze(1), holes.any(dim=2).squeeze(1)  # [N, 8], [N, 12]
    assert torch.equal(holes.squeeze(1), rows[:, :, None] & columns[:, None, :])
    for inside, side in ((rows, 8), (columns, 12)):
        lengths = inside.sum(dim=1)
        assert (int(lengths.min()), int(lengths.max())) == (side // 4, side // 4 + side // 2)
        assert int((inside[:, 1:] != inside[:, :-1]).sum(dim=1).max()) <= 2  # one run of pixels
        assert inside.float().mean(dim=0).min() > 0.1  # everywhere


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("condition", ["low-resolution:2", "mask"])
def test_weights_are_the_same_bits_in_parts_and_in_processes(condition: str, tmp_path: Path) -> None:
    options = RUN | {"condition": condition, "flip": True}
    train(tmp_path / "parts", **options | {"steps": 1})
    resume_and_compare(train, tmp_path / "parts", **options)
    if condition == "mask":  # the one that draws
        for each in run_ranks(2, ["-c", TRAIN, str(tmp_path / "two"), json.dumps(options)], tmp_path):
            assert each.returncode == 0, each.stderr
        assert_same_weights(tmp_path / "whole", tmp_path / "two")


def test_pairs_of_arrays_have_a_range(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(6, 8, 8, 2)))
    np.save(tmp_path / "y.npy", np.random.default_rng(1).normal(size=(6, 8, 8)) * 50)
    train(tmp_path / "run", **RUN | {"data": str(tmp_path / "x.npy"), "condition": str(tmp_path / "y.npy"), "steps": 1})
    config = load_folder(tmp_path / "run").model.config
    (condition_range,), data_ranges = config["condition_range"], config["data_range"]
    assert condition_range[1] > 50 > max(high for _, high in data_ranges)
    assert len(data_ranges) == 2
    with pytest.raises(ValueError, match=r"^expected condition to be given, with 1 channels, as the model reads, got none"):
        evaluated_images(DataOptions(data=tmp_path / "x.npy"), config, 1)
    condition = read_conditions(tmp_path / "y.npy", config, (2, 8, 8))
    assert (condition.shape, float(condition.min()), float(condition.max())) == ((6, 1, 8, 8), -1, 1)


KINDS = "low-resolution:2 to low-resolution:64, grey, mask, or a folder, an archive or a file of arrays"


@pytest.mark.parametrize(
    ("data", "condition", "wanted", "got"),
    [
        ("digits", "blur", f"to be {KINDS}", "'blur', which does not exist"),
        ("digits", "low-resolution:3", "to divide the images' sides, 8x8", "low-resolution:3"),
        ("digits", "grey", "to be another than grey for 1 channels", "grey"),
        ("rgb.npy", "grey", "to be another than grey for channels of several ranges", "grey"),
    ],
)
def test_degradations_that_do_not_fit_are_refused(
    data: str, condition: str, wanted: str, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rgb.npy", np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    with refused(by("load_dataset", InvalidValue("condition", wanted, got))):
        read_data(data, condition=condition)
    assert read_data("rgb.npy", condition="grey", data_range=(-9, 9)).info.condition_channels == 1


# -------------------------------------------------------------------------------------------------- drawing and evaluation


def read(source: Path, condition: str, read_channels: int, channels: int = 3) -> Tensor:
    """Read conditions as a model does that has this condition and draws 8x12 images."""
    return read_conditions(source, {"condition": condition, "in_channels": read_channels}, (channels, 8, 12), seed=4)


def test_conditions_are_read_as_they_were_trained(tmp_path: Path) -> None:
    full, small = scenes(tmp_path / "full"), tmp_path / "small"
    small.mkdir()
    for file in full.iterdir():
        Image.open(file).resize((3, 2), Image.Resampling.LANCZOS).save(small / file.name)
    enlarged = read(small, "low-resolution:4", 6)
    assert torch.equal(read(full, "low-resolution:4", 6), enlarged)
    images = to_unit_range(whole(read_data(str(small))).images)
    expected = torch.nn.functional.interpolate(images, (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(enlarged, expected.clamp(-1, 1))
    assert read(full, "grey", 4).shape == (6, 1, 8, 12)
    boxes = read(full, "mask", 7)
    x_0 = to_unit_range(whole(read_data(str(full))).images)
    assert torch.equal(boxes, Degradation("mask")(x_0, sample_seeds(4, 6)))
    clear = Image.open(full / "2.png").convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(96).reshape(8, 12) < 30, 0, 255).astype(np.uint8)))
    clear.save(full / "2.png")
    holes = read(full, "mask", 7)
    assert torch.equal(holes[2, 3].flatten(), torch.where(torch.arange(96) < 30, 1.0, -1.0))
    assert torch.equal(holes[[0, 1, 3, 4, 5]], boxes[[0, 1, 3, 4, 5]])
    assert torch.equal(read(full, "mask", 9, 4)[:, 4], boxes[:, 3])  # transparency is a channel there, and no hole
    assert torch.equal(read(full / "2.png", "mask", 7), holes[2:3])
    with refused(InvalidValue("channels", "to be one of 1, 3, 4 or None", "2")):
        read(full, "images", 5)


@pytest.fixture
def enlarging(tmp_path: Path) -> Path:
    """A run whose network enlarges digits."""
    train(tmp_path / "run", **RUN | {"condition": "low-resolution:2", "steps": 1})
    return tmp_path / "run"


def test_evaluation_gives_each_image_its_class_and_condition(
    enlarging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Mock(side_effect=Sampler.__call__)
    monkeypatch.setattr(Sampler, "__call__", lambda *arguments, **options: drawn(*arguments, **options))
    evaluated = ["--model", enlarging, "--data", "digits"]
    run_command("evaluate", "psnr", *evaluated, "--num", 4, "--samples", 1, "--quiet")
    images, labels, _ = read_batch(read_data("digits", split="test"), range(4))
    options = drawn.call_args_list[0].kwargs
    assert options["class_labels"].tolist() == labels.tolist()
    assert torch.equal(options["condition"], Degradation("low-resolution", 2)(to_unit_range(images), sample_seeds(0, 4)))
    folder, out = pictures(tmp_path / "small", 1, (4, 4), "L"), tmp_path / "a.png"
    run_command("sample", "--model", enlarging, "--condition", folder, "--out", out, "--steps", 2, "--quiet")
    assert drawn.call_args.kwargs["class_labels"] is None  # nobody knows what the images show
    with Image.open(out) as picture:
        assert picture.size == (8, 8)  # one image without its condition
    shown = run_command("evaluate", "bound", *evaluated, code=2)
    assert "expected --model to read no condition: evaluate psnr is for models that restore images, got 1 channel" in shown


@pytest.fixture
def numbers(tmp_path: Path) -> list[Path]:
    """Files of images of numbers from 3 to 5: several, one of them, and several as uint8."""
    values = np.random.default_rng(0).uniform(3, 5, (6, 8, 8, 1))
    arrays = {"all": values, "one": values[2:3], "pictures": (values * 50).astype(np.uint8)}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return [tmp_path / f"{name}.npy" for name in arrays]


def commands_of_one(run_dir: Path, trained_on: Path, one: Path) -> dict[str, list[object]]:
    """Train a network, and return commands that read one image, by their option of its range."""
    train(run_dir, **RUN | {"condition": "low-resolution:2", "steps": 1, "image_size": 8, "data": str(trained_on)})
    model = ["--model", run_dir, "--quiet"]
    return {
        "--condition-range": ["sample", *model, "--condition", one, "--out", run_dir / "a.png", "--steps", 2],
        "--data-range": ["evaluate", "psnr", *model, "--data", one, "--num", 1, "--samples", 1],
    }


def test_numbers_are_read_by_the_range_that_the_model_keeps(numbers: list[Path], tmp_path: Path) -> None:
    """An image reads the same alone and beside others."""
    several, one, _ = numbers
    commands = commands_of_one(tmp_path / "run", several, one)
    config = load_folder(tmp_path / "run").model.config
    alone, among = (read_conditions(file, config, (1, 8, 8)) for file in (one, several))
    assert torch.equal(alone, among[2:3])
    for command in commands.values():
        run_command(*command)
    shown = run_command("sample", "--condition-range", 0, 9, code=2)
    assert "expected --condition-range to go with --condition, got ((0.0, 9.0),)" in shown
    shown = run_command(*commands["--condition-range"], "--condition-range", 0, 9, code=2)
    assert "expected --condition-range to be left out, as the model keeps ((" in shown


def test_a_model_of_pictures_reads_numbers_of_a_given_range(numbers: list[Path], tmp_path: Path) -> None:
    _, one, of_pictures = numbers
    for option, command in commands_of_one(tmp_path / "run", of_pictures, one).items():
        assert f"expected {option} to be given for numbers, as {one}[0] has float64" in run_command(*command, code=2)
        run_command(*command, option, 3, 5)


def test_as_many_conditions_are_read_as_images_are_drawn(
    enlarging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "many.npy", np.zeros((40, 4, 4, 1), np.uint8))
    read = Mock(wraps=arrays._array)
    monkeypatch.setattr(arrays, "_array", read)
    command = ["sample", "--model", enlarging, "--condition", tmp_path / "many.npy", "--num", 3, "--quiet"]
    run_command(*command, "--out", tmp_path / "a.png", "--steps", 2)
    assert {call.args[-1] for call in read.call_args_list} == {0, 1, 2}


def test_a_folder_may_be_called_as_a_degradation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask").mkdir()
    train(tmp_path / "run", **RUN | {"condition": "mask", "steps": 1})
    assert load_folder(tmp_path / "run").model.config["condition"] == "mask"


def test_a_network_of_another_condition_is_refused(enlarging: Path, tmp_path: Path) -> None:
    dataset = read_data("digits", condition="low-resolution:4")
    with refused(
        by("Trainer", InvalidValue("dataset", "to have the condition of model, low-resolution:2", "low-resolution:4"))
    ):
        Trainer(load_folder(enlarging).model, NoiseSchedule.linear(), dataset, TrainOptions(), tmp_path / "other")


def test_the_command_line_restores_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    data = scenes(tmp_path / "data", count=9)
    small = ["--channels", "8,16", "--layers", "1", "--steps", "2", "--batch-size", "4", "--no-progress", "--sample-every", "2"]
    run_command("train", tmp_path / "run", "--data", data, "--condition", "grey", *small)
    assert "reads    1 channel of a condition: grey" in caplog.text
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as grid:  # two bands of condition, sample, image
        assert grid.size == (8 * (12 * 10 + 2) + 2, 6 * (8 * 10 + 2) + 2)
    sample = ["sample", "--model", tmp_path / "run", "--quiet", "--steps", 2]
    run_command(*sample, "--condition", data, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (8 * (12 * 10 + 2) + 2, 4 * (8 * 10 + 2) + 2)
    run_command(*sample, "--condition", data, "--out", tmp_path / "each.npz", "--num", 11)
    with np.load(tmp_path / "each.npz") as archive:
        assert archive["arr_0"].shape == (11, 8, 12, 3)
    for arguments, wanted in (
        (sample, "--condition to be given, as the model reads 1 channel of a condition (grey), got none"),
        ([*sample, "--condition", data, "--show-channels", 3], "--show-channels to be one, three or four of 0..2, got (3,)"),
        (["sample", "--condition", data], "--condition to be left out, as the model reads none"),
        (["edit", "vary", data / "0.png", *sample[1:4]], "--model to be one without a condition"),
    ):
        assert f"expected {wanted}" in run_command(*arguments, code=2)
    evaluate = ["evaluate", "psnr", "--model", tmp_path / "run", "--data", data, "--num", 3, "--samples", 2]
    output = run_command(*evaluate, "--json", tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())["per_image"]
    assert list(figures) == ["condition", "one sample", "mean of 2"]
    assert f"condition    {float(np.mean(figures['condition']['psnr'])):6.2f} dB" in output
    items = examples(read_data(str(data), condition="grey", first=3), range(3), 0)
    error = (items.condition - items.images).double().square().flatten(1).mean(dim=1)
    assert figures["condition"]["psnr"] == pytest.approx((10 * torch.log10(4 / error)).tolist(), abs=1e-4)
