"""Run folders: the log, checkpoints with checksums, and nothing foreign touched. Locks are tested in tests/files/."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import safetensors.torch
import torch
from commands import run as run_command
from items import flip_bits
from runs import QUIET, assert_same_weights, newest_checkpoint, pictures, train
from torch import Tensor

from ddpm_fast import NoiseSchedule, Objective, UNet, export_checkpoint, load_folder
from ddpm_fast.training import checkpoint, state
from ddpm_fast.training import run as run_module
from ddpm_fast.training.log import CsvLog
from ddpm_fast.training.options import STRUCTS
from ddpm_fast.training.run import RunFolder


def start(folder: Path, steps: int = 4) -> RunFolder:
    train(folder, **QUIET, steps=steps, checkpoint_every=2)
    return RunFolder(folder)


def checkpoints(run: RunFolder) -> list[str]:
    return sorted(entry.name for entry in run.checkpoints.path.iterdir())


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, to copy."""
    return start(tmp_path_factory.mktemp("started") / "run").path


@pytest.fixture(scope="module")
def whole(started: Path) -> Path:
    """The folder of a run of six steps."""
    return start(started.with_name("whole"), 6).path


@pytest.fixture
def run(started: Path, tmp_path: Path) -> RunFolder:
    """A run of four steps, with a checkpoint every two."""
    return RunFolder(Path(shutil.copytree(started, tmp_path / "run", symlinks=True)))


# --------------------------------------------------------------------------------------------------------------------- log


def test_a_log_without_a_whole_first_line_begins_again(tmp_path: Path) -> None:
    """A run was killed, or the disk was full, after the file was made."""
    log = CsvLog(tmp_path / "log.csv")
    log.path.write_text("step,sam")
    log.cut(0)
    log.row({"samples": 6}, 1)
    assert (log.path.read_text(), log.last_step()) == ("step,samples\n1,6\n", 1)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda log: log.symlink_to(log.with_name("elsewhere")), "a link"),
        pytest.param(
            lambda log: os.mkfifo(log),
            "a folder, a pipe or a device",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names"),
        ),
    ],
    ids=["link", "pipe"],
)
def test_what_is_no_file_in_place_of_the_log_is_neither_followed_nor_waited_for(
    make: Callable[[Path], object], got: str, run: RunFolder, tmp_path: Path
) -> None:
    before = run.record.read_text()
    run.log.path.unlink()
    make(run.log.path)
    for caller, call in {
        "train: ": lambda: train(run.path, **QUIET, steps=6, resume=True),
        "export_checkpoint: ": lambda: export_checkpoint(run.path, tmp_path / "out"),
        "": lambda: run.log.row({"loss": 2.0}, 1),
    }.items():
        with pytest.raises(OSError, match=rf"^{caller}expected '.*log\.csv' to be a file, got {got}"):
            call()
    assert run.record.read_text() == before
    assert not run.path.joinpath("elsewhere").exists()
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_in_the_log_are_left_out(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.path.write_bytes(b"step,loss\n1,0.5\n\xff\xfe,3\n" + b"9" * 5000 + b",3\n2,0.25\n")
    assert log.until(2) == "step,loss\n1,0.5\n2,0.25\n"


# --------------------------------------------------------------------------------------------------------------- checkpoints


def _edit_state(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    edit(state)
    (folder / "state.json").write_text(json.dumps(state))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of the weights": lambda f: flip_bits(f / "unet" / "diffusion_pytorch_model.safetensors", -99),
    "a byte of the optimizer": lambda f: flip_bits(f / "optimizer.safetensors", -99),
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


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_newest_whole_one(
    damage: str, run: RunFolder, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is that of a run without damage."""
    DAMAGES[damage](run.checkpoints.path / "step-00000004")
    assert newest_checkpoint(run.path).name == "step-00000002"
    assert "is damaged and left out" in caplog.text
    train(run.path, **QUIET, steps=6, resume=True, checkpoint_every=2)
    assert_same_weights(whole, run.path)


def test_a_checkpoint_of_another_network_is_named(run: RunFolder, tmp_path: Path) -> None:
    train(tmp_path / "other", **QUIET | {"channels": [16, 16]}, steps=4)
    shutil.rmtree(run.checkpoints.path)
    shutil.copytree(tmp_path / "other" / "checkpoints", run.checkpoints.path, symlinks=True)
    with pytest.raises(ValueError, match=r"^train: expected the weights in '.*unet' to fit the options, got missing "):
        train(run.path, **QUIET, steps=6, resume=True)


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (None, r"to fit the network, got missing exp_avg\."),
        (lambda tensor: tensor[:1], r"expected exp_avg\..* to have shape .* in '.*optimizer\.safetensors'"),
        (lambda tensor: tensor.long(), r"expected exp_avg\..* to be floating, got torch\.int64, in '"),
        (lambda tensor: tensor / 0, r"to be finite, got NaN or infinity in exp_avg\."),
        (torch.clone, "optimizer.safetensors' to be a whole safetensors file, got: "),
    ],
    ids=["missing", "shape", "dtype", "nan", "header"],
)
def test_an_optimizer_that_does_not_fit_is_named(
    spoil: Callable[[Tensor], Tensor] | None, wanted: str, run: RunFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.move(run.checkpoints.path / "step-00000004", tmp_path / "copied"))
    (folder / "state.json").unlink()
    file = folder / "optimizer.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.startswith("exp_avg."))
    moment = tensors.pop(name)
    if spoil is not None:
        tensors[name] = spoil(moment)
    safetensors.torch.save_file(tensors, file)
    if "whole" in wanted:
        file.write_bytes(file.read_bytes()[:-1])
    run.checkpoints.add(4, {}, lambda new: shutil.copytree(folder, new, dirs_exist_ok=True), keep=1)  # with its checksums
    with pytest.raises(ValueError, match=wanted):
        train(run.path, **QUIET, steps=6, resume=True)


RECORDED = {name: value for struct in STRUCTS for name, value in struct().recorded().items()}
FIELDS = r"'.*config\.json' to have valid fields, got: "


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        (
            "objective",
            Objective(NoiseSchedule.linear(5)).to_config() | {"schedule": {"name": "linear", "num_timesteps": None}},
            r"objective.num_timesteps to be an integer in 1\.\.100000, got None, in '.*config\.json'",
        ),
        *((name, ..., rf"{FIELDS}Object missing required field `{name}`") for name in ("options", "objective", "dataset")),
        (None, [], r"'.*config\.json' to hold a JSON object, got list"),
        ("objective", {}, r"the keys schedule, prediction, .*, got none, in '.*config\.json'"),
        ("dataset", {}, rf"{FIELDS}Object missing required field `images` - at `\$\.dataset`"),
        ("options", {}, r"options to have all options of a run, got none named attention, .* and 44 more, in '.*json'"),
        ("options", {"lr": 1}, r"options to have all options of a run, got none named attention, .* and 43 more, in '.*json'"),
        ("options", RECORDED | {"lr": "x"}, r"options.lr to be a number, got str, in '.*config\.json'"),
        ("options", [], rf"{FIELDS}Expected `object`, got `array` - at `\$\.options`"),
        ("dataset", {"classes": ["a"]}, rf"{FIELDS}Object missing required field `images` - at `\$\.dataset`"),
        ("format", ..., "format to be 7, got None: another version .*"),
        ("format", 2, r"format to be 7, got 2: another version .* start from its checkpoints \(init\), in '.*config\.json'"),
        ("unet", {"freq_shift": "x"}, r"unet.freq_shift to be an integer of at least 0, got 'x', in '.*config\.json'"),
    ],
)
def test_a_wrong_configuration_is_named(field: str | None, value: object, wanted: str, run: RunFolder, tmp_path: Path) -> None:
    """Without a field, the value takes the place of the configuration. An ellipsis removes the field."""
    changed = json.loads(run.record.read_text()) | {field: value}
    kept = {name: part for name, part in changed.items() if part is not ...}
    run.record.write_text(json.dumps(kept if field else value))
    with pytest.raises(ValueError, match=rf"^train: expected {wanted}$"):
        train(run.path, **QUIET, steps=6, resume=True)
    with pytest.raises(ValueError, match=rf"^export_checkpoint: expected {wanted}$"):
        export_checkpoint(run.path, tmp_path / "out")


def test_a_call_reads_and_writes_the_configuration_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = Mock(wraps=run_module.read_json), Mock(wraps=state.write_json)
    monkeypatch.setattr(run_module, "read_json", read)
    monkeypatch.setattr(state, "write_json", write)
    run_command("train", run.path, "--resume", "--steps=5", "--no-progress")
    assert (read.call_count, write.call_count) == (1, 1)


def test_foreign_files_and_links_are_left_alone(run: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    files = [run.checkpoints.path / name for name in ("step-00000006", ".a.tmp")]
    links = [run.checkpoints.path / name for name in ("step-00000008", ".step-1.tmp")]
    for file, link in zip(files, links, strict=True):
        file.write_text("mine")
        link.symlink_to(elsewhere, target_is_directory=True)
    (run.checkpoints.path / "step-x").mkdir()
    (run.checkpoints.path / "latest").unlink()
    (run.checkpoints.path / "latest").mkdir()
    assert train(run.path, **QUIET, steps=8, resume=True, checkpoint_every=2).step == 8
    assert [file.read_text() for file in (*files, elsewhere / "mine")] == ["mine"] * 3
    assert all(link.is_symlink() for link in links)
    assert {"step-00000006-1", "step-00000008-1", "step-x", "latest"} <= set(checkpoints(run))
    assert newest_checkpoint(run.path).name == "step-00000008-1"


def test_a_checkpoint_that_goes_while_it_is_read_is_followed_by_the_newest(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waiting: list[int] = []  # steps of which a run goes on in the middle of the next call

    def go_on(*_: Any, **__: Any) -> Any:
        if waiting:
            train(run.path, **QUIET | {"steps": waiting.pop(), "keep": 1}, resume=True)
        return DEFAULT  # the mock then calls what it wraps

    monkeypatch.setattr(UNet, "from_pretrained", Mock(wraps=UNet.from_pretrained, side_effect=go_on))
    waiting.append(5)
    load_folder(run.path)
    assert checkpoints(run) == ["latest", "step-00000005"]
    waiting.append(6)
    export_checkpoint(run.path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 6
    waiting.append(7)
    train(tmp_path / "next", **QUIET, steps=1, init=run.path)
    monkeypatch.setattr(checkpoint, "why_damaged", Mock(wraps=checkpoint.why_damaged, side_effect=go_on))
    waiting.append(8)
    assert newest_checkpoint(run.path).name == "step-00000008"
    assert "damaged" not in caplog.text


def test_a_checkpoint_that_stays_is_read_once(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="it is wrong"):
        run.checkpoints.read_newest("", Mock(side_effect=[ValueError("it is wrong"), None]))


def test_fewer_steps_than_are_done_are_refused_before_work(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.record.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.training.preparation.load_dataset", lambda *_, **__: pytest.fail("the images were read"))
        with pytest.raises(ValueError, match=r"train: expected steps to be at least 4, the step of the run in .*, got 3"):
            train(run.path, **QUIET, steps=3, resume=True)
    assert run.record.read_text() == before
    assert train(run.path, **QUIET, steps=4, resume=True).step == 4


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/step-*"])
def test_a_run_whose_checkpoints_are_lost_does_not_start_again(lost: str, run: RunFolder) -> None:
    """Their folder may be on another disk. The link to the latest one may be left."""
    before = run.log.path.read_text()
    for folder in run.path.glob(lost):
        shutil.rmtree(folder)
    wanted = r"train: expected .*checkpoints to have the .* 4 steps, got none; .* remove log\.csv to start again from step 0"
    with pytest.raises(FileNotFoundError, match=wanted):
        train(run.path, **QUIET, steps=4, resume=True)
    assert run.log.path.read_text() == before
    run.log.path.unlink()
    assert train(run.path, **QUIET, steps=2, resume=True).step == 2


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.training.checkpoint.Checkpoints.add", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **QUIET, steps=4)
    assert RunFolder(tmp_path / "run").log.last_step() == 4
    assert train(tmp_path / "run", **QUIET, steps=4, resume=True).step == 4
    assert f"{tmp_path / 'run'} has no checkpoint yet: the run starts again from step 0, and its log too" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("check", ["sample", "exact"])
@pytest.mark.parametrize("changed", ["images", "conditions"])
def test_other_images_or_conditions_stop_a_resumed_run(check: str, changed: str, tmp_path: Path) -> None:
    pairs = {"data": pictures(tmp_path / "images"), "condition": pictures(tmp_path / "conditions", seed=2)}
    folder, options = tmp_path / "run", QUIET | pairs | {"batch_size": 2}
    train(folder, **options, steps=1, data_check=check)
    train(folder, **options, steps=2, resume=True, data_check=check)
    pictures(tmp_path / changed, seed=1)
    with pytest.raises(ValueError, match=r"expected the images .*, got 3 others; .*--data-check off"):
        train(folder, **options, steps=3, resume=True, data_check=check)
    train(folder, **options, steps=3, resume=True, data_check="off")
    assert train(folder, **options, steps=4, resume=True, data_check=check).step == 4  # with the new ones


def test_images_that_were_moved_are_named_by_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    pictures(Path("images"))
    options = QUIET | {"batch_size": 2}
    train("run", **options | {"data": "images"}, steps=1)
    options["data"] = str(tmp_path / "images")
    assert RunFolder("run").read_config()["options"]["data"] == options["data"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    train("../run", **options, steps=2, resume=True)
    Path("../images").rename("moved")
    with pytest.raises(ValueError, match=r"expected data to be one of .* a folder, or a .zip, .npy or .npz, got '.*images'"):
        train("../run", **options, steps=3, resume=True)
    train("../run", **options | {"data": "moved"}, steps=3, resume=True)
    assert RunFolder("../run").read_config()["options"]["data"] == str(tmp_path / "elsewhere" / "moved")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    start(tmp_path / "run")
    assert len(os.listdir("/proc/self/fd")) == before
