"""Folders that `save_to_disk` of Hugging Face's `datasets` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from items import encoded, read_data, whole

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
LABELS = [0, 2, 1, 1, 0, 2, 2]
IMAGES = {"image": {"_type": "Image"}}
FEATURES = {**IMAGES, "id": {"dtype": "string", "_type": "Value"}}
LABELLED = {**FEATURES, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
CELLS = [{"bytes": encoded(pixels), "path": f"{number}.png"} for number, pixels in enumerate(PIXELS)]


def table(features: dict[str, Any] = LABELLED, **columns: list[Any]) -> Any:
    """Return a table of `datasets`. Its labels are not checked, as those that a user has written with pyarrow are not."""
    datasets = pytest.importorskip("datasets", reason="the tables need the library datasets, of the extra datasets")
    datasets.disable_progress_bars()
    values = {"id": list("abcdefg"), "image": CELLS, "second": CELLS, "label": LABELS, "other": LABELS} | columns
    kinds = datasets.Features.from_dict(features)
    rows = pytest.importorskip("pyarrow").table({name: values[name] for name in features}, schema=kinds.arrow_schema)
    return datasets.Dataset(rows, datasets.DatasetInfo(features=kinds), fingerprint="0")  # or it is pickled for one


def write_folder(folder: Path, features: dict[str, Any] = LABELLED, **columns: list[Any]) -> Path:
    """Write a folder with two tables."""
    table(features, **columns).save_to_disk(folder, num_shards=2)
    return folder


@pytest.mark.parametrize("memory", [None, 0])
def test_images_and_labels_are_those_of_the_table(memory: int | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    assert sorted(file.name for file in folder.glob("*.arrow")) == [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    dataset = read_data(str(folder), data_memory=memory)
    assert (dataset.info.shape, dataset.info.classes) == ((3, 6, 6), ("a", "b", "c"))
    images, labels, _ = whole(dataset)
    np.testing.assert_array_equal(images, PIXELS.transpose(0, 3, 1, 2))
    assert labels.tolist() == LABELS


def test_a_split_is_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the tables need the library datasets, of the extra datasets")
    datasets.DatasetDict({"train": table(), "test": table(FEATURES)}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "one")
    assert read_data(str(tmp_path / "both")).info.classes == ("a", "b", "c")
    assert read_data(str(tmp_path / "both"), split="test").info.classes == ("",)
    assert read_data(str(tmp_path / "both" / "train"), split="test").info.classes == ("a", "b", "c")  # it has no splits
    with pytest.raises(ValueError, match=r"load_dataset: expected .*one to .*'?test'?"):
        read_data(str(tmp_path / "one"), split="test")


def test_broken_rows_are_named(tmp_path: Path) -> None:
    """A table may have paths of files alone, which are on another machine, perhaps. `save_to_disk` would read them."""
    pyarrow, text = pytest.importorskip("pyarrow"), {"bytes": b"text", "path": None}
    folder = write_folder(tmp_path / "data", image=[CELLS[0], None, text, *CELLS[3:]])
    with pyarrow.OSFile(str(folder / SECOND), "rb") as opened:
        rows = pyarrow.ipc.open_stream(opened).read_all()  # 4, 5 and 6
    field = rows.schema.field("image")
    cells = pyarrow.array([{"bytes": None, "path": "/elsewhere.png"}, *CELLS[5:]], field.type)
    rows = rows.set_column(rows.schema.get_field_index("image"), field, cells)
    with pyarrow.OSFile(str(folder / SECOND), "wb") as opened, pyarrow.ipc.new_stream(opened, rows.schema) as writer:
        writer.write_table(rows)
    wanted = r"got 3 of 7 that it cannot: row 1 \(.*\), row 2 \(UnidentifiedImageError\), row 4 \(.*\); remove"
    with pytest.raises(ValueError, match=wanted):
        read_data(str(folder))
    images, labels, _ = whole(read_data(str(folder), skip_broken=True))
    np.testing.assert_array_equal(images, PIXELS[[0, 3, 5, 6]].transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 2, 2]


COLUMNS = r".*data to have one Image and at most one ClassLabel, got "


@pytest.mark.parametrize(
    ("features", "columns", "wanted"),
    [
        (LABELLED, {"label": [0, 1, 2, 0, 1, 2, 3]}, r"labels in 0\.\.2, got .*3.*, in '.*data'"),
        (LABELLED, {"label": [0, 1, 2, 0, 1, 2, -1]}, r"labels in 0\.\.2, got .*-1.*, in '.*data'"),
        (LABELLED, {"label": [0, 1, None, 0, 1, 2, 2]}, r".*label.*data"),
        ({"id": FEATURES["id"]}, {}, f"{COLUMNS}none and none"),
        ({**IMAGES, "second": {"_type": "Image"}}, {}, f"{COLUMNS}image, second and none"),
        ({**LABELLED, "other": LABELLED["label"]}, {}, f"{COLUMNS}image and label, other"),
        (LABELLED, {"id": [], "image": [], "label": []}, r".*data to hold images, got none"),
    ],
)
def test_other_columns_are_refused(features: Any, columns: dict[str, list[Any]], wanted: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", features, **columns)
    with pytest.raises(ValueError, match=f"load_dataset: expected {wanted}"):
        read_data(str(folder))


INFO, STATE, SECOND = "dataset_info.json", "state.json", "data-00001-of-00002.arrow"


def with_entry(name: str, value: Any) -> Callable[[bytes], bytes]:
    """Return a function that changes an entry of a JSON file."""
    return lambda content: json.dumps(json.loads(content) | {name: value}).encode()


def with_wrong_offset(content: bytes) -> bytes:
    """Return a table in which the last image ends beyond the table, so that Arrow itself would read memory there."""
    sizes = [len(cell["bytes"]) for cell in CELLS[4:]]
    ends = [np.cumsum([0, *each]).astype("<i4").tobytes() for each in (sizes, [len(CELLS[3]["bytes"]), *sizes])]
    (end,) = [content.find(each) + len(each) for each in ends if each in content]  # it has the last 3 or 4 rows
    return content[: end - 4] + (1 << 30).to_bytes(4, "little") + content[end:]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (INFO, with_entry("features", {"a": {"_type": "Value", "dtype": "string"}})),
        (INFO, with_entry("features", {**LABELLED, "id": {"_type": "Image"}})),
        (INFO, with_entry("features", {**FEATURES, "label": {"_type": "ClassLabel"}})),
        (INFO, with_entry("features", {**FEATURES, "label": {"_type": "ClassLabel", "names": ["a", "a"]}})),
        *((STATE, with_entry("_data_files", files)) for files in (None, [], ["a"], [{"filename": 3}])),
        *((STATE, with_entry("_data_files", [{"filename": name}])) for name in ("../a.arrow", "/a.arrow", "missing.arrow")),
        (SECOND, lambda content: content[:-400]),
        (SECOND, lambda content: b"text"),
        (SECOND, lambda content: b""),
        (SECOND, lambda content: content[:600] + b"\xff" * 8 + content[608:]),
        (SECOND, with_wrong_offset),
    ],
)
def test_damaged_folders_are_named(file: str, change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=r"load_dataset: expected .*data to be a whole folder of save_to_disk, got: "):
        read_data(str(folder))
