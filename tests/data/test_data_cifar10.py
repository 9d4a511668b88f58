"""CIFAR-10's binary archive, with few images."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from items import read_data, whole

from ddpm_fast.data import published

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, (6, 4))
ARCHIVE = "cifar-10-binary.tar.gz"


def write(folder: Path) -> Path:
    """Write the archive."""
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name, images, labels in zip(NAMES, IMAGES, LABELS, strict=True):
            content = np.column_stack([labels, images]).astype(np.uint8).tobytes()  # each label before its pixels
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder / ARCHIVE


def publish(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an archive be the published one."""
    monkeypatch.setattr(published, "_CIFAR10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())


def assert_images_are_read(folder: Path | None) -> None:
    for split, part in (("train", slice(0, 5)), ("test", slice(5, 6))):
        dataset = read_data("cifar10", folder, split=split)
        images, labels, _ = whole(dataset)
        assert (dataset.info.shape, dataset.info.classes) == ((3, 32, 32), CLASSES)
        np.testing.assert_array_equal(images, IMAGES[part].reshape(-1, 3, 32, 32))
        assert labels.dtype == torch.int64
        assert labels.tolist() == LABELS[part].ravel().tolist()


def test_the_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(write(tmp_path), monkeypatch)
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
    with pytest.raises(OSError, match=r"load_dataset: expected CIFAR10 in '.*cache/ddpm_fast' or from .*, got .*corrupted"):
        read_data("cifar10")  # its checksum is not CIFAR-10's
    assert not list((tmp_path / "cache" / "ddpm_fast").iterdir())
    publish(source, monkeypatch)
    assert_images_are_read(None)


def test_another_archive_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    content = file.read_bytes()
    publish(file, monkeypatch)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the archive was unpacked"))
    others = (content[:-200], b"text", b"", content[:500] + b"x" + content[501:], content[:-5] + b"x" + content[-4:])
    for other in others:
        file.write_bytes(other)
        digests = f"to have the MD5 sum {hashlib.md5(content).hexdigest()}, got {hashlib.md5(other).hexdigest()}"
        with pytest.raises(ValueError, match=rf"^load_dataset: expected .*{ARCHIVE} {digests}"):
            read_data("cifar10", tmp_path)
