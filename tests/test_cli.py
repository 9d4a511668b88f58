"""The command line."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner

import ddpm_fast
from ddpm_fast.cli import main, train_command
from ddpm_fast.training import train

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


# ------------------------------------------------------------------------------------------------------------------ train


def test_every_option_of_train_is_on_the_command_line() -> None:
    assert {parameter.name for parameter in train_command.params} == set(inspect.signature(train).parameters)


def test_train_then_resume_then_export(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", folder, *TINY, "--steps", 2, "--lr", 0.01)
    assert "train: expected" in run("train", folder, *TINY, code=2)
    assert "expected lr to be 0.01, as the run in" in run("train", folder, "--resume", "--lr", 0.02, code=2)
    run("train", folder, "--resume", "--steps", 3)
    stored = json.loads((folder / "config.json").read_text())["options"]
    assert (stored["lr"], stored["channels"], stored["attention"], stored["steps"]) == (0.01, [16, 32], [], 3)
    run("train", folder, "--resume")  # nothing left to do
    assert (folder / "checkpoints" / "latest" / "state.json").exists()
    assert str(tmp_path / "out") in run("export", folder, tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 3


def test_train_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    assert "is not a list of whole numbers" in run("train", tmp_path / "run", "--channels", "64;128", code=2)
    assert "expected name to be one of digits" in run("train", tmp_path / "run", "--data", "mnist", code=2)
    assert "expected threads to be at least 1" in run("train", tmp_path / "run", "--threads", 0, code=2)
    assert "expected device to be one of this machine" in run("train", tmp_path / "run", "--device", "xyz", code=2)
    assert "expected a run to resume" in run("train", tmp_path / "run", "--resume", code=2)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in run("export", tmp_path / "empty", tmp_path / "out", code=2)


def test_a_run_that_is_not_one_is_refused_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", folder, *TINY, "--steps", 1)
    assert "expected out_dir to be another folder" in run("export", folder, folder, code=2)
    assert not (folder / "unet").exists()
    config = json.loads((folder / "config.json").read_text())
    sections = {"options": "prediction", "schedule": "name", "dataset": "classes"}
    broken = [({key: value for key, value in config.items() if key != section}, section) for section in sections]
    broken += [({**config, section: {}}, section) for section in sections]
    for content, wanted in [*broken, ({}, "format 1, got None"), ([], "a JSON object, got list")]:
        (folder / "config.json").write_text(json.dumps(content))
        for command in (["train", folder, "--resume"], ["sample", "--model", folder], ["export", folder, tmp_path / "out"]):
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
