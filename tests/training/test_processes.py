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
from launching import run_ranks
from refusals import refused
from runs import QUIET, assert_same_weights, log_rows, newest_checkpoint, train

from ddpm_fast.errors import InvalidValue
from ddpm_fast.training.run import RunFolder

HELPERS = str(Path(__file__).parents[1] / "helpers")
RUN: dict[str, Any] = {
    **QUIET,
    "batch_size": 16,
    "micro_batch_size": 2,
    "dropout": 0.1,
    "flip": True,
    "steps": 4,
    "log_every": 2,
}
START = f"import json, os, sys; sys.path.insert(0, {HELPERS!r}); from runs import train; "
SCRIPT = START + "train(sys.argv[1], **json.loads(sys.argv[2]))"
OTHER_FOLDERS = START + "train(sys.argv[1], **json.loads(sys.argv[2]), data_dir='of rank ' + os.environ['RANK'])"


def train_in(size: int, run_dir: Path, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Train in several processes."""
    return run_ranks(size, ["-c", SCRIPT, str(run_dir), json.dumps(RUN | options)], run_dir.parent)


def succeed_in(size: int, run_dir: Path, **options: Any) -> None:
    for each in train_in(size, run_dir, **options):
        assert each.returncode == 0, each.stderr


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_weights_are_the_same_bits_for_any_number_of_processes(precision: str, tmp_path: Path) -> None:
    """Each process may keep its data sets in another folder."""
    train(tmp_path / "one", **RUN, precision=precision)
    options = json.dumps(RUN | {"precision": precision})
    for each in run_ranks(2, ["-c", OTHER_FOLDERS, str(tmp_path / "two"), options], tmp_path):
        assert each.returncode == 0, each.stderr
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert log_rows(tmp_path / "one") == log_rows(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_may_change_its_number_of_processes(precision: str, tmp_path: Path) -> None:
    """Four processes begin, one process goes on, and two end."""
    train(tmp_path / "one", **RUN, precision=precision)
    succeed_in(4, tmp_path / "several", precision=precision, steps=1)
    train(tmp_path / "several", **RUN | {"steps": 2}, precision=precision, auto_resume=True)
    succeed_in(2, tmp_path / "several", precision=precision, auto_resume=True)
    assert_same_weights(tmp_path / "one", tmp_path / "several")
    assert log_rows(tmp_path / "one")[-1] == log_rows(tmp_path / "several")[-1]


@pytest.mark.slow
def test_eight_processes_train_the_same_weights(tmp_path: Path) -> None:
    train(tmp_path / "one", **RUN)
    succeed_in(8, tmp_path / "eight")
    assert_same_weights(tmp_path / "one", tmp_path / "eight")


@pytest.mark.slow
def test_numbers_that_are_no_powers_of_two_train_up_to_rounding(tmp_path: Path) -> None:
    options = {"batch_size": 18, "micro_batch_size": 6}
    train(tmp_path / "one", **RUN | options)
    succeed_in(3, tmp_path / "three", **options)
    one, three = log_rows(tmp_path / "one"), log_rows(tmp_path / "three")
    # Adam makes the most of a rounding, as in `test_steps_follow_algorithm_1`.
    for expected, row in zip(one, three, strict=True):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3)
        assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-2)


def test_micro_batches_have_the_gradients_of_a_batch(tmp_path: Path) -> None:
    options = RUN | {"steps": 1, "log_every": 1}
    train(tmp_path / "whole", **options | {"micro_batch_size": None})
    train(tmp_path / "parts", **options)
    (whole,), (parts,) = log_rows(tmp_path / "whole"), log_rows(tmp_path / "parts")
    for column in ("loss", "grad_norm"):  # the log has six digits
        assert float(parts[column]) == pytest.approx(float(whole[column]), rel=1e-5)


def test_a_run_keeps_its_micro_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_fast")
    train(tmp_path / "run", **RUN | {"steps": 1})
    same = "batch    16 images a step in micro-batches of 2 on 1 process; weights are the same on 1, 2, 4, ... processes with"
    assert f"{same} --micro-batch-size 2 --threads 1" in caplog.text
    train(tmp_path / "run", **RUN | {"steps": 2, "micro_batch_size": None}, resume=True)
    assert RunFolder(tmp_path / "run").read_config()["options"]["micro_batch_size"] == 2
    train(tmp_path / "run", **RUN | {"steps": 3, "micro_batch_size": 4}, resume=True)
    assert "was trained with micro_batch_size 2 and goes on with 4: gradients are summed in another order" in caplog.text


def test_batches_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    with refused(
        InvalidValue("train", "micro_batch_size", "times 1 process to divide batch_size 16", "micro_batch_size 3; 2 fits")
    ):
        train(tmp_path / "run", **RUN | {"micro_batch_size": 3})
    with refused(
        InvalidValue("train", "micro_batch_size", "times 1 process to divide batch_size 16", "micro_batch_size 11; 8 fits")
    ):
        train(tmp_path / "run", **RUN | {"micro_batch_size": 11})
    with refused(InvalidValue("train", "micro_batch_size", "to be an integer in 1..16 or None", "17")):
        train(tmp_path / "run", **RUN | {"micro_batch_size": 17})
    for each in train_in(3, tmp_path / "run", micro_batch_size=None):
        assert "InvalidValue: train: expected batch_size to be a multiple of 3, one for each process, got 16" in each.stderr
    for each in train_in(2, tmp_path / "run", micro_batch_size=16):
        assert "times 2 processes to divide batch_size 16, got micro_batch_size 16; 8 fits" in each.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_are_given_other_options_are_refused(tmp_path: Path) -> None:
    script = START + "train(sys.argv[1], **json.loads(sys.argv[2]) | {'lr': 1e-3 * (1 + int(os.environ['RANK']))})"
    first, second = run_ranks(2, ["-c", script, str(tmp_path / "run"), json.dumps(RUN)], tmp_path)
    wanted = "InvalidValue: train: expected lr to be the same in all processes, got 0.001 in rank 0 and 0.002 in rank 1"
    assert wanted in first.stderr
    assert wanted in second.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_error_of_rank_0_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    first, second = train_in(2, tmp_path / "run")
    assert "UnusablePath: train: expected" in first.stderr
    assert "FirstFailed: rank 1: expected rank 0 to go on, got an error there, which it reports" in second.stderr


def test_a_change_of_threads_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", **RUN | {"steps": 1})
    train(tmp_path / "run", **RUN | {"steps": 2, "threads": 2}, resume=True)
    assert "was trained with threads 1 and goes on with 2" in caplog.text


# ----------------------------------------------------------------------------------------------------------- torchrun


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def command(run_dir: Path, steps: int, launch: list[str] = LAUNCH) -> list[str]:
    options = {
        **{"--data": "digits", "--channels": "16,32", "--layers": "1", "--attention": "none", "--batch-size": "16"},
        **{"--micro-batch-size": "8", "--warmup-steps": "3", "--sample-every": "0", "--log-every": "5", "--threads": "1"},
        **{"--checkpoint-every": "10", "--steps": str(steps)},
    }
    flags = [part for option in options.items() for part in option]
    return [*launch, "-m", "ddpm_fast", "train", str(run_dir), *flags, "--no-tensorboard", "--no-progress", "--auto-resume"]


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list processes in /proc")
def test_a_killed_rank_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path / "whole", 60, [sys.executable]), check=True, capture_output=True, cwd=tmp_path)
    launch = [*LAUNCH, "--max-restarts=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(tmp_path / "run", 60, launch), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run = RunFolder(tmp_path / "run")
    deadline = time.monotonic() + 100
    while not run.checkpoints.folders() and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    os.kill(random.choice(ranks), signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output.decode()
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path / "run", 100_000), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run = RunFolder(tmp_path / "run")
    deadline = time.monotonic() + 100
    while not run.checkpoints.folders() and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in (*children_of(process.pid), process.pid):  # as Slurm does. torchrun then sends it to the ranks again
        os.kill(number, signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    stopped = re.search(rb"stopped by SIGTERM at step (\d+) of 100000; checkpoint saved", output)
    assert stopped, output.decode()
    step = int(stopped[1])
    checkpoint = newest_checkpoint(run.path)
    assert checkpoint.name == f"step-{step:08d}"
    subprocess.run(command(tmp_path / "run", step + 20), check=True, capture_output=True, cwd=tmp_path)
    assert run.log.last_step() == step + 20
