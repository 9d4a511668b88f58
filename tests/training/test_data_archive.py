"""Zip files of images, and labels in EDM's `dataset.json`, in a zip file or a folder."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import whole
from PIL import Image

from ddpm_fast.training.data import ItemDataset, batches, load_dataset, sources

NAMES = ["00000/img1.png", "00000/img0.png", "b.png", "00001-more/deep/img2.PNG", "A.png"]


def image(number: int, size: int = 6) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_zip(path: Path, files: dict[str, bytes], labels: Any = "no file", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
        if labels != "no file":
            opened.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


@pytest.fixture
def files() -> dict[str, bytes]:
    return {
        "folder/": b"",
        "notes.txt": b"text",
        "__MACOSX/._b.png": b"a note",
        **{name: image(number) for number, name in enumerate(NAMES)},
    }


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_are_those_of_the_extracted_files(
    files: dict[str, bytes], method: int, memory: int | None, tmp_path: Path
) -> None:
    labels: list[Any] = [["00000/img1.png", 2], ["00000/img0.png", 0], ["b.png", 4]]
    labels += [["00001-more/deep/img2.PNG", 0], ["A.png", 1]]
    path = write_zip(tmp_path / "a.zip", files, [*labels, ["other.png", 9]], method)
    dataset = load_dataset(str(path), memory=memory)
    order = sorted(NAMES)
    assert dataset.info.shape == (3, 6, 6)
    assert dataset.info.classes == ("0", "1", "2", "3", "4")
    assert dataset.info.preparation == "as they are, in RGB"
    assert dataset.in_memory == (memory is None)
    assert whole(dataset).labels.tolist() == [dict(labels)[name] for name in order]
    expected = [np.asarray(Image.open(io.BytesIO(files[name]))).transpose(2, 0, 1) for name in order]
    first, second = batches(dataset, [torch.arange(5), torch.tensor([3, 3])], 0)
    np.testing.assert_array_equal(first.images, expected)
    assert torch.equal(first.labels, whole(dataset).labels)
    np.testing.assert_array_equal(second.images[1], expected[3])
    assert dataset.fingerprint(exact=True) == load_dataset(str(path)).fingerprint(exact=True)
    resized = load_dataset(str(path), image_size=3, first=2, memory=memory)
    assert (resized.info.shape, len(resized), resized.info.classes) == ((3, 3, 3), 2, dataset.info.classes)


@pytest.mark.parametrize("labels", ["no file", None])
def test_images_without_labels_share_one_class(files: dict[str, bytes], labels: Any, tmp_path: Path) -> None:
    dataset = load_dataset(str(write_zip(tmp_path / "a.zip", files, labels)))
    assert (dataset.info.classes, whole(dataset).labels.tolist()) == (("",), [0] * 5)


@pytest.mark.parametrize(
    ("label", "got"),
    [
        ([0.5, 1.0], r"\[0\.5, 1\.0\]"),
        (None, "None"),
        (-1, "-1"),
        (65_536, "65536"),
        (1.0, r"1\.0"),
        (True, "True"),
        ("1", "'1'"),
    ],
)
def test_other_labels_are_refused_by_name(files: dict[str, bytes], label: Any, got: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", files, [[name, label if name == "b.png" else 0] for name in NAMES])
    wanted = rf"load_dataset: expected the label of b\.png in dataset\.json in .*a\.zip to be in 0\.\.65535, got {got}"
    with pytest.raises(ValueError, match=wanted):
        load_dataset(str(path))


@pytest.mark.parametrize("labels", [5, {"a.png": 1}, ["a.png"], [["a.png", 1, 2]]])
def test_other_lists_of_labels_are_refused(files: dict[str, bytes], labels: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"labels to be a list of pairs \[name, label\], or null, got .*, in 'dataset\.json in "
    ):
        load_dataset(str(write_zip(tmp_path / "a.zip", files, labels)))


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000])
def test_damaged_labels_are_named(files: dict[str, bytes], text: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_dataset: expected dataset\.json in .*a\.zip to be JSON, got: "):
        load_dataset(str(write_zip(tmp_path / "a.zip", {**files, "dataset.json": text})))


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"load_dataset: expected .*a\.zip to be a folder or a whole zip file, got: "):
        load_dataset(str(path))
    with pytest.raises(ValueError, match=r"a\.zip to hold images .* got none"):
        load_dataset(str(write_zip(path, {"a.txt": b"text"})))


@pytest.mark.parametrize("memory", [None, 0])
def test_a_damaged_image_is_named(files: dict[str, bytes], memory: int | None, tmp_path: Path) -> None:
    """The archive's checksum also finds what Pillow would not."""
    path = write_zip(tmp_path / "a.zip", files)
    content = path.read_bytes()
    at = content.index(files["b.png"]) + len(files["b.png"]) - 1  # in the checksum of the last chunk, which Pillow skips
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(
        ValueError, match=r"Pillow can read in .*a\.zip, got .*b\.png \(BadZipFile: Bad CRC-32 for file 'b\.png'\)"
    ):
        whole(load_dataset(str(path), memory=memory))
    dataset = load_dataset(str(path), memory=memory, skip_broken=True)
    assert len(whole(dataset).images) == len(dataset) == 4


def test_large_files_are_refused_before_they_are_unpacked(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "a.zip", {**files, "bomb.png": bytes(10**6)}, [], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(sources, "_MAX_FILE", 10**5)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("a file was opened"))
    with pytest.raises(ValueError, match=r"expected bomb\.png to have at most 100000 bytes, got 1000000, in '.*a\.zip'"):
        load_dataset(str(path))
    monkeypatch.undo()
    write_zip(path, files, [[" " * 10**6, 0]], zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(sources, "_MAX_FILE", 10**5)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("a file was opened"))
    with pytest.raises(ValueError, match=r"expected dataset\.json to have at most 100000 bytes, got 10000\d\d, in '.*a\.zip'"):
        load_dataset(str(path))


def test_a_file_that_is_larger_than_its_entry_says_is_cut_off(files: dict[str, bytes], tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": image(0) + bytes(10**6)}, method=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    size = (10**6 + len(image(0))).to_bytes(4, "little")
    path.write_bytes(content.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"Pillow can read in .*a\.zip, got 1 of 1 that it cannot: a\.png \(BadZipFile"):
        load_dataset(str(path))


def test_encrypted_files_cannot_be_read(files: dict[str, bytes], tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": image(0)})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"got 1 of 1 that it cannot: a\.png \(RuntimeError: .*encrypted, password required"):
        load_dataset(str(path))


def test_a_folder_takes_the_labels_of_its_file(files: dict[str, bytes], tmp_path: Path) -> None:
    labels = [["00000/img1.png", 2], ["00000/img0.png", 0], ["b.png", 4], ["00001-more/deep/img2.PNG", 0], ["A.png", 1]]
    path = write_zip(tmp_path / "a.zip", files, labels)
    with zipfile.ZipFile(path) as opened:
        opened.extractall(tmp_path / "folder")
    folder = tmp_path / "folder"
    (folder / "00000" / "broken.png").write_bytes(files["b.png"][:60])
    with pytest.raises(ValueError, match=r"expected the label of 00000.broken\.png in .*dataset\.json to be in .*, got none"):
        load_dataset(str(folder), skip_broken=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": [*labels, ["00000/broken.png", 3]]}))
    dataset, zipped = load_dataset(str(folder), skip_broken=True), load_dataset(str(path))
    assert dataset.info.classes == zipped.info.classes

    def content(dataset: ItemDataset) -> list[tuple[bytes, int]]:
        images, labels, _ = whole(dataset)
        return sorted((image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))

    assert content(dataset) == content(zipped)
    for other in ('{"name": "pets"}', "[]"):
        (folder / "dataset.json").write_text(other)
        assert load_dataset(str(folder), skip_broken=True).info.classes == ("", "00000", "00001-more")
    (folder / "dataset.json").write_text('{"labels": null}')
    assert load_dataset(str(folder), skip_broken=True).info.classes == ("",)
    (folder / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"expected .*dataset\.json to be JSON, got: "):
        load_dataset(str(folder))
    (folder / "dataset.json").unlink()
    (folder / "dataset.json").mkdir()
    assert load_dataset(str(folder), skip_broken=True).info.classes == ("", "00000", "00001-more")  # no file, so no labels


@pytest.mark.parametrize("content", [b'{"name": "pets"}', b"[]", b'"labels"'])
def test_other_files_of_this_name_are_ignored(files: dict[str, bytes], content: bytes, tmp_path: Path) -> None:
    dataset = load_dataset(str(write_zip(tmp_path / "a.zip", {**files, "dataset.json": content})))
    assert (dataset.info.classes, len(dataset)) == (("",), 5)
