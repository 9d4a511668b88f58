"""Training on pairs: conditions computed from the images, those of a second folder, and those of a data set's items."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from items import assert_equal, whole
from launching import run_ranks
from PIL import Image
from refusals import refused
from runs import QUIET, TRAIN, assert_same_weights, train
from torch import Tensor

from ddpm_fast import NoiseSchedule, Trainer, TrainOptions, UNet, load_folder, sample_seeds
from ddpm_fast.cli import main
from ddpm_fast.errors import InvalidValue
from ddpm_fast.training.data import Degradation, arrays, batches, load_dataset, read_batch, to_unit_range
from ddpm_fast.training.data.condition import evaluated_images, examples, read_conditions

RUN: dict[str, Any] = QUIET | {"channels": [8, 16], "batch_size": 8, "micro_batch_size": 2, "steps": 3}


def pictures(folder: Path, count: int = 6, size: tuple[int, int] = (12, 8), mode: str = "RGB", seed: int = 0) -> Path:
    """Write smooth pictures of (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    rng, bands = np.random.default_rng(seed), {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (2, 3, bands), dtype=np.uint8).squeeze(), mode if bands > 1 else "L")
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def images(n: int = 4, channels: int = 3, sides: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.rand(n, channels, *sides, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------- degradations


def test_degradations_have_names() -> None:
    for text in ("low-resolution:2", "low-resolution:64", "grey", "mask"):
        found = Degradation.named(text)
        assert found is not None
        assert str(found) == text
    for text in ("", "blur", "low-resolution", "low-resolution:1", "low-resolution:x", "grey:2", "mask:"):
        assert Degradation.named(text) is None


def test_low_resolution_keeps_what_a_small_image_has() -> None:
    x_0, seeds = images(), sample_seeds(0, 4)
    condition = Degradation("low-resolution", 4)(x_0, seeds)
    assert condition.shape == x_0.shape
    assert condition.abs().max() <= 1
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
    assert condition.shape == (500, 4, 8, 12)
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
    train(tmp_path / "whole", **options)
    train(tmp_path / "parts", **options | {"steps": 1})
    train(tmp_path / "parts", **options, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    if condition == "mask":  # the one that draws
        for each in run_ranks(2, ["-c", TRAIN, str(tmp_path / "two"), json.dumps(options)], tmp_path):
            assert each.returncode == 0, each.stderr
        assert_same_weights(tmp_path / "whole", tmp_path / "two")
    config = load_folder(tmp_path / "whole").model.config
    assert (config["condition"], config["in_channels"], config["out_channels"]) == (
        condition,
        3 if condition == "mask" else 2,
        1,
    )


def test_pairs_are_of_one_name(tmp_path: Path) -> None:
    """Images in memory and decoded as they are used, files and arrays, whatever their order and their endings."""
    sharp, dim = pictures(tmp_path / "sharp"), pictures(tmp_path / "dim", mode="L", seed=1)
    (dim / "3.png").rename(dim / "3.jpg.tmp")
    Image.open(dim / "3.jpg.tmp").save(dim / "3.bmp")
    (dim / "3.jpg.tmp").unlink()
    for memory in (None, 0):
        dataset = load_dataset(str(sharp), condition=dim, memory=memory)
        assert (dataset.info.shape, dataset.info.condition, dataset.info.condition_channels) == ((3, 8, 12), "images", 1)
        batch = read_batch(dataset, torch.tensor([3, 0]))
        assert batch.conditions is not None
        for row, number in enumerate((3, 0)):
            other = next(dim.glob(f"{number}.*"))
            assert np.array_equal(batch.conditions[row, 0], np.asarray(Image.open(other)))
            assert np.array_equal(batch.images[row].permute(1, 2, 0), np.asarray(Image.open(sharp / f"{number}.png")))
        (again,) = batches(dataset, [torch.tensor([3, 0])], 0)
        assert_equal(again, batch)
        condition = dataset[3].condition
        assert condition is not None
        assert torch.equal(condition, batch.conditions[0])
    train(tmp_path / "run", **RUN | {"data": str(sharp), "condition": str(dim), "steps": 2})
    before = (tmp_path / "run" / "config.json").read_text()
    Image.new("L", (12, 8)).save(dim / "0.png")
    with pytest.raises(ValueError, match="the images that the run"):
        train(tmp_path / "run", **RUN | {"data": str(sharp), "condition": str(dim)}, resume=True)
    assert json.loads(before)["unet"]["condition"] == "images"


def test_pairs_of_arrays_have_a_range(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(6, 8, 8, 2)))
    np.save(tmp_path / "y.npy", np.random.default_rng(1).normal(size=(6, 8, 8)) * 50)
    train(tmp_path / "run", **RUN | {"data": str(tmp_path / "x.npy"), "condition": str(tmp_path / "y.npy"), "steps": 1})
    config = load_folder(tmp_path / "run").model.config
    (condition_range,), data_ranges = config["condition_range"], config["data_range"]
    assert condition_range[1] > 50 > max(high for _, high in data_ranges)
    assert len(data_ranges) == 2
    with pytest.raises(
        ValueError, match="evaluate: expected condition to be given, with 1 channels, as the model reads, got none"
    ):
        evaluated_images(str(tmp_path / "x.npy"), None, None, config, 2, 1)
    condition = read_conditions(tmp_path / "y.npy", config, (2, 8, 8))
    assert (condition.shape, float(condition.min()), float(condition.max())) == ((6, 1, 8, 8), -1, 1)


def test_what_cannot_be_paired_is_named(tmp_path: Path) -> None:
    sharp, dim = pictures(tmp_path / "sharp"), pictures(tmp_path / "dim", 2)
    wanted = f"to have files of the same names as {sharp}"
    with refused(InvalidValue("load_dataset", "condition", wanted, f"none named 2, 3, 4, 5 in {dim}")):
        load_dataset(str(sharp), condition=dim)
    with pytest.raises(ValueError, match=f"none named 2, 3, 4, 5 in {dim}"):
        load_dataset(str(dim), condition=sharp)
    pictures(dim, 20)
    with pytest.raises(ValueError, match=r"none named 10, 11, 12, 13, 14 and 9 more in .*sharp"):
        load_dataset(str(sharp), condition=dim)
    wanted = "to be low-resolution:2 to low-resolution:64, grey, mask, or a folder, an archive or a file of arrays"
    with refused(InvalidValue("load_dataset", "condition", wanted, "'blur', which does not exist")):
        load_dataset(str(sharp), condition="blur")
    with refused(InvalidValue("load_dataset", "condition", "to divide the images' sides, 12x8", "low-resolution:3")):
        load_dataset(str(sharp), condition="low-resolution:3")
    with refused(InvalidValue("load_dataset", "condition", "to be another than grey for 1 channels", "grey")):
        load_dataset("digits", condition="grey")
    np.save(tmp_path / "rgb.npy", np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    with refused(InvalidValue("load_dataset", "condition", "to be another than grey for channels of several ranges", "grey")):
        load_dataset(str(tmp_path / "rgb.npy"), condition="grey")
    assert load_dataset(str(tmp_path / "rgb.npy"), condition="grey", data_range=(-9, 9)).info.condition_channels == 1
    with pytest.raises(
        ValueError, match=r"expected condition to be one array file or one table, as digits is, got .*dim, whose "
    ):
        load_dataset("digits", condition=dim)


class Pairs:
    """Items with a condition, as a tuple or by name."""

    def __init__(self, change: Any = lambda image, label, condition: (image, label, condition)) -> None:
        self.digits, self.change = load_dataset("digits"), change

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        image, label, _ = self.digits[index]
        return self.change(image, label, torch.cat([image.flip(2), image // 2]))


def trainer(run_dir: Path, dataset: Any, channels: int = 3, **options: Any) -> Trainer:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = UNet(
            **{"in_channels": channels, "out_channels": 1, "block_out_channels": [8], "norm_num_groups": 8},
            **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1},
        )
    shared = {"batch_size": 4, "steps": 3, "sample_every": 0, "checkpoint_minutes": 0.0, "progress": False, "threads": 1}
    return Trainer(model, NoiseSchedule.linear(), dataset, TrainOptions(**shared | options), run_dir)


def test_items_may_be_triples_or_mappings(tmp_path: Path) -> None:
    trainer(tmp_path / "triples", Pairs(), tensorboard=False).run()
    named = Pairs(lambda image, label, condition: {"condition": condition, "image": image})
    trainer(tmp_path / "names", named, tensorboard=False).run()
    floats = Pairs(lambda image, label, condition: (image, None, to_unit_range(condition)))
    trainer(tmp_path / "floats", floats, tensorboard=False).run()
    assert_same_weights(tmp_path / "triples", tmp_path / "names")
    assert_same_weights(tmp_path / "triples", tmp_path / "floats")
    trainer(tmp_path / "flips", Pairs(), tensorboard=False, flip=True).run()  # both are mirrored
    config = json.loads((tmp_path / "flips" / "config.json").read_text())
    assert config["unet"]["condition"] == "images"


@pytest.mark.parametrize(
    ("change", "channels", "wanted"),
    [
        (
            lambda i, n, c: (i, n),
            3,
            r"dataset\[0\] to have a condition of 2 channels, as the network reads 3 and the image has 1, got none",
        ),
        (
            lambda i, n, c: (i, n, c),
            1,
            r"dataset\[0\] to have no condition, as the network reads 1 and the image has 1, got one",
        ),
        (
            lambda i, n, c: (i, n, c[:1]),
            3,
            r"dataset\[0\] to have a condition of .* \[2, 8, 8\].*, got torch\.uint8 \[1, 8, 8\]",
        ),
        (lambda i, n, c: (i, n, c[:, :4]), 3, r"dataset\[0\] to have a condition of .*, got torch\.uint8 \[2, 4, 8\]"),
        (lambda i, n, c: (i, n, c.int()), 3, r"dataset\[0\] to have a condition of .*, got torch\.int32 \[2, 8, 8\]"),
        (lambda i, n, c: (i, n, c / 0), 3, r"dataset\[0\] to have a condition of .*, got NaN or infinity"),
        (
            lambda i, n, c: (i, n, c, c),
            3,
            r"dataset\[0\] to be an image, \(image, label\) or \(image, label, condition\), got 4 values",
        ),
        (lambda i, n, c: {"image": i, "mask": c}, 3, r"dataset\[0\] to have image, label and condition, got image, mask"),
    ],
)
def test_wrong_conditions_are_named(change: Any, channels: int, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Trainer: expected {wanted}"):
        trainer(tmp_path / "run", Pairs(change), channels)


# -------------------------------------------------------------------------------------------------- drawing and evaluation


def test_conditions_are_read_as_they_were_trained(tmp_path: Path) -> None:
    config = {"condition": "low-resolution:4", "in_channels": 6}
    full = pictures(tmp_path / "full")
    small = tmp_path / "small"
    small.mkdir()
    for file in full.iterdir():
        Image.open(file).resize((3, 2), Image.Resampling.LANCZOS).save(small / file.name)
    enlarged = read_conditions(small, config, (3, 8, 12))
    assert torch.equal(read_conditions(full, config, (3, 8, 12)), enlarged)
    images = to_unit_range(whole(load_dataset(str(small))).images)
    expected = torch.nn.functional.interpolate(images, (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(enlarged, expected.clamp(-1, 1))
    grey = read_conditions(full, {"condition": "grey", "in_channels": 4}, (3, 8, 12))
    assert grey.shape == (6, 1, 8, 12)
    mask = {"condition": "mask", "in_channels": 7}
    boxes = read_conditions(full, mask, (3, 8, 12), seed=4)
    x_0 = to_unit_range(whole(load_dataset(str(full))).images)
    assert torch.equal(boxes, Degradation("mask")(x_0, sample_seeds(4, 6)))
    clear = Image.open(full / "2.png").convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(96).reshape(8, 12) < 30, 0, 255).astype(np.uint8)))
    clear.save(full / "2.png")
    holes = read_conditions(full, mask, (3, 8, 12), seed=4)
    assert torch.equal(holes[2, 3].flatten(), torch.where(torch.arange(96) < 30, 1.0, -1.0))
    assert torch.equal(holes[[0, 1, 3, 4, 5]], boxes[[0, 1, 3, 4, 5]])
    rgba = {"condition": "mask", "in_channels": 9}  # transparency is a channel there, and no hole
    assert torch.equal(read_conditions(full, rgba, (4, 8, 12), seed=4)[:, 4], boxes[:, 3])
    one = read_conditions(full / "2.png", mask, (3, 8, 12), seed=4)
    assert torch.equal(one, holes[2:3])
    with refused(InvalidValue("sample", "channels", "to be one of 1, 3, 4 or None", "2")):
        read_conditions(full, {"condition": "images", "in_channels": 5}, (3, 8, 12))


def test_evaluation_gives_each_image_its_class_and_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_fast.sampling import sampler

    train(tmp_path / "run", **RUN | {"condition": "low-resolution:2", "steps": 1})
    seen: list[Any] = []
    draw = sampler.Sampler.__call__
    monkeypatch.setattr(sampler.Sampler, "__call__", lambda *a, **k: (seen.append(k), draw(*a, **k))[1])
    arguments = ["evaluate", "--model", str(tmp_path / "run"), "--data", "digits", "--num", "4", "--samples", "1", "--quiet"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    test = load_dataset("digits", split="test")
    images, labels, _ = read_batch(test, range(4))
    assert seen[0]["class_labels"].tolist() == labels.tolist()
    assert torch.equal(seen[0]["condition"], Degradation("low-resolution", 2)(to_unit_range(images), sample_seeds(0, 4)))
    folder = pictures(tmp_path / "small", 1, (4, 4), "L")
    seen.clear()
    arguments = ["sample", "--model", str(tmp_path / "run"), "--condition", str(folder), "--out", str(tmp_path / "a.png")]
    assert CliRunner().invoke(main, [*arguments, "--quiet"]).exit_code == 0
    assert seen[0]["class_labels"] is None  # nobody knows what the images show
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (8, 8)  # one image without its condition
    arguments = ["evaluate", "--model", str(tmp_path / "run"), "--data", "digits"]
    result = CliRunner().invoke(main, [*arguments, "--variance", "fixed_large"])
    assert "expected --variance to be left out, as the model restores images" in result.output


def test_numbers_are_read_by_the_range_that_the_model_keeps(tmp_path: Path) -> None:
    """An image reads the same alone and beside others, and numbers for a model of pictures are refused."""
    numbers = np.random.default_rng(0).uniform(3, 5, (6, 8, 8, 1))
    np.save(tmp_path / "all.npy", numbers)
    np.save(tmp_path / "one.npy", numbers[2:3])
    np.save(tmp_path / "pictures.npy", (numbers * 50).astype(np.uint8))
    run, model = CliRunner().invoke, ["--model", str(tmp_path / "run"), "--quiet"]
    small = RUN | {"condition": "low-resolution:2", "steps": 1, "image_size": 8}
    for trained_on in ("pictures", "all"):
        train(tmp_path / "run", **small | {"data": str(tmp_path / f"{trained_on}.npy")})
        config = load_folder(tmp_path / "run").model.config
        sample = ["sample", *model, "--condition", str(tmp_path / "one.npy"), "--out", str(tmp_path / "a.png"), "--steps", "2"]
        evaluate = ["evaluate", *model, "--data", str(tmp_path / "one.npy"), "--num", "1", "--samples", "1"]
        if trained_on == "all":
            alone, among = (read_conditions(tmp_path / f"{name}.npy", config, (1, 8, 8)) for name in ("one", "all"))
            assert torch.equal(alone, among[2:3])
            assert run(main, sample).exit_code == run(main, evaluate).exit_code == 0
            result = run(main, ["sample", "--condition-range", "0", "9"])
            assert "expected --condition-range to go with --condition, got ((0.0, 9.0),)" in result.output
            with pytest.raises(ValueError, match="condition_range to go with a condition that is read from files"):
                load_dataset(str(tmp_path / "all.npy"), condition="grey", condition_range=(0, 9))
            result = run(main, [*sample, "--condition-range", "0", "9"])
            assert "expected --condition-range to be left out, as the model keeps ((" in result.output
        for command, option in ((sample, "--condition-range"), (evaluate, "--data-range")) * (trained_on == "pictures"):
            result = run(main, command)
            assert result.exit_code == 2
            assert f"expected {option} to be given for numbers, as {tmp_path / 'one.npy'}[0] has float64" in result.output
            result = run(main, [*command, option, "3", "5"])
            assert result.exit_code == 0, result.output
        shutil.rmtree(tmp_path / "run")


def test_as_many_conditions_are_read_as_images_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", **RUN | {"condition": "low-resolution:2", "steps": 1})
    np.save(tmp_path / "many.npy", np.zeros((40, 4, 4, 1), np.uint8))
    read: list[int] = []
    array = arrays._array
    monkeypatch.setattr(arrays, "_array", lambda *arguments: (read.append(arguments[-1]), array(*arguments))[1])
    command = ["sample", "--model", str(tmp_path / "run"), "--condition", str(tmp_path / "many.npy"), "--num", "3", "--quiet"]
    assert CliRunner().invoke(main, [*command, "--out", str(tmp_path / "a.png"), "--steps", "2"]).exit_code == 0
    assert set(read) == {0, 1, 2}


def test_a_folder_may_be_called_as_a_degradation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask").mkdir()
    train(tmp_path / "run", **RUN | {"condition": "mask", "steps": 1})
    assert load_folder(tmp_path / "run").model.config["condition"] == "mask"


def test_a_network_of_another_condition_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", **RUN | {"condition": "low-resolution:2", "steps": 1})
    dataset = load_dataset("digits", condition="low-resolution:4")
    with refused(InvalidValue("Trainer", "dataset", "to have the condition of model, low-resolution:2", "low-resolution:4")):
        Trainer(load_folder(tmp_path / "run").model, NoiseSchedule.linear(), dataset, TrainOptions(), tmp_path / "other")


def test_the_command_line_restores_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    data = pictures(tmp_path / "data", 9)
    run = CliRunner().invoke
    small = ["--channels", "8,16", "--layers", "1", "--steps", "2", "--batch-size", "4", "--no-progress", "--sample-every", "2"]
    result = run(main, ["train", str(tmp_path / "run"), "--data", str(data), "--condition", "grey", *small])
    assert result.exit_code == 0, result.output
    assert "reads    1 channel of a condition: grey" in caplog.text
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as grid:  # two bands of condition, sample, image
        assert grid.size == (8 * (12 * 10 + 2) + 2, 6 * (8 * 10 + 2) + 2)
    model = ["--model", str(tmp_path / "run"), "--quiet"]
    result = run(main, ["sample", *model, "--condition", str(data), "--out", str(tmp_path / "a.png"), "--steps", "2"])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (8 * (12 * 10 + 2) + 2, 4 * (8 * 10 + 2) + 2)
    result = run(
        main, ["sample", *model, "--condition", str(data), "--out", str(tmp_path / "each.npz"), "--num", "11", "--steps", "2"]
    )
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "each.npz") as archive:
        assert archive["arr_0"].shape == (11, 8, 12, 3)
    for arguments, wanted in (
        ([], "expected --condition to be given, as the model reads a condition of 1 channels (grey), got none"),
        (
            ["--condition", str(data), "--show-channels", "3"],
            "expected --show-channels to be one, three or four of 0..2, got [3]",
        ),
    ):
        result = run(main, ["sample", *model, *arguments])
        assert result.exit_code == 2
        assert wanted in result.output
    result = run(main, ["sample", "--condition", str(data)])
    assert "expected --condition to be left out, as the model reads none" in result.output
    evaluate = ["evaluate", *model[:2], "--data", str(data), "--num", "3", "--samples", "2", "--json", str(tmp_path / "a.json")]
    result = run(main, evaluate)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "a.json").read_text())
    assert list(figures["per_image"]) == ["condition", "one sample", "mean of 2"]
    shown = float(np.mean(figures["per_image"]["condition"]["psnr"]))
    assert f"condition    {shown:6.2f} dB" in result.output
    items = examples(load_dataset(str(data), condition="grey", first=3), range(3), 0)
    error = (items.condition - items.images).double().square().flatten(1).mean(dim=1)
    assert figures["per_image"]["condition"]["psnr"] == pytest.approx((10 * torch.log10(4 / error)).tolist(), abs=1e-4)
    result = run(main, ["edit", "vary", str(next(data.iterdir())), *model])
    assert "expected --model to be one without a condition" in result.output
