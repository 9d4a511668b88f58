"""The files of many images: a folder of PNGs, or blocks in a folder that become an npz at the end."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from torch import Tensor

from ..checks import check_same
from ..errors import UnusablePath, expect
from ..files.result_folder import LOCK, ResultFolder
from ..files.writing import flush_names, read_json, remove_leftovers, replacing, write_bytes, write_text
from ..resources import check_writable

_MANIFEST: Final = "manifest.json"
_WRITERS: Final = 8  # threads that write PNGs, which wait for the disk most of the time
_PNG_END: Final = b"IEND\xaeB`\x82"

Pixels = np.ndarray[Any, np.dtype[Any]]


class SampleFiles(ResultFolder):
    """The files of one call. Blocks and the manifest are in the folder `path`, until an npz has them all.

    Args:
        out: File or folder to write. Its ending chooses the format.
        num_samples: Number of images.
        shape: (C, H, W) of an image.
        labels: Labels [num_samples, ...] on the CPU, or None.
        pictures: False: the values are floats, for which there is the npz alone.

    Attributes:
        kind: "folder" or "npz", for the manifest.
        dtype: Type of the values, as numpy writes it: "|u1", or "<f4" in an npz of data that are no pictures.
    """

    argument = "out"
    record_name = _MANIFEST
    hint = "choose another out"

    def __init__(
        self,
        out: str | os.PathLike[str],
        num_samples: int,
        shape: Sequence[int],
        labels: Tensor | None,
        *,
        pictures: bool,
    ) -> None:
        result, kind = Path(out), kind_of(os.fspath(out))
        expect(kind, "out", "to be a folder or an .npz", repr(os.fspath(out)))
        self.kind = kind or "folder"
        self.dtype = "|u1" if pictures or self.kind == "folder" else "<f4"
        self.num_samples, self.shape, self.labels = num_samples, tuple(shape), labels
        super().__init__(result.with_name(f"{result.name}.parts") if self.kind == "npz" else result, result)
        fits = len(shape) == 3 and (self.kind == "npz" or shape[0] in (1, 3, 4))
        one_of = "" if self.kind == "npz" else " with C one of 1, 3, 4"
        expect(fits, "shape", f"to be (C, H, W){one_of} for {str(result)!r}", tuple(shape))
        check_writable("out", result, result.parent if self.kind == "npz" else result)
        fits = self.kind == "folder" or result.is_file() or not result.exists()
        expect(fits, "out", "to be a file", f"{str(result)!r}, which is a folder or a device")

    def manifest(self) -> dict[str, Any] | None:
        """Return the fields of the manifest, which is the comment of a whole npz, or None if there is none."""
        if self.kind == "folder" or not self.result.exists():
            return read_json(self.record, _fields) if self.record.exists() else None
        try:
            with zipfile.ZipFile(self.result) as archive:
                return _fields(json.loads(archive.comment))
        except Exception as error:  # damaged archives raise errors of many types
            wanted, got = "to be new or written by the same call", f"{str(self.result)!r} without a manifest: {error}"
            raise UnusablePath("out", wanted, got) from error

    def agrees(self, wanted: Mapping[str, Any]) -> bool:
        """Return False if there is no manifest. Raise a ValueError if it differs in a field."""
        found = self.manifest()
        if found is not None:
            check_same(wanted, found, repr(str(self.result)), f"; {self.hint}")
        return found is not None

    def remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed. The caller holds the lock."""
        for folder in (self.path, *self.path.glob("*/")):
            remove_leftovers(folder, 0)

    def has(self, block: range) -> bool:
        """Return whether a block is whole."""
        if self.kind == "folder":
            return all(_is_png(self.path / _png_name(index)) for index in block)
        with suppress(Exception):  # damaged files raise errors of many types
            return self.result.exists() or len(self._read(block)) == len(block)
        return False

    def write(self, block: range, pixels: Pixels) -> None:
        """Write a block of images [n, H, W, C] of `dtype`."""
        if self.kind == "npz":
            write_bytes(self._part(block), _npy(pixels))
            return
        for folder in {_png_name(index).parent for index in block}:
            (self.path / folder).mkdir(exist_ok=True)
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda index, image: write_bytes(self.path / _png_name(index), _png(image)), block, pixels))

    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        """Write what needs all blocks. A call that then locks a new file finds nothing left to write."""
        done: list[str] = []
        if self.kind == "npz":
            done = [_MANIFEST, self.result.name, *(self._part(block).name for block in blocks)]
            if not self.result.exists():
                self._pack(blocks, manifest)
        else:
            names = [_png_name(index).as_posix() for index in range(self.num_samples)]
            pairs = None if self.labels is None else [list(pair) for pair in zip(names, self.labels.tolist(), strict=True)]
            write_text(self.path / "dataset.json", json.dumps({"labels": pairs}))  # EDM's
        with suppress(OSError):
            for name in (*done, LOCK):
                (self.path / name).unlink(missing_ok=True)
            if self.kind == "npz":
                self.path.rmdir()  # unless it has files of others

    def _pack(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        """Make the npz of all blocks, one at a time, as guided-diffusion writes it. The manifest is its comment."""
        channels, height, width = self.shape
        header = {"descr": self.dtype, "fortran_order": False, "shape": (self.num_samples, height, width, channels)}
        whole = self.path / self.result.name  # a process that is killed leaves no file next to the result
        with replacing(whole) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(self._read(block).tobytes())
            if self.labels is not None:
                archive.writestr(zipfile.ZipInfo("arr_1.npy"), _npy(self.labels.numpy()))
            archive.comment = json.dumps(manifest).encode()
        whole.replace(self.result)
        flush_names(self.result.parent)

    def _part(self, block: range) -> Path:
        """Return the file of a block."""
        return self.path / f"{block.start:010d}.npy"

    def _read(self, block: range) -> Pixels:
        """Return the images of a block's file, mapped into memory. Raise a ValueError if they are not `dtype` [n, H, W, C]."""
        found: Pixels = np.load(self._part(block), "r")
        channels, height, width = self.shape
        expect(found.shape[1:] == (height, width, channels) and found.dtype == self.dtype, "block", "whole", found.shape)
        return found


def kind_of(out: str) -> Literal["folder", "npz"] | None:
    """Return the format of many images at a path, or None for a file of another kind.

    A folder exists, ends in a separator, or has no ending, where numbers are none: it may be called v1.5.
    """
    ending = Path(out).suffix.lower()
    if ending == ".npz":
        return "npz"
    named = os.path.isdir(out) or out.endswith(tuple(filter(None, (os.sep, os.altsep))))
    return "folder" if named or not re.fullmatch(r"\.[a-z]\w*", ending) else None


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the checked fields of a manifest."""
    import msgspec

    from ..schemas import SampleManifest

    return msgspec.structs.asdict(msgspec.convert(values, SampleManifest))


def _png_name(index: int) -> Path:
    return Path(f"{index - index % 1000:06d}", f"{index:06d}.png")


def _png(image: Pixels) -> bytes:
    """Return a picture [H, W, C] as PNG."""
    from PIL import Image

    content = io.BytesIO()
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    picture.save(content, format="PNG", compress_level=6)
    return content.getvalue()


def _npy(array: Pixels) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _is_png(path: Path) -> bool:
    """Return whether a file ends as a whole PNG does."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-len(_PNG_END), os.SEEK_END)
        return file.read() == _PNG_END
    return False
