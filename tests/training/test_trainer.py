"""`Trainer`: the run of `train` with a network and a data set of one's own."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from commands import run as run_command
from items import read_data, whole
from launching import run_ranks
from PIL import Image
from refusals import by, refused
from runs import (
    QUIET,
    SHARED,
    assert_same_runs,
    assert_same_weights,
    log_rows,
    newest_checkpoint,
    resume_and_compare,
    train,
)
from torch import Tensor
from torch.utils.data import ChainDataset, Dataset, Subset, TensorDataset

import ddpm_fast
from ddpm_fast import Logger, NoiseSchedule, Trainer, TrainOptions, UNet, load_folder
from ddpm_fast.data.items import to_unit_range
from ddpm_fast.data.loader import batches
from ddpm_fast.data.user_dataset import UserDataset
from ddpm_fast.distributed import ProcessLost
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.interface import Labels
from ddpm_fast.training import loop
from ddpm_fast.training.rng import TrainingRng
from ddpm_fast.training.state import State
from ddpm_fast.training.task import Task

TEN = Labels.of_number(10)


class Digits(Dataset[Any]):
    """The digits as a data set that knows nothing of this package. `change` is made to each item."""

    def __init__(self, change: Callable[[int, Tensor, int], Any] = lambda index, image, label: (image, label)) -> None:
        self.digits, self.change = read_data("digits"), change

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> Any:
        image, label, _ = self.digits[index]
        return self.change(index, image, label)


def network(**changes: Any) -> UNet:
    """Return a tiny network for digits, with the weights from which `train` starts with seed 0."""
    config = {
        **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 32], "layers_per_block": 1},
        **{"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 4},
        **{"attention_head_dim": None, "num_class_embeds": 11, "downsample_padding": 0, "flip_sin_to_cos": False},
        **{"freq_shift": 1, "norm_eps": 1e-6},
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(TrainingRng(0, 6).weights_seed)
        return UNet(**config | changes)


def trainer(run_dir: Path, dataset: Any = None, model: UNet | None = None, **options: Any) -> Trainer:
    """Return a trainer of three steps on digits, unless the options say otherwise."""
    dataset = Digits() if dataset is None else dataset
    model = network() if model is None else model
    arguments = {name: options.pop(name) for name in ("on_step", "on_checkpoint", "loggers") if name in options}
    schedule = options.pop("schedule", NoiseSchedule.linear())
    return Trainer(model, schedule, dataset, TrainOptions(**SHARED | {"steps": 3} | options), run_dir, **arguments)


def run(run_dir: Path, *arguments: Any, **options: Any) -> Trainer:
    """Run a trainer, and return it."""
    made = trainer(run_dir, *arguments, **options)
    made.run()
    return made


def assert_same_parameters(a: UNet, b: UNet) -> None:
    assert [name for name, value in a.state_dict().items() if not torch.equal(value.cpu(), b.state_dict()[name].cpu())] == []


def test_that_msgspec_is_missing_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are read by it, and the second one reads the first."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.delitem(sys.modules, "ddpm_fast.schemas", raising=False)
    monkeypatch.delitem(vars(ddpm_fast), "schemas", raising=False)
    with pytest.raises(ModuleNotFoundError, match="msgspec"):
        trainer(tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- the same as train


def test_weights_are_those_of_train(tmp_path: Path) -> None:
    """With labels, dropout, flips and bfloat16, on a data set of this package and on a plain one."""
    options = {"steps": 5, "flip": True, "precision": "bf16", "loss_weight": "min_snr", "label_dropout": 0.5}
    train(tmp_path / "train", **QUIET | options, dropout=0.1)
    for name, dataset in (("own", read_data("digits")), ("plain", Digits())):
        trained = run(tmp_path / name, dataset, network(dropout=0.1, sample_size=None), **options)
        assert_same_runs(tmp_path / "train", tmp_path / name)
    loaded = load_folder(tmp_path / "plain")
    assert_same_parameters(loaded.model, trained.ema)
    assert loaded.model.config["class_names"] == list("0123456789")
    assert [load_folder(tmp_path / name).model.config["no_label"] for name in ("train", "own", "plain")] == [10, 10, 10]
    assert loaded.model.config["sample_size"] == 8
    checkpoint = newest_checkpoint(tmp_path / "plain")
    assert_same_parameters(UNet.from_pretrained(checkpoint / "unet"), trained.model)


def test_an_altered_network_resumes_exactly(tmp_path: Path) -> None:
    """Its own layers draw from PyTorch's generator, and its forward need not know of seeds."""

    class Altered(UNet):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(torch.nn.functional.dropout(x, 0.2), t, class_labels)

    def begin(folder: Path, **options: Any) -> None:
        model = Altered(**network().config)
        model.load_state_dict(network().state_dict())
        run(folder, None, model, **options)

    begin(tmp_path / "parts", steps=2)
    resume_and_compare(begin, tmp_path / "parts", steps=4)


def test_a_run_from_before_no_label_was_written_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "parts", steps=2)
    file = tmp_path / "parts" / "config.json"
    config = json.loads(file.read_text())
    assert config["unet"].pop("no_label") == 10
    file.write_text(json.dumps(config))
    resume_and_compare(partial(run), tmp_path / "parts", steps=3)
    assert load_folder(tmp_path / "parts").interface.labels.none == 10


def pair(change: Callable[[Tensor, int, Tensor], Any]) -> Digits:
    """Return the digits as a data set with conditions of two channels. `change` is made to image, label and condition."""
    return Digits(lambda index, image, label: change(image, label, torch.cat([image.flip(2), image // 2])))


TRIPLES = partial(pair, lambda image, label, condition: (image, label, condition))
PAIR, UNLABELLED = {"in_channels": 3}, {"num_class_embeds": None}
FORMS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "pil": (Digits, lambda: Digits(lambda i, image, label: (Image.fromarray(np.asarray(image[0])), label)), {}),
    "pil-rgb": (
        Digits,
        lambda: Digits(lambda i, image, label: (Image.fromarray(np.asarray(image[0])).convert("RGB"), np.int64(label))),
        {},
    ),
    "float32": (Digits, lambda: Digits(lambda i, image, label: [to_unit_range(image), torch.tensor(label)]), {}),
    "float64": (Digits, lambda: Digits(lambda i, image, label: (to_unit_range(image).double(), label)), {}),
    "mapping": (TRIPLES, lambda: pair(lambda *item: dict(zip(("image", "label", "condition"), item, strict=True))), PAIR),
    "float condition": (TRIPLES, lambda: pair(lambda image, label, condition: (image, label, to_unit_range(condition))), PAIR),
    "tuple of one": (Digits, lambda: TensorDataset(whole(read_data("digits")).images), UNLABELLED),
}


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form_train_the_same(form: str, tmp_path: Path) -> None:
    """Conditions are mirrored with their images."""
    *datasets, changes = FORMS[form]
    for name, dataset in zip(("usual", "other"), datasets, strict=True):
        run(tmp_path / name, dataset(), network(**changes), flip=True)
    assert_same_weights(tmp_path / "usual", tmp_path / "other")
    assert load_folder(tmp_path / "other").model.config.get("condition") == ("images" if changes is PAIR else None)


def test_names_of_classes_come_from_the_network_the_data_set_or_numbers(tmp_path: Path) -> None:
    dataset = Digits()
    dataset.classes = [f"digit {i}" for i in range(10)]  # type: ignore[attr-defined]  # as torchvision's have
    assert trainer(tmp_path, dataset).model.config["class_names"] == dataset.classes  # type: ignore[attr-defined]
    names = list("abcdefghij")
    assert trainer(tmp_path, dataset, network(class_names=names)).model.config["class_names"] == names
    dataset.classes = ["one"]  # type: ignore[attr-defined]
    assert trainer(tmp_path, dataset).model.config["class_names"] == list("0123456789")


# ------------------------------------------------------------------------------------------------------------------ resuming


def test_runs_of_train_and_of_a_trainer_on_its_data_set_go_on_in_a_trainer(tmp_path: Path) -> None:
    train(tmp_path / "run", **QUIET | {"steps": 2})
    resume_and_compare(run, tmp_path / "run", dataset=read_data("digits"), steps=5)


def mirror(index: int, image: Tensor, label: int) -> Any:
    return image.flip(-1), label


def test_resuming_as_something_else_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("lr to be 0.001, as in '.*', got 0.002", {"lr": 2e-3}),
        ("ema_warmup to be True, as in '.*', got False", {"ema_warmup": False}),
        (r"model.block_out_channels to be \[16, 32\], .* got \[16, 16\]", {"model": network(block_out_channels=[16, 16])}),
        ("classes to be", {"model": network(num_class_embeds=None)}),
        ("schedule to be NoiseSchedule", {"schedule": NoiseSchedule.cosine()}),
        ("the images that the run", {"dataset": Subset(Digits(), range(1499))}),
        ("the images that the run", {"dataset": Digits(mirror)}),
    ]
    for wanted, changes in cases:
        with pytest.raises(ValueError, match=rf"^Trainer\.run: expected {wanted}"):
            run(tmp_path, resume=True, **changes)
    assert trainer(tmp_path, Digits(mirror), steps=4, resume=True, data_check="off").run().step == 4


def test_train_refuses_a_trainers_run(tmp_path: Path) -> None:
    run(tmp_path)
    wanted = "to hold a run that `train` started, got one of a Trainer; resume it with its Trainer"
    with pytest.raises(ValueError, match=wanted):
        train(tmp_path, **QUIET, steps=4, resume=True)
    assert wanted in " ".join(run_command("train", tmp_path, "--resume", code=2).split())


def test_trained_weights_keep_their_average(tmp_path: Path) -> None:
    train(tmp_path / "first", **QUIET | {"steps": 3})
    checkpoint = newest_checkpoint(tmp_path / "first")
    train(tmp_path / "init", **QUIET | {"steps": 3}, init=checkpoint / "unet")
    run(tmp_path / "trainer", model=UNet.from_pretrained(checkpoint / "unet"), ema_warmup=False)
    assert_same_weights(tmp_path / "init", tmp_path / "trainer")


# ----------------------------------------------------------------------------------------------------------------- callbacks


def test_callbacks_see_each_step_and_each_checkpoint(tmp_path: Path) -> None:
    steps: list[tuple[int, float]] = []
    saved: list[Path] = []

    def on_step(step: int, loss: Tensor) -> None:
        assert (loss.shape, loss.requires_grad) == ((), False)
        steps.append((step, float(loss)))
        loss.zero_()  # it is the callback's

    options = {"steps": 5, "log_every": 5, "checkpoint_every": 2}
    run(tmp_path / "run", **options, on_step=on_step, on_checkpoint=saved.append)
    run(tmp_path / "quiet", **options)
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
    first, *others = (loss for _, loss in steps)
    logged = [(row["step"], float(row["loss"])) for row in log_rows(tmp_path / "run")]
    assert logged == [("1", pytest.approx(first, rel=1e-5)), ("5", pytest.approx(sum(others) / 4, rel=1e-5))]
    assert [path.name for path in saved] == ["step-00000002", "step-00000004", "step-00000005"]
    assert_same_runs(tmp_path / "run", tmp_path / "quiet")


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError])
@pytest.mark.parametrize("callback", ["on_step", "on_checkpoint"])
def test_an_error_of_a_callback_is_raised_as_it_is(callback: str, kind: type[Exception], tmp_path: Path) -> None:
    fail = Mock(side_effect=[kind("mine")] if callback == "on_checkpoint" else [None, kind("mine")])
    options = {"steps": 3, "checkpoint_every": 2}
    with pytest.raises(kind, match=r"^'?mine'?$"):
        run(tmp_path / "run", **options, **{callback: fail})
    assert newest_checkpoint(tmp_path / "run").name == "step-00000002"
    resume_and_compare(run, tmp_path / "run", **options)


# ------------------------------------------------------------------------------------------------------------------- loggers


def logger(method: str = "row", error: Exception | None = None) -> Mock:
    """Return a logger that keeps what it receives, and raises an error in one of its methods."""
    return Mock(spec=Logger, **{f"{method}.side_effect": error})


def test_loggers_receive_the_rows_and_the_images_of_grids(tmp_path: Path) -> None:
    recorder = logger()
    run(tmp_path, steps=5, log_every=2, sample_every=3, sample_steps=1, loggers=[recorder])
    rows = [
        {name: float(value) for name, value in row.items()}
        for row in csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    ]
    received = [{"step": call.args[1], **call.args[0]} for call in recorder.row.call_args_list]
    assert received == [pytest.approx(row, rel=1e-5) for row in rows]
    shapes = [(call.args[1], *call.args[0].shape) for call in recorder.images.call_args_list]
    assert shapes == [(3, 40, 1, 8, 8), (5, 40, 1, 8, 8)]
    recorder.close.assert_called_once_with()


def test_a_first_grid_is_drawn_after_one_percent_of_the_steps(tmp_path: Path) -> None:
    recorder = logger()
    run(tmp_path, steps=200, max_minutes=1e-9, sample_every=1000, sample_steps=1, loggers=[recorder])
    run(tmp_path, steps=200, max_minutes=1e-9, sample_every=1000, sample_steps=1, loggers=[recorder], resume=True)
    assert [call.args[1] for call in recorder.images.call_args_list] == [1, 2]


@pytest.mark.parametrize(("method", "rows"), [("row", 1), ("images", 1), ("close", 3)])
def test_a_logger_that_cannot_write_is_said_once_and_left_out(
    method: str, rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, other = logger(method, OSError(28, "No space left on device")), logger()
    options = {"steps": 3, "log_every": 1, "sample_every": 1, "sample_steps": 1}
    assert trainer(tmp_path, **options, loggers=[full, other]).run().step == 3
    assert caplog.messages == ["Mock fails, so the run goes on without it: [Errno 28] No space left on device"]
    assert (full.row.call_count, full.close.called) == (rows, True)
    assert (other.row.call_count, other.images.call_count, other.close.call_count) == (3, 3, 1)


@pytest.mark.parametrize(("method", "step"), [("row", 1), ("images", 2), ("close", 4)])
def test_another_error_of_a_logger_ends_the_run_with_a_checkpoint(method: str, step: int, tmp_path: Path) -> None:
    """Each other logger is closed."""
    options = {"steps": 4, "log_every": 3, "sample_every": 2, "sample_steps": 1}
    fails, other = logger(method, ValueError("mine")), logger()
    with pytest.raises(ValueError, match=r"^mine$"):
        run(tmp_path / "run", **options, loggers=[fails, other])
    assert newest_checkpoint(tmp_path / "run").name == f"step-{step:08d}"
    assert (other.row.called, other.close.call_count, fails.close.called) == (True, 1, True)
    resume_and_compare(run, tmp_path / "run", **options)
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "run")


def test_an_error_of_the_run_is_shown_with_that_of_a_logger_that_is_closed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^mine$") as caught:
        run(tmp_path, loggers=[logger("close", ValueError("mine"))], lr=1e30, warmup_steps=0, log_every=1)
    assert isinstance(caught.value.__cause__, FloatingPointError)


# ---------------------------------------------------------------------------------------------------- a step that fails


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError("no room"), "no room"),
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), r"Tried to allocate 2\.00 GiB"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate"), r"\[x\] Def.* allocate"),
        (ProcessLost("no answer"), "no answer"),
    ],
    ids=["python", "gpu", "cpu", "process"],
)
def test_a_step_without_memory_or_another_process_ends_the_run_with_a_checkpoint(
    error: Exception, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", Mock(wraps=loop.take_step, side_effect=[DEFAULT, DEFAULT, error]))
        with pytest.raises(
            type(error),
            match=rf"^{wanted}\nthe run in .* ended at step 2; the last good checkpoint is .*step-00000002, from which",
        ):
            run(tmp_path / "run", steps=4)
    resume_and_compare(run, tmp_path / "run", steps=4)


@pytest.mark.parametrize(("low", "warns"), [(0.0, True), (-1.0, False)])
def test_floats_without_negative_values_are_a_warning(low: float, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    """They are those of torchvision's ToTensor."""
    UserDataset([torch.linspace(low, 1, 64).view(1, 8, 8)], 1, Labels())
    assert ("dataset[0] has no value below 0" in caplog.text) == warns


def test_half_a_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out between the new weights and their average."""
    monkeypatch.setattr(torch, "_foreach_lerp_", Mock(side_effect=[None, None, MemoryError("no room")]))
    with pytest.raises(MemoryError, match=r"^no room\nthe run in .* ended at step 2; there is no checkpoint yet$"):
        run(tmp_path, steps=4)


def test_memory_that_is_too_small_for_the_checkpoint_of_a_step_without_memory_keeps_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    monkeypatch.setattr(loop, "take_step", Mock(wraps=loop.take_step, side_effect=[DEFAULT, DEFAULT, full]))
    monkeypatch.setattr(State, "is_finite", Mock(side_effect=[True, full]))  # before either checkpoint
    with pytest.raises(torch.OutOfMemoryError, match=r"^Tried.*\n.* ended at step 2; .* is .*step-00000002"):
        run(tmp_path, steps=4, checkpoint_every=2)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = network()

    def spoil(step: int, loss: Tensor) -> None:
        if step == 3:
            torch.nn.init.constant_(model.conv_in.bias, math.nan)

    with pytest.raises(FloatingPointError, match=r"no longer finite after step 3.*step-00000002"):
        run(tmp_path, None, model, checkpoint_every=2, on_step=spoil)
    assert newest_checkpoint(tmp_path).name == "step-00000002"


def test_a_run_that_fails_in_its_first_step_can_be_resumed(tmp_path: Path) -> None:
    first = int(TrainingRng(0, 6).indices(0, len(read_data("digits")))[0])
    wrong = Digits(lambda i, image, label: (image, 10 if i == first else label))
    with pytest.raises(ValueError, match=r"got 10\n.*; the last good checkpoint is .*step-00000000"):
        run(tmp_path / "run", wrong)
    resume_and_compare(run, tmp_path / "run")


def test_a_signal_does_not_interrupt_the_checkpoint_of_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher sends SIGTERM to the other processes as soon as one has ended."""
    write, received = State.write, []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))

    def interrupted(state: State, task: Task) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return write(state, task)

    monkeypatch.setattr(State, "write", interrupted)
    try:
        with pytest.raises(ValueError, match=r"^mine$"):
            run(tmp_path, on_step=Mock(side_effect=ValueError("mine")))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (newest_checkpoint(tmp_path).name, received) == ("step-00000001", [])


# ----------------------------------------------------------------------------------------------------------- wrong arguments


def test_a_data_set_of_ones_own_need_not_tell_the_ranges_that_the_network_keeps(tmp_path: Path) -> None:
    """Who maps the values to [-1, 1] has done so in the ranges that drawings are mapped back by."""
    ranges = {"condition": "images", "condition_range": [[-2.0, 2.0]], "data_range": [[-4.0, 4.0]]}
    model = network(in_channels=2, num_class_embeds=None, **ranges)
    run(tmp_path / "run", Digits(lambda index, image, label: (image, None, image)), model)
    assert ranges.items() <= dict(load_folder(tmp_path / "run").model.config).items()


@pytest.mark.parametrize("dataset", [ChainDataset([]), iter([]), 5])
def test_data_sets_that_are_not_map_style_are_refused(dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Trainer: expected dataset to be map-style \(__len__ and __getitem__\), got "):
        trainer(tmp_path, dataset)


def partly_frozen() -> UNet:
    model = network()
    next(model.parameters()).requires_grad_(False)
    return model


DEEP = {"block_out_channels": [16] * 5, "down_block_types": ["DownBlock2D"] * 5, "up_block_types": ["UpBlock2D"] * 5}
own = partial(read_data, "digits")


@pytest.mark.parametrize(
    ("model", "dataset", "wanted"),
    [
        (partly_frozen, Digits, "model to have parameters that require gradients, got conv_in.weight without"),
        (lambda: network().bfloat16(), Digits, "model to be float32, got torch.bfloat16 in conv_in.weight; use precision="),
        (lambda: network().to("meta"), Digits, "model to have weights, got conv_in.weight on the meta device"),
        (lambda: network(out_channels=2), Digits, "model to have out_channels = 1, as the images of dataset, got 2"),
        (
            lambda: network(num_class_embeds=1),
            Digits,
            "model to have num_class_embeds = None or the number of classes plus one",
        ),
        (lambda: network(in_channels=3, out_channels=3), Digits, "dataset[0] to be uint8 [3, H, W], "),
        (
            lambda: network(**DEEP),
            Digits,
            "dataset to have H and W that are multiples of 16, got 8x8",
        ),
        (
            lambda: network(num_class_embeds=12),
            own,
            "model to have num_class_embeds = 11, the number of classes plus one, got 12",
        ),
        (lambda: network(no_label=3), own, "model to have no_label = 10, the last label, or None, got 3"),
        (lambda: network(out_channels=3), own, "model to have out_channels = 1, as the images of dataset, got 3"),
        (network, list, "dataset to have at least one item, got none"),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    model: Callable[[], UNet], dataset: Callable[[], Any], wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Trainer: expected {wanted}")):
        trainer(tmp_path / "run", dataset(), model())
    assert not (tmp_path / "run").exists()


def test_other_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with refused(by("Trainer", InvalidType("model", "to be a Module", "str"))):
        trainer(tmp_path, model="unet")  # type: ignore[arg-type]
    with refused(by("Trainer", InvalidType("loggers", "to be a Logger", "str"))):
        trainer(tmp_path, loggers=["tensorboard"])
    with refused(by("Trainer", InvalidValue("num_classes", "to be None, as model has num_class_embeds", "10"))):
        Trainer(network(), NoiseSchedule.linear(), Digits(), TrainOptions(), tmp_path, num_classes=10)
    with pytest.raises(RuntimeError, match="Trainer: expected run to be called before ema is read"):
        trainer(tmp_path).ema  # noqa: B018


WRONG_ITEMS: list[tuple[Callable[[int, Tensor, int], Any], str]] = [
    (lambda i, image, label: (image[0], label), r"to be uint8 \[1, H, W\], .*, got torch\.uint8 \[8, 8\]"),
    (lambda i, image, label: (image.int(), label), r"to be uint8 .*, got torch\.int32 \[1, 8, 8\]"),
    (lambda i, image, label: (image.to_sparse(), label), r"to be uint8 .*, got torch\.uint8 without values"),
    (lambda i, image, label: (image.float(), label), r"to be in \[-1, 1\], got values from 0 to 2"),
    (lambda i, image, label: (image / 0.0, label), r"to be in \[-1, 1\], got values from nan"),
    (lambda i, image, label: (image.numpy(), label), "to be uint8 .*, got ndarray"),
    (lambda i, image, label: {"pixels": image}, "to have image, label and condition, got pixels"),
    (lambda i, image, label: (Image.new("F", (8, 8)), label), "to be an image, got: expected 8 or 16 bits per channel"),
    (lambda i, image, label: image, r"to have a label in 0\.\.9, got no label"),
    (lambda i, image, label: (image, 10), r"to have a label in 0\.\.9, got 10"),
    (lambda i, image, label: (image, -1), r"to have a label in 0\.\.9, got -1"),
    (lambda i, image, label: (image, "3"), r"to have a label in 0\.\.9, got '3'"),
    (lambda i, image, label: (image, torch.ones(10)), r"to have a label in 0\.\.9, got tensor"),
    (lambda i, image, label: (image, label, None, i), r"to be an image, \(image, label\) or .*, got 4 values"),
    (Mock(side_effect=FileNotFoundError("gone")), "to be an item, got FileNotFoundError: gone"),
]


@pytest.mark.parametrize(("change", "wanted"), WRONG_ITEMS)
def test_wrong_items_are_named(change: Callable[[int, Tensor, int], Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Trainer: expected dataset\[0\] {wanted}"):
        trainer(tmp_path / "run", Digits(change))
    later = Digits(lambda i, image, label: change(i, image, label) if i == 7 else (image, label))
    with pytest.raises(ValueError, match=rf"^expected dataset\[7\] {wanted}"):
        UserDataset(later, 1, TEN)[7]


@pytest.mark.parametrize(
    ("change", "channels", "wanted"),
    [
        (lambda i, n, c: (i, n), 3, r"a condition of 2 channels, as the network reads 3 and the image has 1, got none"),
        (lambda i, n, c: (i, n, c), 1, r"no condition, as the network reads 1 and the image has 1, got one"),
        (lambda i, n, c: (i, n, c[:1]), 3, r"a condition of .* \[2, 8, 8\].*, got torch\.uint8 \[1, 8, 8\]"),
        (lambda i, n, c: (i, n, c[:, :4]), 3, r"a condition of .*, got torch\.uint8 \[2, 4, 8\]"),
        (lambda i, n, c: (i, n, c.int()), 3, r"a condition of .*, got torch\.int32 \[2, 8, 8\]"),
        (lambda i, n, c: (i, n, c / 0), 3, r"a condition of .*, got NaN or infinity"),
        (lambda i, n, c: {"image": i, "mask": c}, 3, r"image, label and condition, got image, mask"),
    ],
)
def test_wrong_conditions_are_named(change: Any, channels: int, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Trainer: expected dataset\[0\] to have {wanted}"):
        trainer(tmp_path, pair(change), network(in_channels=channels))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda image: image.repeat(1, 2, 1), r"torch\.uint8 \[1, 16, 8\]"),
        (to_unit_range, r"torch\.float32 \[1, 8, 8\]"),
    ],
)
def test_items_of_another_size_or_kind_than_the_first_are_named(change: Callable[[Tensor], Tensor], got: str) -> None:
    digits = Digits(lambda i, image, label: (change(image) if i == 7 else image, label))
    with pytest.raises(ValueError, match=rf"dataset\[7\] to be torch\.uint8 \[1, 8, 8\], as dataset\[0\], got {got}"):
        UserDataset(digits, 1, TEN)[7]


def test_a_wrong_item_of_the_fingerprint_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    wrong = Digits(lambda i, image, label: (image, 10 if i == 24 else label))  # one of 64 at even distances
    with refused(by("Trainer.run", InvalidValue("dataset[24]", "to have a label in 0..9", "10"))):
        run(tmp_path, wrong)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_item_of_a_later_batch_ends_the_run_with_a_checkpoint(num_workers: int, tmp_path: Path) -> None:
    third = int(TrainingRng(0, 6).indices(2, len(read_data("digits")))[0])
    wrong = Digits(lambda i, image, label: (image, 10 if i == third else label))
    with pytest.raises(
        ValueError, match=rf"^Trainer\.run: expected dataset\[{third}\] to have a label in 0\.\.9, got 10\n.*step-00000002"
    ):
        run(tmp_path / "cut", wrong, num_workers=num_workers)
    resume_and_compare(run, tmp_path / "cut")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_may_die_while_it_sends(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    read_or_fail = Mock(side_effect=[(torch.zeros(1), torch.zeros(1)), error])
    monkeypatch.setattr("ddpm_fast.data.loader.DataLoader", lambda *_, **__: iter(read_or_fail, None))
    read = batches(UserDataset(Digits(), 1, TEN), [], num_workers=1)
    next(read)
    with pytest.raises(
        ValueError, match=r"expected dataset to be read by its workers, got: (\[Errno 104\] Connection|EOFError)"
    ):
        next(read)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGKILL), id="killed"),
        pytest.param(lambda: sys.exit(0), id="exit", marks=pytest.mark.slow),
        pytest.param(lambda: sys.exit(3), id="exit-3", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_ends_the_run_between_two_steps(end: Callable[[], object], tmp_path: Path) -> None:
    """Workers read ahead. So one dies while a step is computed, and that step must not be cut off."""
    last = int(TrainingRng(0, 6).indices(29, len(read_data("digits")))[0])

    def change(index: int, image: Tensor, label: int) -> tuple[Tensor, int]:
        if index == last and torch.utils.data.get_worker_info() is not None:
            end()
        return image, label

    wanted = (
        r"^Trainer\.run: expected dataset to be read by its workers, got: .*\n.*; the last good checkpoint is .*step-000000"
    )
    with pytest.raises(ValueError, match=wanted):
        run(tmp_path / "cut", Digits(change), num_workers=2, steps=30)
    resume_and_compare(run, tmp_path / "cut", steps=30)


def test_fingerprints_are_those_of_the_items() -> None:
    before = UserDataset(Digits(), 1, TEN).fingerprint(exact=True)
    one = Digits(lambda i, image, label: (image.flip(-1) if i == 1 else image, label))  # it is not in the sample
    after = UserDataset(one, 1, TEN).fingerprint(exact=True)
    assert before["sample"] == after["sample"]
    assert before["exact"] != after["exact"]


# ----------------------------------------------------------------------------------------------------------------- processes

TWO = """
import sys
from pathlib import Path
from test_trainer import run
run(Path(sys.argv[1]), micro_batch_size=3, on_step=lambda step, loss: print(step, float(loss)))
"""


@pytest.mark.slow
def test_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    """The callback of each process receives the loss of the whole batch."""
    run(tmp_path / "one", micro_batch_size=3)
    first, second = run_ranks(2, ["-c", TWO, str(tmp_path / "two")], tmp_path)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert first.stdout == second.stdout
    assert len(first.stdout.splitlines()) == 3
