"""Training in several processes: the same weights, bit for bit, and no file but rank 0's."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import run as run_command
from launching import run_ranks
from refusals import refused
from runs import QUIET, TRAIN, assert_same_runs, assert_same_weights, log_rows, newest_checkpoint, train

from ddpm_fast import NoiseSchedule, Objective, TrainOptions
from ddpm_fast.distributed import Processes
from ddpm_fast.errors import InvalidValue
from ddpm_fast.training.run import RunFolder, open_run

RUN: dict[str, Any] = {
    **QUIET,
    "batch_size": 8,
    "micro_batch_size": 1,
    "dropout": 0.1,
    "flip": True,
    "steps": 3,
    "log_every": 2,
}
OTHER_FOLDERS = f"import os; own = {{'data_dir': 'of rank ' + os.environ['RANK']}}; {TRAIN[:-1]}, **own)"


def train_in(size: int, run_dir: Path, program: str = TRAIN, **options: Any) -> None:
    """Train in several processes."""
    for each in run_ranks(size, ["-c", program, str(run_dir), json.dumps(RUN | options)], run_dir.parent):
        assert each.returncode == 0, each.stderr


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_weights_are_the_same_bits_for_any_number_of_processes(precision: str, tmp_path: Path) -> None:
    """Each process may keep its data sets in another folder."""
    train(tmp_path / "one", **RUN, precision=precision)
    train_in(2, tmp_path / "two", OTHER_FOLDERS, precision=precision)
    assert_same_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_may_change_its_number_of_processes(tmp_path: Path) -> None:
    """Eight processes begin, one process goes on, and two end."""
    options = RUN | {"precision": "bf16"}
    train(tmp_path / "one", **options)
    train_in(8, tmp_path / "several", **options | {"steps": 1})
    train(tmp_path / "several", **options | {"steps": 2}, auto_resume=True)
    train_in(2, tmp_path / "several", **options, auto_resume=True)
    assert_same_weights(tmp_path / "one", tmp_path / "several")
    assert log_rows(tmp_path / "one")[-1] == log_rows(tmp_path / "several")[-1]


@pytest.mark.slow
def test_numbers_that_are_no_powers_of_two_train_up_to_rounding(tmp_path: Path) -> None:
    options = {"batch_size": 18, "micro_batch_size": 6}
    train(tmp_path / "one", **RUN | options)
    train_in(3, tmp_path / "three", **options)
    # Adam makes the most of a rounding, as in `test_steps_follow_algorithm_1`.
    for expected, row in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "three"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3)
        assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-2)


def test_micro_batches_have_the_gradients_of_a_batch(tmp_path: Path) -> None:
    options = RUN | {"steps": 1, "log_every": 1, "condition": "mask"}  # which draws for each image
    train(tmp_path / "whole", **options | {"micro_batch_size": None})
    train(tmp_path / "parts", **options)
    (whole,), (parts,) = log_rows(tmp_path / "whole"), log_rows(tmp_path / "parts")
    for column in ("loss", "grad_norm"):  # the log has six digits
        assert float(parts[column]) == pytest.approx(float(whole[column]), rel=1e-5)


def test_a_run_keeps_its_micro_batches_and_says_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    train(tmp_path / "run", **RUN | {"steps": 1, "micro_batch_size": 2})
    same = "batch    8 images a step in micro-batches of 2 on 1 process; weights are the same on 1, 2, 4, ... processes with"
    assert f"{same} --micro-batch-size 2 --threads 1" in caplog.text
    train(tmp_path / "run", **RUN | {"steps": 2, "micro_batch_size": None}, resume=True)
    folder = RunFolder(tmp_path / "run")
    config = folder.read_config()
    assert config["options"]["micro_batch_size"] == 2
    folder.record.write_text(json.dumps(config | {"threads": 2}))
    train(tmp_path / "run", **RUN | {"steps": 3, "micro_batch_size": 4}, resume=True)
    for before, now in (("micro_batch_size 2", "4"), ("threads 2", "1")):
        assert f"was trained with {before} and goes on with {now}: gradients are summed in another order" in caplog.text


@pytest.mark.parametrize(
    ("processes", "options", "name", "wanted", "got"),
    [
        (
            1,
            {"micro_batch_size": 3},
            "micro_batch_size",
            "times 1 process to divide batch_size 16",
            "micro_batch_size 3; 2 fits",
        ),
        (
            1,
            {"micro_batch_size": 11},
            "micro_batch_size",
            "times 1 process to divide batch_size 16",
            "micro_batch_size 11; 8 fits",
        ),
        (1, {"micro_batch_size": 17}, "micro_batch_size", "to be an integer in 1..16 or None", "17"),
        (3, {}, "batch_size", "to be a multiple of 3, one for each process", "16"),
        (
            2,
            {"micro_batch_size": 16},
            "micro_batch_size",
            "times 2 processes to divide batch_size 16",
            "micro_batch_size 16; 8 fits",
        ),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(
    processes: int, options: dict[str, int], name: str, wanted: str, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "from_all", lambda team, value: [value] * team.size)
    objective, given = Objective(NoiseSchedule.linear()), TrainOptions(batch_size=16, **options)
    with refused(InvalidValue(name, wanted, got)):
        open_run(RunFolder(tmp_path / "run"), given, objective, Processes(0, processes), {})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_are_given_other_options_are_refused(tmp_path: Path) -> None:
    program = f"import os; other = {{'seed': int(os.environ['RANK'])}}; {TRAIN[:-1]}, **other)"
    for each in run_ranks(2, ["-c", program, str(tmp_path / "run"), json.dumps(RUN)], tmp_path):
        assert "train: expected seed to be 0, as in rank 0, got 1 in rank 1" in each.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_error_of_rank_0_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    first, second = run_ranks(2, ["-c", TRAIN, str(tmp_path / "run"), json.dumps(RUN)], tmp_path)
    assert "UnusablePath: train: expected" in first.stderr
    assert "FirstFailed: rank 1: expected rank 0 to go on, got an error there, which it reports" in second.stderr


# ----------------------------------------------------------------------------------------------------------- torchrun


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def arguments(run_dir: Path, steps: int) -> list[str]:
    return [
        *("train", str(run_dir), "--data=digits", "--channels=16,32", "--layers=1", "--attention=none", "--threads=1"),
        *("--batch-size=16", "--micro-batch-size=8", "--warmup-steps=3", "--sample-every=0", "--log-every=5"),
        *("--checkpoint-every=10", f"--steps={steps}", "--no-tensorboard", "--no-progress", "--auto-resume"),
    ]


def begin(folder: Path, steps: int, *options: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a run, and wait for its first checkpoint. Return torchrun's process, and the numbers of those that it started."""
    process = subprocess.Popen(
        [*LAUNCH, *options, "-m", "ddpm_fast", *arguments(folder, steps)],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 100
    while not RunFolder(folder).checkpoints.folders() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return process, [int(child) for child in children.read_text().split()] if children.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list processes in /proc")
def test_a_killed_rank_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    run_command(*arguments(tmp_path / "whole", 60))
    process, ranks = begin(tmp_path / "run", 60, "--max-restarts=3")
    assert len(ranks) == 2
    os.kill(random.choice(ranks), signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output.decode()
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    process, ranks = begin(tmp_path / "run", 100_000)
    for number in (*ranks, process.pid):  # as Slurm does. torchrun then sends it to the ranks again
        os.kill(number, signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    stopped = re.search(rb"stopped by SIGTERM at step (\d+) of 100000; checkpoint saved", output)
    assert stopped, output.decode()
    step = int(stopped[1])
    assert newest_checkpoint(tmp_path / "run").name == f"step-{step:08d}"
    run_command(*arguments(tmp_path / "run", step + 20))
    assert RunFolder(tmp_path / "run").log.last_step() == step + 20
