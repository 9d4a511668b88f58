"""The command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from commands import run, save_model
from drawing import SCHEDULE, tiny_unet
from items import write
from launching import run_ranks
from PIL import Image
from refusals import by

import ddpm_fast
from ddpm_fast.cli.console import Command
from ddpm_fast.cli.train import NETWORKS, train_command
from ddpm_fast.distributed.processes import FirstFailed, ProcessLost
from ddpm_fast.errors import InvalidValue
from ddpm_fast.files import images
from ddpm_fast.files.writing import PREFIX
from ddpm_fast.options import options_of
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.training import loop
from ddpm_fast.training.loop import TrainResult
from ddpm_fast.training.options import STRUCTS, DataOptions, ModelOptions, TrainOptions

TINY = [
    "--channels=16,32",
    "--layers=1",
    "--attention=none",
    "--batch-size=4",
    "--threads=1",
    "--sample-every=0",
    "--no-tensorboard",
]


def content(folder: Path) -> dict[Path, bytes | None]:
    """Return the paths in a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of 8x8 images in one of three classes, 20 timesteps, as a folder."""
    model = tiny_unet(classes=3, class_names=["zero", "one", "ankle boot"])
    return save_model(tmp_path_factory.mktemp("model"), model, SCHEDULE, variance_type="fixed_large")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of one step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run("train", folder, *TINY, "--steps", 1)
    return folder


def test_help_lists_the_commands() -> None:
    assert ddpm_fast.__version__ in run("--version")
    commands = run("--help").partition("Commands:")[2]
    assert re.findall(r"^  (\w+) ", commands, re.MULTILINE) == [
        "edit",
        "evaluate",
        "export",
        "fit",
        "info",
        "push",
        "sample",
        "train",
    ]
    assert "..." not in commands + run("evaluate", "--help").partition("Commands:")[2]  # no description is cut


# ------------------------------------------------------------------------------------------------------------ wait policy

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Print the variables when torch is first looked for, and end there, because loading it takes seconds.
ON_IMPORT = f"""
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(*(f"{{v}}={{os.environ[v]}}" for v in {WAIT_VARIABLES} if v in os.environ), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
"""
COMMAND = "from ddpm_fast.cli import main; main(['info'])"
MODULE = "import runpy; sys.argv = ['ddpm-fast', 'info']; runpy.run_module('ddpm_fast', run_name='__main__')"
LIBRARY = "import ddpm_fast, ddpm_fast.cli, ddpm_fast.__main__; ddpm_fast.load_builtin()"


@pytest.mark.parametrize(
    ("source", "given", "found"),
    [
        (COMMAND, {}, "OMP_WAIT_POLICY=passive"),
        (MODULE, {}, "OMP_WAIT_POLICY=passive"),
        (LIBRARY, {}, ""),
        (COMMAND, {"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"),
        (COMMAND, {"GOMP_SPINCOUNT": "1000"}, "GOMP_SPINCOUNT=1000"),
        (COMMAND, {"KMP_BLOCKTIME": "1000"}, "KMP_BLOCKTIME=1000"),
    ],
)
def test_idle_threads_of_a_command_sleep_unless_the_user_says_otherwise(source: str, given: dict[str, str], found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES} | given
    command = [sys.executable, "-W", "ignore", "-c", ON_IMPORT + source]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{found}\n"


def test_a_program_that_has_loaded_torch_keeps_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    run("info")
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------------------- train and export


def test_every_option_of_train_is_on_the_command_line() -> None:
    declared = [each.name for struct in STRUCTS for each in options_of(struct)]
    assert [parameter.name for parameter in train_command.params] == ["run_dir", "network", *declared]


@pytest.mark.parametrize(
    ("arguments", "device", "name"),
    [
        *((["--network", name], device, name) for name in NETWORKS for device in ("cpu", "cuda")),
        *(([], "cpu", "small"), ([], "cuda", "base"), (["--init", "a/model"], "cpu", "base")),
    ],
)
def test_a_network_sets_options_that_others_override(
    arguments: list[str],
    device: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    seen: list[Any] = []
    monkeypatch.setattr("ddpm_fast.training.trainer.train_in", lambda *a: (seen.append(a), TrainResult(9, 0.0, 0.0, None))[1])
    monkeypatch.setattr("ddpm_fast.checks.computing_device", lambda *_: torch.device(device))
    run("train", tmp_path / "run", *arguments, "--steps", 9, "--lr", TrainOptions().lr)
    (_, options, data, model, _), (about, values) = seen[0], NETWORKS[name]
    made, defaults = (
        vars(a) | vars(b) | vars(c) for a, b, c in ((options, data, model), (TrainOptions(), DataOptions(), ModelOptions()))
    )
    given = {"steps": 9, "lr": TrainOptions().lr} | ({"init": "a/model"} if "--init" in arguments else {})
    assert made == defaults | values | given  # a value that is given stays, also if it is the default
    assert caplog.messages[0] == f"--network {name}: {about}"


def test_a_command_with_a_network_can_be_repeated(tmp_path: Path) -> None:
    """Torchrun repeats it after a failure."""
    command = ["train", tmp_path / "run", *TINY, "--network", "cifar10", "--dropout", 0.0, "--steps", 1, "--auto-resume"]
    run(*command)
    run(*command)
    before = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    resumed = [*command[:2], "--resume", "--network"]
    run(*resumed, "cifar10", "--channels=16,32", "--layers=1", "--attention=none", "--batch-size=4", "--dropout=0")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"] == before  # steps and records stay
    for other, wanted in (("small", "expected --"), ("base", "expected --channels to be [16, 32], as ")):
        assert wanted in run(*resumed, other, code=2)


def test_train_then_resume_then_export(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", folder, *TINY, "--steps", 2, "--lr", 0.01)
    assert "train: expected" in run("train", folder, *TINY, code=2)
    assert "expected --lr to be 0.01, as " in run("train", folder, "--resume", "--lr", 0.02, code=2)
    # Its micro-batches are larger, but that is no option that was given.
    assert "expected --batch-size to be 4, as " in run("train", folder, "--resume", "--batch-size", 2, code=2)
    run("train", folder, "--resume", "--steps", 3)
    stored = json.loads((folder / "config.json").read_text())["options"]
    assert (stored["lr"], stored["channels"], stored["attention"], stored["steps"]) == (0.01, [16, 32], [], 3)
    run("train", folder, "--resume")  # nothing left to do
    drawn = run("sample", "--model", folder, "--num", 1, "--steps", 1, "--out", tmp_path / "a.png")
    assert f": 1 image of class 0 in 1 step (dpm++2m-sde), from step 3 of {folder}, " in drawn
    assert str(tmp_path / "out") in run("export", folder, tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("--channels 64;128", "expected whole numbers separated by commas, got"),
        ("--data mnist", "expected --data to be one of digits"),
        ("--threads 0", "expected --threads to be a positive integer or None"),
        ("--threads 100000", "expected --threads to be an integer in 1.."),
        ("--device xyz", "expected --device to be a torch.device or its name"),
        ("--device cuda:99", "expected --device to be available, got cuda:99: PyTorch sees"),
        ("--resume", "expected a run to resume"),
        ("--num-timesteps 99999999999", "expected --num-timesteps to be an integer in 1..100000, got 99999999999"),
        ("--batch-size 99999999999", "expected --batch-size to be an integer in 1..1048576, got 99999999999"),
        ("--lr inf", "expected --lr to be positive and finite, got inf"),
        ("--image-size 1000000", "expected --image-size to be an integer in 1..65536, got 1000000"),
        *(
            (f"--image-size {value}", "expected a width and height such as 64 or 48x32, got")
            for value in ("x", "12x", "x8", "12x8x3", "-4", "1.5")
        ),
        (
            "--init org/name",
            "expected --init to be a folder or a model of the Hugging Face hub, got 'org/name', which does not exist",
        ),
    ],
)
def test_train_refuses_before_work(arguments: str, wanted: str, tmp_path: Path) -> None:
    line = run("train", tmp_path / "run", *arguments.split(), code=2).splitlines()[-1]
    assert line.startswith("Error: ")
    assert wanted in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["train run --data .", "evaluate bound --data ."])  # which has an option --labels
def test_names_in_files_are_not_taken_for_options(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dataset.json").write_text('{"labels": 5}')
    Image.new("L", (8, 8)).save("a.png")
    wanted = "expected labels to be a list of pairs [name, label], or null, got 5, in "
    assert wanted in run(*command.split(), code=2).splitlines()[-1]


@pytest.mark.parametrize(
    ("folder", "out", "wanted"),
    [
        ("{trained}", "{trained}", "expected OUT_DIR to be another folder"),
        ("{trained}", "{trained}/checkpoints/step-00000001", "expected OUT_DIR to be apart from the run's checkpoints"),
        ("{trained}", "{trained}/config.json/out", "expected OUT_DIR to be in a folder, got"),
        ("{trained}", "", "expected a path, got an empty text"),
        ("{empty}", "out", "has no config.json"),
    ],
)
def test_export_refuses_before_work(folder: str, out: str, wanted: str, trained: Path, tmp_path: Path) -> None:
    before = content(trained)
    paths = (each.format(trained=trained, empty=tmp_path) for each in (folder, out))
    assert wanted in run("export", *paths, code=2).splitlines()[-1]
    assert content(trained) == before


def test_an_export_that_fails_is_one_line(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = safetensors.SafetensorError("No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", Mock(side_effect=error))
    line = run("export", trained, tmp_path / "out", code=2).splitlines()[-1]
    assert line.startswith(f"Error: export: expected to write a model to {tmp_path / 'out'}, got ")
    assert line.endswith(".safetensors cannot be written: No space left on device; export it again")


# ------------------------------------------------------------------------------------------------------------------ sample


@pytest.mark.parametrize(
    ("options", "plan", "arguments", "said", "steps"),
    [
        (
            "--num 5 --steps 4 --sampler ddim --eta 0.5 --spacing trailing --guidance 2 --seed 9 --batch-size 2 "
            "--classes '1, Ankle boot'",
            ddpm_fast.ddim_plan(SCHEDULE, 4, eta=0.5, spacing="trailing"),
            {"num_samples": 5, "seed": 9, "class_labels": [1, 2, 1, 2, 1], "guidance_scale": 2.0, "batch_size": 2},
            "5 images of 2 classes in turn in 4 steps (ddim), ",
            "12/12",  # in three batches
        ),
        (
            "--num 2 --classes none --dtype float64 --sampler ddpm --variance fixed_small",
            ddpm_fast.ddpm_plan(SCHEDULE),
            {"num_samples": 2, "class_labels": "none", "dtype": torch.float64},
            "2 images of no class in 20 steps (ddpm), ",
            "20/20",
        ),
    ],
)
def test_options_of_sample_do_what_they_say(
    options: str, plan: ddpm_fast.SamplingPlan, arguments: dict[str, Any], said: str, steps: str, small: Path, tmp_path: Path
) -> None:
    out, gif = tmp_path / "a.png", tmp_path / "a.gif"
    output = run("sample", "--model", small, *shlex.split(options), "--out", out, "--gif", gif)
    assert f"{out}, {gif}: {said}" in output
    assert steps in output  # the progress bar
    drawn = ddpm_fast.sample(ddpm_fast.load_folder(small).model, plan, **arguments, progress=False)
    with Image.open(out) as picture, Image.open(gif) as animation:
        assert np.array_equal(np.asarray(picture), images.image_grid(drawn, scale=16)[..., 0])
        assert animation.n_frames == plan.num_steps + 1  # x_T and one after each step


REFUSED = {
    "sample": [
        ("--out a.xbm", r"expected --out to end in \.png.* of mode L, .*got 'a\.xbm': cannot write mode L"),
        ("--out a.h5", r"expected --out to end in \.png"),
        ("--out x.txt", r"to end in \.png, .* for pictures of mode L, in \.npz, or to be a folder \(dir/\), got 'x\.txt'$"),
        ("--gif a.palm", r"expected --gif to end in \.png"),
        ("--out " + "x" * 300 + ".png", "expected --out to be a path that can be written, got: .*File name too long"),
        ("--out file/a.png", "expected --out to be in a folder, got 'file/a.png', and '.*file' is a file"),
        ("--out /dev/null/a.png", "/dev/null"),
        ("--out /proc/a.png", "/proc"),
        ("--gif file/a.gif", "expected --gif to be in a folder, got 'file/a.gif'"),
        ("--out dir/ --gif a.gif", "expected --gif to go with --out as one picture, got 'a.gif' and 'dir/'"),
        ("--out file/", "expected --out to be in a folder, got 'file', and '.*file' is a file"),
        ("--out a.npz --classes 7", r"expected --classes to be in 0\.\.2, got 7"),
        ("--gif folder.png", r"'--gif': File 'folder\.png' is a directory"),
        ("--out a.png --gif b/../a.png", "expected --gif to be another file than --out"),
        ("--out a.png --gif A.PNG", "expected --gif to be another file than --out"),
        ("--out there.png --gif link.png", "expected --gif to be another file than --out"),
        ("--out there.png --gif hard.png", "expected --gif to be another file than --out"),
        ("--guidance 1e300", r"expected --guidance to be .*, got 1e\+300"),
        ("--guidance nan", "expected --guidance to be at least -10000.0 and at most 10000.0 or None, got nan"),
        ("--guidance 2 --classes none", "expected --guidance to be None or 1, as there are no class_labels, got 2.0"),
        ("--sampler ddim --eta inf", "expected --eta to be at least 0 and finite or None, got inf"),
        ("--sampler ddim --eta 1e9", "expected --eta to be at most"),
        ("--sampler ddpm --eta 1", r"expected --eta to go with sampler dpm\+\+2m-sde or ddim, got 1.0 with ddpm"),
        ("--eta 1.5", r"expected --eta to be at least 0 and at most 1, got 1\.5"),
        ("--steps 5000", r"expected --steps to be in 1\.\.20 with dpm\+\+2m-sde, got 5000"),
        ("--steps 21 --sampler ddpm", r"expected --steps to be in 1\.\.20 with ddpm, got 21"),
        (
            "--sampler ddpm --variance learned",
            "expected --variance to be fixed_small or fixed_large for this model, got learned",
        ),
        ("--variance learned", r"expected --variance to go with sampler ddpm, got learned with dpm\+\+2m-sde"),
        ("--sampler ddim --variance fixed_small", "expected --variance to go with sampler ddpm, got fixed_small with ddim"),
        ("--sampler ddim --order 3", r"expected --order to go with sampler dpm\+\+2m or dpm\+\+2m-sde, got 3 with ddim"),
        ("--order 4", r"expected --order to be an integer in 1\.\.3 or None, got 4"),
        ("--spacing karras --sampler ddim", "expected --spacing to be leading, trailing or linspace with ddim"),
        (
            "--sampler ddim --sigma-min 0",
            r"expected --sigma-min to go with sampler dpm\+\+2m or dpm\+\+2m-sde or heun, got 0\.0 with ddim",
        ),
        ("--sampler dpm++2m --sigma-max 1", """expected --sigma-max to go with spacing="karras", got 1.0 with 'linspace'"""),
        ("--sigma-max 99", r"expected --sigma-max to be in 0\.0708881\.\.5\.44346, the levels of the timesteps, got 99\.0"),
        ("--sigma-min 0.3 --sigma-max 0.2", r"expected --sigma-max to be above the last level, 0\.3, got 0\.2"),
        ("--sigma-min nan", "expected --sigma-min to be at least 0 and finite or None, got nan"),
        ("--classes hat", "expected --classes to be integers or names among zero, one, ankle boot, got 'hat'"),
        ("--classes 3", r"expected --classes to be in 0\.\.2, got 3"),
        ("--seed " + "9" * 30, "expected --seed to be an integer in"),
        ("--device meta", "expected --device to be one that computes, got meta"),
        ("--device cuda:99", "expected --device to be available, got cuda:99"),
        ("--device nowhere", "'nowhere'"),
        ("--num 0", "--num"),
        ("--num 100000000000", r"'--num' / '--num-samples': 100000000000 is not in the range 1<=x<=4294967296"),
        ("--num 20000 --out a.webp", r"expected --out to end in \.png, as pictures in WEBP have at most 16383 pixels"),
        ("--num 3000 --out a.png --gif a.jpg", r"expected --gif to end in \.png, as pictures in JPEG"),
        ("--model org/name", "expected --model to be a folder .*, got 'org/name', .*; from the hub: not in its cache"),
        ("--model name", "expected --model to be a folder that holds a model, got 'name', which does not exist$"),
        ("--model ./trianed", r"expected --model .* got 'trianed', which does not exist; did you mean 'trained'\?$"),
        # folder.png holds no model
        ("--model ./flolder.png", r"expected --model .* got 'flolder\.png', which does not exist$"),
        ("--model=", "expected a path, got an empty text"),
    ],
    "evaluate psnr": [("", "expected --model to restore images: evaluate bound is for any other, got one without a condition")],
    "evaluate bound --data digits": [
        ("--json /dev/null", "expected --json to be a file, got '/dev/null'"),
        ("--num 1000000000000", "expected --num to be at most 297, the test images of digits"),
        ("--data nothing", "expected --data to be one of"),
        ("--json file/a.json", "expected --json to be in a folder, got 'file/a.json', and '.*file' is a file"),
        ("", r"expected --labels to be in 0\.\.2, as the model has, got 9; --no-labels"),
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments", "wanted"), [(command, *case) for command, cases in REFUSED.items() for case in cases]
)
def test_sample_and_evaluate_refuse_before_work(
    command: str, arguments: str, wanted: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "draw", lambda *_, **__: pytest.fail("images were drawn"))
    monkeypatch.setattr(ddpm_fast.VariationalBound, "of", lambda *_, **__: pytest.fail("a bound was computed"))
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("trained", "unet").mkdir(parents=True)
    write(tmp_path, {"config.json": b'{"a": 1}', "file": b"", "there.png": b""})
    Path("link.png").symlink_to("there.png")
    os.link("there.png", "hard.png")
    before = content(tmp_path)
    line = run(*command.split(), "--model", small, *arguments.split(), code=2).splitlines()[-1]
    assert line.startswith("Error: ")
    assert re.search(wanted, line), line
    assert content(tmp_path) == before


def test_a_class_that_is_called_none_can_be_drawn(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_unet(classes=3, class_names=["some", "none", "all"])
    folder, draw = save_model(tmp_path / "model", model, SCHEDULE), Mock(return_value=torch.zeros(2, 1, 8, 8))
    monkeypatch.setattr(Sampler, "__call__", draw)
    for model_folder, classes in ((folder, "none"), (folder, "all,none"), (small, "none")):
        run("sample", "--model", model_folder, "--num", 2, "--classes", classes, "--out", tmp_path / "a.png")
    assert [call.kwargs["class_labels"] for call in draw.call_args_list] == [[1, 1], [2, 1], "none"]


def test_leftovers_of_killed_commands_go(small: Path, trained: Path, tmp_path: Path) -> None:
    folders = [tmp_path, tmp_path / "gif", tmp_path / "out", tmp_path / "out" / "unet"]
    old = [folder / f"{PREFIX}old.tmp" for folder in folders]
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (0, 0))
    run("sample", "--model", small, "--num", 1, "--steps", 1, "--out", tmp_path / "a.png", "--gif", tmp_path / "gif" / "a.gif")
    run("export", trained, tmp_path / "out")
    assert not [path for path in old if path.exists()]


# ------------------------------------------------------------------------------------------------------------- many images


def test_each_image_is_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("made.png").mkdir()
    draw = ["sample", "--model", small, "--num", 3, "--steps", 1, "--batch-size", 2, "--out"]
    for out in (f"folder{os.sep}", "made.png", "a.npz"):
        assert f"{Path(out)}: 3 images of 3 classes in turn in 1 step (dpm++2m-sde), " in run(*draw, out)
    assert [len([*Path(name, "000000").iterdir()]) for name in ("folder", "made.png")] == [3, 3]
    assert "expected --seed to be 0, as " in run(*draw, "a.npz", "--seed", 1, code=2)


INTERRUPTED = """
from ddpm_fast.cli import main
from ddpm_fast.sampling.sampler import Sampler
def interrupt(*_, **__):
    raise KeyboardInterrupt
Sampler.draw = interrupt
main()
"""


@pytest.mark.slow
def test_rank_0_alone_speaks(small: Path, tmp_path: Path) -> None:
    draw = ["sample", "--model", str(small), "--num-samples=3", "--steps=1", "--batch-size=2", "--out", "a.npz"]
    for command, code, said, reason in (
        (["-c", INTERRUPTED, *draw], 130, "", "Stopped by Ctrl-C. 0 of 3 images are written to a.npz. Start it again to draw"),
        (["-m", "ddpm_fast", *draw], 0, "a.npz: 3 images of 3 classes in turn in 1 step", "3/3"),
        (["-m", "ddpm_fast", *draw, "--seed=1"], 2, "", "Error: sample: expected --seed to be 0, as"),
    ):
        first, second = run_ranks(2, command, tmp_path)
        assert [first.returncode, second.returncode] == [code, code], first.stderr
        assert first.stdout.startswith(said)
        assert reason in first.stderr
        assert not second.stdout
        assert not re.search("sampling|Stopped|Error|Traceback", second.stderr)


@pytest.mark.parametrize(
    ("rank", "out", "error", "code", "text"),
    [
        (
            0,
            "a.npz",
            KeyboardInterrupt("2 of 3 images are written."),
            130,
            r"Stopped by Ctrl-C\. 2 of 3 images are written\.\n",
        ),
        (1, "a.npz", KeyboardInterrupt(), 130, ""),
        (0, "a.npz", KeyboardInterrupt(), 130, r"Stopped by Ctrl-C\. Nothing was written\.\n"),
        (1, "a.npz", FirstFailed("rank 0 says why"), 2, ""),
        (0, "a.npz", ProcessLost("Lost"), 1, r"Error: Lost\. The same command draws the images that are missing\.\n"),
        (0, "a.png", None, 2, r"Error: sample: expected --out to be a folder \(dir/\) or \.npz with 2 processes, got '.*'\n"),
    ],
)
def test_rank_0_says_how_a_command_of_processes_ends(
    rank: int, out: str, error: Any, code: int, text: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ddpm_fast, "write_samples", Mock(side_effect=error))
    assert re.fullmatch(text, run("sample", "--model", small, "--out", tmp_path / out, code=code))


# ---------------------------------------------------------------------------------------------------- work that goes wrong


@pytest.mark.parametrize(
    ("command", "failing", "left"),
    [
        ("sample --num 2 --steps 3 --out out/a.png --gif gif/a.gif", "gif/a.gif", ["out/a.png"]),
        ("sample --num 2 --steps 3 --out out/a.png --gif gif/a.gif", "out/a.png", []),
        ("edit vary digits:0 --num 1 --steps 2 --out a.png", "a.png", []),
        ("evaluate bound --data digits --no-labels --num 2 --json figures.json", "figures.json", []),
    ],
)
def test_a_file_that_cannot_be_written_is_an_error_of_one_line(
    command: str, failing: str, left: list[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing = images.replacing

    def replace(path: Path) -> object:
        if path == Path(failing):
            raise OSError(28, "No space left on device", str(path))
        return replacing(path)

    monkeypatch.setattr(images, "replacing", replace)
    monkeypatch.setattr("ddpm_fast.files.writing.replacing", replace)
    monkeypatch.chdir(tmp_path)
    output = run(*command.split(), "--model", small, "--quiet", code=2)
    assert output == f"Error: [Errno 28] No space left on device: '{failing}'\n"
    assert [str(path) for path in Path().rglob("*") if path.is_file()] == left  # a picture that was written before stays


def test_a_format_that_fails_is_an_error_of_one_line(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.GifImagePlugin._write_single_frame", Mock(side_effect=OverflowError("int too big to convert")))
    monkeypatch.setattr(images, "image_format", lambda path, *_, **__: "GIF" if Path(path).suffix == ".gif" else "PNG")
    output = run("sample", "--model", small, "--num", 1, "--steps", 1, "--quiet", "--out", tmp_path / "a.gif", code=2)
    assert re.fullmatch("Error: .*int too big to convert\n", output)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("patched", "first", "command", "scale"),
    [
        ("ddpm_fast.sampling.sampler.Sampler.__call__", 0, "sample --num 3", 16),
        ("ddpm_fast.vary", 1, "edit vary black.png --num 2 --steps 2", 12),
    ],
)
def test_images_that_are_not_finite_cost_no_others(
    patched: str, first: int, command: str, scale: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("black.png")
    drawn = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).repeat(1, 1, 8, 8)
    drawn[1, 0, 0, 0] = torch.nan
    monkeypatch.setattr(patched, Mock(return_value=drawn[first:].clone()))
    output = run(*command.split(), "--model", small, "--out", "a.png", code=1)
    assert "Error: 1 of 3 images contain NaN or infinity and are grey; the first is number 1 of 0..2" in output
    with Image.open("a.png") as image:
        assert np.array_equal(np.asarray(image), images.image_grid(drawn.nan_to_num(0), scale=scale)[..., 0])


NAMED = {"--num": ["num_samples"]}


@pytest.mark.parametrize(
    ("options", "error", "status", "text"),
    [
        (
            ["--num"],
            by("sample", InvalidValue("num_samples", "to be 1", 2)),
            2,
            "Error: fails: expected --num to be 1, got 2\n",
        ),
        ([], OSError(13, "Permission denied", "a.png"), 2, "Error: [Errno 13] Permission denied: 'a.png'\n"),
        ([], ProcessLost("rank 1 has ended"), 1, "Error: rank 1 has ended\n"),
        ([], FirstFailed("rank 0 says why"), 1, ""),
        ([], FloatingPointError("no longer finite"), 1, "Error: no longer finite\n"),
        (["--num"], MemoryError("no room"), 2, "Error: out of memory; a smaller --num needs less: no room\n"),
        (["--num", "--batch-size"], torch.OutOfMemoryError("Tried"), 2, "a smaller --num or --batch-size needs less: Tried\n"),
        ([], MemoryError(), 2, "Error: out of memory: no reason given\n"),
        ([], RuntimeError("a bug"), 1, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_person_can_mend_is_one_line(options: list[str], error: Exception, status: int, text: str) -> None:
    fails = Command(
        "fails", callback=Mock(side_effect=error), params=[click.Option([option, *NAMED.get(option, ())]) for option in options]
    )
    result = CliRunner().invoke(fails)
    assert (result.exit_code, result.stderr[-len(text) :] if text else result.stderr) == (status, text)
    assert (result.exception is error) == (str(error) == "a bug")  # Python shows its traceback


@pytest.mark.parametrize(
    ("patched", "command", "options"),
    [
        ("ddpm_fast.sampling.sampler.Sampler.__call__", "sample --model {small}", "--num or --batch-size"),
        ("ddpm_fast.vary", "edit vary digits:0 --model {small}", "--num or --batch-size"),
        (
            "ddpm_fast.training.preparation.UNet",
            "train run " + " ".join(TINY),
            "--batch-size or --micro-batch-size or --image-size or --channels or --data-memory",
        ),
    ],
)
def test_memory_of_the_host_that_runs_out_is_an_error_of_one_line(
    patched: str, command: str, options: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's error has no type of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patched, lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    line = run(*command.format(small=small).split(), code=2).splitlines()[-1]
    reason = r"needs less: (can't allocate|not enough) memory: you tried to allocate \d+ bytes\..*"
    assert re.fullmatch(f"Error: out of memory; a smaller {options} {reason}", line), line
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------- streams

needs_full_device = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
REDIRECTIONS = {
    "closed stdout": (">&-", 0),
    "closed stderr": ("2>&-", 0),
    "all closed": ("<&- >&- 2>&-", 0),
    "full stderr": ("2>/dev/full", 0),
    "closed pipe": ("| true", None),
}
# A command that writes to the same streams and file, and starts without PyTorch.
QUICK = """
from pathlib import Path
import click
from PIL import Image
from tqdm import trange
from ddpm_fast.cli.console import Commands
@click.group(cls=Commands)
def main():
    pass
@main.command()
@click.option("--out", type=Path)
def quick(out):
    for _ in trange(9):
        pass
    Image.new("L", (8, 8)).save(out)
    click.get_current_context().obj.append(out)
    click.echo(f"{out}: 1 image")
main()
"""
WRITERS = {"quick": f"-c {shlex.quote(QUICK)} quick", "sample": "-m ddpm_fast sample --num 1 --steps 2 --model"}


@needs_full_device
@pytest.mark.parametrize("writer", ["quick", pytest.param("sample", marks=pytest.mark.slow)])
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_images_are_saved_whatever_becomes_of_the_streams(redirection: str, writer: str, small: Path, tmp_path: Path) -> None:
    text, code = REDIRECTIONS[redirection]
    command = (
        f"{sys.executable} -W ignore {WRITERS[writer]} {small if writer == 'sample' else ''} --out {tmp_path}/a.png {text}"
    )
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert code is None or result.returncode == code
    assert not re.search("Traceback|Exception ignored|Broken pipe", result.stderr)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the file system has names of text alone")
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [("", 0, r".*\\udcff\.png: 1 image of class zero in 1 step"), ("x", 2, "Error: sample: expected --out to end in")],
)
def test_names_that_are_no_text_are_shown(ending: str, code: int, said: str, small: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png") + ending
    command = f"{sys.executable} -W ignore -m ddpm_fast sample --num 1 --steps 1 --model {small} --out".split()
    result = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    assert (result.returncode, os.path.exists(name)) == (code, code == 0), result.stderr
    assert re.match(said, result.stderr if code else result.stdout)


# ------------------------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize(
    ("interrupted", "command", "written"),
    [
        ("ddpm_fast.save_trajectory", "sample --model {small} --num 1 --steps 1 --gif a.gif", "Written: samples.png."),
        ("ddpm_fast.sampling.sampler.Sampler.__call__", "sample --model {small}", "Nothing was written."),
        ("ddpm_fast.VariationalBound.of", "evaluate bound --model {small} --data digits --num 1", "Nothing was written."),
        ("ddpm_fast.info.info", "info", "Nothing was written."),
        ("ddpm_fast.training.report.summary", "train run " + " ".join(TINY), "The last checkpoint of run: none."),
        (
            "ddpm_fast.training.checkpoint.Checkpoints.add",
            "train {run} --resume --steps 2",
            "The last checkpoint of {run}: {run}/checkpoints/step-00000001.",
        ),
    ],
)
def test_ctrl_c_ends_a_command_with_130(
    interrupted: str,
    command: str,
    written: str,
    small: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupted, Mock(side_effect=KeyboardInterrupt()))
    folders = {"small": small, "run": shutil.copytree(trained, tmp_path / "copy")}
    line = run(*command.format(**folders).split(), code=130).splitlines()[-1]
    assert line == f"Stopped by Ctrl-C. {written}".format(**folders)


def test_ctrl_c_saves_a_run_and_ends_it_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    take_step = loop.take_step

    def step(task: Any, state: Any, batch: Any) -> Any:
        if state.step == 1:
            signal.raise_signal(signal.SIGINT)
        return take_step(task, state, batch)

    monkeypatch.setattr(loop, "take_step", step)
    assert "images/s" in run("train", tmp_path / "run", *TINY, "--steps", 9, code=130)  # the progress bar
    assert "stopped by SIGINT at step 2 of 9; checkpoint saved" in caplog.text
    assert json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())["step"] == 2


@pytest.mark.slow  # test_training.py sends a signal without another process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_process_saves_at_a_signal_and_ends_with_its_status(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", "train", str(tmp_path / "run"), *TINY, "--steps", "1000000", "--log-every=1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    while process.poll() is None and not (tmp_path / "run" / "log.csv").exists():
        time.sleep(0.01)
    assert process.stderr is not None
    process.stderr.close()  # as a terminal that is closed: nothing can be written to it any more
    process.send_signal(number)
    assert process.wait(timeout=600) == 128 + number  # only against hanging
    assert (tmp_path / "run" / "checkpoints" / "latest" / "state.json").exists()
