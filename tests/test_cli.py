"""The command line."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("start", ["from ddpm_fast.cli import main; main(['info'])", "RUN"])
def test_idle_threads_sleep_unless_the_user_says_otherwise(start: str) -> None:
    run_module = "import runpy; sys.argv = ['ddpm-fast', 'info']; runpy.run_module('ddpm_fast', run_name='__main__')"
    source = start.replace("RUN", run_module)
    assert at_the_import_of_torch(source) == "OMP_WAIT_POLICY=passive"
    assert at_the_import_of_torch(source, OMP_WAIT_POLICY="active") == "OMP_WAIT_POLICY=active"


@pytest.mark.parametrize("name", WAIT_VARIABLES[1:])
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
    assert "expected threads to be a positive integer or None" in run("train", tmp_path / "run", "--threads", 0, code=2)
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
    for content, wanted in [*broken, ({}, "format to be given, got none"), ([], "a JSON object, got list")]:
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
