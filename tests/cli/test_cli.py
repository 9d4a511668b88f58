"""The command line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from launching import run_ranks
from PIL import Image

import ddpm_fast
from ddpm_fast.cli import main
from ddpm_fast.cli.console import Command
from ddpm_fast.cli.train import NETWORKS, train_command
from ddpm_fast.distributed.processes import FirstFailed, ProcessLost
from ddpm_fast.errors import InvalidValue
from ddpm_fast.files import images
from ddpm_fast.files.writing import PREFIX
from ddpm_fast.nn import UNet
from ddpm_fast.options import options_of
from ddpm_fast.sampling.arguments import Request
from ddpm_fast.sampling.sampler import Sampler
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


def run(*arguments: object, code: int = 0) -> str:
    """The output of a command that is expected to end with `code`."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_help_lists_the_commands() -> None:
    assert ddpm_fast.__version__ in run("--version")
    commands = run("--help")
    for command in ("train", "export"):
        assert re.search(rf"^  {command} ", commands, re.MULTILINE)
    assert "..." not in commands.partition("Commands:")[2]  # no description is cut


# ------------------------------------------------------------------------------------------------------------ wait policy

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Prints the variables when torch is first looked for.
ON_IMPORT = f"""
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("at the import:", *(f"{{v}}={{os.environ[v]}}" for v in {WAIT_VARIABLES} if v in os.environ), file=sys.stderr)
sys.meta_path.insert(0, Finder)
"""


def at_the_import_of_torch(source: str, **variables: str) -> str:
    """The wait variables that a program has when it imports torch, and when it ends."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES} | variables
    source = ON_IMPORT + source
    command = [sys.executable, "-W", "ignore", "-c", source]
    errors = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"^at the import: ?(.*)$", errors, re.MULTILINE)
    assert len(found) == 1, errors
    return found[0]


@pytest.mark.parametrize(
    "start", ["from ddpm_fast.cli import main; main(['info'])", pytest.param("RUN", marks=pytest.mark.slow)]
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(start: str) -> None:
    run_module = "import runpy; sys.argv = ['ddpm-fast', 'info']; runpy.run_module('ddpm_fast', run_name='__main__')"
    source = start.replace("RUN", run_module)
    assert at_the_import_of_torch(source) == "OMP_WAIT_POLICY=passive"
    assert at_the_import_of_torch(source, OMP_WAIT_POLICY="active") == "OMP_WAIT_POLICY=active"


@pytest.mark.parametrize("name", [WAIT_VARIABLES[1], pytest.param(WAIT_VARIABLES[2], marks=pytest.mark.slow)])
def test_other_variables_of_waiting_are_respected(name: str) -> None:
    assert at_the_import_of_torch("from ddpm_fast.cli import main; main(['info'])", **{name: "1000"}) == f"{name}=1000"


def test_the_library_leaves_the_environment_alone() -> None:
    source = """
before = dict(os.environ)
import ddpm_fast, ddpm_fast.cli, ddpm_fast.__main__
for name in dir(ddpm_fast):
    getattr(ddpm_fast, name)
ddpm_fast.load_builtin()
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # PyTorch sets it
before.pop("TORCHINDUCTOR_CACHE_DIR", None)
assert dict(os.environ) == before
"""
    assert at_the_import_of_torch(source) == ""


def test_a_program_that_has_loaded_torch_keeps_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    run("info")
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------------------------------ train


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
    assert (folder / "checkpoints" / "latest" / "state.json").exists()
    assert str(tmp_path / "out") in run("export", folder, tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 3


def test_train_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    assert "is not a list of whole numbers" in run("train", tmp_path / "run", "--channels", "64;128", code=2)
    assert "expected --data to be one of digits" in run("train", tmp_path / "run", "--data", "mnist", code=2)
    assert "expected --threads to be a positive integer or None" in run("train", tmp_path / "run", "--threads", 0, code=2)
    assert "expected --device to be a torch.device or its name" in run("train", tmp_path / "run", "--device", "xyz", code=2)
    assert "expected a run to resume" in run("train", tmp_path / "run", "--resume", code=2)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in run("export", tmp_path / "empty", tmp_path / "out", code=2)


def test_a_run_that_is_not_one_is_refused_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", folder, *TINY, "--steps", 1)
    assert "expected OUT_DIR to be another folder" in run("export", folder, folder, code=2)
    assert not (folder / "unet").exists()
    config = json.loads((folder / "config.json").read_text())
    sections = {"options": "options", "objective": "the keys schedule, prediction", "dataset": "dataset"}
    broken = [({key: value for key, value in config.items() if key != section}, section) for section in sections]
    broken += [({**config, section: {}}, wanted) for section, wanted in sections.items()]
    for content, wanted in [*broken, ({}, "expected format to be 6, got None"), ([], "a JSON object, got list")]:
        (folder / "config.json").write_text(json.dumps(content))
        for command in (["train", folder, "--resume"], ["export", folder, tmp_path / "out"]):
            lines = run(*command, code=2).splitlines()
            assert lines[-1].startswith("Error: ")
            assert wanted in lines[-1]
            assert "config.json" in lines[-1]


def test_errors_of_the_system_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = run("train", tmp_path / "file" / "run", *TINY, "--steps", 1, code=2).splitlines()[-1]
    assert line.startswith("Error: ")
    assert str(tmp_path / "file" / "run") in line


def test_ctrl_c_saves_and_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", "train", str(tmp_path / "run"), *TINY, "--steps", "1000000", "--log-every=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run" / "log.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)  # only against hanging
    assert process.returncode == 130, errors
    saved = re.search(r"stopped by SIGINT at step (\d+) of 1000000; checkpoint saved", errors)
    assert saved, errors
    assert "images/s" in errors  # the progress bar
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["step"] == int(saved[1])


# ----------------------------------------------------------------------------------------------------- checks before work


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of 8x8 images in one of three classes, 20 timesteps, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    model = UNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=[8],
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=4,
    )
    model.save_pretrained(folder / "unet")
    (folder / "scheduler_config.json").write_text(json.dumps({"ddpm_fast": ddpm_fast.NoiseSchedule.linear(20).to_config()}))
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a Sampler and a bound that begin to work fail the test."""
    monkeypatch.setattr(Sampler, "_draw", lambda *_, **__: pytest.fail("images were drawn"))
    monkeypatch.setattr(ddpm_fast, "variational_bound", lambda *_, **__: pytest.fail("a bound was computed"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--out", "a.xbm"], r"expected --out to end in \.png.* of mode L, .*got 'a\.xbm': cannot write mode L"),
        (["--out", "a.h5"], r"expected --out to end in \.png"),
        (
            ["--out", "x.txt"],
            r"to end in \.png, .* for pictures of mode L, in \.npz, or to be a folder \(dir/\), got 'x\.txt'$",
        ),
        (
            ["--out", "images"],
            r"sample: expected --out to be a picture \(\.png\), a folder \(dir/\) or \.npz, got 'images'",
        ),
        (["--gif", "a.palm"], r"expected --gif to end in \.png"),
        (["--out", "x" * 300 + ".png"], "expected --out to be a path that can be written, got: .*File name too long"),
        (["--out", "file/a.png"], "expected --out to be in a folder, got 'file/a.png', and '.*file' is a file"),
        (["--gif", "file/a.gif"], "expected --gif to be in a folder, got 'file/a.gif'"),
        (["--out", "dir/", "--gif", "a.gif"], "expected --gif to go with --out as one picture, got 'a.gif' and 'dir/'"),
        (["--out", "file/"], "expected --out to be in a folder, got 'file', and '.*file' is a file"),
        (["--out", "a.npz", "--classes", "7"], r"expected --classes to be in 0\.\.2, got 7"),
        (["--gif", "folder.png"], r"'--gif': File 'folder\.png' is a directory"),
        (["--out", "a.png", "--gif", "b/../a.png"], "expected --gif to be another file than --out"),
        (["--out", "a.png", "--gif", "A.PNG"], "expected --gif to be another file than --out"),
        (["--out", "there.png", "--gif", "link.png"], "expected --gif to be another file than --out"),
        (["--out", "there.png", "--gif", "hard.png"], "expected --gif to be another file than --out"),
        (["--guidance", "1e300"], r"expected --guidance to be .*, got 1e\+300"),
        (["--guidance", "nan"], "expected --guidance to be at least -10000.0 and at most 10000.0 or None, got nan"),
        (["--sampler", "ddim", "--eta", "inf"], "expected --eta to be at least 0 and finite or None, got inf"),
        (["--sampler", "ddim", "--eta", "1e9"], "expected --eta to be at most"),
        (
            ["--guidance", "2", "--classes", "none"],
            "expected --guidance to be None or 1, as there are no class_labels, got 2.0",
        ),
        (["--steps", "5000"], r"expected --steps to be in 1\.\.20 with dpm\+\+2m-sde, got 5000"),
        (
            ["--sampler", "ddpm", "--variance", "learned"],
            "expected --variance to be fixed_small or fixed_large for this model, got learned",
        ),
        (["--variance", "learned"], r"expected --variance to go with sampler ddpm, got learned with dpm\+\+2m-sde"),
        (
            ["--sampler", "ddim", "--variance", "fixed_small"],
            "expected --variance to go with sampler ddpm, got fixed_small with ddim",
        ),
        (
            ["--sampler", "ddim", "--order", "3"],
            r"expected --order to go with sampler dpm\+\+2m or dpm\+\+2m-sde, got 3 with ddim",
        ),
        (["--order", "4"], r"expected --order to be an integer in 1\.\.3 or None, got 4"),
        (["--eta", "1.5"], r"expected --eta to be at least 0 and at most 1, got 1\.5"),
        (["--classes", "cat"], "expected --classes to be integers, as the model has no class names, got 'cat'"),
        (["--classes", "7"], r"expected --classes to be in 0\.\.2, got 7"),
        (["--device", "meta"], "expected --device to be one that computes, got meta"),
        (["--device", "cuda:99"], "expected --device to be available, got cuda:99"),
        (["--num", "100000000000"], r"'--num' / '--num-samples': 100000000000 is not in the range 1<=x<=4294967296"),
        (
            ["--num", "20000", "--out", "a.webp"],
            r"expected --out to end in \.png, as pictures in WEBP have at most 16383 pixels",
        ),
        (["--num", "3000", "--out", "a.png", "--gif", "a.jpg"], r"expected --gif to end in \.png, as pictures in JPEG"),
        (
            ["--model", "org/name"],
            "expected --model to be a folder .*, got 'org/name', .* hf download org/name --local-dir name",
        ),
        (["--model", "name"], "expected --model to be a folder that holds a model, got 'name', which does not exist$"),
        (["--model", "./trianed"], r"expected --model .* got 'trianed', which does not exist; did you mean 'trained'\?$"),
        # folder.png holds no model
        (["--model", "./flolder.png"], r"expected --model .* got 'flolder\.png', which does not exist$"),
    ],
)
def test_sample_refuses_before_work(
    arguments: list[str], wanted: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.png").mkdir()
    Path("trained", "unet").mkdir(parents=True)
    Path("there.png").touch()
    Path("link.png").symlink_to("there.png")
    os.link("there.png", "hard.png")
    before = sorted(tmp_path.iterdir())
    line = run("sample", "--model", small, *arguments, code=2).splitlines()[-1]
    assert line.startswith("Error: ")
    assert re.search(wanted, line), line
    assert sorted(tmp_path.iterdir()) == before


def test_a_class_that_is_called_none_can_be_drawn(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(small, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"class_names": ["some", "none", "all"]}))
    drawn = []

    def draw(*_: object, class_labels: object, **__: object) -> torch.Tensor:
        drawn.append(class_labels)
        return torch.zeros(2, 1, 8, 8)

    monkeypatch.setattr(Sampler, "__call__", draw)
    for model, classes in ((folder, "none"), (folder, "all,none"), (small, "none")):
        run("sample", "--model", model, "--num", 2, "--classes", classes, "--out", tmp_path / "a.png")
    assert drawn == [[1, 1], [2, 1], "none"]


def test_memory_that_runs_out_in_a_command_without_batches_names_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(ddpm_fast, "export_checkpoint", fail)
    output = run("export", tmp_path / "run", tmp_path / "out", code=2)
    assert output.endswith("Error: out of memory: no reason given\n")


def test_a_seed_that_is_too_large_is_that_of_the_option(small: Path, tmp_path: Path) -> None:
    output = run("sample", "--model", small, "--seed", "9" * 30, "--out", tmp_path / "a.png", code=2)
    assert "expected --seed to be an integer in" in output


@pytest.mark.usefixtures("no_work")
def test_evaluate_refuses_before_work(small: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    arguments = ["evaluate", "--model", small, "--data", "digits"]
    wanted = "expected --json to be new or of an earlier evaluation"
    assert wanted in run(*arguments, "--json", tmp_path / "config.json", code=2)
    assert "expected --json to be a file, got '/dev/null'" in run(*arguments, "--json", "/dev/null", code=2)
    assert "expected --num to be at most 297, the test images of digits" in run(*arguments, "--num", 10**12, code=2)
    assert "expected --labels to be in 0..2, as the model has, got 9; --no-labels" in run(*arguments, code=2)
    wanted = "expected --condition to be left out, as the model reads none, got "
    assert wanted in run(*arguments, "--condition", tmp_path, code=2)
    assert (tmp_path / "config.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--device", "cuda:99"], "expected --device to be available, got cuda:99: PyTorch sees"),
        (["--num-timesteps", "99999999999"], "expected --num-timesteps to be an integer in 1..100000, got 99999999999"),
        (["--batch-size", "99999999999"], "expected --batch-size to be an integer in 1..1048576, got 99999999999"),
        (["--threads", "100000"], "expected --threads to be an integer in 1.."),
        (["--lr", "inf"], "expected --lr to be positive and finite, got inf"),
        (["--image-size", "1000000"], "expected --image-size to be an integer in 1..65536 or None, got 1000000"),
        (["--init", "org/name"], "hf download org/name --local-dir name"),
    ],
)
def test_train_names_its_options(arguments: list[str], wanted: str, tmp_path: Path) -> None:
    line = run("train", tmp_path / "run", *arguments, code=2).splitlines()[-1]
    assert wanted in line
    assert not (tmp_path / "run").exists()


def test_names_in_files_are_not_taken_for_options(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": 5}')
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    line = run("train", tmp_path / "run", "--data", tmp_path, code=2).splitlines()[-1]
    assert "expected labels to be a list of pairs [name, label], or null, got 5, in " in line
    line = run("evaluate", "--data", tmp_path, code=2).splitlines()[-1]  # which has an option --labels
    assert "expected labels to be a list of pairs [name, label], or null, got 5, in " in line


def test_export_refuses_before_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", folder, *TINY, "--steps", 1)
    checkpoint = folder / "checkpoints" / "step-00000001"
    assert "expected OUT_DIR to be apart from the run's checkpoints" in run("export", folder, checkpoint, code=2)
    assert not (checkpoint / "training.json").exists()
    (tmp_path / "file").touch()
    assert "expected OUT_DIR to be in a folder, got" in run("export", folder, tmp_path / "file" / "out", code=2)


def test_memory_that_runs_out_in_the_work_is_an_error_of_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Sampler, "__call__", fail)
    line = run("sample", "--model", small, "--out", tmp_path / "a.png", code=2).splitlines()[-1]
    assert line == "Error: out of memory; a smaller --num or --batch-size needs less: Tried to allocate 2.00 GiB"


def test_memory_of_the_host_that_runs_out_is_an_error_of_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's error has no type of its own."""

    def fail(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Sampler, "__call__", fail)
    monkeypatch.setattr(ddpm_fast, "vary", fail)
    monkeypatch.setattr("ddpm_fast.training.parts.UNet", fail)
    reason = r"needs less: (can't allocate|not enough) memory: you tried to allocate \d+ bytes\..*"
    for arguments, options in (
        (["sample", "--model", small, "--out", tmp_path / "a.png"], "--num or --batch-size"),
        (["edit", "vary", "digits:0", "--model", small, "--out", tmp_path / "a.png"], "--num or --batch-size"),
        (
            ["train", tmp_path / "run", *TINY, "--steps", 1],
            "--batch-size or --micro-batch-size or --image-size or --channels or --data-memory",
        ),
    ):
        line = run(*arguments, code=2).splitlines()[-1]
        assert re.fullmatch(f"Error: out of memory; a smaller {options} {reason}", line), line
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_commands_go(small: Path, tmp_path: Path) -> None:
    folders = [tmp_path, tmp_path / "gif", tmp_path / "out", tmp_path / "out" / "unet"]
    old, new = ([folder / f"{PREFIX}{name}.tmp" for folder in folders] for name in ("old", "new"))
    for path in (*old, *new):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    run("sample", "--model", small, "--num", 1, "--steps", 1, "--out", tmp_path / "a.png", "--gif", tmp_path / "gif" / "a.gif")
    run("train", tmp_path / "run", *TINY, "--steps", 1)
    run("export", tmp_path / "run", tmp_path / "out")
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in new)


# ------------------------------------------------------------------------------------------------------------- many images


def test_each_image_is_written(small: Path, tmp_path: Path) -> None:
    draw = ["sample", "--model", small, "--num", 3, "--steps", 1, "--batch-size", 2]
    (tmp_path / "made.png").mkdir()
    for name, out in (("folder", f"{tmp_path / 'folder'}{os.sep}"), ("made.png", tmp_path / "made.png")):
        assert f"{tmp_path / name}: 3 images of 3 classes in turn in 1 step (dpm++2m-sde), " in run(*draw, "--out", out)
        assert len([*(tmp_path / name / "000000").iterdir()]) == 3
    run(*draw, "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 1)
        assert arrays["arr_1"].tolist() == [0, 1, 2]
    assert "expected --seed to be 0, as " in run(*draw, "--out", tmp_path / "a.npz", "--seed", 1, code=2)


@pytest.mark.slow
def test_rank_0_alone_speaks(small: Path, tmp_path: Path) -> None:
    draw = ["-m", "ddpm_fast", "sample", "--model", str(small), "--num-samples=3", "--steps=1", "--batch-size=2"]
    done = run_ranks(2, [*draw, "--out", "a.npz"], tmp_path)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    assert done[0].stdout.startswith("a.npz: 3 images of 3 classes in turn in 1 step")
    assert "3/3" in done[0].stderr
    assert not done[1].stdout
    assert not re.search("sampling|Traceback", done[1].stderr)
    done = run_ranks(2, [*draw, "--out", "a.npz", "--seed=1"], tmp_path)
    assert [each.returncode for each in done] == [2, 2]
    assert "Error: sample: expected --seed to be 0, as" in done[0].stderr
    assert not re.search("Error|Traceback", done[1].stderr)


def test_several_processes_draw_no_grid(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    line = run("sample", "--model", small, "--out", tmp_path / "a.png", code=2).splitlines()[-1]
    assert "expected --out to be a folder (dir/) or .npz with 2 processes, got '" in line


INTERRUPTED = """
from ddpm_fast.cli import main
from ddpm_fast.sampling.sampler import Sampler
def interrupt(*_, **__):
    raise KeyboardInterrupt
Sampler._draw = interrupt
main()
"""


def test_ctrl_c_is_answered_by_rank_0(small: Path, tmp_path: Path) -> None:
    command = ["sample", "--model", str(small), "--num=4", "--batch-size=2", "--steps=1", "--out", "a.npz", "--quiet"]
    done = run_ranks(2, ["-c", INTERRUPTED, *command], tmp_path)
    assert [each.returncode for each in done] == [130, 130]
    assert "Stopped by Ctrl-C. 0 of 4 images are written to a.npz. Start it again to draw the others." in done[0].stderr
    assert not re.search("Stopped|Traceback", done[1].stderr)


def test_ctrl_c_says_how_many_images_are_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Sampler._draw

    def draw(self: Sampler, request: Request) -> object:
        if request.num_samples == 1:
            raise KeyboardInterrupt
        return call(self, request)

    out = tmp_path / "folder"
    command = ["sample", "--model", small, "--num", 3, "--steps", 1, "--batch-size", 2, "--out", f"{out}/"]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "_draw", draw)
        line = run(*command, code=130).splitlines()[-1]
        assert line == f"Stopped by Ctrl-C. 2 of 3 images are written to {out}. Start it again to draw the others."
    run(*command)
    assert len([*(out / "000000").iterdir()]) == 3


# ------------------------------------------------------------------------------------------------------- what cannot be written


def fail_for(monkeypatch: pytest.MonkeyPatch, refused: Path) -> None:
    """Let writing fail for this file."""
    replacing = images.replacing

    def replace(path: Path) -> object:
        if path == refused:
            raise OSError(28, "No space left on device", str(path))
        return replacing(path)

    monkeypatch.setattr(images, "replacing", replace)
    monkeypatch.setattr("ddpm_fast.files.writing.replacing", replace)


def test_pictures_that_cannot_be_written_are_an_error_of_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ["sample", "--model", small, "--num", 2, "--sampler", "ddpm", "--steps", 3, "--quiet"]
    out, gif = tmp_path / "out" / "a.png", tmp_path / "gif" / "a.gif"
    run(*draw, "--out", tmp_path / "expected.png")
    for path, written in ((gif, [out]), (out, [])):
        with monkeypatch.context() as patch:
            fail_for(patch, path)
            output = run(*draw, "--out", out, "--gif", gif, code=2)
        assert output == f"Error: [Errno 28] No space left on device: '{path}'\n"
        found = [*out.parent.iterdir(), *gif.parent.iterdir()]
        assert found == written  # a picture that was written before stays
        for each in found:
            assert each.read_bytes() == (tmp_path / "expected.png").read_bytes()
            each.unlink()


def test_a_format_that_fails_is_an_error_of_one_line(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OverflowError("int too big to convert")

    monkeypatch.setattr("PIL.GifImagePlugin._write_single_frame", fail)
    monkeypatch.setattr(images, "image_format", lambda path, *_, **__: "GIF" if Path(path).suffix == ".gif" else "PNG")
    draw = ["sample", "--model", small, "--num", 1, "--steps", 1, "--quiet"]
    output = run(*draw, "--out", tmp_path / "a.gif", code=2)
    assert output.startswith("Error: ")
    assert output.endswith("int too big to convert\n")
    assert len(output.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_was_removed_is_made_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Sampler.__call__

    def draw(*arguments: object, **keywords: object) -> object:
        shutil.rmtree(tmp_path / "out")
        return call(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "__call__", draw)
    (tmp_path / "out").mkdir()
    run("sample", "--model", small, "--num", 1, "--steps", 1, "--out", tmp_path / "out" / "a.png")
    assert (tmp_path / "out" / "a.png").exists()


def test_figures_that_cannot_be_written_are_an_error_of_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    fail_for(monkeypatch, out)
    evaluate = ["evaluate", "--model", small, "--data", "digits", "--no-labels", "--num", 2, "--quiet"]
    assert run(*evaluate, "--json", out, code=2) == f"Error: [Errno 28] No space left on device: '{out}'\n"
    assert not [*tmp_path.iterdir()]


def test_images_that_are_not_finite_cost_no_others(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
    drawn[1, 0, 0, 0] = torch.nan
    monkeypatch.setattr(Sampler, "__call__", lambda *_, **__: drawn.clone())
    output = run("sample", "--model", small, "--num", 3, "--out", tmp_path / "a.png", code=1)
    assert "Error: 1 of 3 images are not finite and drawn grey, from number 1 (of 0..2)" in output
    expected = images.image_grid(drawn.nan_to_num(0), scale=16)[..., 0].numpy()
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == expected).all()


def test_an_export_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", tmp_path / "run", *TINY, "--steps", 1)

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    line = run("export", tmp_path / "run", tmp_path / "out", code=2).splitlines()[-1]
    assert line.startswith(f"Error: export_checkpoint: expected to write a model to {tmp_path / 'out'}, got: ")
    assert line.endswith(".safetensors cannot be written: No space left on device; export it again")


# ------------------------------------------------------------------------------------------------------ streams and Ctrl-C

REDIRECTIONS = {
    "closed stdout": (">&-", 0),
    "closed stderr": ("2>&-", 0),
    "all closed": ("<&- >&- 2>&-", 0),
    "full stdout": (">/dev/full", 1),
    "full stderr": ("2>/dev/full", 0),
    "both full": (">/dev/full 2>/dev/full", 1),
    "closed pipe": ("| true", None),
}
QUICK_REDIRECTIONS = ("all closed", "full stdout", "closed pipe")  # each takes a process, and the others resemble these


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "redirection",
    [pytest.param(name, marks=() if name in QUICK_REDIRECTIONS else pytest.mark.slow) for name in REDIRECTIONS],
)
def test_images_are_saved_whatever_becomes_of_the_streams(redirection: str, small: Path, tmp_path: Path) -> None:
    text, code = REDIRECTIONS[redirection]
    command = f"{sys.executable} -W ignore -m ddpm_fast sample --model {small} --num 1 --steps 2 --out {tmp_path}/a.png {text}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert code is None or result.returncode == code
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    if redirection == "full stdout":
        error = f"Error: standard output: [Errno 28] No space left on device. Written: {tmp_path}/a.png."
        assert result.stderr.splitlines()[-1] == error
    with Image.open(tmp_path / "a.png") as image:
        image.load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_names_that_are_no_text_are_shown(small: Path, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the file system has names of text alone")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "ddpm_fast",
        "sample",
        "--model",
        str(small),
        "--num=1",
        "--steps=1",
        "--out",
    ]
    result = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    assert (result.returncode, os.path.exists(name)) == (0, True), result.stderr
    assert "\\udcff.png: 1 image of class 0 in 1 step" in result.stdout
    result = subprocess.run([*command, name + "x"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: sample: expected --out to end in")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InvalidValue("sample", "num_samples", "to be 1", 2), 2, "Error: fails: expected --num to be 1, got 2\n"),
        (OSError(13, "Permission denied", "a.png"), 2, "Error: [Errno 13] Permission denied: 'a.png'\n"),
        (ProcessLost("rank 1 has ended"), 1, "Error: rank 1 has ended\n"),
        (FirstFailed("rank 0 says why"), 1, ""),
        (FloatingPointError("no longer finite"), 1, "Error: no longer finite\n"),
        (MemoryError("no room"), 2, "Error: out of memory; a smaller --num needs less: no room\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_person_can_mend_is_one_line(error: Exception, status: int, text: str) -> None:
    @click.command(cls=Command)
    @click.option("--num")
    def fails(num: str | None) -> None:
        raise error

    result = CliRunner().invoke(fails)
    assert (result.exit_code, result.stderr[-len(text) :] if text else result.stderr) == (status, text)


def test_a_bug_is_a_traceback() -> None:
    @click.command(cls=Command)
    def fails() -> None:
        raise RuntimeError("a bug")

    assert isinstance(CliRunner().invoke(fails).exception, RuntimeError)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", ["--help", "info", "train --help"])
def test_a_full_standard_output_is_an_error_of_one_line(arguments: str) -> None:
    command = f"{sys.executable} -W ignore -m ddpm_fast {arguments} >/dev/full"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        1,
        "Error: standard output: [Errno 28] No space left on device. Nothing was written.\n",
    )


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
def test_bytes_for_a_full_standard_output_are_an_error_of_one_line() -> None:
    """Shell completion writes below the text stream."""
    code = "from ddpm_fast.cli import main; main(prog_name='ddpm-fast')"
    command = f'_DDPM_FAST_COMPLETE=bash_source {sys.executable} -W ignore -c "{code}" >/dev/full'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Error: standard output: [Errno 28]")


def test_a_stream_in_place_of_standard_output_that_fails_leaves_the_file_alone(capfd: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with redirect_stdout(Full()), pytest.raises(SystemExit):
        main(["info"])
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_ctrl_c_ends_sample_and_evaluate_with_130(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "a.png"
    gif = ["--gif", tmp_path / "a.gif"]
    draw = ["sample", "--model", small, "--num", 1, "--steps", 1, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(ddpm_fast, "save_trajectory", interrupt)
        assert run(*draw, *gif, code=130).splitlines()[-1] == f"Stopped by Ctrl-C. Written: {out}."
    monkeypatch.setattr(Sampler, "__call__", interrupt)
    monkeypatch.setattr(ddpm_fast, "variational_bound", interrupt)
    evaluate = ["evaluate", "--model", small, "--data", "digits", "--num", 1]
    for command in (draw, evaluate):
        assert run(*command, code=130).splitlines()[-1] == "Stopped by Ctrl-C. Nothing was written."
    monkeypatch.setattr("ddpm_fast.info.info", interrupt)
    assert run("info", code=130).splitlines()[-1] == "Stopped by Ctrl-C. Nothing was written."


def test_a_second_ctrl_c_names_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    monkeypatch.setattr("ddpm_fast.training.report.summary", interrupt)
    assert run("train", folder, *TINY, code=130).endswith(f"Stopped by Ctrl-C. The last checkpoint of {folder}: none.\n")
    monkeypatch.undo()
    shutil.rmtree(folder)
    run("train", folder, *TINY, "--steps", 1)
    monkeypatch.setattr("ddpm_fast.training.checkpoint.Checkpoints.add", interrupt)
    last = run("train", folder, "--resume", "--steps", 2, code=130).splitlines()[-1]
    assert last.endswith(f"The last checkpoint of {folder}: {folder}/checkpoints/step-00000001.")


@pytest.mark.slow  # test_training.py sends a signal without another process
def test_a_hangup_saves_and_ends_with_129(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", "train", str(tmp_path / "run"), *TINY, "--steps", "1000000", "--log-every=1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    while process.poll() is None and not (tmp_path / "run" / "log.csv").exists():
        time.sleep(0.01)
    assert process.stderr is not None
    process.stderr.close()  # as a terminal that is closed: nothing can be written to it any more
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=600) == 129  # only against hanging
    assert (tmp_path / "run" / "checkpoints" / "latest" / "state.json").exists()
