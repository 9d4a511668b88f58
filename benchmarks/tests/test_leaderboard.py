"""The leaderboard: its rows, the error of x_0^, and runs that go on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import judges
import leaderboard
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, Objective, TrainOptions, UNet
from ddpm_fast.data.items import DatasetInfo, Item, ItemDataset

TINY = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 2}


class Images(ItemDataset):
    """Images of ten classes in turn."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.in_memory = pixels, True
        self.info = DatasetInfo("noise", (1, 32, 32), classes=tuple("abcdefghij"))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Item:
        return Item(self.pixels[index], index % 10)

    def contents(self, exact: bool) -> Iterator[bytes]:
        yield self.pixels.numpy().tobytes()


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace both sets by 80 images with classes in turn."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (80, 1, 32, 32), dtype=torch.uint8, generator=generator)
    monkeypatch.setattr(leaderboard, "images_of", lambda name, *, split: Images(pixels))


@pytest.mark.parametrize("name", leaderboard.ROWS)
def test_every_row_is_a_network_and_options(name: str) -> None:
    row = leaderboard.ROWS[name]
    options = leaderboard.options_of(row, 1000)
    TrainOptions(steps=1000, **options)
    config = leaderboard.network_of(row, leaderboard.images_of("emoji", split="train"), 11)
    with torch.device("meta"):
        network = UNet(**config)
    assert network.config["num_class_embeds"] == 11
    if row.options is leaderboard.FAST:
        assert (options["warmup_steps"], options["lr_decay_steps"]) == (20, 300)
        assert 1 / (1 - options["ema_decay"]) == pytest.approx(70)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_error_compares_what_networks_predict(schedule: str, prediction: Any) -> None:
    x_0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
    objective = Objective(getattr(NoiseSchedule, schedule)(), prediction)

    class Oracle(nn.Module):
        """Predict from x_0 + `off`, which is not clipped."""

        def __init__(self, off: float) -> None:
            super().__init__()
            self.off, self.levels = off, iter(leaderboard.LEVELS.tolist())  # a batch a level

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            level = next(self.levels)
            alpha = 1 / math.sqrt(1 + level**2)
            sigma, found = level * alpha, x_0 + self.off
            epsilon = (x_t - alpha * found) / sigma
            return {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * found, "sample": found}[prediction]

    for off in (0.0, 0.05):
        errors = leaderboard.x_0_errors(leaderboard.Trained(Oracle(off), objective, False), x_0, torch.zeros(6))
        assert errors == pytest.approx([off] * len(leaderboard.LEVELS), abs=1e-4)


def test_a_schedule_without_all_levels_has_no_error() -> None:
    trained = leaderboard.Trained(nn.Identity(), Objective(NoiseSchedule.laplace(), "epsilon"), False)
    assert leaderboard.x_0_errors(trained, torch.zeros(2, 1, 4, 4), torch.zeros(2)) == []


def test_a_run_goes_on_and_judges_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "one": leaderboard.Row(
            about="tiny", network=TINY, schedule="linear", options={"batch_size": 4, "warmup": 0.5, "average": 0.5}
        )
    }
    monkeypatch.setattr(leaderboard, "ROWS", rows)
    monkeypatch.setattr(leaderboard, "ANCHOR", "one")
    monkeypatch.setattr(leaderboard, "BUILD", tmp_path / "build")
    monkeypatch.setattr(leaderboard, "rate_of", lambda row, data: 4.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(judges, "judge_of", lambda name, images, labels: (Judge(), {"sha256": "of " + name}))
    train, trained = leaderboard.train_row, []

    def watched(*args: Any) -> leaderboard.Trained:
        if len(trained) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        trained.append(args[3])
        return train(*args)

    monkeypatch.setattr(leaderboard, "train_row", watched)
    arguments = ["one", "--minutes", "0.05", "--seeds", "2", "--num", "70", "--results", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        leaderboard.main(arguments)
    leaderboard.main(arguments)
    assert trained == [0, 1]  # each seed once
    file = tmp_path / "out" / "fashion-mnist" / "one.json"
    section = json.loads(file.read_text())["0.05 minutes, 70 images"]
    assert section["made"]["steps"] == 3
    assert section["made"]["judges"] == {"class": "of class", "grain": "of grain"}
    assert section["real"]["class"] >= 0
    for seed in section["seeds"].values():
        assert seed["error"] == pytest.approx(math.prod(seed["errors"]) ** (1 / 8))
        assert seed["accuracy"] == 0.1  # the judge says "class 0" of everything
        assert seed["grain"] == seed["class"] > 0
    text = file.read_text()
    leaderboard.main(arguments)
    assert file.read_text() == text
    assert len(list((tmp_path / "build").rglob("sheet.png"))) == 2
    rows["one"] = dataclasses.replace(rows["one"], options={"batch_size": 4, "lr": 1e-3})
    with pytest.raises(SystemExit, match=r"expected one to be as in '.*one.json', got another row: pass --results"):
        leaderboard.main(arguments)
    assert file.read_text() == text


def test_a_run_that_a_signal_stops_is_not_judged(tmp_path: Path) -> None:
    row = leaderboard.Row(about="tiny", network=TINY, schedule="linear", options={"batch_size": 4})
    with pytest.raises(SystemExit, match="stopped by SIGTERM; the same command goes on"):
        leaderboard.train_row(row, "emoji", 3, 0, tmp_path / "run", lambda step, loss: signal.raise_signal(signal.SIGTERM))


class Judge(nn.Module):
    """A judge whose features are the means of two rows of pixels, and who knows one class."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(10)[:1].expand(len(images), 10), images[:, 0, :2].mean(2)


@pytest.mark.parametrize("name", ["diffusers", "diffusers-no-classes", "denoising-diffusion-pytorch"])
def test_peers_train_and_draw(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers" if name.startswith("diffusers") else name.replace("-", "_"))
    row = leaderboard.ROWS[name]
    seen: list[int] = []
    trained = leaderboard.train_row(row, "fashion-mnist", 2, 0, tmp_path, lambda step, loss: seen.append(step))
    assert seen == [1, 2]
    images = leaderboard.draw(trained, 3, 0, (1, 32, 32))
    assert images.shape == (3, 1, 32, 32)
    assert images.isfinite().all()
    assert trained.labelled == row.labelled


def test_rates_are_measured_on_an_idle_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = leaderboard.Row(about="tiny", network=TINY, schedule="linear", options={"batch_size": 2})
    assert leaderboard.rate_of(row, "emoji", seconds=0) > 0
    monkeypatch.setattr(os, "getloadavg", lambda: (1.6, 0.0, 0.0))
    with pytest.raises(SystemExit, match=r"expected an idle machine, to measure images per second, got a load of 1\.6"):
        leaderboard.main(["small-fast", "--rates", "--results", str(tmp_path)])
    assert not [*tmp_path.iterdir()]


def test_rates_are_shared_and_relate_to_the_anchor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []  # batch sizes
    speed = iter([2.0, 5.0, 4.0, 2.0, 4.0, 3.0, 9.0, 5.0, 5.0, 8.0, 6.0, 5.0, 6.0, 4.0, 3.0])

    def rate_of(row: leaderboard.Row, data: str) -> float:
        asked.append(row.options["batch_size"])
        return next(speed)

    monkeypatch.setattr(leaderboard, "rate_of", rate_of)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))

    def rates(*names: str) -> list[float]:
        leaderboard.main([*names, "--rates", "--results", str(tmp_path)])
        files = (tmp_path / "fashion-mnist" / f"{name}.json" for name in names)
        return [json.loads(file.read_text())["rate"]["images_per_second"] for file in files]

    # Groups and the objective do not change the speed; the batch does.
    names = ["small-fast-16-groups", "small-fast-batch-16", "small-fast-epsilon", "small-fast"]
    # small-fast alone, then just before the other: (2 4), (3 9), (5 5). The median ratio is 2.
    assert rates(*names) == [5.0, 10.0, 5.0, 5.0]
    assert asked == [8, 8, 8, *[8, 16] * 3]
    assert rates("small-fast-min-snr") == [5.0]  # known from a row of the same speed
    assert len(asked) == 9
    assert rates("small-fast-bf16") == [5.0 * 6 / 8]  # small-fast's own is kept
    file = tmp_path / "fashion-mnist" / "small-fast.json"
    file.write_text(file.read_text().replace(common.machine()["device"], "another processor"))
    with pytest.raises(SystemExit, match="expected another processor, as for small-fast: pass --results FOLDER"):
        rates("small-fast-two-layers")


def test_the_help_shows_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        leaderboard.main(["--help"])
    assert "decay over the last 30 %" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"expected rows of small-16-groups, .*, got nonsense"):
        leaderboard.main(["nonsense"])


def test_the_table_sorts_by_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, errors in (("small-fast", [0.2, 0.3]), ("small-fast-bf16", [0.1, 0.1])):
        seeds = {str(number): {"error": error} for number, error in enumerate(errors)}
        made = {"row": {}, "steps": 7, "images_per_second": 3.0, "judges": {}}
        section = {"made": made, "parameters": 2e6, "seeds": seeds}
        folder = tmp_path / "emoji"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"10 minutes, 1000 images": section}))
    leaderboard.main(["--table", "--data", "emoji", "--results", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| small-fast, bfloat16 | 2.00 | 3 | 7 | 0.1000 ± 0 | 2 |",
        f"| {leaderboard.ROWS['small-fast'].about} | 2.00 | 3 | 7 | 0.2500 ± 0.07 | 2 |",
    ]
    with pytest.raises(SystemExit, match=r"expected results of 5 minutes, 1000 images in .*, got none: train first"):
        leaderboard.main(["--table", "--data", "emoji", "--minutes", "5", "--results", str(tmp_path)])
