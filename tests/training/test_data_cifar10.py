"""CIFAR-10's binary and Python versions, with few images."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_fast.training.data import cifar10, load_dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STEMS = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, (6, 4))

VERSIONS = {"binary": ("cifar-10-batches-bin", ".bin"), "python": ("cifar-10-batches-py", "")}


def python_2_pickle(labels: list[int], images: np.ndarray) -> bytes:
    """Return a batch as the pickle module of Python 2 wrote it, with an array of old NumPy."""
    listed = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"l"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    array += b"(K\x01(K" + bytes([len(images)]) + b"M\x00\x0ct" + dtype + b"I00\nT" + len(content).to_bytes(4, "little")
    array += content + b"tb"
    return b"\x80\x02}(U\x0bbatch_labelU\x07a batchU\x06labels" + listed + b"U\x04data" + array + b"u."


def contents(version: str) -> dict[str, bytes]:
    """Return the files of a version by name."""
    folder, suffix = VERSIONS[version]
    files = {}
    for stem, images, labels in zip(STEMS, IMAGES, LABELS, strict=True):
        if version == "binary":
            content = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
        elif stem == "data_batch_2":  # today's NumPy
            content = pickle.dumps({b"labels": labels.tolist(), b"data": images, b"filenames": [b"a.png"]}, 4)
        else:
            content = python_2_pickle(labels.tolist(), images)
        files[f"{folder}/{stem}{suffix}"] = content
    return files | {f"{folder}/readme.html": b"text"}


def write(root: Path, version: str, place: str) -> None:
    """Write a version into `root`: in its folder, one level below, without the folder, or as an archive."""
    files = contents(version)
    root.mkdir(exist_ok=True)
    if place == "archive":
        write_archive(root / f"cifar-10-{version}.tar.gz", files)
        return
    for name, content in files.items():
        file = root / {"folder": name, "below": f"deep/{name}", "itself": Path(name).name}[place]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("place", ["folder", "below", "itself", "archive"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read(version: str, place: str, tmp_path: Path) -> None:
    write(tmp_path / "data", version, place)
    for split, part in (("train", slice(0, 5)), ("test", slice(5, 6))):
        dataset = load_dataset("cifar10", tmp_path / "data", split=split)
        images, labels = dataset[torch.arange(len(dataset))]
        assert (dataset.shape, dataset.classes) == ((3, 32, 32), CLASSES)
        np.testing.assert_array_equal(images, IMAGES[part].reshape(-1, 3, 32, 32))
        assert labels.tolist() == LABELS[part].ravel().tolist()


def test_an_array_in_the_order_of_fortran_is_read(tmp_path: Path) -> None:
    for stem, images, labels in zip(STEMS, IMAGES, LABELS, strict=True):
        batch = {b"labels": labels.tolist(), b"data": np.asfortranarray(images)}
        (tmp_path / stem).write_bytes(pickle.dumps(batch, 4))
    images, _ = load_dataset("cifar10", tmp_path)[torch.arange(20)]
    np.testing.assert_array_equal(images, IMAGES[:5].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("version", VERSIONS)
def test_missing_and_damaged_files_are_named(version: str, tmp_path: Path) -> None:
    write(tmp_path, version, "folder")
    folder, suffix = VERSIONS[version]
    file = tmp_path / folder / f"data_batch_4{suffix}"
    whole = file.read_bytes()
    for damaged, wanted in (
        (whole[:-1], "records of 3073 bytes, got 12291" if suffix else "pickled batch .*, got "),
        (b"", "0"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"load_dataset: expected .*/data_batch_4{suffix} to .*{wanted}"):
            load_dataset("cifar10", tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=rf"batches-\w+ to hold data_batch_1.*, got no data_batch_4{suffix}"):
        load_dataset("cifar10", tmp_path)
    if version == "binary":
        file.write_bytes(b"\x0a" + whole[1:])
        with pytest.raises(ValueError, match=r"expected labels in 0\.\.9, got 10, in '.*data_batch_4\.bin'"):
            load_dataset("cifar10", tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write(tmp_path, "binary", "archive")
    file = tmp_path / "cifar-10-binary.tar.gz"
    whole = file.read_bytes()
    for damaged in (whole[:-200], b"text", whole[:500] + b"x" + whole[501:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"expected .*cifar-10-binary\.tar\.gz to (be a whole \.tar\.gz file|hold)"):
            load_dataset("cifar10", tmp_path)


def test_a_header_cannot_ask_for_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 20
    file = tmp_path / "cifar-10-binary.tar.gz"
    with gzip.open(file, "wb") as packed:
        packed.write(header.tobuf(tarfile.PAX_FORMAT) + bytes(1 << 20) + bytes(1024))
    monkeypatch.setattr(cifar10, "_MAX_FILE", 1 << 19)
    with pytest.raises(ValueError, match=r"whole \.tar\.gz file, got: parts of 1048576 bytes instead of at most 524288"):
        load_dataset("cifar10", tmp_path)


def test_a_large_archive_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "binary", "archive")
    monkeypatch.setattr(cifar10, "_MAX_ARCHIVE", 30_000)
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz to hold at most 30000 bytes, got more"):
        load_dataset("cifar10", tmp_path)
    monkeypatch.setattr(cifar10, "_MAX_ARCHIVE", 10**6)
    monkeypatch.setattr(cifar10, "_MAX_FILE", 5000)
    with pytest.raises(ValueError, match=r"tar\.gz/data_batch_1\.bin to have 1 to 5000 bytes, got 12292"):
        load_dataset("cifar10", tmp_path)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    write(tmp_path, "python", "itself")
    file = tmp_path / "data_batch_1"
    marker = tmp_path / "executed"
    for call in (Calls(Path.touch, marker), Calls(eval, f"open({str(marker)!r}, 'w')"), Calls(np.load, "a")):
        file.write_bytes(pickle.dumps({b"labels": [1], b"data": call}, 4))
        with pytest.raises(ValueError, match=r"UnpicklingError: [\w.]+ is neither an array nor a plain value"):
            load_dataset("cifar10", tmp_path)
    file.write_bytes(f"cos\nsystem\n(Vtouch {marker}\ntR.".encode())
    with pytest.raises(ValueError, match=r"data_batch_1 to be a pickled batch of CIFAR-10, got .*: (os|posix|nt)\.system is"):
        load_dataset("cifar10", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        ([1], "got list"),
        ({b"data": IMAGES[0]}, "got no list of labels"),
        ({b"data": IMAGES[0], b"labels": [1, 2, 3, "a"]}, "got no list of labels"),
        ({b"data": b"abc", b"labels": [1]}, "got no array of images"),
        ({b"data": IMAGES[0], b"labels": [1]}, r"got 1 labels and images of shape \(4, 3072\) in 12288 bytes"),
        ({b"data": IMAGES[0].astype(float), b"labels": [1] * 4}, "got images of another dtype than uint8"),
        ({b"data": IMAGES[0], b"labels": [1, 2, 3, 11]}, r"expected labels in 0\.\.9, got 11, in '.*data_batch_1'"),
    ],
)
def test_other_pickles_are_refused(batch: Any, wanted: str, tmp_path: Path) -> None:
    write(tmp_path, "python", "itself")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, 4))
    with pytest.raises(ValueError, match=wanted):
        load_dataset("cifar10", tmp_path)
