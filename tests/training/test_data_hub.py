"""Folders in the layout of `save_to_disk` of Hugging Face's `datasets`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training.data import load_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
LABELS = [0, 2, 1, 1, 0, 2, 2]
FEATURES = {"image": {"_type": "Image"}, "id": {"dtype": "string", "_type": "Value"}}
LABELLED = {**FEATURES, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_folder(folder: Path, features: dict[str, Any] = LABELLED, **columns: list[Any]) -> Path:
    """Write a folder with two tables."""
    pyarrow = pytest.importorskip("pyarrow", reason="the tables need pyarrow, of the extra hub")
    folder.mkdir(parents=True)
    values: dict[str, list[Any]] = {
        "id": list("abcdefg"),
        "image": [{"bytes": encoded(pixels), "path": f"{number}.png"} for number, pixels in enumerate(PIXELS)],
        "label": LABELS,
    }
    table = pyarrow.table({name: column for name, column in (values | columns).items() if name in features})
    names = []
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        names.append(f"data-{number:05d}-of-00002.arrow")
        with pyarrow.OSFile(str(folder / names[-1]), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


@pytest.mark.parametrize("memory", [None, 0])
def test_images_and_labels_are_those_of_the_table(memory: int | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    dataset = load_dataset(str(folder), memory=memory)
    assert (dataset.shape, dataset.classes, dataset.labels.tolist()) == ((3, 6, 6), ("a", "b", "c"), LABELS)
    (images, labels), *_ = dataset.batches([torch.tensor([6, 0, 3, 2])])
    np.testing.assert_array_equal(images, PIXELS[[6, 0, 3, 2]].transpose(0, 3, 1, 2))
    assert labels.tolist() == [2, 0, 1, 1]
    assert dataset.fingerprint(exact=True) == load_dataset(str(folder)).fingerprint(exact=True)
    resized = load_dataset(str(folder), image_size=3, first=2, memory=memory)
    assert (resized.shape, len(resized), resized.classes) == ((3, 3, 3), 2, dataset.classes)


def test_images_without_labels_share_one_class(tmp_path: Path) -> None:
    dataset = load_dataset(str(write_folder(tmp_path / "data", FEATURES)))
    assert (dataset.classes, dataset.labels.tolist()) == (("",), [0] * 7)


def test_a_split_is_chosen(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", FEATURES)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert load_dataset(str(tmp_path)).classes == ("a", "b", "c")
    assert load_dataset(str(tmp_path), split="test").classes == ("",)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"expected splits to have test, got \['train'\], in '.*dataset_dict\.json'"):
        load_dataset(str(tmp_path), split="test")


def test_broken_rows_are_named(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": encoded(pixels), "path": None} for pixels in PIXELS]
    images[3] = {"bytes": None, "path": "/elsewhere.png"}
    images[5] = {"bytes": b"text", "path": None}
    folder = write_folder(tmp_path / "data", image=images)
    wanted = r"got 2 of 7 that it cannot: row 3 \(ValueError: the table has no bytes of the image\), row 5 \(Unidentified"
    with pytest.raises(ValueError, match=wanted):
        load_dataset(str(folder))
    dataset = load_dataset(str(folder), skip_broken=True)
    assert dataset.labels.tolist() == [0, 2, 1, 0, 2]
    np.testing.assert_array_equal(dataset.images[3], PIXELS[4].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([0, 1, 2, 0, 1, 2, 3], r"expected labels in 0\.\.2, got 3, in '.*data'"),
        ([0, 1, 2, 0, 1, 2, -1], r"expected labels in 0\.\.2, got -1, in '.*data'"),
        ([0, 1, None, 0, 1, 2, 2], r"expected each row of .*data to have a label, got 1 without"),
        (list("abcdefg"), r"expected label to be integers, got string, in '.*\.arrow'"),
    ],
)
def test_other_labels_are_refused(labels: list[Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"load_dataset: {wanted}"):
        load_dataset(str(write_folder(tmp_path / "data", label=labels)))


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        (None, "expected features to be an object, got None"),
        ({"a": {"_type": "Value"}}, "expected features to have one Image, got none"),
        ({"a": {"_type": "Image"}, "b": {"_type": "Image"}}, "expected features to have one Image, got a, b"),
        ({**LABELLED, "d": {"_type": "ClassLabel"}}, "expected features to have at most one ClassLabel, got label, d"),
        ({**FEATURES, "d": {"_type": "ClassLabel"}}, r"expected features\.d\.names to be a list of names, got None"),
        ({**FEATURES, "d": {"_type": "ClassLabel", "names": ["a", "a"]}}, r"d\.names to be without repetitions"),
        ({"picture": {"_type": "Image"}}, r"\.arrow to be a whole Arrow table with \['picture'\], got: "),
        ({"id": {"_type": "Image"}}, r"expected id to be encoded images, got string, in '.*\.arrow'"),
    ],
)
def test_other_columns_are_refused(features: Any, wanted: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    with pytest.raises(ValueError, match=wanted):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    "files", [None, [], ["a"], [{"filename": "../a.arrow"}], [{"filename": "/a.arrow"}], [{"filename": 3}]]
)
def test_other_lists_of_tables_are_refused(files: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(ValueError, match=r"load_dataset: expected _data_files to have names of files, got .*state\.json"):
        load_dataset(str(folder))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    file = write_folder(tmp_path / "data") / "data-00001-of-00002.arrow"
    whole = file.read_bytes()
    for damaged in (whole[:-400], b"text", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"load_dataset: expected .*data-00001-of-00002\.arrow to be a whole Arrow table"):
            load_dataset(str(tmp_path / "data"))
    file.unlink()
    with pytest.raises(ValueError, match=r"load_dataset: expected .*data-00001-of-00002\.arrow to be a whole Arrow table"):
        load_dataset(str(tmp_path / "data"))


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow is missing: install it with pip install 'ddpm_fast\[hub\]'"):
        load_dataset(str(tmp_path))
