"""Folders that `save_to_disk` of Hugging Face's `datasets` writes: JSON files and Arrow tables.

The tables are read with pyarrow alone, mapped into memory. So no code of a data set runs, and `datasets` is not needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch

from ...atomic import read_json
from ...errors import InvalidValue, expect
from .dataset import ImageDataset
from .download import import_extra
from .image_files import ImageFiles, load_images
from .labels import check_labels

_DICT: Final = "dataset_dict.json"  # names the splits, each of which is a folder
_STATE: Final = "state.json"  # names the tables
_INFO: Final = "dataset_info.json"  # has the columns' types


class _Columns(NamedTuple):
    image: str
    label: str | None
    classes: tuple[str, ...]


def is_hub_folder(folder: Path) -> bool:
    """Return whether `save_to_disk` has written a folder."""
    return (folder / _DICT).is_file() or all((folder / name).is_file() for name in (_STATE, _INFO))


def read_hub_folder(
    root: Path, split: str, image_size: int | None, skip_broken: bool, first: int | None, memory: int | None
) -> ImageDataset:
    """Return the images of a table, or of a split if there are several."""
    folder = root
    if (root / _DICT).is_file():
        folder = root / read_json("load_dataset", root / _DICT, lambda values: _check_split(values, split))
    columns = read_json("load_dataset", folder / _INFO, _columns)
    tables = read_json("load_dataset", folder / _STATE, _table_names)
    table = _read_tables([folder / name for name in tables], columns)
    images_column = table.column(columns.image)

    def encoded(name: str) -> Any:
        content = images_column[_number(name)]["bytes"].as_buffer()
        if content is None:
            raise ValueError("the table has no bytes of the image")
        return content

    def open_row(name: str) -> BinaryIO:
        return io.BytesIO(encoded(name))

    files = ImageFiles(
        root=str(folder),
        names=[f"row {number}" for number in range(table.num_rows)][:first],
        open=open_row,
        num_bytes=lambda name: len(encoded(name)),
    )
    labels = torch.zeros(table.num_rows, dtype=torch.int64)
    if columns.label is not None:
        column = table.column(columns.label)
        expect(
            not column.null_count, "load_dataset", "", f"each row of {folder} to have a label", f"{column.null_count} without"
        )
        labels = torch.tensor(column.to_pylist())
        check_labels(folder, labels, len(columns.classes))
    images, files, preparation = load_images(files, image_size=image_size, skip_broken=skip_broken, memory=memory)
    labels = labels[[_number(name) for name in files.names]]
    return ImageDataset(str(root), images, labels, columns.classes, files.contents, preparation)


def _number(name: str) -> int:
    return int(name.removeprefix("row "))


def _check_split(values: Mapping[str, Any], split: str) -> str:
    """Return the split if a dataset_dict.json names it."""
    splits = values.get("splits")
    expect(isinstance(splits, list) and split in splits, "", "splits", f"to have {split}", splits)
    return split


def _columns(values: Mapping[str, Any]) -> _Columns:
    """Return the columns of images and labels that a dataset_info.json describes."""
    features = values.get("features")
    if not isinstance(features, dict):
        raise InvalidValue("", "features", "to be an object", repr(features))
    named: dict[str, list[str]] = {
        kind: [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    images, labels = named["Image"], named["ClassLabel"]
    expect(len(images) == 1, "", "features", "to have one Image", ", ".join(images) or "none")
    expect(len(labels) <= 1, "", "features", "to have at most one ClassLabel", f"{', '.join(labels)}; remove the others")
    if not labels:
        return _Columns(images[0], None, ("",))
    classes = features[labels[0]].get("names")
    name = f"features.{labels[0]}.names"
    if not isinstance(classes, list) or not classes or not all(isinstance(each, str) for each in classes):
        raise InvalidValue("", name, "to be a list of names", repr(classes))
    expect(len(set(classes)) == len(classes), "", name, "to be without repetitions", classes)
    return _Columns(images[0], labels[0], tuple(classes))


def _table_names(values: Mapping[str, Any]) -> list[str]:
    """Return the files that a state.json names, which lie beside it."""
    entries = values.get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    plain = [name for name in names if isinstance(name, str) and name == Path(name).name and "\\" not in name]
    expect(plain and plain == names, "", "_data_files", "to have names of files", repr(entries))
    if indices := values.get("_indices_data_files"):
        got = f"{indices!r}; call flatten_indices() of the data set, then save it again"
        raise InvalidValue("", "_indices_data_files", "to be none", got)
    return plain


def _read_tables(files: list[Path], columns: _Columns) -> Any:
    """Return the columns of all tables as one, mapped into memory."""
    pyarrow = import_extra("pyarrow", "hub")
    wanted = [name for name in (columns.image, columns.label) if name is not None]
    tables = []
    for file in files:
        try:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all().select(wanted)
            table.validate(full=True)  # or an offset in a damaged file would lead anywhere
        except (pyarrow.ArrowInvalid, KeyError, OSError) as error:
            raise InvalidValue("load_dataset", str(file), f"to be a whole Arrow table with {wanted}", error) from error
        kind = table.schema.field(columns.image).type
        expect(
            pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0,
            "load_dataset",
            columns.image,
            "to be encoded images",
            kind,
            str(file),
        )
        if columns.label is not None and not pyarrow.types.is_integer(table.schema.field(columns.label).type):
            got = table.schema.field(columns.label).type
            raise InvalidValue("load_dataset", columns.label, "to be integers", got, str(file))
        tables.append(table)
    table = pyarrow.concat_tables(tables)
    expect(table.num_rows, "load_dataset", str(files[0].parent), "to hold images", "none")
    return table
