"""CIFAR-10, 32x32 pixels: its binary and its Python version, as folders or as the archives that hold them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InvalidValue, expect
from .download import default_folder, downloaded
from .labels import check_labels

CIFAR10_CLASSES: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_PIXELS: Final = 3 * 32 * 32
_MAX_FILE: Final = 64 << 20  # bytes of a file; those of CIFAR-10 have 31 MB
_MAX_ARCHIVE: Final = 1 << 30  # bytes of an archive, unpacked; those of CIFAR-10 have 0.2 GB

_Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [N, 3072] and labels [N]


class _Version(NamedTuple):
    """A form in which CIFAR-10 is published."""

    folder: str
    archive: str
    suffix: str
    read: Callable[[str, bytes], _Batch]

    def names(self, split: str) -> list[str]:
        stems = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
        return [stem + self.suffix for stem in stems]


def read_cifar10(root: Path | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the images, uint8 [N, 3, 32, 32], their labels, int64 [N], and the names of the classes."""
    folder = root or default_folder()
    for version in _VERSIONS:
        found = _find(folder, version, split)
        if found is not None:
            place, contents = found
            missing = [name for name in version.names(split) if name not in contents]
            if missing:
                raise InvalidValue("load_dataset", str(place), f"to hold {', '.join(version.names(split))}", f"no {missing[0]}")
            batches = [version.read(f"{place}/{name}", contents[name]) for name in version.names(split)]
            images = torch.from_numpy(np.concatenate([images for images, _ in batches]))
            labels = torch.from_numpy(np.concatenate([labels for _, labels in batches]))
            return images.view(-1, 3, 32, 32), labels, CIFAR10_CLASSES
    source = downloaded("CIFAR10", root, split, "cifar-10-python.tar.gz")
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32]
    return images, torch.tensor(source.targets), tuple(source.classes)


def _find(root: Path, version: _Version, split: str) -> tuple[Path, Mapping[str, bytes]] | None:
    """Return the place of a version and its files' contents by name, or None if it is not there."""
    names = version.names(split)
    for folder in (root, root / version.folder, *sorted(root.glob(f"*/{version.folder}"))):
        files = [folder / name for name in names if (folder / name).is_file()]
        if files:
            return folder, {file.name: _read_file(file) for file in files}
    archive = root / version.archive
    return (archive, _read_archive(archive, names)) if archive.is_file() else None


def _read_file(file: Path) -> bytes:
    size = file.stat().st_size
    expect(0 < size <= _MAX_FILE, "load_dataset", str(file), f"to have 1 to {_MAX_FILE} bytes", size)
    return file.read_bytes()


def _read_archive(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Return the files of an archive that have these names, in whichever folder. Nothing is extracted."""
    contents = {}
    try:
        with _BoundedGzip(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as opened:
            for member in opened:
                expect(
                    member.offset_data + member.size <= _MAX_ARCHIVE,
                    "load_dataset",
                    str(archive),
                    f"to hold at most {_MAX_ARCHIVE} bytes",
                    "more",
                )
                name = PurePosixPath(member.name).name
                if name in names and (file := opened.extractfile(member)) is not None:
                    expect(
                        0 < member.size <= _MAX_FILE,
                        "load_dataset",
                        f"{archive}/{name}",
                        f"to have 1 to {_MAX_FILE} bytes",
                        member.size,
                    )
                    contents[name] = file.read()
            part = min(_MAX_FILE, 1 << 20)
            for _ in range(_MAX_ARCHIVE // part):  # gzip compares the checksum at the end
                if not unpacked.read(part):
                    break
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InvalidValue("load_dataset", str(archive), "to be a whole .tar.gz file", error) from error
    return contents


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that refuses to read much at once, as a header of a tar file can ask for any number of bytes."""

    def read(self, size: int | None = -1) -> bytes:
        """Read bytes. Raise a TarError if they are too many."""
        if size is None or not 0 <= size <= _MAX_FILE:
            raise tarfile.ReadError(f"parts of {size} bytes instead of at most {_MAX_FILE}")
        return super().read(size)


# ---------------------------------------------------------------------------------------------------------- binary version


def _read_binary(file: str, content: bytes) -> _Batch:
    """Return images and labels of records of a byte with the label and the pixels, [3, 32, 32]."""
    expect(
        len(content) % (1 + _PIXELS) == 0,
        "load_dataset",
        file,
        f"to hold records of {1 + _PIXELS} bytes",
        f"{len(content)} bytes",
    )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    images, labels = records[:, 1:], records[:, 0].astype(np.int64)
    check_labels(file, labels, 10)
    return images, labels


# ---------------------------------------------------------------------------------------------------------- Python version


class _Array:
    """A stand-in for an array in a pickle. It keeps the state and does nothing with it."""

    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Array):
    """A stand-in for a dtype in a pickle."""


class _Unpickler(pickle._Unpickler):
    """An unpickler of plain values and arrays. It calls no function of any module, so a pickle cannot run code.

    It is the one in Python, as the one in C allocates as much memory as a damaged file asks for.
    """

    _STAND_INS: Final = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    # A bytearray would be allocated before its content is read.
    dispatch: ClassVar[Any] = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a plain value")
        return self._STAND_INS[module, name]


def _read_python(file: str, content: bytes) -> _Batch:
    """Return images and labels of a pickled dict of b"data", uint8 [N, 3072], and b"labels", a list of N ints."""

    def refuse(got: object) -> NoReturn:
        raise InvalidValue("load_dataset", file, "to be a pickled batch of CIFAR-10", got)

    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise any error
        refuse(f"{type(error).__name__}: {error}")
    if not isinstance(batch, dict):
        refuse(type(batch).__name__)
    labels = batch.get(b"labels", batch.get("labels"))
    if not isinstance(labels, list) or not labels or not all(type(label) is int and 0 <= label < 256 for label in labels):
        refuse("no list of labels")
    array = batch.get(b"data", batch.get("data"))
    # The state of an array: a version, the shape, the dtype, whether it is in Fortran's order, the bytes.
    state = array.state if isinstance(array, _Array) else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], bytes):
        refuse("no array of images")
    _, shape, dtype, is_fortran, pixels = state
    if not isinstance(dtype, _Dtype) or dtype.arguments[:1] not in (("u1",), (b"u1",)):
        refuse("images of another dtype than uint8")
    if shape != (len(labels), _PIXELS) or len(pixels) != len(labels) * _PIXELS:
        refuse(f"{len(labels)} labels and images of shape {shape} in {len(pixels)} bytes")
    images = np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    numbers = np.array(labels)
    check_labels(file, numbers, 10)
    return images, numbers


_VERSIONS: Final = (
    _Version("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _read_binary),
    _Version("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _read_python),
)
