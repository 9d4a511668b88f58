"""The formats of many images: a folder of PNGs or an npz, each written block by block."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from ..checks import check_same
from ..errors import InvalidValue, UnusablePath, expect
from ..files.result_folder import LOCK, ResultFolder
from ..files.writing import flush_names, read_json, remove_leftovers, replacing, write_bytes, write_json, write_text
from ..resources import check_writable

_DATASET: Final = "dataset.json"
_WRITERS: Final = 8  # threads that write PNGs, which wait for the disk most of the time
_PNG_END: Final = b"IEND\xaeB`\x82"

Pixels = np.ndarray[Any, np.dtype[Any]]


class SampleFormat(ResultFolder, ABC):
    """The files of one call. Blocks and the manifest are in the folder `path`.

    Attributes:
        kind: Name of the format in the manifest.
        channels: Numbers of channels that the format has. None: any.
        num_samples: Number of images.
        shape: (C, H, W) of an image.
        labels: int64 [num_samples], or None.
        dtype: Type of the values, as numpy writes it: "|u1", or "<f4" in an npz of data that are no pictures.
    """

    kind: ClassVar[str]
    channels: ClassVar[tuple[int, ...] | None]
    caller = "write_samples"
    argument = "out"
    record_name = "manifest.json"
    hint = "choose another out"

    def __init__(self, out: Path, folder: Path, num_samples: int, shape: Sequence[int], labels: np.ndarray | None) -> None:
        super().__init__(folder, out)
        self.dtype = "|u1"
        self.num_samples, self.shape, self.labels = num_samples, tuple(shape), labels
        if len(shape) != 3 or (self.channels is not None and shape[0] not in self.channels):
            one_of = "" if self.channels is None else f" with C one of {', '.join(map(str, self.channels))}"
            raise InvalidValue(self.caller, "shape", f"to be (C, H, W){one_of} for {str(out)!r}", tuple(shape))
        check_writable(self.caller, "out", out, folder if folder == out else out.parent)

    def manifest(self) -> dict[str, Any] | None:
        """Return the fields of the manifest, or None if there is none."""
        return read_json(self.caller, self.record, _fields) if self.record.exists() else None

    def agrees(self, wanted: Mapping[str, Any]) -> bool:
        """Return False if there is no manifest. Raise a ValueError if it differs in a field."""
        found = self.manifest()
        if found is not None:
            check_same(self.caller, wanted, found, repr(str(self.result)), f"; {self.hint}")
        return found is not None

    def remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed. The caller holds the lock."""
        for folder in (self.path, *self.path.glob("*/")):
            remove_leftovers(folder, 0)

    def remove_lock(self) -> None:
        """Remove the lock's file once all is written. A call that then locks a new file finds nothing left to write."""
        with suppress(OSError):
            (self.path / LOCK).unlink()

    def size(self, images: int) -> int:
        """Return the bytes of this number of images."""
        return images * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @abstractmethod
    def has(self, block: range) -> bool:
        """Return whether a block is whole."""

    @abstractmethod
    def write(self, block: range, pixels: Pixels) -> None:
        """Write a block of images [n, H, W, C] of `dtype`."""

    @abstractmethod
    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        """Write what needs all blocks."""


class _Folder(SampleFormat):
    """A folder of PNGs."""

    kind = "folder"
    channels = (1, 3, 4)

    def __init__(self, out: Path, num_samples: int, shape: Sequence[int], labels: np.ndarray | None) -> None:
        super().__init__(out, out, num_samples, shape, labels)

    def has(self, block: range) -> bool:
        return all(_is_png(self.path / _folder_name(index)) for index in block)

    def write(self, block: range, pixels: Pixels) -> None:
        for name in {_folder_name(index).parent for index in block}:
            (self.path / name).mkdir(exist_ok=True)

        def write(index: int, image: Pixels) -> None:
            write_bytes(self.path / _folder_name(index), _png(image))

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(write, block, pixels))

    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        names = [_folder_name(index).as_posix() for index in range(self.num_samples)]
        write_text(self.path / _DATASET, _dataset_text(names, self.labels))
        self.remove_lock()


class _Npz(SampleFormat):
    """An npz in guided-diffusion's form with its manifest. Until it is whole, a folder next to it has an npy per block."""

    kind = "npz"
    channels = None

    def __init__(self, out: Path, num_samples: int, shape: Sequence[int], labels: np.ndarray | None) -> None:
        super().__init__(out, out.with_name(f"{out.name}.parts"), num_samples, shape, labels)
        self.beside = out.with_name(f"{out.name}.json")
        if out.exists() and not out.is_file():
            raise InvalidValue(self.caller, "out", "to be a file", f"{str(out)!r}, which is a folder or a device")

    def manifest(self) -> dict[str, Any] | None:
        if not self.result.exists():
            return super().manifest()
        wanted, got = "to be new or written by the same call", f"{str(self.result)!r} without {self.beside.name!r}"
        if not self.beside.exists():
            raise UnusablePath(self.caller, "out", wanted, got)
        return read_json(self.caller, self.beside, _fields)

    def agrees(self, wanted: Mapping[str, Any]) -> bool:
        same, size = super().agrees(wanted), len(self.header(self.num_samples)) + self.size(self.num_samples)
        if same and self.result.exists():
            try:
                with zipfile.ZipFile(self.result) as archive:
                    found = archive.getinfo("arr_0.npy").file_size
                expect(found == size, self.caller, "out", f"to hold {size} bytes of images", found)
            except Exception as error:  # damaged archives raise errors of many types
                raise UnusablePath(self.caller, "out", "to be as it was written", error) from error
        return same

    def check_new(self) -> None:
        super().check_new()
        if self.beside.exists():
            read_json(self.caller, self.beside, _fields)  # a manifest without images, or a file of others

    def has(self, block: range) -> bool:
        if self.result.exists():
            return True
        header = self.header(len(block))
        with suppress(OSError), self.part(block).open("rb") as file:
            whole = len(header) + self.size(len(block))
            return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == whole
        return False

    def write(self, block: range, pixels: Pixels) -> None:
        write_bytes(self.part(block), self.header(len(block)) + pixels.tobytes())

    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        if not self.result.exists():
            whole = self.path / self.result.name  # a process that is killed leaves no file next to the result
            with replacing(whole) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                self.add(archive, blocks)
            write_json(self.beside, manifest)  # before the archive, which nothing could continue without it
            whole.replace(self.result)
            flush_names(self.result.parent)
        if self.path.exists():
            for path in self.path.iterdir():
                if path.name == self.result.name or re.fullmatch(r"\d{10}\.npy", path.name):
                    path.unlink()
            self.record.unlink(missing_ok=True)
            self.remove_lock()
            with suppress(OSError):  # it has files of others
                self.path.rmdir()

    def part(self, block: range) -> Path:
        """Return the file of a block."""
        return self.path / f"{block.start:010d}.npy"

    def header(self, images: int) -> bytes:
        """Return what an npy of this number of images begins with."""
        channels, height, width = self.shape
        return _npy_header((images, height, width, channels), self.dtype)

    def add(self, archive: zipfile.ZipFile, blocks: Sequence[range]) -> None:
        """Copy the blocks' files to the archive, one at a time, and add the labels."""
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            member.write(self.header(self.num_samples))
            for block in blocks:
                with self.part(block).open("rb") as part:
                    part.seek(len(self.header(len(block))))
                    shutil.copyfileobj(part, member)
        if self.labels is not None:
            header = _npy_header(self.labels.shape, "<i8")
            archive.writestr(zipfile.ZipInfo("arr_1.npy"), header + self.labels.astype("<i8").tobytes())


def files_of(
    out: str | os.PathLike[str], num_samples: int, shape: Sequence[int], labels: np.ndarray | None, *, pictures: bool
) -> SampleFormat:
    """Return the files of a call, in the format that the ending of `out` chooses. An npz without `pictures` holds floats."""
    path, ending = Path(out), Path(out).suffix.lower()
    is_folder = os.path.isdir(path) or os.fspath(out).endswith(("/", os.sep))
    fits = is_folder or ending in ("", ".npz") or not re.fullmatch(r"\.[a-z]\w*", ending)  # a folder may be called v1.5
    expect(fits, "write_samples", "out", "to be a folder or an .npz", repr(os.fspath(out)))
    kind = _Npz if ending == ".npz" else _Folder
    files = kind(Path(out), num_samples, shape, labels)
    files.dtype = "<f4" if kind is _Npz and not pictures else files.dtype
    return files


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the checked fields of a manifest."""
    import msgspec

    from ..schemas import SampleManifest

    return msgspec.structs.asdict(msgspec.convert(values, SampleManifest))


def _folder_name(index: int) -> Path:
    return Path(f"{index - index % 1000:06d}", f"{index:06d}.png")


def _png(image: Pixels) -> bytes:
    """Return a picture [H, W, C] as PNG."""
    from PIL import Image

    content = io.BytesIO()
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    picture.save(content, format="PNG", compress_level=6)
    return content.getvalue()


def _is_png(path: Path) -> bool:
    """Return whether a file ends as a whole PNG does."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-len(_PNG_END), os.SEEK_END)
        return file.read() == _PNG_END
    return False


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": shape})
    return content.getvalue()


def _dataset_text(names: Sequence[str], labels: np.ndarray | None) -> str:
    """Return EDM's dataset.json."""
    pairs = None if labels is None else [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
    return json.dumps({"labels": pairs})
