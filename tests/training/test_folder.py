"""Run folders: the log, checkpoints with checksums, and nothing foreign touched. Locks are tested in tests/files/."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from refusals import refused
from runs import QUIET, newest_checkpoint, train
from torch import Tensor

from ddpm_fast.cli import main
from ddpm_fast.errors import InvalidValue
from ddpm_fast.files.images import save_grid
from ddpm_fast.nn import UNet
from ddpm_fast.pretrained import load_folder
from ddpm_fast.schedule import NoiseSchedule, Objective
from ddpm_fast.training import checkpoint, state
from ddpm_fast.training import run as run_module
from ddpm_fast.training.checkpoint import why_damaged
from ddpm_fast.training.data import Batch
from ddpm_fast.training.export import export_checkpoint
from ddpm_fast.training.log import CsvLog
from ddpm_fast.training.options import TrainOptions
from ddpm_fast.training.run import RunFolder
from ddpm_fast.training.state import State
from ddpm_fast.training.task import Task


def start(folder: Path, step: int = 4) -> RunFolder:
    train(folder, **QUIET, steps=step, checkpoint_every=2)
    return RunFolder(folder)


def checkpoints(run: RunFolder) -> list[str]:
    return sorted(entry.name for entry in run.checkpoints.path.iterdir())


# --------------------------------------------------------------------------------------------------------------------- log


def test_a_link_in_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    run = start(tmp_path / "run", step=2)
    run.log.path.unlink()
    run.log.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"train: expected '.*log\.csv' to be a file, got a link"):
        train(run.path, **QUIET | {"log_every": 1}, steps=4, resume=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_log_without_a_whole_first_line_begins_again(tmp_path: Path) -> None:
    """A run was killed, or the disk was full, after the file was made."""
    log = CsvLog(tmp_path / "log.csv")
    log.path.write_text("step,sam")
    log.cut(0)
    log.row({"samples": 6}, 1)
    assert (log.path.read_text(), log.last_step()) == ("step,samples\n1,6\n", 1)


def test_a_pipe_in_place_of_the_log_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    run = start(tmp_path / "run", step=2)
    before = run.record.read_text()
    run.log.path.unlink()
    os.mkfifo(run.log.path)
    wanted = r"expected '.*log\.csv' to be a file, got a folder, a pipe or a device"
    with pytest.raises(OSError, match=f"^train: {wanted}"):
        train(run.path, **QUIET, steps=4, resume=True)
    with pytest.raises(OSError, match=f"^export_checkpoint: {wanted}"):
        export_checkpoint(run.path, tmp_path / "out")
    with pytest.raises(OSError, match=wanted):
        run.log.row({"loss": 2.0}, 1)
    assert run.record.read_text() == before
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- checkpoints


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _edit_state(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    edit(state)
    (folder / "state.json").write_text(json.dumps(state))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of the weights": lambda f: _flip_a_byte(f / "unet" / "diffusion_pytorch_model.safetensors"),
    "a byte of the optimizer": lambda f: _flip_a_byte(f / "optimizer.safetensors"),
    "a missing file": lambda f: (f / "optimizer.safetensors").unlink(),
    "a list": lambda f: (f / "state.json").write_text("[]"),
    "a list of files": lambda f: (f / "state.json").write_text('{"files": []}'),
    "no JSON": lambda f: (f / "state.json").write_text("{"),
    "nested without end": lambda f: (f / "state.json").write_text("[" * 100_000),
    "another step": lambda f: _edit_state(f, lambda state: state.update(step=3)),
    "a text as size": lambda f: _edit_state(f, lambda state: state["files"].update({"optimizer.safetensors": "x"})),
    "a device among the files": lambda f: _edit_state(f, lambda state: state["files"].update({"/dev/zero": 0})),
    "a folder among the files": lambda f: ((f / "unet_ema" / "config.json").unlink(), (f / "unet_ema" / "config.json").mkdir()),
    "no state": lambda f: (f / "state.json").unlink(),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, to copy."""
    return start(tmp_path_factory.mktemp("started") / "run").path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_newest_whole_one(
    damage: str, started: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(Path(shutil.copytree(started, tmp_path / "run", symlinks=True)))
    newest = newest_checkpoint(run.path)
    assert newest.name == "step-00000004"
    DAMAGES[damage](newest)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(run.path)
    assert found.name == "step-00000002"
    assert "is damaged and left out" in caplog.text
    assert train(run.path, **QUIET, steps=6, resume=True, checkpoint_every=2).step == 6
    again = newest_checkpoint(run.path)
    assert why_damaged(again) is None


def test_a_checkpoint_of_another_network_is_named(tmp_path: Path) -> None:
    run = start(tmp_path / "run", step=2)
    other = train(tmp_path / "other", **QUIET | {"channels": [16, 16]}, steps=2)
    assert other.step == 2
    shutil.rmtree(run.checkpoints.path)
    shutil.copytree(tmp_path / "other" / "checkpoints", run.checkpoints.path, symlinks=True)
    with pytest.raises(ValueError, match=r"^train: expected the weights in '.*unet' to fit the options, got missing "):
        train(run.path, **QUIET, steps=4, resume=True)


def _spoil(tensors: dict[str, Tensor], kind: str) -> None:
    name = next(name for name in tensors if name.startswith("exp_avg."))
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name] = {"shape": tensors[name][:1], "dtype": tensors[name].long(), "nan": tensors[name] / 0}[kind]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("missing", r"to fit the network, got missing exp_avg\."),
        ("shape", r"expected exp_avg\..* to have shape .* in '.*optimizer\.safetensors'"),
        ("dtype", r"expected exp_avg\..* to be floating, got torch\.int64, in '"),
        ("nan", r"to be finite, got NaN or infinity in exp_avg\."),
        ("header", "optimizer.safetensors' to be a whole safetensors file, got: "),
    ],
)
def test_an_optimizer_that_does_not_fit_is_named(kind: str, wanted: str, tmp_path: Path) -> None:
    run = start(tmp_path / "run", step=2)
    folder = run.checkpoints.path / "step-00000002"
    file = folder / "optimizer.safetensors"
    tensors = safetensors.torch.load_file(file)
    if kind == "header":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        _spoil(tensors, kind)
        safetensors.torch.save_file(tensors, file)
    copied = tmp_path / "copied"
    shutil.move(folder, copied)
    (copied / "state.json").unlink()
    run.checkpoints.add(2, {}, lambda new: shutil.copytree(copied, new, dirs_exist_ok=True), keep=1)  # with its checksums
    with pytest.raises(ValueError, match=wanted):
        train(run.path, **QUIET, steps=4, resume=True)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        (
            "objective",
            Objective(NoiseSchedule.linear(5)).to_config() | {"schedule": {"name": "linear", "num_timesteps": None}},
            r"objective.num_timesteps to be an integer in 1\.\.100000, got None, in '.*config\.json'",
        ),
        ("options", {"lr": 1}, r"options to have all options of a run, got none named batch_size, .* and 23 more, in '.*json'"),
        ("options", TrainOptions().recorded() | {"lr": "x"}, r"options.lr to be a number, got str, in '.*config\.json'"),
        ("options", [], r"'.*config\.json' to have valid fields, got: Expected `object`, got `array` - at `\$\.options`"),
        (
            "dataset",
            {"classes": ["a"]},
            r"'.*config\.json' to have valid fields, got: Object missing required field `images` - at `\$\.dataset`",
        ),
        ("unet", {"freq_shift": "x"}, r"unet.freq_shift to be an integer of at least 0, got 'x', in '.*config\.json'"),
    ],
)
def test_a_wrong_configuration_is_named(field: str, value: object, wanted: str, tmp_path: Path) -> None:
    run = start(tmp_path / "run", step=2)
    config = json.loads(run.record.read_text())
    run.record.write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=rf"^train: expected {wanted}$"):
        train(run.path, **QUIET, steps=4, resume=True)
    with pytest.raises(ValueError, match=rf"^export_checkpoint: expected {wanted}$"):
        export_checkpoint(run.path, tmp_path / "out")


def test_a_call_reads_and_writes_the_configuration_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start(tmp_path / "run", step=2)
    calls: list[str] = []
    for module, name in ((run_module, "read_json"), (state, "write_json")):
        function = getattr(module, name)

        def counted(*arguments: Any, function: Any = function, name: str = name) -> Any:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    arguments = ["train", str(folder.path), "--resume", "--steps=3", "--no-progress"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert calls == ["read_json", "write_json"]


def test_bytes_that_are_no_text_in_the_log_are_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log.path.write_bytes(b"step,loss\n1,0.5\n\xff\xfe,3\n" + b"9" * 5000 + b",3\n2,0.25\n")
    assert run.log.until(2) == "step,loss\n1,0.5\n2,0.25\n"


def test_the_result_after_damage_is_that_of_a_run_without(tmp_path: Path) -> None:
    whole, damaged = start(tmp_path / "whole"), start(tmp_path / "damaged")
    _flip_a_byte(damaged.checkpoints.path / "step-00000004" / "optimizer.safetensors")
    for run in (whole, damaged):
        train(run.path, **QUIET, steps=6, resume=True)
    files = [run.checkpoints.path / "step-00000006" / "optimizer.safetensors" for run in (whole, damaged)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_foreign_files_and_links_are_left_alone(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    foreign = [run.checkpoints.path / name for name in ("step-00000006", "step-00000008", "step-x", ".step-1.tmp", ".a.tmp")]
    foreign[0].write_text("mine")
    foreign[1].symlink_to(elsewhere, target_is_directory=True)
    foreign[2].mkdir()
    foreign[3].symlink_to(elsewhere, target_is_directory=True)
    foreign[4].write_text("mine")
    (run.checkpoints.path / "latest").unlink()
    (run.checkpoints.path / "latest").mkdir()
    assert train(run.path, **QUIET, steps=8, resume=True, checkpoint_every=2).step == 8
    assert foreign[0].read_text() == foreign[4].read_text() == "mine"
    assert foreign[1].is_symlink()
    assert foreign[3].is_symlink()
    assert (elsewhere / "mine").read_text() == "mine"
    assert {"step-00000006-1", "step-00000008-1", "step-x", "latest"} <= set(checkpoints(run))
    latest = newest_checkpoint(run.path)
    assert latest.name == "step-00000008-1"


def test_a_checkpoint_that_goes_while_it_is_read_is_followed_by_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(tmp_path / "run", step=2)
    from_pretrained = UNet.from_pretrained
    waiting = [0]

    def go_on() -> None:
        if waiting:
            train(run.path, **QUIET | {"steps": 4 + 2 * waiting.pop(), "keep": 1}, resume=True)

    def read(*arguments: Any, **options: Any) -> UNet:
        go_on()
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(UNet, "from_pretrained", read)
    load_folder(run.path)
    assert not (run.checkpoints.path / "step-00000002").exists()
    waiting.append(1)
    assert export_checkpoint(run.path, tmp_path / "out").is_dir()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 6
    waiting.append(2)
    train(tmp_path / "next", **QUIET, steps=1, init=run.path)
    monkeypatch.undo()

    def why(folder: Path, part: str | None = "") -> str | None:
        go_on()
        return why_damaged(folder, part)

    waiting.append(3)
    monkeypatch.setattr(checkpoint, "why_damaged", why)
    latest = newest_checkpoint(run.path)
    assert latest.name == "step-00000010"
    assert "damaged" not in caplog.text


def test_a_checkpoint_that_stays_is_read_once(tmp_path: Path) -> None:
    def read(checkpoint: Path) -> None:
        raise ValueError(f"{checkpoint.name} is wrong")

    with pytest.raises(ValueError, match="step-00000002 is wrong"):
        start(tmp_path / "run", step=2).checkpoints.read_newest("", read)


def test_fewer_steps_than_are_done_are_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path / "run")
    before = run.record.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.training.parts.load_dataset", lambda *_, **__: pytest.fail("the images were read"))
        with pytest.raises(ValueError, match=r"train: expected steps to be at least 4, the step of the run in .*, got 3"):
            train(run.path, **QUIET, steps=3, resume=True)
    assert run.record.read_text() == before
    assert train(run.path, **QUIET, steps=4, resume=True).step == 4


def test_a_run_whose_checkpoints_are_lost_does_not_start_again(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    before = run.log.path.read_text()
    run.checkpoints.path.rename(tmp_path / "unmounted")
    wanted = r"train: expected .*checkpoints to have the .* 4 steps, got none; .* remove log\.csv to start again from step 0"
    with pytest.raises(FileNotFoundError, match=wanted):
        train(run.path, **QUIET, steps=4, resume=True)
    assert run.log.path.read_text() == before
    run.log.path.unlink()
    assert train(run.path, **QUIET, steps=2, resume=True).step == 2


def test_a_link_to_a_checkpoint_that_is_gone_does_not_start_again(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    before = run.log.path.read_text()
    for folder in run.checkpoints.folders():
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"to have the checkpoints of the run, whose log\.csv has 4 steps, got none"):
        train(run.path, **QUIET, steps=4, resume=True)
    assert run.log.path.read_text() == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.training.checkpoint.Checkpoints.add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **QUIET, steps=4)
    assert RunFolder(tmp_path / "run").log.last_step() == 4
    assert train(tmp_path / "run", **QUIET, steps=4, resume=True).step == 4
    assert f"{tmp_path / 'run'} has no checkpoint yet: the run starts again from step 0, and its log too" in caplog.text


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path / "run")
    from ddpm_fast.training import loop

    take_step = loop.take_step

    def spoil(task: Task, state: State, batch: Batch) -> tuple[Tensor, float]:
        result = take_step(task, state, batch)
        with torch.no_grad():
            next(state.model.parameters()).view(-1)[0] = float("nan")
        return result

    monkeypatch.setattr(loop, "take_step", spoil)
    with pytest.raises(FloatingPointError, match=r"no longer finite after step 5.*step-00000004"):
        train(run.path, **QUIET, steps=5, resume=True)
    assert checkpoints(run) == ["latest", "step-00000002", "step-00000004"]


# ---------------------------------------------------------------------------------------------------------------------- data


def _images(folder: Path, seed: int) -> None:
    for i in range(6):
        pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed + i)) * 2 - 1
        save_grid(pixels, folder / f"{i}.png", columns=1, padding=0)


@pytest.mark.parametrize("check", ["sample", "exact"])
def test_other_images_stop_a_resumed_run(check: str, tmp_path: Path) -> None:
    options = QUIET | {"data": str(tmp_path / "images"), "steps": 1}
    _images(tmp_path / "images", 0)
    train(tmp_path / "run", **options, data_check=check)
    assert train(tmp_path / "run", **options | {"steps": 2}, resume=True, data_check=check).step == 2
    shutil.rmtree(tmp_path / "images")
    _images(tmp_path / "images", 10)
    with pytest.raises(ValueError, match=r"expected the images .*, got 6 others; .*--data-check off"):
        train(tmp_path / "run", **options | {"steps": 3}, resume=True, data_check=check)
    assert train(tmp_path / "run", **options | {"steps": 3}, resume=True, data_check="off").step == 3
    assert train(tmp_path / "run", **options | {"steps": 4}, resume=True, data_check=check).step == 4  # with the new ones


def test_images_that_were_moved_are_named_by_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    _images(Path("images"), 0)
    options = QUIET | {"data": "images"}
    train("run", **options, steps=1)
    stored = RunFolder("run").read_config()["options"]
    assert stored["data"] == str(tmp_path / "images")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train("../run", **QUIET | {"data": stored["data"]}, steps=2, resume=True).step == 2
    Path("../images").rename("moved")
    with pytest.raises(ValueError, match=r"expected data to be one of .* a folder, or a .zip, .npy or .npz, got '.*images'"):
        train("../run", **QUIET | {"data": stored["data"]}, steps=3, resume=True)
    assert train("../run", **QUIET | {"data": "moved"}, steps=3, resume=True).step == 3
    assert RunFolder("../run").read_config()["options"]["data"] == str(tmp_path / "elsewhere" / "moved")
    _images(Path("others"), 10)
    with refused(
        InvalidValue(
            "train",
            "",
            "the images that the run in ../run was started with",
            '6 others; pass data_check="off" (--data-check off) to go on with them',
        )
    ):
        train("../run", **QUIET | {"data": "others"}, steps=4, resume=True)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    start(tmp_path / "run")
    assert len(os.listdir("/proc/self/fd")) == before
