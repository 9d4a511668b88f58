"""`ddpm-fast edit`."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run, save_model
from drawing import tiny_unet
from items import read_data
from PIL import Image
from torch import Tensor

import ddpm_fast
from ddpm_fast import pretrained
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.files.images import save_grid

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of grey 8x8 images with three classes."""
    model = tiny_unet(classes=3, class_names=["a", "b", "c"])
    with torch.no_grad():
        model.class_embedding.weight.mul_(30)  # so that classes differ by more than a grey level
    return save_model(tmp_path_factory.mktemp("grey"), model, SCHEDULE)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def edit(model: Path | str, command: str, *arguments: object, code: int = 0) -> str:
    """Return the output of `edit` with a model."""
    return run("edit", command, "--model", model, *arguments, code=code)


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
    return to_unit_range(read_batch(read_data("digits", split="test"), numbers).images)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Images match but for the rounding of the network."""
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1


# ------------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("options", "seed", "arguments"),
    [
        (["--seed=7", "--strength=0.4"], 7, {"strength": 0.4}),
        (["--classes=b,2", "--guidance=2"], 0, {"class_labels": [1, 1, 1, 2, 2, 2], "guidance_scale": 2.0}),
    ],
)
def test_variations_stand_beside_their_image(options: list[str], seed: int, arguments: dict[str, Any], folder: Path) -> None:
    output = edit(folder, "vary", "digits:0", "digits:5", "--num=3", "--steps=4", *options)
    assert "variations.png: 2 rows of 4 images." in output
    plan = ddpm_fast.dpm_solver_plan(SCHEDULE, 4, eta=1.0, solver="heun", spacing="karras", lambda_min=-5.1)
    images, seeds = digit(0, 5), ddpm_fast.sample_seeds(seed, 3).repeat(2)
    sampler = ddpm_fast.load_folder(folder).sampler(plan)
    varied = ddpm_fast.vary(sampler, images.repeat_interleave(3, dim=0), seed=seeds, **arguments, **QUIET)
    wanted = torch.cat([images[:, None], varied.reshape(2, 3, 1, SIZE, SIZE)], dim=1)
    assert_close(cells("variations.png", 2, 4), shown(wanted))


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


@pytest.mark.parametrize(
    ("prediction", "told", "options", "label"), [("epsilon", "arrival", ["--classes=c"], 2), ("sample", "start", [], "none")]
)
def test_an_inversion_shows_its_noise_and_prints_the_error(
    prediction: Any, told: Any, options: list[str], label: Any, folder: Path
) -> None:
    model = save_model(Path("model"), ddpm_fast.load_folder(folder).model, SCHEDULE, prediction_type=prediction)
    output = edit(model, "invert", "digits:0", "digits:1", "--steps=6", *options)
    images, common = digit(0, 1), {"prediction": prediction, "clip": None}
    forth = ddpm_fast.load_folder(model).sampler(ddpm_fast.ddim_inversion_plan(SCHEDULE, 6, evaluate_at=told, **common))
    x_T = ddpm_fast.invert(forth, images, class_labels=label, **QUIET)
    back = forth.with_plan(ddpm_fast.ddim_plan(SCHEDULE, 6, **common))
    again = back(2, x_T=x_T, class_labels=label, **QUIET)
    assert_close(cells("inversion.png", 2, 3), shown(torch.stack([images, x_T / 3, again], dim=1)))
    for i in range(2):
        ratio = 10 * torch.log10(4 / (again[i] - images[i]).square().mean())
        assert f"digits:{i}: PSNR {float(ratio):.1f} dB" in output
    assert edit(model, "invert", "digits:0", "--steps=2", "--quiet") == ""


def test_a_box_is_painted_and_the_rest_is_kept(folder: Path) -> None:
    options = ["--steps=4", "--jump-length=2", "--jump-samples=3", "--box=2,1,4,5"]
    output = edit(folder, "inpaint", "digits:0", "digits:1", *options, "--out=new/folder/painted.png")
    assert "2 rows of 3 images." in output
    images, mask = digit(0, 1), torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., 1:6, 2:6] = True
    sampler = ddpm_fast.load_folder(folder).sampler(ddpm_fast.repaint_plan(SCHEDULE, 4, 2, 3))
    result = ddpm_fast.inpaint(sampler, images, mask, **QUIET)
    wanted = torch.stack([images, images.masked_fill(mask, 0), result], dim=1)
    assert_close(cells("new/folder/painted.png", 2, 3), shown(wanted))


def test_a_mask_file_says_what_a_box_says(folder: Path) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[1:6, 2:6] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST).convert("RGB").save("large.png")  # another size
    for out, option in (("a.png", "--box= 2, 1, 4, 5"), ("b.png", "--mask=mask.png"), ("c.png", "--mask=large.png")):
        edit(folder, "inpaint", "digits:0", "--steps=3", "--jump-samples=1", "--quiet", f"--out={out}", option)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert np.array_equal(cells("c.png", 1, 3)[0, 0], cells("a.png", 1, 3)[0, 0])


def test_one_step_of_inpainting_does_not_jump(folder: Path) -> None:
    assert edit(folder, "inpaint", "digits:0", "--box=0,0,4,4", "--steps=1", "--quiet") == ""


def test_one_drawn_image_is_edited_as_it_is(folder: Path) -> None:
    run("sample", "--model", folder, "--num=1", "--classes=b", "--sampler=ddim", "--steps=3", "--out=drawn.png")
    edit(folder, "vary", "drawn.png", "--num=1", "--steps=2", "--strength=0")
    with Image.open("drawn.png") as picture:
        assert np.array_equal(cells("variations.png", 1, 2)[0, 0, :, :, 0], np.asarray(picture))


@pytest.mark.parametrize(
    ("name", "size", "colour", "grey"),
    [("wide.png", (60, 40), (255, 0, 0), 76), ("digits:0", (8, 8), (99, 99, 99), 99)],  # a file comes before a data set
)
def test_files_are_cropped_resized_and_made_grey(
    name: str, size: tuple[int, int], colour: tuple[int, ...], grey: int, folder: Path
) -> None:
    picture = Image.new("RGB", size)
    width, height = size
    picture.paste(colour, ((width - height) // 2, 0, (width + height) // 2, height))  # the central square
    picture.save(name, format="PNG")
    edit(folder, "vary", name, "--num=1", "--steps=2", "--strength=0")
    assert (cells("variations.png", 1, 2) == grey).all()


def test_a_colour_model_takes_files_of_either_kind() -> None:
    colour = save_model(Path("rgb"), tiny_unet(in_channels=3, out_channels=3), SCHEDULE)
    save_grid(digit(0), "grey.png", padding=0)
    Image.new("RGB", (8, 8), (200, 100, 50)).save("rgb.png")
    edit(colour, "vary", "grey.png", "rgb.png", "--num=1", "--steps=2", "--strength=0")
    got = cells("variations.png", 2, 2, channels=3)
    assert np.array_equal(got[0, 0], np.repeat(shown(digit(0)[None])[0, 0], 3, axis=-1))
    assert (got[1] == (200, 100, 50)).all()
    edit(colour, "inpaint", "rgb.png", "--box=0,0,4,4", "--steps=2", "--jump-samples=1")
    assert (cells("inpainted.png", 1, 3, channels=3)[0, 2, 4:] == (200, 100, 50)).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_defaults(command: str) -> None:
    text = " ".join(run("edit", command, "--help").split())
    assert "none for no label. [default: none]" in text
    assert "Write the pictures here" in text


# ----------------------------------------------------------------------------------------------------------------- refusals

COMMON = [
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
]
VALUES = [
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
]
SOURCES = [
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
]
INPAINT = [
    (["--mask=text.png"], "inpaint: expected --mask to be an image, got 'text.png'"),
    (["--mask=dark.png"], "expected --mask to have white pixels, got values up to 1 of 255"),
    ([], "expected either --mask or --box to be given, got neither"),
    (["--mask=text.png", "--box=0,0,1,1"], "expected either --mask or --box to be given, got both"),
    (["--box=0,0,4,4", "--steps=4", "--jump-length=4"], "expected --jump-length to be an integer in 1..3, got 4"),
    *(
        (["--box", box], f"expected --box to be X,Y,W,H within 8x8 pixels, got ({box.replace(',', ', ')})")
        for box in ("0,0,9,8", "0,0,8,9", "8,0,1,1", "-1,0,2,2", "0,0,0,4", "0,0,4", "0,0,4,4,4")
    ),
    *((["--box", box], f"expected whole numbers separated by commas, got {box!r}") for box in ("a,0,1,1", "")),
]
REFUSED: list[tuple[list[str], str]] = [
    *(([command, *COMMANDS[command], option], message) for command in COMMANDS for option, message in COMMON),
    *(([command, *COMMANDS[command], *options.split()], message) for command, options, message in VALUES),
    *(
        ([command, *(source if each == "digits:0" else each for each in COMMANDS[command])], f"{command}: {message}")
        for command in COMMANDS
        for source, message in SOURCES
    ),
    *((["inpaint", "digits:0", *options], message) for options, message in INPAINT),
    (
        ["interpolate", "digits:0", "digits:1", "--classes=a,b"],
        "expected --classes to be one class, as there are no more images, got 'a,b'",
    ),
    (["vary", "digits:0", "digits:1", "--classes=a,b,c"], "expected --classes to be at most 2 classes"),
    (
        ["vary", "digits:0", "--num=200", "--out=new/a.webp"],
        "expected --out to end in .png, as pictures in WEBP have at most 16383 pixels per side",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_arguments_are_refused_before_work(arguments: list[str], message: str, folder: Path) -> None:
    Image.new("L", (8, 8), 1).save("dark.png")
    Image.effect_noise((64, 64), 50).save("damaged.png")
    Path("damaged.png").write_bytes(Path("damaged.png").read_bytes()[:300])
    Path("text.png").write_text("no picture")
    command, *rest = arguments
    error = refused(folder, command, "--out=new/a.png", *rest)
    assert any(part in error for part in message.split("|")), error


PICTURES = "--model to be one that draws grey, RGB or RGBA pictures of one size"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 2, "out_channels": 2}, f"vary: expected {PICTURES}, got sample_size (8, 8) and 2 channels"),
        ({"sample_size": None}, f"vary: expected {PICTURES}, got sample_size None and 1 channels"),
        ({"in_channels": 3, "out_channels": 3}, "expected IMAGE to have 3 channels, as the model, got 'digits:0'"),
    ],
)
def test_other_models_are_refused(config: dict[str, Any], message: str) -> None:
    assert message in refused(save_model(Path("other"), tiny_unet(**config), SCHEDULE), "vary", "digits:0")


@pytest.mark.parametrize(
    "command", ["inpaint digits:0", "invert digits:0 --guidance=2", "vary nothing.png", "vary digits:0 --out=a.txt"]
)
def test_nothing_is_loaded_for_options_that_exclude_each_other(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "load_folder", lambda *_: pytest.fail("the model was loaded"))
    refused(folder, *command.split())


READ = {command: ["in.png" if each == "digits:0" else each for each in COMMANDS[command]] for command in COMMANDS}


@pytest.mark.parametrize("out", ["in.png", "./in.png", "same.png"])
@pytest.mark.parametrize(("command", "arguments"), [*READ.items(), ("inpaint", ["digits:0", "--mask=in.png"])])
def test_the_result_never_replaces_a_file_that_is_read(command: str, arguments: list[str], out: str, folder: Path) -> None:
    Image.new("L", (8, 8), 255).save("in.png")
    os.link("in.png", "same.png")
    before = Path("in.png").read_bytes()
    error = refused(folder, command, *arguments, f"--out={out}")
    assert f"{command}: expected --out to be another file than those that are read, got 'in.png'" in error
    assert Path("in.png").read_bytes() == before
