"""Which condition belongs to which image: every combination of two sources, with 12 items, whose text order differs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import assert_equal, encoded, read_data, whole, write
from refusals import by, refused
from test_data_tables import FEATURES, write_folder

from ddpm_fast.data.items import read_batch
from ddpm_fast.errors import InvalidValue

COUNT = 12
FLAT, CLASSES = [str(number) for number in range(COUNT)], [f"{'ab'[number % 2]}/{number}" for number in range(COUNT)]


def pixels(number: int, scale: int) -> np.ndarray:
    """Return a picture whose only colour says its number."""
    return np.full((4, 6), scale * number, dtype=np.uint8)


def files(scale: int, names: list[str], ending: str = ".png") -> dict[str, Any]:
    """Return pictures or arrays by name."""
    arrays = {name + ending: pixels(number, scale) for number, name in enumerate(names)}
    return arrays if ending == ".npy" else {name: encoded(each) for name, each in arrays.items()}


def rows(scale: int) -> np.ndarray:
    return np.stack([pixels(number, scale) for number in range(COUNT)])


def table(path: Path, scale: int) -> Path:
    images = [{"bytes": encoded(pixels(number, scale)), "path": f"{COUNT - number}.png"} for number in range(COUNT)]
    return write_folder(path, FEATURES, id=FLAT, image=images)


def archive(path: Path, scale: int, names: list[str]) -> Path:
    return write(path.with_suffix(".zip"), dict(reversed(files(scale, names).items())))


# How the items of a source are known, and how it is written: FLAT or CLASSES for files of these names, None for rows.
SOURCES: dict[str, tuple[Any, Callable[[Path, int], Path]]] = {
    "folder": (FLAT, lambda path, scale: write(path, files(scale, FLAT))),
    "class folders": (CLASSES, lambda path, scale: write(path, files(scale, CLASSES))),
    "archive": (FLAT, lambda path, scale: archive(path, scale, FLAT)),
    "archive of class folders": (CLASSES, lambda path, scale: archive(path, scale, CLASSES)),
    "folder of arrays": (FLAT, lambda path, scale: write(path, files(scale, FLAT, ".npy"))),
    "class folders of arrays": (CLASSES, lambda path, scale: write(path, files(scale, CLASSES, ".npy"))),
    "npy": (None, lambda path, scale: write(path.with_suffix(".npy"), rows(scale))),
    "npz": (None, lambda path, scale: write(path.with_suffix(".npz"), {"arr_0": rows(scale)})),
    "table": (None, table),
}


@pytest.mark.parametrize(("first", "second"), [*itertools.product(SOURCES, SOURCES)])
def test_every_combination_is_matched_or_refused(first: str, second: str, tmp_path: Path) -> None:
    (names, write_first), (others, write_second) = SOURCES[first], SOURCES[second]
    source, condition = str(write_first(tmp_path / "source", 20)), write_second(tmp_path / "condition", 10)
    if names is not others:
        with pytest.raises(ValueError, match="load_dataset: expected condition to ") as caught:
            read_data(source, condition=condition)
        assert source in str(caught.value)
        assert str(condition) in str(caught.value)
        return
    for memory in (None, 0):
        dataset = read_data(source, condition=condition, data_memory=memory)
        images, _, conditions = whole(dataset)
        assert conditions is not None
        assert torch.equal(images[:, :1], 2 * conditions[:, :1])
        assert sorted(conditions[:, 0, 0, 0].tolist()) == [10 * number for number in range(COUNT)]
        few = read_data(source, condition=condition, data_memory=memory, first=5)
        assert_equal(whole(few), read_batch(dataset, range(5)))


TWICE = "several in twice that differ in their endings alone: 3"


@pytest.mark.parametrize(
    ("name", "condition", "expected", "got"),
    [
        ("files", "few", "to have files of the same names as files", "none named 10, 11, 2, 3, 4 and 5 more in few"),
        ("few", "files", "to have files of the same names as few", "none named 10, 11, 2, 3, 4 and 5 more in few"),
        ("files", "twice", "to have one file of each name, as must files", TWICE),
        ("twice", "files", "to have one file of each name, as must twice", TWICE),
        (
            "files",
            "rows.npy",
            "to be a folder or an archive with files of the same names, as files is",
            "rows.npy, whose items are rows",
        ),
        ("rows.npy", "files", "to be one array file or one table, as rows.npy is", "files, whose items are files"),
        ("rows.npy", "few.npy", "to have 12 rows, as rows.npy", "3 in few.npy"),
        ("digits", "files", "to be one array file or one table, as digits is", "files, whose items are files"),
        ("digits", "few.npy", "to have 1500 rows, as digits", "3 in few.npy"),
    ],
)
def test_what_cannot_be_paired_is_named_with_both_sources(
    name: str, condition: str, expected: str, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = {"files": files(10, FLAT), "few": files(10, FLAT[:2]), "twice": files(10, FLAT) | {"3.bmp": b""}}
    write(tmp_path, written | {"rows.npy": rows(20), "few.npy": rows(20)[:3]})
    with refused(by("load_dataset", InvalidValue("condition", expected, got))):
        read_data(name, condition=condition)


def test_skipped_images_take_their_conditions_with_them(tmp_path: Path) -> None:
    source = write(tmp_path / "source", files(20, FLAT) | {"10.png": b"damaged"})
    condition = write(tmp_path / "condition", files(10, FLAT, ".npy"))
    dataset = read_data(str(source), condition=condition, skip_broken=True)
    images, _, conditions = whole(dataset)
    assert conditions is not None
    assert len(images) == COUNT - 1
    assert torch.equal(images, 2 * conditions)
    assert 100 not in conditions
