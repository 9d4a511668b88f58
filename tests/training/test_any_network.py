"""`Trainer` with networks that are no `UNet`: images, signals and volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run as run_command
from items import read_data
from launching import run_ranks
from refusals import by, refused
from runs import SHARED, assert_same_weights, newest_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, Sampler, Trainer, TrainOptions, ddim_plan, export_checkpoint, freeze, load_folder
from ddpm_fast.errors import InvalidValue

SCHEDULE = NoiseSchedule.linear()
SIDES = {1: (12,), 2: (6, 4), 3: (4, 2, 6)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Net(nn.Module):
    """Two convolutions of a signal, an image or a volume, with a shift by timestep and class."""

    def __init__(
        self,
        dims: int = 2,
        channels: int = 2,
        reads: int = 2,
        classes: int | None = None,
        norm: bool = False,
        width: int = 8,
    ) -> None:
        super().__init__()
        self.first = CONV[dims](reads, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.classes = None if classes is None else nn.Embedding(classes + 1, width)
        self.norm = NORM[dims](width) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.1)
        self.last = CONV[dims](width, channels, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(3))  # its gradient is always None
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.tied = self.last.bias

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        shift = self.time(t[:, None] / 1000)
        if self.classes is not None:
            assert class_labels is not None
            shift = shift + self.classes(class_labels)
        h = self.norm(self.first(x_t)) + shift.view(*shift.shape, *[1] * (x_t.dim() - 2))
        return self.last(self.dropout(nn.functional.silu(h)))


class Items:
    """Items [C, ...] of waves, with labels and conditions if they are wanted."""

    def __init__(self, dims: int = 2, classes: int | None = None, reads: int = 2) -> None:
        self.dims, self.classes, self.reads = dims, classes, reads

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        shape = (2, *SIDES[self.dims])
        x_0 = torch.sin(torch.arange(torch.Size(shape).numel()) * (0.1 + index / 40)).view(shape)
        item: dict[str, Any] = {"image": x_0}
        if self.classes is not None:
            item["label"] = index % self.classes
        if self.reads > 2:
            item["condition"] = x_0[:1].roll(1, -1)
        return item


OPTIONS = SHARED | {"batch_size": 4, "micro_batch_size": 2, "steps": 4, "warmup_steps": 1, "sample_every": 2, "sample_steps": 2}


def trainer(
    run_dir: Path, dims: int = 2, classes: int | None = None, reads: int = 2, norm: bool = False, **options: Any
) -> Trainer:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Net(dims, reads=reads, classes=classes, norm=norm)
    options = OPTIONS | options
    return Trainer(model, SCHEDULE, Items(dims, classes, reads), TrainOptions(**options), run_dir, num_classes=classes)


TWO = """
import sys
from pathlib import Path
from test_any_network import trainer
trainer(Path(sys.argv[1]), 2, 3, 3, flip=True).run()
"""


@pytest.mark.parametrize(("dims", "classes", "reads"), [(1, None, 2), (2, 3, 3), (3, None, 3)])
def test_networks_train_resume_and_sample(dims: int, classes: int | None, reads: int, tmp_path: Path) -> None:
    assert trainer(tmp_path / "whole", dims, classes, reads, flip=True).run().step == 4
    trainer(tmp_path / "parts", dims, classes, reads, flip=True, steps=1).run()
    again = trainer(tmp_path / "parts", dims, classes, reads, flip=True, resume=True)
    again.run()
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    checkpoint = newest_checkpoint(tmp_path / "parts")
    for name, model in (("model", again.model), ("ema", again.ema)):
        torch.testing.assert_close(load_file(checkpoint / f"{name}.safetensors"), dict(model.state_dict()), rtol=0, atol=0)
    assert not torch.equal(again.model.state_dict()["first.weight"], again.ema.state_dict()["first.weight"])
    assert again.model.get_parameter("fixed").tolist() == [1, 1, 1]
    grids = [path.name for path in (tmp_path / "whole").glob("samples/*")]
    assert len(grids) == (2 if dims == 2 else 0)  # signals and volumes are no pictures

    arguments: dict[str, Any] = {"class_labels": 1} if classes else {}
    if reads > 2:
        arguments["condition"] = torch.stack([Items(dims, classes, reads)[i]["condition"] for i in range(3)])
    images = Sampler(again.ema, ddim_plan(SCHEDULE, 3), shape=(2, *SIDES[dims]))(3, progress=False, **arguments)
    assert images.shape == (3, 2, *SIDES[dims])
    assert torch.isfinite(images).all()


@pytest.mark.slow
def test_weights_are_the_same_bits_in_two_processes(tmp_path: Path) -> None:
    trainer(tmp_path / "one", 2, 3, 3, flip=True).run()
    for each in run_ranks(2, ["-c", TWO, str(tmp_path / "two")], tmp_path):
        assert each.returncode == 0, each.stderr
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_changing_buffers_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = trainer(tmp_path / "norm", norm=True)
    trained.run()
    changed = "norm.num_batches_tracked, norm.running_mean, norm.running_var"
    assert f"the network's forward changes {changed}: weights are not bit-identical for other numbers" in caplog.text
    assert torch.equal(trained.model.get_buffer("norm.running_mean"), trained.ema.get_buffer("norm.running_mean"))
    caplog.clear()
    trainer(tmp_path / "none").run()
    assert "forward changes" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"channels_last": False}])
def test_images_and_weights_are_channels_last_unless_told_otherwise(options: dict[str, bool], tmp_path: Path) -> None:
    trained, seen = trainer(tmp_path / "run", steps=1, sample_every=0, **options), list[Tensor]()
    trained.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trained.run()
    wanted = torch.contiguous_format if options else torch.channels_last
    assert len(seen) == 2  # micro-batches
    assert all(each.is_contiguous(memory_format=wanted) for each in (*seen, trained.model.get_parameter("first.weight")))


def test_what_needs_a_configuration_says_so(tmp_path: Path) -> None:
    trainer(tmp_path / "run", steps=1).run()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["network"].endswith("test_any_network.Net")
    assert "unet" not in config
    assert config["dataset"]["shape"] == [2, 6, 4]
    file = tmp_path / "run" / "checkpoints" / "step-00000001" / "ema.safetensors"
    wanted = f"another network, which its folder does not describe; make it, and load {file} with load_state_dict"
    with refused(by("load_folder", InvalidValue("path", "to hold a UNet", wanted))):
        load_folder(tmp_path / "run")
    with refused(by("export_checkpoint", InvalidValue("run_dir", "to hold a UNet", wanted))):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    with pytest.raises(TypeError, match=r"freeze: expected x to be a ddpm_fast\.UNet, .* got a Net"):
        freeze(Net())
    for arguments in (["sample", "--model"], ["train", "--resume"]):
        assert "Error:" in run_command(*arguments, tmp_path / "run", code=2)


def test_another_network_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path / "run", steps=1).run()

    class Other(Net):
        pass

    options = TrainOptions(**OPTIONS | {"resume": True})
    with pytest.raises(ValueError, match="Other"):
        Trainer(Other(), SCHEDULE, Items(), options, tmp_path / "run").run()
    with pytest.raises(ValueError, match=r"first\.(weight|bias) to have shape"):
        Trainer(Net(width=16), SCHEDULE, Items(), options, tmp_path / "run").run()


class Stateful(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


class Raising(Net):
    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        raise RuntimeError("no such layer")


FITS = r"model to take \[2, 2, 6, 4\], t \[2\] and return \[2, 2, 6, 4\], got"


@pytest.mark.parametrize(
    ("model", "items", "classes", "wanted"),
    [
        (Net(channels=3), Items(), None, rf"{FITS} \[2, 3, 6, 4\]$"),
        (Raising(), Items(), None, f"{FITS}: no such layer$"),
        (Net(), Items(reads=3), None, r"model to take \[2, 3, 6, 4\], t \[2\] and .* got: .*expected input"),
        # The network takes the labels 0, 1 and 2, and so none that says that there is no label.
        (Net(classes=2), Items(classes=3), 3, r"model to take .*, t \[2\] and labels \[2\] and return .*, got: "),
        (nn.Identity(), Items(), None, "model to have parameters that require gradients, got none$"),
        (Net().double(), Items(), None, r'model to be float32, got torch\.float64 in unused; use precision="bf16" for speed$'),
        (lambda x, t: x, Items(), None, "model to be a Module, got function$"),
        (Stateful(), Items(), None, "model to have a state_dict of tensors, got a dict in _extra_state$"),
        (Net(), Items(), 0, "num_classes to be a positive integer or None, got 0$"),
    ],
)
def test_networks_that_do_not_fit_are_refused(model: Any, items: Any, classes: int | None, wanted: str, tmp_path: Path) -> None:
    kind = ValueError if isinstance(model, nn.Module) else TypeError
    with pytest.raises(kind, match=f"^Trainer: expected {wanted}"):
        Trainer(model, SCHEDULE, items, TrainOptions(**OPTIONS), tmp_path / "run", num_classes=classes)
    assert not (tmp_path / "run").exists()


DIGITS, NUMBERS = {"data": "digits"}, {"data": "x.npy", "condition": "y.npy", "data_range": (-4, 4), "condition_range": (-4, 4)}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("condition", DIGITS | {"condition": "low-resolution:2"}, DIGITS | {"condition": "low-resolution:4"}),
        ("condition_range", NUMBERS, NUMBERS | {"condition_range": (-8, 8)}),
        ("data_range", NUMBERS, NUMBERS | {"data_range": (-8, 8)}),
    ],
)
def test_a_resumed_run_keeps_its_condition_and_its_ranges(
    name: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a network without a configuration, and though the bytes of the files are the same."""
    monkeypatch.chdir(tmp_path)
    for file, seed in (("x.npy", 0), ("y.npy", 1)):
        np.save(file, np.random.default_rng(seed).normal(size=(8, 8, 8)).clip(-2, 2))

    def runs(arguments: dict[str, Any], **options: Any) -> Trainer:
        return Trainer(Net(2, 1, 2), SCHEDULE, read_data(**arguments), TrainOptions(**OPTIONS | options), tmp_path / "run")

    runs(before).run()
    with pytest.raises(ValueError, match=f"^Trainer\\.run: expected {name} to be .*, as in .*run.*, got "):
        runs(after, resume=True, steps=5).run()
    assert runs(before, resume=True, steps=5).run().step == 5
