"""Folders that `save_to_disk` of Hugging Face's `datasets` writes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import whole
from PIL import Image

from ddpm_fast.training.data import batches, load_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
LABELS = [0, 2, 1, 1, 0, 2, 2]
IMAGES = {"image": {"_type": "Image"}}
FEATURES = {**IMAGES, "id": {"dtype": "string", "_type": "Value"}}
LABELLED = {**FEATURES, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def table(features: dict[str, Any] = LABELLED, **columns: list[Any]) -> Any:
    """Return a table of `datasets`. Its labels are not checked, as those that a user has written with pyarrow are not."""
    datasets = pytest.importorskip("datasets", reason="the tables need the library datasets, of the extra hub")
    pyarrow = pytest.importorskip("pyarrow")
    values: dict[str, list[Any]] = {
        "id": list("abcdefg"),
        "image": [{"bytes": encoded(pixels), "path": f"{number}.png"} for number, pixels in enumerate(PIXELS)],
        "label": LABELS,
    }
    kinds = datasets.Features.from_dict(features)
    rows = pyarrow.table({name: (values | columns)[name] for name in features}, schema=kinds.arrow_schema)
    return datasets.Dataset(rows, datasets.DatasetInfo(features=kinds), fingerprint="0")  # or it is pickled for one


def write_folder(folder: Path, features: dict[str, Any] = LABELLED, **columns: list[Any]) -> Path:
    """Write a folder with two tables."""
    written = table(features, **columns)
    with quiet():
        written.save_to_disk(folder, num_shards=2)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Show no bar of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def change_features(folder: Path, features: Any) -> None:
    """Change what a folder says about its columns."""
    file = folder / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"features": features}))


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the rows of a table in a folder."""
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.OSFile(str(file), "rb") as opened:
        rows = change(pyarrow.ipc.open_stream(opened).read_all())
    with pyarrow.OSFile(str(file), "wb") as opened, pyarrow.ipc.new_stream(opened, rows.schema) as writer:
        writer.write_table(rows)


@pytest.mark.parametrize("memory", [None, 0])
def test_images_and_labels_are_those_of_the_table(memory: int | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    assert sorted(file.name for file in folder.glob("*.arrow")) == [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    dataset = load_dataset(str(folder), memory=memory)
    assert (dataset.info.shape, dataset.info.classes) == ((3, 6, 6), ("a", "b", "c"))
    assert whole(dataset).labels.tolist() == LABELS
    (batch,) = batches(dataset, [torch.tensor([6, 0, 3, 2])], 0)
    np.testing.assert_array_equal(batch.images, PIXELS[[6, 0, 3, 2]].transpose(0, 3, 1, 2))
    assert batch.labels.tolist() == [2, 0, 1, 1]
    assert dataset.fingerprint(exact=True) == load_dataset(str(folder)).fingerprint(exact=True)
    resized = load_dataset(str(folder), image_size=3, first=2, memory=memory)
    assert (resized.info.shape, len(resized), resized.info.classes) == ((3, 3, 3), 2, dataset.info.classes)


def test_images_without_labels_share_one_class(tmp_path: Path) -> None:
    dataset = load_dataset(str(write_folder(tmp_path / "data", FEATURES)))
    assert (dataset.info.classes, whole(dataset).labels.tolist()) == (("",), [0] * 7)


def test_a_split_is_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the tables need the library datasets, of the extra hub")
    with quiet():
        datasets.DatasetDict({"train": table(), "test": table(FEATURES)}).save_to_disk(tmp_path / "both")
        datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "one")
    assert load_dataset(str(tmp_path / "both")).info.classes == ("a", "b", "c")
    assert load_dataset(str(tmp_path / "both"), split="test").info.classes == ("",)
    assert load_dataset(str(tmp_path / "both" / "train"), split="test").info.classes == ("a", "b", "c")  # it has no splits
    with pytest.raises(ValueError, match=r"load_dataset: expected .*one to .*'?test'?"):
        load_dataset(str(tmp_path / "one"), split="test")


def test_broken_rows_are_named(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": encoded(pixels), "path": None} for pixels in PIXELS]
    images[3] = None
    images[5] = {"bytes": b"text", "path": None}
    folder = write_folder(tmp_path / "data", image=images)
    with pytest.raises(ValueError, match=r"got 2 of 7 that it cannot: row 3 \(.*\), row 5 \(UnidentifiedImageError\); remove"):
        load_dataset(str(folder))
    dataset = load_dataset(str(folder), skip_broken=True)
    assert whole(dataset).labels.tolist() == [0, 2, 1, 0, 2]
    np.testing.assert_array_equal(dataset[3].image, PIXELS[4].transpose(2, 0, 1))


def test_a_row_without_bytes_is_named(tmp_path: Path) -> None:
    """A table may have paths of files alone, which are on another machine, perhaps."""
    folder = write_folder(tmp_path / "data")
    cells = [{"bytes": encoded(PIXELS[5]) if row == 1 else None, "path": "/elsewhere.png"} for row in range(3)]

    def change(rows: Any) -> Any:
        """`save_to_disk` itself would read the paths."""
        field = rows.schema.field("image")
        return rows.set_column(
            rows.schema.get_field_index("image"), field, pytest.importorskip("pyarrow").array(cells, field.type)
        )

    rewrite(folder / "data-00001-of-00002.arrow", change)
    with pytest.raises(ValueError, match=r"got 2 of 7 that it cannot: row 4 \(.*\), row 6 \(.*\); remove"):
        load_dataset(str(folder))
    assert len(load_dataset(str(folder), skip_broken=True)) == 5


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([0, 1, 2, 0, 1, 2, 3], r"expected labels in 0\.\.2, got .*3.*, in '.*data'"),
        ([0, 1, 2, 0, 1, 2, -1], r"expected labels in 0\.\.2, got .*-1.*, in '.*data'"),
        ([0, 1, None, 0, 1, 2, 2], r"expected .*label.*data"),
    ],
)
def test_other_labels_are_refused(labels: list[Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"load_dataset: {wanted}"):
        load_dataset(str(write_folder(tmp_path / "data", label=labels)))


@pytest.mark.parametrize(
    ("features", "got"),
    [
        ({"id": FEATURES["id"]}, "none and none"),
        ({**IMAGES, "second": {"_type": "Image"}}, "image, second and none"),
        ({**LABELLED, "other": LABELLED["label"]}, "image and label, other"),
    ],
)
def test_other_columns_are_refused(features: Any, got: str, tmp_path: Path) -> None:
    images = [{"bytes": encoded(pixels), "path": None} for pixels in PIXELS]
    folder = write_folder(tmp_path / "data", features, second=images, other=LABELS)
    with pytest.raises(
        ValueError, match=rf"load_dataset: expected .*data to have one Image and at most one ClassLabel, got {got}"
    ):
        load_dataset(str(folder))


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    for file in folder.glob("*.arrow"):
        rewrite(file, lambda rows: rows.slice(0, 0))
    with pytest.raises(ValueError, match=r"load_dataset: expected .*data to (hold|have) .*, got (none|0|no )"):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    "features",
    [
        {"a": {"_type": "Value", "dtype": "string"}},
        {**LABELLED, "id": {"_type": "Image"}},
        {**FEATURES, "label": {"_type": "ClassLabel"}},
        {**FEATURES, "label": {"_type": "ClassLabel", "names": ["a", "a"]}},
    ],
)
def test_columns_that_the_tables_do_not_have_are_refused(features: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    change_features(folder, features)
    with pytest.raises(ValueError, match=r"load_dataset: expected .*data to be a whole folder of save_to_disk, got: "):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    "files", [None, [], ["a"], [{"filename": "../a.arrow"}], [{"filename": "/a.arrow"}], [{"filename": 3}]]
)
def test_other_lists_of_tables_are_refused(files: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": files}))
    with pytest.raises(ValueError, match=r"load_dataset: expected .*data to be a whole folder of save_to_disk, got: "):
        load_dataset(str(folder))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    file = write_folder(tmp_path / "data") / "data-00001-of-00002.arrow"
    content = file.read_bytes()
    wanted = r"load_dataset: expected .*data to be a whole folder of save_to_disk, got: "
    for damaged in (content[:-400], b"text", b"", content[:600] + b"\xff" * 8 + content[608:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=wanted):
            load_dataset(str(tmp_path / "data"))
    file.unlink()
    with pytest.raises(ValueError, match=wanted):
        load_dataset(str(tmp_path / "data"))


def test_an_offset_that_leads_out_of_its_table_is_found(tmp_path: Path) -> None:
    """Arrow itself would read memory beyond the table."""
    folder = write_folder(tmp_path / "data")
    file = folder / "data-00001-of-00002.arrow"
    content = bytearray(file.read_bytes())
    sizes = [len(encoded(pixels)) for pixels in PIXELS[4:]]  # the second table has the last 3 or 4 rows
    ends = [np.cumsum([0, *each]).astype("<i4").tobytes() for each in (sizes, [len(encoded(PIXELS[3])), *sizes])]
    (found,) = [(content.find(each), len(each)) for each in ends if each in content]
    at = found[0] + found[1] - 4
    content[at : at + 4] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"load_dataset: expected .*data to be a whole folder of save_to_disk, got: "):
        load_dataset(str(folder))


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is missing: install it with pip install 'ddpm_fast\[hub\]'"):
        load_dataset(str(tmp_path))
