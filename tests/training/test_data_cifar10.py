"""CIFAR-10's binary archive, with few images."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.training.data import load_dataset, loading

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, (6, 4))
ARCHIVE = "cifar-10-binary.tar.gz"


def contents() -> dict[str, bytes]:
    """Return the archive's files by name."""
    files = {"batches.meta.txt": b"text"}
    for name, images, labels in zip(NAMES, IMAGES, LABELS, strict=True):
        files[name] = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    return files


def write(folder: Path, **changes: bytes | None) -> Path:
    """Write the archive. Changes by a file's stem replace its content. None: leave the file out."""
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name, content in contents().items():
            changed = changes.get(name.partition(".")[0], content)
            if changed is not None:
                entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                entry.size = len(changed)
                archive.addfile(entry, io.BytesIO(changed))
    return folder / ARCHIVE


def assert_images_are_read(folder: Path | None) -> None:
    for split, part in (("train", slice(0, 5)), ("test", slice(5, 6))):
        dataset = load_dataset("cifar10", folder, split=split)
        images, labels = dataset.batch(torch.arange(len(dataset)))
        assert (dataset.shape, dataset.classes) == ((3, 32, 32), CLASSES)
        np.testing.assert_array_equal(images, IMAGES[part].reshape(-1, 3, 32, 32))
        assert labels.dtype == torch.int64
        assert labels.tolist() == LABELS[part].ravel().tolist()


def test_the_archive_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    assert_images_are_read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]  # nothing is extracted


def test_a_missing_archive_is_downloaded_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("torchvision.datasets.utils")
    (tmp_path / "source").mkdir()
    source = write(tmp_path / "source")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fetch(url: str, file: str) -> None:
        assert url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        shutil.copy(source, file)

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", fetch)
    with pytest.raises(OSError, match=r"load_dataset: expected CIFAR10 in '.*cache/ddpm_fast' or from .*, got: .*corrupted"):
        load_dataset("cifar10")  # its checksum is not CIFAR-10's
    assert not list((tmp_path / "cache" / "ddpm_fast").iterdir())
    monkeypatch.setattr(loading, "_CIFAR10_MD5", hashlib.md5(source.read_bytes()).hexdigest())
    assert_images_are_read(None)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    for damaged, wanted in (
        (contents()["data_batch_4.bin"][:-1], r"/data_batch_4\.bin to hold records of 3073 bytes, got 12291"),
        (b"", r"/data_batch_4\.bin to hold records of 3073 bytes, got 0"),
        (None, r" to hold data_batch_1\.bin.*, got no data_batch_4\.bin"),
    ):
        write(tmp_path, data_batch_4=damaged)
        with pytest.raises(ValueError, match=rf"load_dataset: expected .*{ARCHIVE}{wanted}"):
            load_dataset("cifar10", tmp_path)
    write(tmp_path, data_batch_4=b"\x0a" + contents()["data_batch_4.bin"][1:])
    with pytest.raises(ValueError, match=rf"expected labels in 0\.\.9, got 10, in '.*{ARCHIVE}/data_batch_4\.bin'"):
        load_dataset("cifar10", tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    file = write(tmp_path)
    whole = file.read_bytes()
    for damaged in (whole[:-200], b"text", whole[:500] + b"x" + whole[501:], whole[:-5] + b"x" + whole[-4:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"expected .*{ARCHIVE} to be a whole \.tar\.gz file, got: "):
            load_dataset("cifar10", tmp_path)


def test_a_header_cannot_lead_anywhere(tmp_path: Path) -> None:
    """A negative size would lead back to the same header, and a large one to nowhere."""
    for size in (-1024, 1 << 40):
        header = tarfile.TarInfo("data_batch_1.bin")
        header.size = size
        with gzip.open(tmp_path / ARCHIVE, "wb") as packed:
            packed.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 15))
        with pytest.raises(ValueError, match=r"to be a whole \.tar\.gz file, got: "):
            load_dataset("cifar10", tmp_path)


def test_headers_of_headers_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 512
    with gzip.open(tmp_path / ARCHIVE, "wb") as packed:
        packed.write((header.tobuf(tarfile.GNU_FORMAT) + b"a" * 512) * 5000)
    with pytest.raises(ValueError, match=r"to be a whole \.tar\.gz file, got: "):
        load_dataset("cifar10", tmp_path)


def test_a_large_archive_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(loading, "_MAX_ARCHIVE", 30_000)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the archive was parsed"))
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz to hold at most 30000 bytes, got more"):
        load_dataset("cifar10", tmp_path)
