"""Zip files of images, and labels in EDM's `dataset.json`, in a zip file or a folder."""

from __future__ import annotations

import json
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import encoded, flip_bits, read_data, whole, write

from ddpm_fast.data import sources
from ddpm_fast.data.loader import batches

NAMES = ["00000/img1.png", "00000/img0.png", "b.png", "00001-more/deep/img2.PNG", "A.png"]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
IMAGES = {name: encoded(pixels) for name, pixels in zip(NAMES, PIXELS, strict=True)}
FILES = {"notes.txt": b"text", "__MACOSX/._b.png": b"a note", **IMAGES}
LABELS = dict(zip(NAMES, [2, 0, 4, 0, 1], strict=True))


def listing(labels: Any) -> bytes:
    """Return a `dataset.json` with these labels."""
    return json.dumps({"labels": labels}).encode()


def labelled(**others: Any) -> bytes:
    """Return a `dataset.json` with the labels of all images, of which some are others."""
    return listing([*(LABELS | {f"{name}.png": label for name, label in others.items()}).items()])


containers = pytest.mark.parametrize("container", ["a.zip", "folder"])


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize(
    ("container", "files", "method"),
    [
        ("a.zip", {"folder/": b"", **FILES}, zipfile.ZIP_STORED),
        ("a.zip", {"folder/": b"", **FILES}, zipfile.ZIP_DEFLATED),
        ("folder", FILES, zipfile.ZIP_STORED),
    ],
)
def test_images_are_those_of_the_files(
    container: str, files: dict[str, bytes], method: int, memory: int | None, tmp_path: Path
) -> None:
    path = str(write(tmp_path / container, files | {"dataset.json": labelled(other=9)}, method))
    dataset = read_data(path, data_memory=memory)
    order = [NAMES.index(name) for name in sorted(NAMES)]
    assert (dataset.info.shape, dataset.info.preparation) == ((3, 6, 6), "not resized, in RGB")
    assert dataset.info.classes == ("0", "1", "2", "3", "4")
    assert dataset.in_memory == (memory is None)
    first, second = batches(dataset, [torch.arange(5), torch.tensor([3, 3])], 0)
    np.testing.assert_array_equal(first.images, PIXELS[order].transpose(0, 3, 1, 2))
    assert first.labels.tolist() == [LABELS[name] for name in sorted(NAMES)]
    np.testing.assert_array_equal(second.images[1], first.images[3])
    resized = read_data(path, image_size=3, first=2, data_memory=memory)
    assert (resized.info.shape, len(resized), resized.info.classes) == ((3, 3, 3), 2, dataset.info.classes)


@containers
@pytest.mark.parametrize(
    ("others", "is_listed"),
    [
        ({}, False),
        ({"dataset.json": listing(None)}, True),
        # Other files and folders of this name are ignored.
        *(({"dataset.json": content}, False) for content in (b'{"name": "pets"}', b"[]", b'"labels"')),
        ({"dataset.json/a.txt": b"text"}, False),
    ],
)
def test_images_without_labels_share_one_class_or_are_of_sub_folders(
    container: str, others: dict[str, bytes], is_listed: bool, tmp_path: Path
) -> None:
    dataset = read_data(str(write(tmp_path / container, FILES | others)))
    by_folder = container == "folder" and not is_listed
    wanted = (("", "00000", "00001-more"), [1, 1, 2, 0, 0]) if by_folder else (("",), [0] * 5)
    assert (dataset.info.classes, whole(dataset).labels.tolist()) == wanted


PAIRS = r"labels to be a list of pairs \[name, label\], or null, got .*, in '.*dataset\.json"
NO_JSON = r"(.*/)?dataset\.json.* to be JSON, got: "
NO_LABEL = r"the label of b\.png in .*dataset\.json.* to be in 0\.\.65535, got "


@containers
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (labelled(b=[0.5, 1.0]), rf"{NO_LABEL}\[0\.5, 1\.0\]"),
        (labelled(b=None), f"{NO_LABEL}None"),
        (labelled(b=-1), f"{NO_LABEL}-1"),
        (labelled(b=65_536), f"{NO_LABEL}65536"),
        (labelled(b=1.0), rf"{NO_LABEL}1\.0"),
        (labelled(b=True), f"{NO_LABEL}True"),
        (labelled(b="1"), f"{NO_LABEL}'1'"),
        (listing([*LABELS.items()][:4]), r"the label of A\.png in .* to be in 0\.\.65535, got none"),
        *((listing(labels), PAIRS) for labels in (5, {"a.png": 1}, ["a.png"], [["a.png", 1, 2]])),
        *((content, NO_JSON) for content in (b"{", b"\xff", b"[" * 100_000)),
    ],
    ids=reprlib.repr,
)
def test_other_labels_are_refused_by_name(container: str, content: bytes, wanted: str, tmp_path: Path) -> None:
    path = write(tmp_path / container, FILES | {"dataset.json": content})
    with pytest.raises(ValueError, match=f"load_dataset: expected {wanted}"):
        read_data(str(path))


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", b"text")
    with pytest.raises(ValueError, match=r"load_dataset: expected .*a\.zip to be a folder or a whole zip file, got: "):
        read_data(str(path))
    with pytest.raises(ValueError, match=r"a\.zip to hold images .* got none"):
        read_data(str(write(path, {"a.txt": b"text"})))


@pytest.mark.parametrize("memory", [None, 0])
def test_a_damaged_image_is_named(memory: int | None, tmp_path: Path) -> None:
    """The archive's checksum also finds what Pillow would not."""
    path = write(tmp_path / "a.zip", FILES)
    end = path.read_bytes().index(IMAGES["b.png"]) + len(IMAGES["b.png"])
    flip_bits(path, end - 1)  # the last chunk's checksum, which Pillow skips
    with pytest.raises(
        ValueError, match=r"Pillow can read in .*a\.zip, got .*b\.png \(BadZipFile: Bad CRC-32 for file 'b\.png'\)"
    ):
        whole(read_data(str(path), data_memory=memory))
    dataset = read_data(str(path), data_memory=memory, skip_broken=True)
    assert len(whole(dataset).images) == len(dataset) == 4


@pytest.mark.parametrize(
    ("name", "content", "size"),
    [("bomb.png", bytes(10**6), "1000000"), ("dataset.json", labelled(a=" " * 10**6), r"1000\d\d\d")],
    ids=reprlib.repr,
)
def test_large_files_are_refused_before_they_are_unpacked(
    name: str, content: bytes, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.zip", FILES | {name: content}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(sources, "_MAX_FILE", 10**5)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("a file was opened"))
    with pytest.raises(ValueError, match=rf"expected {name} to have at most 100000 bytes, got {size}, in '.*a\.zip'"):
        read_data(str(path))


def test_a_file_that_is_larger_than_its_entry_says_is_cut_off(tmp_path: Path) -> None:
    image = IMAGES["b.png"] + bytes(10**6)
    path = write(tmp_path / "a.zip", {"a.png": image}, zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(len(image).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"Pillow can read in .*a\.zip, got 1 of 1 that it cannot: a\.png \(BadZipFile"):
        read_data(str(path))


def test_encrypted_files_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"a.png": IMAGES["b.png"]})
    flip_bits(path, path.read_bytes().rindex(b"PK\1\2") + 8)
    with pytest.raises(ValueError, match=r"got 1 of 1 that it cannot: a\.png \(RuntimeError: .*encrypted, password required"):
        read_data(str(path))
