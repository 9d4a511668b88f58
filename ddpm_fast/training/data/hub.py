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
from .dataset import ImageDataset
from .download import import_extra
from .image_files import ImageFiles, load_images

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
        if column.null_count:
            raise ValueError(f"load_dataset: expected each row of {folder} to have a label, got {column.null_count} without")
        labels = torch.tensor(column.to_pylist())
        if labels.min() < 0 or labels.max() >= len(columns.classes):
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise ValueError(f"load_dataset: expected labels in 0..{len(columns.classes) - 1} in {folder}, got {wrong}")
    images, files, preparation = load_images(files, image_size=image_size, skip_broken=skip_broken, memory=memory)
    labels = labels[[_number(name) for name in files.names]]
    return ImageDataset(str(root), images, labels, columns.classes, files.contents, preparation)


def _number(name: str) -> int:
    return int(name.removeprefix("row "))


def _check_split(values: Mapping[str, Any], split: str) -> str:
    """Return the split if a dataset_dict.json names it."""
    splits = values.get("splits")
    if not isinstance(splits, list) or split not in splits:
        raise ValueError(f"expected splits to have {split}, got {splits}")
    return split


def _columns(values: Mapping[str, Any]) -> _Columns:
    """Return the columns of images and labels that a dataset_info.json describes."""
    features = values.get("features")
    if not isinstance(features, dict):
        raise ValueError(f"expected features to be an object, got {features!r}")
    named: dict[str, list[str]] = {
        kind: [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    images, labels = named["Image"], named["ClassLabel"]
    if len(images) != 1:
        raise ValueError(f"expected features to have one Image, got {', '.join(images) or 'none'}")
    if len(labels) > 1:
        raise ValueError(f"expected features to have at most one ClassLabel, got {', '.join(labels)}; remove the others")
    if not labels:
        return _Columns(images[0], None, ("",))
    classes = features[labels[0]].get("names")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"expected features.{labels[0]}.names to be a list of names, got {classes!r}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"expected features.{labels[0]}.names to be without repetitions, got {classes}")
    return _Columns(images[0], labels[0], tuple(classes))


def _table_names(values: Mapping[str, Any]) -> list[str]:
    """Return the files that a state.json names, which lie beside it."""
    entries = values.get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    plain = [name for name in names if isinstance(name, str) and name == Path(name).name and "\\" not in name]
    if not plain or plain != names:
        raise ValueError(f"expected _data_files to have names of files, got {entries!r}")
    if values.get("_indices_data_files"):
        raise ValueError("expected _indices_data_files to be none: flatten_indices() of the data set, then save it again")
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
            raise ValueError(f"load_dataset: expected {file} to be a whole Arrow table with {wanted}, got: {error}") from error
        kind = table.schema.field(columns.image).type
        if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise ValueError(f"load_dataset: expected {columns.image} in {file} to be encoded images, got {kind}")
        if columns.label is not None and not pyarrow.types.is_integer(table.schema.field(columns.label).type):
            got = table.schema.field(columns.label).type
            raise ValueError(f"load_dataset: expected {columns.label} in {file} to be integers, got {got}")
        tables.append(table)
    table = pyarrow.concat_tables(tables)
    if not table.num_rows:
        raise ValueError(f"load_dataset: expected {files[0].parent} to hold images, got none")
    return table
