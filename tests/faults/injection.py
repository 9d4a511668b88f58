"""Let each system call of a task fail once, and look at what is left.

    LD_PRELOAD=LIBRARY python injection.py LIBRARY FOLDER TASK,KIND,EVERY ...

LIBRARY is the compiled system_calls.c. A child process does the task, so that it can be killed. KIND is the name of an errno,
SHORT (a write takes half of its bytes) or KILL. Every EVERY-th call is tried. A line of JSON for each task has the numbers of
its calls, of tried ones, and of children that finished or were stopped.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from items import read_data
from PIL import Image
from runs import QUIET, assert_same_weights, log_rows, newest_checkpoint, train

from ddpm_fast import UNet, export_checkpoint, save_grid
from ddpm_fast.cli import main as main_command
from ddpm_fast.files.writing import PREFIX
from ddpm_fast.training.checkpoint import Checkpoints

KINDS = {"KILL": -1, "SHORT": -2}
FINISHED, REFUSED, BROKEN = 0, 3, 4  # exit statuses of a child; REFUSED: it raised an OSError
OPTIONS: dict[str, Any] = QUIET | {
    "channels": [8],
    "batch_size": 2,
    "steps": 4,
    "log_every": 1,
    "sample_every": 2,
    "sample_steps": 1,
    "checkpoint_every": 1,
}


class Task(NamedTuple):
    """Something that writes files.

    Attributes:
        prepare: Make the folder as it is before.
        do: Do the task, which may fail at any moment.
        check: Raise an AssertionError unless the folder is as it should be after a failure. The argument after the folder
            says whether the task finished.
    """

    prepare: Callable[[Path], object]
    do: Callable[[Path], object]
    check: Callable[[Path, bool], None]


def run_in_child(task: Callable[[], object]) -> int:
    """Run a task in a child process. Return its exit status, or minus the number of the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            task()
            status = FINISHED
        except OSError:
            status = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------------------------------------ tasks


def made(folder: Path, steps: int) -> Path:
    """Return a run that nothing has disturbed, made once next to the folder."""
    run = folder.with_name(f"run of {steps} steps")
    if not run.exists():
        assert run_in_child(lambda: train(run, **OPTIONS | {"steps": steps})) == FINISHED
    return run


def train_or_resume(run: Path) -> None:
    train(run, **OPTIONS, auto_resume=True)


def check_run(run: Path, finished: bool) -> None:
    """Every checkpoint with a checkpoint's name is whole, and the run goes on to the undisturbed one's weights."""
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
    latest = Checkpoints(run).newest()
    assert (latest is None) == (not steps)
    assert latest is None or latest.name == f"step-{max(steps):08d}"
    assert not finished or max(steps) == OPTIONS["steps"]
    assert run_in_child(lambda: train_or_resume(run)) == FINISHED
    whole = made(run, 4)
    assert_same_weights(run, whole)
    wanted = {row["step"]: row for row in log_rows(whole)}
    rows = log_rows(run)
    steps = [int(row["step"]) for row in rows]
    assert len(set(steps)) == len(steps)
    assert steps[-1] == 4
    for step, row in zip(steps, rows, strict=True):
        expected = dict(wanted[row["step"]])
        if step > 1 and step - 1 not in steps:  # the loss of a row that could not be written is part of the next one's mean
            expected["loss"] = row["loss"]
        assert row == expected
    for sample in (run / "samples").glob("*.png"):
        Image.open(sample).load()
    assert not list((run / "checkpoints").glob(".*step-*"))


def prepare_model(folder: Path) -> None:
    """Export half of a run, which the task replaces."""
    made(folder, 4)
    export_checkpoint(made(folder, 2), folder, torch.float32)


def check_model(folder: Path, finished: bool) -> None:
    """The folder holds the old network or the new one."""
    found = UNet.from_pretrained(folder).state_dict()
    ends = [UNet.from_pretrained(newest_checkpoint(made(folder, steps)) / "unet_ema").state_dict() for steps in (2, 4)]
    matches = [all(torch.equal(found[name], end[name]) for name in end) for end in ends]
    assert any(matches)
    assert not finished or matches[1]


IMAGES = [torch.full((4, 1, 8, 8), value) for value in (-0.5, 0.5)]


def check_picture(folder: Path, finished: bool) -> None:
    """The file holds the old picture or the new one, and nothing else is there."""
    found = (folder / "a.png").read_bytes()
    matches = []
    for images in IMAGES:
        save_grid(images, folder.parent / "expected.png")
        matches.append(found == folder.parent.joinpath("expected.png").read_bytes())
    assert any(matches)
    assert not finished or matches[1]


def prepare_picture(folder: Path) -> None:
    folder.mkdir()
    save_grid(IMAGES[0], folder / "a.png")


def sample(folder: Path) -> None:
    """Draw images with the command line, from half of a run."""
    options = ["--steps=2", "--num=2", f"--out={folder / 'a.png'}", f"--gif={folder / 'a.gif'}", "--quiet"]
    try:
        main_command(["sample", f"--model={folder.parent / 'model'}", *options], standalone_mode=False)
    except click.ClickException as error:  # a refusal, or results that went elsewhere
        raise OSError(error.format_message()) from error


def check_samples(folder: Path, finished: bool) -> None:
    """Each picture is whole or absent, and a second call writes the same bytes as one that nothing disturbed."""
    for picture in folder.glob("a*"):
        Image.open(picture).load()
    expected = folder.parent / "expected"
    for target in [expected] * (not expected.exists()) + [folder]:
        target.mkdir(exist_ok=True)
        assert run_in_child(lambda target=target: sample(target)) == FINISHED
    for name in ("a.png", "a.gif"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


def prepare_model_to_sample(folder: Path) -> None:
    if not (folder.parent / "model").exists():
        export_checkpoint(made(folder, 2), folder.parent / "model", torch.float32)
    folder.mkdir()


def prepare_run(folder: Path) -> None:
    shutil.copytree(made(folder, 2), folder, symlinks=True)


def export(folder: Path) -> None:
    export_checkpoint(made(folder, 4), folder, torch.float32)


TASKS = {
    "sample": Task(prepare_model_to_sample, sample, check_samples),
    "train": Task(lambda run: None, train_or_resume, check_run),
    "resume": Task(prepare_run, train_or_resume, check_run),
    "export": Task(prepare_model, export, check_model),
    "picture": Task(prepare_picture, lambda folder: save_grid(IMAGES[1], folder / "a.png"), check_picture),
}


# ------------------------------------------------------------------------------------------------------------------- main


def inject(library: ctypes.CDLL, base: Path, name: str, kind_name: str, every: int) -> dict[str, int]:
    """Try a task once for each of the chosen calls. Return the counts."""
    kind = KINDS.get(kind_name) or getattr(errno, kind_name)
    task, folder = TASKS[name], base / name

    def attempt(call: int) -> tuple[int, int]:
        """Do the task with its `call`-th call failing. Return the child's exit status and the number of its calls."""
        shutil.rmtree(folder, ignore_errors=True)
        task.prepare(folder)
        read, write = os.pipe()

        def do() -> None:
            library.arm(os.fsencode(folder), call, kind)
            try:
                task.do(folder)
            finally:
                os.write(write, str(library.count_calls()).encode())

        status = run_in_child(do)
        os.close(write)
        with os.fdopen(read) as counts:
            return status, int(counts.read() or 0)

    status, calls = attempt(0)
    assert status == FINISHED
    task.check(folder, True)
    ends: Counter[str] = Counter()
    for call in range(1, calls + 1, every):
        status, _ = attempt(call)
        harmless = kind_name in ("EINTR", "SHORT")
        allowed = (-signal.SIGKILL,) if kind_name == "KILL" else (FINISHED,) if harmless else (FINISHED, REFUSED)
        assert status in allowed, f"{name}: call {call} of {calls}, {kind_name}: exit status {status}"
        try:
            task.check(folder, status == FINISHED)
        except Exception as error:
            raise AssertionError(f"{name}: call {call} of {calls}, {kind_name}: {error!r}") from error
        leftovers = [path for path in folder.rglob(f"{PREFIX}*.tmp") if kind_name != "KILL"]
        assert len(leftovers) <= 1, f"{name}: call {call} of {calls}, {kind_name}: {leftovers}"  # 1: its removal failed
        ends["finished" if status == FINISHED else "stopped"] += 1
    return {"calls": calls, "tried": ends.total(), **ends}


def main() -> None:
    library, base = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    Image.init()  # its modules, once instead of in each child
    if any(not argument.startswith("picture") for argument in sys.argv[3:]):
        import sklearn.datasets

        sklearn.datasets.load_digits = cache(sklearn.datasets.load_digits)
        read_data("digits")  # these read files and import modules once instead of in each child
        torch.optim.AdamW([torch.zeros(1)]).zero_grad()
    base.mkdir()
    for argument in sys.argv[3:]:
        name, kind, every = argument.split(",")
        print(json.dumps({"task": name, "kind": kind} | inject(library, base, name, kind, int(every))), flush=True)


if __name__ == "__main__":
    main()
