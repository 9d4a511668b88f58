"""`ddpm-fast edit`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drawing import tiny_unet
from PIL import Image
from torch import Tensor

import ddpm_fast
from ddpm_fast.cli import main
from ddpm_fast.files.images import save_grid
from ddpm_fast.nn import UNet
from ddpm_fast.training.data import load_dataset, published, read_batch, to_unit_range

SCHEDULE = ddpm_fast.NoiseSchedule.linear(1000)
SIZE = 8
SCALE = 96 // SIZE
COMMANDS = {
    "vary": ["digits:0", "--steps=3"],
    "interpolate": ["digits:0", "digits:1", "--steps=3"],
    "invert": ["digits:0", "--steps=3"],
    "inpaint": ["digits:0", "--steps=3", "--jump-samples=2", "--jump-length=1", "--box=0,0,4,8"],
}
QUIET: Any = {"progress": False}


def save_model(path: Path, model: UNet, **extra: Any) -> Path:
    named = UNet(**model.config, **extra)
    named.load_state_dict(model.state_dict())
    named.save_pretrained(path / "unet")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"ddpm_fast": SCHEDULE.to_config()}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of grey 8x8 images with three classes."""
    model = tiny_unet(classes=3)
    with torch.no_grad():
        model.class_embedding.weight.mul_(30)  # so that classes differ by more than a grey level
    return save_model(tmp_path_factory.mktemp("grey"), model, class_names=["a", "b", "c"])


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of RGB 8x8 images without classes."""
    config = tiny_unet().config | {"in_channels": 3, "out_channels": 3}
    return save_model(tmp_path_factory.mktemp("rgb"), UNet(**config))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def edit(model: Path | str, *arguments: object, code: int = 0) -> str:
    """Return the output of `edit` with a model."""
    command, *rest = (str(argument) for argument in arguments)
    result = CliRunner().invoke(main, ["edit", command, "--model", str(model), *rest])
    assert result.exit_code == code, result.output
    return result.output


def refused(model: Path | str, *arguments: object) -> str:
    """Return the error of a command that must end with status 2 and leave the folder as it is."""
    before = sorted(path.name for path in Path().rglob("*"))
    output = edit(model, *arguments, code=2)
    assert sorted(path.name for path in Path().rglob("*")) == before
    lines = output.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert all(line.startswith(("Usage: ", "Try ")) or not line for line in lines[:-1]), output
    return lines[-1]


def cells(path: str, rows: int, columns: int, channels: int = 1) -> np.ndarray:
    """Return the images of a picture, uint8 [rows, columns, H, W, C]."""
    step = SIZE * SCALE + 2
    with Image.open(path) as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        assert image.size == (columns * step + 2, rows * step + 2)
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
    grid = [
        [pixels[y * step + 2 : (y + 1) * step : SCALE, x * step + 2 : (x + 1) * step : SCALE] for x in range(columns)]
        for y in range(rows)
    ]
    return np.array(grid)


def shown(rows: Tensor) -> np.ndarray:
    """Return [rows, columns, C, H, W] in [-1, 1] as `cells` does."""
    return ddpm_fast.to_uint8(rows).movedim(2, -1).numpy()


def digit(*numbers: int) -> Tensor:
    return to_unit_range(read_batch(load_dataset("digits", split="test"), numbers).images)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Images match but for the rounding of the network."""
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1


# ------------------------------------------------------------------------------------------------------------------ results


def test_variations_stand_beside_their_image(folder: Path) -> None:
    output = edit(folder, "vary", "digits:0", "digits:5", "--num=3", "--steps=4", "--strength=0.5", "--seed=7")
    assert "variations.png: 2 rows of 4 images." in output
    got = cells("variations.png", 2, 4)
    loaded = ddpm_fast.load_folder(folder)
    plan = ddpm_fast.dpm_solver_plan(SCHEDULE, 4, eta=1.0, solver="heun", spacing="karras", lambda_min=-5.1)
    images = digit(0, 5)
    seeds = ddpm_fast.sample_seeds(7, 3).repeat(2)
    varied = ddpm_fast.vary(loaded.sampler(plan), images.repeat_interleave(3, dim=0), 0.5, seed=seeds, **QUIET)
    assert_close(got, shown(torch.cat([images[:, None], varied.reshape(2, 3, 1, SIZE, SIZE)], dim=1)))


def test_strength_0_keeps_the_image_and_more_changes_more(folder: Path) -> None:
    distances = []
    for strength in (0, 0.3, 1):
        edit(folder, "vary", "digits:0", "--num=2", "--steps=10", f"--strength={strength}", "--quiet")
        image, *varied = cells("variations.png", 1, 3)[0].astype(float)
        distances.append(np.square(varied - image).mean())
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert len(set(distances)) == 3


def test_classes_go_to_images_in_turn(folder: Path) -> None:
    edit(folder, "vary", "digits:0", "digits:0", "--num=1", "--steps=3", "--classes=b,2", "--guidance=2")
    got = cells("variations.png", 2, 2)
    plan = ddpm_fast.dpm_solver_plan(SCHEDULE, 3, eta=1.0, solver="heun", spacing="karras", lambda_min=-5.1)
    loaded = ddpm_fast.load_folder(folder)
    seeds = ddpm_fast.sample_seeds(0, 1).repeat(2)
    labels: Any = {"class_labels": [1, 2], "guidance_scale": 2.0}
    varied = ddpm_fast.vary(loaded.sampler(plan), digit(0, 0), 0.5, seed=seeds, **labels, **QUIET)
    assert_close(got[:, 1], shown(varied[:, None])[:, 0])
    assert not np.array_equal(got[0, 1], got[1, 1])


SAMPLERS = {
    "dpm++2m-sde": lambda: ddpm_fast.dpm_solver_plan(SCHEDULE, 5, eta=1.0, solver="heun", spacing="karras", lambda_min=-5.1),
    "dpm++2m": lambda: ddpm_fast.dpm_solver_plan(SCHEDULE, 5, lambda_min=-5.1),
    "dpm++2m --spacing=karras --sigma-min=0.06 --sigma-max=80": lambda: ddpm_fast.dpm_solver_plan(
        SCHEDULE, 5, solver="heun", spacing="karras", sigma_min=0.06, sigma_max=80.0, lambda_min=-5.1
    ),
    "dpm++2m --order=3": lambda: ddpm_fast.dpm_solver_plan(SCHEDULE, 5, order=3, lambda_min=-5.1),
    "ddpm": lambda: ddpm_fast.ddpm_plan(SCHEDULE, 5),
    "ddim": lambda: ddpm_fast.ddim_plan(SCHEDULE, 5),
    "heun": lambda: ddpm_fast.heun_plan(SCHEDULE, 5, lambda_min=-5.1),
    "dpm++2m-sde --eta=0.5 --spacing=linspace": lambda: ddpm_fast.dpm_solver_plan(
        SCHEDULE, 5, eta=0.5, solver="heun", spacing="linspace", lambda_min=-5.1
    ),
    "ddim --eta=1 --spacing=trailing": lambda: ddpm_fast.ddim_plan(SCHEDULE, 5, eta=1.0, spacing="trailing"),
    "ddpm --variance=fixed_large": lambda: ddpm_fast.ddpm_plan(SCHEDULE, 5, variance="fixed_large"),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interpolation_runs_with_each_sampler(folder: Path, sampler: str) -> None:
    options = ["--num=3", "--steps=5", "--strength=0.6", "--seed=2", "--sampler", *sampler.split()]
    assert "1 row of 5 images." in edit(folder, "interpolate", "digits:0", "digits:1", *options)
    a, b = digit(0), digit(1)
    draw = ddpm_fast.load_folder(folder).sampler(SAMPLERS[sampler]())
    between = ddpm_fast.interpolate(draw, a, b, 3, strength=0.6, seed=2, **QUIET)
    assert_close(cells("interpolation.png", 1, 5), shown(torch.cat([a[None], between, b[None]], dim=1)))


def test_an_inversion_shows_its_noise_and_prints_the_error(folder: Path) -> None:
    output = edit(folder, "invert", "digits:0", "digits:1", "--steps=6", "--classes=c")
    loaded, images = ddpm_fast.load_folder(folder), digit(0, 1)
    labels: Any = {"class_labels": 2}
    forth, back = (
        ddpm_fast.ddim_inversion_plan(SCHEDULE, 6, evaluate_at="arrival", clip=None),
        ddpm_fast.ddim_plan(SCHEDULE, 6, clip=None),
    )
    x_T = ddpm_fast.invert(loaded.sampler(forth), images, **labels, **QUIET)
    again = ddpm_fast.sample(loaded.model, back, 2, x_T=x_T, **labels, **QUIET)
    assert_close(cells("inversion.png", 2, 3), shown(torch.stack([images, x_T / 3, again], dim=1)))
    for i in range(2):
        ratio = 10 * torch.log10(4 / (again[i] - images[i]).square().mean())
        assert f"digits:{i}: PSNR {float(ratio):.1f} dB" in output
    assert edit(folder, "invert", "digits:0", "--steps=2", "--quiet") == ""


def test_a_model_that_predicts_x_0_is_inverted_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = {"prediction_type": "sample", "ddpm_fast": SCHEDULE.to_config()}
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert "PSNR" in edit("model", "invert", "digits:0", "--steps=4")
    image, _, again = cells("inversion.png", 1, 3)[0]
    model: Any = ddpm_fast.load_folder("model").model
    plans: Any = {"prediction": "sample", "clip": None}
    x_T = ddpm_fast.invert(ddpm_fast.Sampler(model, ddpm_fast.ddim_inversion_plan(SCHEDULE, 4, **plans)), digit(0), **QUIET)
    back = ddpm_fast.ddim_plan(SCHEDULE, 4, **plans)
    wanted = ddpm_fast.sample(model, back, 1, x_T=x_T, class_labels="none", **QUIET)
    assert np.array_equal(image, shown(digit(0)[None])[0, 0])
    assert_close(again, shown(wanted[None])[0, 0])


def test_a_box_is_painted_and_the_rest_is_kept(folder: Path) -> None:
    options = ["--steps=4", "--jump-length=2", "--jump-samples=3", "--box=2,1,4,5"]
    output = edit(folder, "inpaint", "digits:0", "digits:1", *options, "--out=new/folder/painted.png")
    assert "2 rows of 3 images." in output
    image, kept, result = cells("new/folder/painted.png", 2, 3).transpose(1, 0, 2, 3, 4)
    painted = np.zeros((SIZE, SIZE), bool)
    painted[1:6, 2:6] = True
    assert np.array_equal(image, shown(digit(0, 1)[:, None])[:, 0])
    assert (kept[:, painted] == 128).all()
    assert np.array_equal(kept[:, ~painted], image[:, ~painted])
    assert np.array_equal(result[:, ~painted], image[:, ~painted])
    assert not np.array_equal(result[:, painted], image[:, painted])
    mask = torch.from_numpy(painted)[None, None]
    plan = ddpm_fast.repaint_plan(SCHEDULE, 4, 2, 3)
    wanted = ddpm_fast.inpaint(ddpm_fast.load_folder(folder).sampler(plan), digit(0, 1), mask, **QUIET)
    assert_close(result, shown(wanted[:, None])[:, 0])


def test_a_mask_file_says_what_a_box_says(folder: Path) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[1:6, 2:6] = 255
    Image.fromarray(mask).save("mask.png")
    common = ["digits:0", "--steps=3", "--jump-samples=1", "--quiet"]
    edit(folder, "inpaint", *common, "--mask=mask.png", "--out=a.png")
    edit(folder, "inpaint", *common, "--box= 2, 1, 4, 5", "--out=b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST).convert("RGB").save("large.png")  # another size
    edit(folder, "inpaint", *common, "--mask=large.png", "--out=c.png")
    assert np.array_equal(cells("c.png", 1, 3)[0, 0], cells("a.png", 1, 3)[0, 0])


def test_one_drawn_image_is_edited_as_it_is(folder: Path) -> None:
    draw = ["sample", "--model", str(folder), "--num=1", "--classes=b", "--sampler=ddim", "--steps=3", "--out=drawn.png"]
    assert CliRunner().invoke(main, draw).exit_code == 0
    loaded = ddpm_fast.load_folder(folder)
    plan = ddpm_fast.ddim_plan(SCHEDULE, 3)
    drawn = ddpm_fast.to_uint8(ddpm_fast.sample(loaded.model, plan, 1, class_labels=1, **QUIET))
    with Image.open("drawn.png") as picture:
        assert (np.asarray(picture) == drawn[0, 0].numpy()).all()
    edit(folder, "vary", "drawn.png", "--num=1", "--steps=2", "--strength=0")
    assert np.array_equal(cells("variations.png", 1, 2)[0, 0], drawn[0].permute(1, 2, 0).numpy())


def test_files_are_cropped_resized_and_made_grey(folder: Path) -> None:
    flat = np.zeros((40, 60, 3), np.uint8)
    flat[:, 10:50] = (255, 0, 0)  # the central square
    Image.fromarray(flat).save("wide.png")
    edit(folder, "vary", "wide.png", "--num=1", "--steps=2", "--strength=0")
    assert (cells("variations.png", 1, 2) == 76).all()  # the grey of red


def test_a_colour_model_takes_files_of_either_kind(colour: Path) -> None:
    save_grid(digit(0), "grey.png", padding=0)
    Image.new("RGB", (8, 8), (200, 100, 50)).save("rgb.png")
    edit(colour, "vary", "grey.png", "rgb.png", "--num=1", "--steps=2", "--strength=0")
    got = cells("variations.png", 2, 2, channels=3)
    assert np.array_equal(got[0, 0], np.repeat(shown(digit(0)[None])[0, 0], 3, axis=-1))
    assert (got[1] == (200, 100, 50)).all()
    edit(colour, "inpaint", "rgb.png", "--box=0,0,4,4", "--steps=2", "--jump-samples=1")
    assert (cells("inpainted.png", 1, 3, channels=3)[0, 2, 4:] == (200, 100, 50)).all()


def test_a_file_comes_before_a_data_set_of_the_same_name(folder: Path) -> None:
    Image.new("L", (8, 8), 99).save("file.png")
    Path("file.png").rename("digits:0")
    edit(folder, "vary", "digits:0", "--num=1", "--steps=2", "--strength=0")
    assert (cells("variations.png", 1, 2) == 99).all()


def test_fashion_mnist_is_padded_to_32_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of Debian's package have few images here."""
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    debian = Path("debian").resolve()
    debian.mkdir()
    (debian / "t10k-images-idx3-ubyte").write_bytes(np.array([0x803, 5, 28, 28], ">u4").tobytes() + images.tobytes())
    (debian / "t10k-labels-idx1-ubyte").write_bytes(np.array([0x801, 5], ">u4").tobytes() + bytes([3, 0, 9, 1, 1]))
    monkeypatch.setattr(published, "FASHION_MNIST_DEBIAN", debian)
    result = CliRunner().invoke(main, ["edit", "vary", "fashion-mnist:3", "--num=1", "--strength=0", "--quiet"])
    assert result.exit_code == 0, result.output
    with Image.open("variations.png") as image:
        assert image.size == (2 * 98 + 2, 100)
        pixels = np.asarray(image)[2:98:3, 2:98:3]
    assert np.array_equal(pixels, np.pad(images[3], 2))


def test_images_that_are_not_finite_are_drawn_grey(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddpm_fast, "vary", lambda sampler, images, *_, **__: images * float("nan"))
    output = edit(folder, "vary", "digits:0", "--num=2", "--steps=2", code=1)
    assert output.strip() == "Error: 2 of 3 images are not finite and drawn grey, from number 1 (of 0..2)"
    got = cells("variations.png", 1, 3)[0]
    assert (got[1:] == 128).all()
    assert np.array_equal(got[0], shown(digit(0)[None])[0, 0])


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_fast.files import images

    def fails(path: Path) -> object:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(images, "replacing", fails)
    assert refused(folder, "vary", "digits:0", "--num=1", "--steps=2", "--quiet").endswith("device: 'variations.png'")


# ----------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--out=picture", "expected --out to end in .png"),
        ("--out=mask.ico", "expected --out to end in .png"),
        ("--steps=0", "'--steps': 0 is not in the range x>=1|expected --steps to be a positive integer or None, got 0"),
        (
            "--steps=1001",
            "expected --steps to be in 1..1000 with dpm++2m-sde, got 1001|expected --steps to be an integer in 1..1000",
        ),
        ("--batch-size=0", "'--batch-size': 0 is not in the range"),
        (
            "--guidance=2",
            "expected --guidance to be None or 1, as there are no class_labels|expected --guidance to be 1, as inversion",
        ),
        (
            "--guidance=nan",
            "expected --guidance to be at least -10000.0 and at most 10000.0 or None, got nan|"
            "expected --guidance to be 1, as inversion",
        ),
        ("--classes=d", "expected --classes to be"),
        ("--classes=3", "expected --classes to be in 0..2, got 3"),
        ("--device=nothing", "expected --device to be"),
        ("--dtype=int8", "'--dtype'"),
        (f"--seed={1 << 70}", "expected --seed to be an integer in"),
        ("--model=nothing", "expected --model to be a folder that holds a model, got 'nothing'"),
    ],
)
def test_a_bad_value_of_a_common_option_is_refused(folder: Path, command: str, option: str, message: str) -> None:
    error = refused(folder, command, *COMMANDS[command], "--out=new/a.png", option)
    assert any(part in error for part in message.split("|")), error


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        *(
            (command, option, message)
            for command, (option, message) in itertools.product(
                ("vary", "interpolate"),
                [
                    ("--strength=1.5", "expected --strength to be at least 0 and at most 1, got 1.5"),
                    ("--strength=nan", "expected --strength to be at least 0 and at most 1, got nan"),
                    ("--sampler=euler", "'--sampler'"),
                    ("--eta=-1", "expected --eta to be at least 0"),
                    ("--eta=1.5", "expected --eta to be"),
                    ("--sampler=heun --eta=1", "expected --eta to go with sampler dpm++2m-sde or ddim, got 1.0 with heun"),
                    ("--sampler=ddim --spacing=karras", "expected --spacing to be leading, trailing or linspace with ddim"),
                    (
                        "--sampler=ddim --sigma-min=0.1",
                        "expected --sigma-min to go with sampler dpm++2m or dpm++2m-sde or heun, got 0.1 with ddim",
                    ),
                    ("--sampler=ddim --order=3", "expected --order to go with sampler dpm++2m or dpm++2m-sde, got 3 with ddim"),
                    ("--order=4", "expected --order to be an integer in 1..3 or None, got 4"),
                    ("--sigma-min=2 --sigma-max=1", "expected --sigma-max to be above the last level, 2, got 1.0"),
                    ("--variance=fixed_small", "expected --variance to go with sampler ddpm, got fixed_small with dpm++2m-sde"),
                    ("--sampler=ddpm --variance=learned", "expected --variance to be fixed_small or fixed_large"),
                    ("--num=0", "'--num'"),
                ],
            )
        ),
        ("interpolate", "--num=1", "'--num'"),
        ("interpolate", "--num=65537", "'--num'"),
        ("interpolate", "digits:2", "unexpected extra argument (digits:2)"),
        ("invert", "--strength=1", "No such option '--strength'"),
        ("inpaint", "--jump-length=1001", "expected --jump-length to be an integer in 1..2, got 1001"),
        ("inpaint", "--jump-samples=1001", "expected --jump-samples to be an integer in 1..1000, got 1001"),
        ("inpaint", "--jump-samples=0", "'--jump-samples'"),
        ("inpaint", "--mask=nothing.png", "'--mask': File 'nothing.png' does not exist"),
    ],
)
def test_a_bad_value_is_refused(folder: Path, command: str, option: str, message: str) -> None:
    assert message in refused(folder, command, *COMMANDS[command], "--out=new/a.png", *option.split())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.png", "expected IMAGE to be a file or one of digits:NUMBER, fashion-mnist:NUMBER, cifar10:NUMBER, got"),
        ("mnist:3", "expected IMAGE to be a file or one of"),
        (".", "expected IMAGE to be a file or one of"),
        ("digits", "expected IMAGE to be a file or one of"),
        ("digits:", "expected IMAGE to be a file or one of"),
        ("digits:297", "expected IMAGE to be digits:0 to digits:296, got 'digits:297'"),
        ("digits:-1", "expected IMAGE to be a file or one of"),
        ("digits:1.0", "expected IMAGE to be a file or one of"),
        ("digits:" + "9" * 5000, "expected IMAGE to be a file or one of"),
        ("damaged.png", "expected IMAGE to be an image, got 'damaged.png'"),
        ("text.png", "expected IMAGE to be an image, got 'text.png'"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_image_is_refused(folder: Path, command: str, source: str, message: str) -> None:
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("damaged.png").write_bytes(Path("whole.png").read_bytes()[:300])
    Path("text.png").write_text("no picture")
    arguments = [source if argument == "digits:0" else argument for argument in COMMANDS[command]]
    assert f"{command}: {message}" in refused(folder, command, *arguments, "--out=new/a.png")


def test_a_bad_mask_is_refused(folder: Path) -> None:
    Path("text.png").write_text("no picture")
    common = ["inpaint", "digits:0", "--out=new/a.png"]
    assert "inpaint: expected --mask to be an image, got 'text.png'" in refused(folder, *common, "--mask=text.png")
    assert "expected either --mask or --box to be given, got neither" in refused(folder, *common)
    assert "expected either --mask or --box to be given, got both" in refused(
        folder, *common, "--mask=text.png", "--box=0,0,1,1"
    )


@pytest.mark.parametrize("box", ["0,0,9,8", "0,0,8,9", "8,0,1,1", "-1,0,2,2", "0,0,0,4", "0,0,4", "0,0,4,4,4", "a,0,1,1", ""])
def test_a_box_outside_is_refused(folder: Path, box: str) -> None:
    error = refused(folder, "inpaint", "digits:0", "--box", box)
    assert f"expected --box to be X,Y,W,H within 8x8 pixels, got {box!r}" in error


def test_nothing_is_loaded_for_options_that_exclude_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_fast import pretrained

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pretrained, "load_folder", load)
    refused(folder, "inpaint", "digits:0")
    refused(folder, "invert", "digits:0", "--guidance=2")
    refused(folder, "vary", "nothing.png")
    refused(folder, "vary", "digits:0", "--out=a.txt")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_result_never_replaces_an_image_that_is_read(folder: Path, command: str) -> None:
    Image.new("L", (8, 8), 99).save("in.png")
    os.link("in.png", "same.png")
    before = Path("in.png").read_bytes()
    arguments = ["in.png" if argument == "digits:0" else argument for argument in COMMANDS[command]]
    for out in ("in.png", "./in.png", "same.png"):
        error = refused(folder, command, *arguments, f"--out={out}")
        assert f"{command}: expected --out to be another file than those that are read, got 'in.png'" in error
    assert Path("in.png").read_bytes() == before


def test_the_result_never_replaces_the_mask(folder: Path) -> None:
    Image.new("L", (8, 8), 255).save("mask.png")
    error = refused(folder, "inpaint", "digits:0", "--mask=mask.png", "--out=mask.png")
    assert "expected --out to be another file than those that are read, got 'mask.png'" in error


def test_a_grey_test_image_does_not_suit_a_colour_model(colour: Path) -> None:
    assert "expected IMAGE to have 3 channels, as the model, got 'digits:0'" in refused(colour, "vary", "digits:0")


@pytest.mark.parametrize(
    ("config", "got"), [({"in_channels": 2, "out_channels": 2}, "2 channels"), ({"sample_size": None}, "sample_size None")]
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, Any], got: str) -> None:
    model = save_model(tmp_path / "other", UNet(**(tiny_unet().config | config)))
    error = refused(model, "vary", "digits:0")
    assert "vary: expected --model to be one that draws grey, RGB or RGBA pictures of one size" in error
    assert got in error


def test_more_pixels_than_the_format_allows_are_refused(folder: Path) -> None:
    error = refused(folder, "vary", "digits:0", "--num=200", "--out=new/a.webp")
    assert "expected --out to end in .png, as pictures in WEBP have at most 16383 pixels a side" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_defaults(command: str) -> None:
    result = CliRunner().invoke(main, ["edit", command, "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "none for no label. [default: none]" in text
    assert "Write the pictures here" in text


def test_both_images_of_an_interpolation_share_one_class(folder: Path) -> None:
    error = refused(folder, "interpolate", "digits:0", "digits:1", "--classes=a,b")
    assert "expected --classes to be one class, as there are no more images, got 'a,b'" in error
    assert "expected --classes to be at most 2 classes" in refused(folder, "vary", "digits:0", "digits:1", "--classes=a,b,c")


def test_a_mask_without_white_is_refused(folder: Path) -> None:
    Image.new("L", (8, 8), 1).save("mask.png")
    error = refused(folder, "inpaint", "digits:0", "--mask=mask.png")
    assert "expected --mask to have white pixels, got values up to 1 of 255" in error


def test_one_step_of_inpainting_does_not_jump(folder: Path) -> None:
    edit(folder, "inpaint", "digits:0", "--box=0,0,4,4", "--steps=1", "--quiet")
    error = refused(folder, "inpaint", "digits:0", "--box=0,0,4,4", "--steps=4", "--jump-length=4")
    assert "expected --jump-length to be an integer in 1..3, got 4" in error


@pytest.mark.parametrize("command", [["sample", "--model="], ["export", ".", ""], ["edit", "vary", "digits:0", "--model="]])
def test_an_empty_path_is_not_the_current_folder(command: list[str]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "expected a path, got an empty text" in result.output


@pytest.mark.slow
def test_a_picture_is_named_if_the_output_is_closed(folder: Path) -> None:
    arguments = ["edit", "invert", "--model", str(folder), "digits:0", "--steps=2", "--out=a.png"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "ddpm_fast", *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: standard output: ")
    assert done.stderr.rstrip().endswith("Written: a.png.")
