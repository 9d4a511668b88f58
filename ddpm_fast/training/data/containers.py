"""Containers of image files: folders, zip files, and tables of Hugging Face's `datasets`.

The labels of folders and zip files are those in a `dataset.json`, as the data set tools of EDM and StyleGAN write it.
Without that file the sub-folders of a folder are its classes.
"""

from __future__ import annotations

import io
import json
import os
import reprlib
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ...errors import InvalidValue, expect
from ...files.writing import read_json
from .dataset import check_labels, import_extra
from .image_files import ImageFiles

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ARRAYS: Final = (".npy", ".npz")
_LABELS: Final = "dataset.json"
_DICT: Final = "dataset_dict.json"  # names the splits, each of which is a folder
_STATE: Final = "state.json"  # names the tables
_INFO: Final = "dataset_info.json"  # has the columns' types
_MAX_IMAGE: Final = 256 << 20  # bytes of an image's file in an archive, unpacked
_MAX_LABELS: Final = 256 << 20  # bytes of a dataset.json; that of ImageNet has 50 MB
_MAX_LABEL: Final = 65_535  # ImageNet-21k has 21,841 classes


# ----------------------------------------------------------------------------------------------------------------- folders


def read_folder(root: Path) -> ImageFiles:
    """Return the images or the arrays of a folder and its sub-folders, sorted by the parts of their paths.

    Raises:
        ValueError: The folder holds neither, or both.
    """
    files = list(_files(root))
    names = [name for name in files if name.lower().endswith(ARRAYS)]
    if not names:
        names = _image_names(root, files)
    elif images := _named(files):
        got = f"images, such as {images[0]}, and arrays, such as {names[0]}; move one kind to another folder"
        raise InvalidValue("load_dataset", str(root), "to hold images or arrays", got)
    names.sort(key=lambda name: name.replace(os.sep, "\0"))  # a folder's files come before those of "folder-2"
    values = _folder_labels(root / _LABELS)
    if values is not None:
        labels, classes = _listed_labels(str(root / _LABELS), values, names)
    else:
        folders = [os.path.dirname(name).partition(os.sep)[0] for name in names]  # "" for images in the root itself
        classes = tuple(sorted(set(folders)))
        numbers = {folder: number for number, folder in enumerate(classes)}
        labels = torch.tensor([numbers[folder] for folder in folders])
    return ImageFiles(
        root=str(root),
        names=names,
        open=lambda name: (root / name).open("rb"),
        num_bytes=lambda name: (root / name).stat().st_size,
        labels=labels,
        classes=classes,
        keeps_classes=values is not None,
    )


def read_file(path: Path) -> ImageFiles:
    """Return one image."""
    return ImageFiles(
        root=str(path.parent),
        names=[path.name],
        open=lambda name: path.open("rb"),
        num_bytes=lambda name: path.stat().st_size,
        labels=torch.zeros(1, dtype=torch.int64),
        classes=("",),
    )


def _files(root: Path) -> Iterator[str]:
    """Yield the paths of files in a folder and its sub-folders, relative to it. They take less memory than `Path`s.

    Pipes and devices are left out. A link to nothing is a missing file.
    """

    def fail(error: OSError) -> None:
        raise error  # or a folder that must not be read would be left out in silence

    for folder, folders, names in os.walk(root, onerror=fail):
        for path in (os.path.join(folder, name) for name in folders):  # a link may lead to a folder above it
            expect(not os.path.islink(path), "load_dataset", "", f"folders without links in {root}", repr(path))
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isfile(path) or not os.path.exists(path):
                yield os.path.relpath(path, root)


def _folder_labels(file: Path) -> dict[str, Any] | None:
    """Return the content of a folder's `dataset.json`, or None if there is none, or one of another kind."""
    if not file.exists():
        return None
    size = file.stat().st_size if file.is_file() else None
    expect(
        size is not None and size <= _MAX_LABELS,
        "load_dataset",
        str(file),
        f"to be a file of at most {_MAX_LABELS} bytes",
        "none" if size is None else f"{size} bytes",
    )
    values = _parsed(str(file), file.read_bytes())
    return values if isinstance(values, dict) and "labels" in values else None


# --------------------------------------------------------------------------------------------------------------- zip files


def read_archive(path: Path) -> ImageFiles:
    """Return the images of a zip file, in any of its folders, sorted by name."""
    archive = _opened(path)
    names = sorted(_image_names(path, set(archive.namelist())))  # EDM has the same order
    for name in names:
        _check_entry(path, archive.getinfo(name), _MAX_IMAGE)
    place, values = f"{_LABELS} in {path}", None
    if _LABELS in archive.NameToInfo:
        _check_entry(path, archive.getinfo(_LABELS), _MAX_LABELS)
        try:
            content = archive.read(_LABELS)
        except MemoryError:
            raise
        except Exception as error:  # each kind of compression raises errors of its own
            raise InvalidValue("load_dataset", place, "to be whole", error) from error
        values = _parsed(place, content)
    labels, classes = _listed_labels(place, values, names)
    return ImageFiles(
        root=str(path),
        names=names,
        open=lambda name: archive.open(name),  # type: ignore[arg-type, return-value]
        num_bytes=lambda name: archive.getinfo(name).file_size,
        labels=labels,
        classes=classes,
    )


def _opened(path: Path) -> zipfile.ZipFile:
    """Return the open archive.

    All threads share it, as its directory takes half a kilobyte for each image. It locks each read of the file. The count
    of users, by which it would close a file that it had opened itself, is not locked. So the file is opened here.
    """
    file = path.open("rb")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        file.close()
        raise InvalidValue("load_dataset", str(path), "to be a folder or a whole zip file", error) from error
    weakref.finalize(archive, file.close)
    return archive


def _check_entry(path: Path, entry: zipfile.ZipInfo, largest: int) -> None:
    """Raise a ValueError if a file in the archive is too large or encrypted, before it is unpacked."""
    name, size = entry.filename, entry.file_size
    expect(size <= largest, "load_dataset", name, f"to have at most {largest} bytes", size, str(path))
    expect(not entry.flag_bits & 1, "load_dataset", str(path), "to hold no encrypted files", name)


# ------------------------------------------------------------------------------------------------------------------- names


def _image_names(root: Path, names: Iterable[str]) -> list[str]:
    """Return the names that have the ending of an image. Raise a ValueError if there are none."""
    images = _named(names)
    expect(images, "load_dataset", str(root), f"to hold images ({', '.join(sorted(SUFFIXES))})", "none")
    return images


def _named(names: Iterable[str]) -> list[str]:
    """Return the names that have the ending of an image, without the notes that macOS puts into archives."""
    return [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("__MACOSX/")]


def _parsed(place: str, content: bytes) -> Any:
    """Return the content of a `dataset.json`. `place` is the file, for error messages."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidValue("load_dataset", place, "to be JSON", error) from error


def _listed_labels(place: str, values: Any, names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the label of each name, int64 [N], and the names of the classes: numbers, or "" alone without labels.

    Args:
        place: The file, for error messages.
        values: Its content. None: there is no file.
        names: Paths of images, relative to the file's folder.

    Raises:
        ValueError: The labels are no pairs, or a name has none.
    """
    pairs = values.get("labels") if isinstance(values, dict) else values
    if pairs is None:
        return torch.zeros(len(names), dtype=torch.int64), ("",)
    paired = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    expect(paired, "load_dataset", "labels", "to be a list of pairs [name, label], or null", reprlib.repr(pairs), place)
    labels: dict[str, Any] = {name: label for name, label in pairs if isinstance(name, str)}
    numbers: list[Any] = [labels.get(name.replace("\\", "/")) for name in names]
    for name, label in zip(names, numbers, strict=True):
        if type(label) is not int or not 0 <= label <= _MAX_LABEL:
            got = "a vector" if isinstance(label, list) else "none" if label is None else repr(label)
            raise InvalidValue("load_dataset", "", f"the label of {name} in {place} to be in 0..{_MAX_LABEL}", got)
    return torch.tensor(numbers), tuple(map(str, range(max(numbers) + 1)))


# -------------------------------------------------------------------------------------------------------- Hugging Face's tables
#
# `save_to_disk` of Hugging Face's `datasets` writes JSON files and Arrow tables. The tables are read with pyarrow alone,
# mapped into memory. So no code of a data set runs, and `datasets` is not needed.


def is_hub_folder(folder: Path) -> bool:
    """Return whether `save_to_disk` has written a folder."""
    return (folder / _DICT).is_file() or all((folder / name).is_file() for name in (_STATE, _INFO))


def read_hub_folder(root: Path, split: str) -> ImageFiles:
    """Return the images of a table, or of a split if there are several."""
    folder = root
    if (root / _DICT).is_file():
        folder = root / read_json("load_dataset", root / _DICT, lambda values: _check_split(values, split))
    image, label, classes = read_json("load_dataset", folder / _INFO, _columns)
    names = read_json("load_dataset", folder / _STATE, _table_names)
    table = _read_tables([folder / name for name in names], image, label)
    labels = torch.zeros(table.num_rows, dtype=torch.int64)
    if label is not None:
        missing = table.column(label).null_count
        expect(not missing, "load_dataset", "", f"each row of {folder} to have a label", f"{missing} without")
        labels = torch.tensor(table.column(label).to_pylist())
        check_labels(folder, labels, len(classes))
    images = table.column(image)

    def content(name: str) -> Any:
        buffer = images[int(name.removeprefix("row "))]["bytes"].as_buffer()
        if buffer is None:
            raise ValueError("the table has no bytes of the image")
        return buffer

    return ImageFiles(
        root=str(folder),
        names=[f"row {number}" for number in range(table.num_rows)],
        numbered=True,
        open=lambda name: io.BytesIO(content(name)),
        num_bytes=lambda name: len(content(name)),
        labels=labels,
        classes=classes,
    )


def _check_split(values: Mapping[str, Any], split: str) -> str:
    """Return the split if a dataset_dict.json names it."""
    splits = values.get("splits")
    expect(isinstance(splits, list) and split in splits, "", "splits", f"to have {split}", splits)
    return split


def _columns(values: Mapping[str, Any]) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the columns of images and labels, and the classes, that a dataset_info.json describes."""
    features = values.get("features")
    if not isinstance(features, dict):
        raise InvalidValue("", "features", "to be an object", repr(features))
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images, labels = ([name for name in kinds if kinds[name] == kind] for kind in ("Image", "ClassLabel"))
    expect(len(images) == 1, "", "features", "to have one Image", ", ".join(images) or "none")
    expect(len(labels) <= 1, "", "features", "to have at most one ClassLabel", f"{', '.join(labels)}; remove the others")
    if not labels:
        return images[0], None, ("",)
    classes, name = features[labels[0]].get("names"), f"features.{labels[0]}.names"
    named = isinstance(classes, list) and classes and all(isinstance(each, str) for each in classes)
    expect(named, "", name, "to be a list of names", repr(classes))
    expect(len(set(classes)) == len(classes), "", name, "to be without repetitions", classes)
    return images[0], labels[0], tuple(classes)


def _table_names(values: Mapping[str, Any]) -> list[str]:
    """Return the files that a state.json names, which lie beside it."""
    entries, indices = values.get("_data_files"), values.get("_indices_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    plain = [name for name in names if isinstance(name, str) and name == Path(name).name and "\\" not in name]
    expect(plain and plain == names, "", "_data_files", "to have names of files", repr(entries))
    expect(
        not indices,
        "",
        "_indices_data_files",
        "to be none",
        f"{indices!r}; call flatten_indices() of the data set, then save it again",
    )
    return plain


def _read_tables(files: list[Path], image: str, label: str | None) -> Any:
    """Return the columns of images and labels of all tables as one table, mapped into memory."""
    pyarrow = import_extra("pyarrow", "hub")
    wanted = [image] if label is None else [image, label]
    tables = []
    for file in files:
        try:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all().select(wanted)
            table.validate(full=True)  # or an offset in a damaged file would lead anywhere
        except (pyarrow.ArrowInvalid, KeyError, OSError) as error:
            raise InvalidValue("load_dataset", str(file), f"to be a whole Arrow table with {wanted}", error) from error
        kinds = [table.schema.field(name).type for name in wanted]
        encoded = pyarrow.types.is_struct(kinds[0]) and kinds[0].get_field_index("bytes") >= 0
        expect(encoded, "load_dataset", image, "to be encoded images", kinds[0], str(file))
        for kind in kinds[1:]:
            expect(pyarrow.types.is_integer(kind), "load_dataset", wanted[1], "to be integers", kind, str(file))
        tables.append(table)
    table = pyarrow.concat_tables(tables)
    expect(table.num_rows, "load_dataset", str(files[0].parent), "to hold images", "none")
    return table
