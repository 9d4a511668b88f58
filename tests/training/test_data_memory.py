"""Items that are decoded as they are used, and the processes that read them ahead, batch by batch."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import assert_equal, drawn, whole
from PIL import Image
from runs import train
from test_data_hub import write_folder

from ddpm_fast.checks import checked_bytes
from ddpm_fast.training.data import batches, load_dataset, loader, read_batch

COUNT = 300  # items of an archive, or of arrays
SOURCES = ("archive", "rows", "classes", "class folders with conditions", "arrays with rows", "resized arrays")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 30 images of 8x8 pixels in two classes."""
    return write_images(tmp_path / "images")


def write_images(folder: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for i in range(30):
        file = folder / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return folder


def write_source(root: Path, kind: str) -> dict[str, Any]:
    """Write a data set of one kind. Return arguments of `load_dataset`."""
    if kind in ("classes", "class folders with conditions"):
        arguments = {"name": str(write_images(root / "images"))}
        return arguments | ({} if kind == "classes" else {"condition": str(write_images(root / "conditions", 1))})
    random = np.random.default_rng(0)
    if kind.endswith("with rows"):
        np.save(root / "conditions.npy", random.normal(size=(COUNT, 8, 8)))
        return write_source(root, "arrays") | {"condition": str(root / "conditions.npy")}
    if kind.endswith("arrays"):  # in memory
        np.savez(root / "arrays.npz", arr_0=random.integers(0, 256, (COUNT, 8, 8), np.uint8), arr_1=np.arange(COUNT) % 3)
        return {"name": str(root / "arrays.npz")} | ({} if kind == "arrays" else {"image_size": 5})
    if kind == "rows":
        np.save(root / "rows.npy", random.normal(size=(40, 8, 8, 2)))
        return {"name": str(root / "rows.npy")}
    if kind == "table":
        return {"name": str(write_folder(root / "table"))}
    with zipfile.ZipFile(root / "archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(COUNT):
            with archive.open(f"{number}.png", "w") as file:
                Image.fromarray(np.full((1 + number % 2, 3), number % 251, np.uint8)).resize((8, 8)).save(file, "PNG")
    return {"name": str(root / "archive.zip")}


# ------------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("image_size", [None, 5])
def test_batches_are_those_of_images_in_memory(folder: Path, image_size: int | None, num_workers: int) -> None:
    held = load_dataset(str(folder), image_size=image_size)
    dataset = load_dataset(str(folder), image_size=image_size, memory=0)
    assert held.in_memory
    assert not dataset.in_memory
    assert (dataset.info, len(dataset), dataset.info.classes) == (held.info, 30, ("a", "b"))
    assert dataset.fingerprint(exact=True) == held.fingerprint(exact=True)
    indices = drawn(dataset)
    for each, batch, expected in zip(indices, batches(dataset, indices, num_workers), batches(held, indices), strict=True):
        assert_equal(batch, expected)
        assert_equal(read_batch(dataset, each), expected)
    assert not multiprocessing.active_children()
    for index in (0, 29, -1):
        assert_equal(dataset[index], held[index])
    with pytest.raises(IndexError):
        dataset[30]


def test_more_workers_than_processors_are_no_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # and warnings are errors
    dataset = load_dataset(str(folder), memory=0)
    assert len(list(batches(dataset, drawn(dataset), 2))) == len(drawn(dataset))


@pytest.mark.parametrize("kind", [*SOURCES, "table"])
def test_workers_read_the_right_items(kind: str, tmp_path: Path) -> None:
    """The workers are forked when this process has already read from the same file."""
    dataset = load_dataset(**write_source(tmp_path, kind), memory=0)
    assert not dataset.in_memory
    indices = drawn(dataset)
    expected = list(batches(dataset, indices, 0))
    for num_workers in (1, 2):
        for batch, wanted in zip(batches(dataset, indices, num_workers), expected, strict=True):
            assert_equal(batch, wanted)
    if kind == "archive":
        names = sorted(f"{number}.png" for number in range(COUNT))
        found = [int(image[0, 0, 0]) for batch in batches(dataset, torch.arange(COUNT).split(9), 2) for image in batch.images]
        assert found == [int(name.partition(".")[0]) % 251 for name in names]


STARTED_ANEW = f"""
import json
import multiprocessing
import sys

if __name__ == "__main__":
    sys.path.append({str(Path(__file__).parents[1] / "helpers")!r})
    from items import assert_equal, drawn

    from ddpm_fast.training.data import batches, load_dataset

    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["ddpm_fast.training.data.load"])  # saves time
    results = {{}}
    for kind, arguments in json.loads(sys.argv[1]).items():
        try:
            dataset = load_dataset(**arguments)
            indices = drawn(dataset)
            expected = list(batches(dataset, indices, 0))
            for batch, wanted in zip(batches(dataset, indices, 2), expected, strict=True):
                assert_equal(batch, wanted)
            results[kind] = "right"
        except Exception as error:
            results[kind] = repr(error)
    print(json.dumps(results))
"""


def test_workers_that_are_started_anew_read_the_right_items(tmp_path: Path) -> None:
    """Python 3.14 starts processes by a server, on macOS by themselves. They get the data set as a pickle."""
    arguments = {kind: write_source(tmp_path, kind) | {"memory": 0} for kind in SOURCES}
    arguments["arrays"] = write_source(tmp_path, "arrays")  # in memory
    script = tmp_path / "script.py"
    script.write_text(STARTED_ANEW)
    done = subprocess.run([sys.executable, script, json.dumps(arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(arguments, "right")


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in SOURCES),
        ("table", {}),
        ("archive", {"first": 5, "channels": 3, "condition": "mask"}),
        ("classes", {"skip_broken": True, "image_size": 4, "condition": "low-resolution:2"}),
        ("rows", {"image_size": 4, "data_range": (-9, 9)}),
    ],
)
def test_a_pickled_data_set_reads_the_same_items(
    kind: str, options: dict[str, Any], memory: int | None, tmp_path: Path
) -> None:
    dataset = load_dataset(**write_source(tmp_path, kind) | options, memory=memory)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy.info, len(copy), copy.in_memory) == (dataset.info, len(dataset), dataset.in_memory)
    for index in [0, 3, len(dataset) - 1]:
        assert_equal(copy[index], dataset[index])
    assert copy.fingerprint() == dataset.fingerprint()


# ------------------------------------------------------------------------------------------------------------------ workers


def test_workers_read_what_is_not_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "DECODING_WORKERS", 1)
    for memory, workers in ((None, 0), (0, 1)):
        with closing(batches(load_dataset(str(folder), memory=memory), [torch.arange(4)] * 9)) as read:
            next(read)
            assert len(multiprocessing.active_children()) == workers
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_each_worker_reads_two_batches_ahead(folder: Path, num_workers: int) -> None:
    taken = [0]

    def indices() -> Iterator[torch.Tensor]:
        for _ in range(20):
            taken[0] += 1
            yield torch.arange(4)

    read = batches(load_dataset(str(folder), memory=0), indices(), num_workers)
    for number, _ in enumerate(read, 1):
        assert taken[0] == min(20, number + 2 * num_workers)
    assert number == 20


@pytest.mark.parametrize("num_workers", [1, 2])
def test_closing_early_stops_the_workers(folder: Path, num_workers: int) -> None:
    dataset = load_dataset(str(folder), memory=0)
    handler = signal.getsignal(signal.SIGCHLD)
    with closing(batches(dataset, (torch.arange(4) for _ in itertools.count()), num_workers)) as read:  # endless indices
        next(read)
        assert len(multiprocessing.active_children()) == num_workers
    assert not multiprocessing.active_children()
    assert handler in (signal.getsignal(signal.SIGCHLD), signal.SIG_DFL)  # PyTorch sets its own once


def test_a_reader_that_is_forgotten_stops_its_workers(folder: Path) -> None:
    read = batches(load_dataset(str(folder), memory=0), (torch.arange(4) for _ in itertools.count()), 2)
    next(read)
    assert multiprocessing.active_children()
    del read
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_that_end_all_processes_are_left_to_the_parent(folder: Path, name: str) -> None:
    """A launcher sends SIGTERM to each process, a terminal SIGINT and SIGHUP. The parent finishes its step first."""
    dataset = load_dataset(str(folder), memory=0)
    with closing(batches(dataset, (torch.arange(k % 9, 12) for k in itertools.count()), 2)) as read:
        next(read), next(read)  # one of each worker, which has begun then
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, getattr(signal, name))
        for k in range(2, 12):  # more than had been read ahead
            assert_equal(next(read), read_batch(dataset, range(k % 9, 12)))
        assert all(worker.is_alive() for worker in workers)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_leaves_the_generator(folder: Path, num_workers: int) -> None:
    before = torch.get_rng_state()
    list(batches(load_dataset(str(folder), memory=0), [torch.arange(4)] * 3, num_workers))
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------------- memory


def test_memory_decides_where_images_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    needed = 30 * 3 * 8 * 8
    assert load_dataset(str(folder), memory=needed).in_memory
    with caplog.at_level(logging.INFO):
        assert not load_dataset(str(folder), memory=needed - 1).in_memory
    assert "as they are used, as all take 0.0 MB and data_memory is 0.0 MB" in caplog.text


def test_sizes_are_checked_without_decoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.training.data.pictures.decoded", lambda *_: pytest.fail("an image was decoded"))
    load_dataset(str(folder), memory=0)
    (folder / "a" / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"got 1 of 31 that it cannot: a/text\.png \(UnidentifiedImageError\); remove"):
        load_dataset(str(folder), memory=0, image_size=8)
    (folder / "a" / "text.png").unlink()
    Image.new("RGB", (9, 8)).save(folder / "a" / "00.png")
    with pytest.raises(ValueError, match=r"got None with sizes 8x8 \(29\), 9x8 \(1\)"):  # the most frequent first
        load_dataset(str(folder), memory=0)


def break_image(file: Path) -> None:
    """Damage the pixels of a PNG and keep its header."""
    content = bytearray(file.read_bytes())
    content[50] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_broken_image_is_an_error_of_its_batch(folder: Path, num_workers: int) -> None:
    break_image(folder / "b" / "11.png")  # number 20
    dataset = load_dataset(str(folder), memory=0)
    read = batches(dataset, torch.arange(30).split(4), num_workers)
    for _ in range(5):
        next(read)
    wanted = (
        r"^load_dataset: expected images that Pillow can read in .*images, got b/11\.png \(.*\); remove them; in training, skip"
    )
    with pytest.raises(ValueError, match=wanted):
        next(read)
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match=wanted):
        dataset[20]


def test_a_file_that_has_gone_is_an_error_of_its_batch(folder: Path) -> None:
    dataset = load_dataset(str(folder), memory=0)
    (folder / "b" / "11.png").unlink()
    with pytest.raises(ValueError, match=r"got b/11\.png \(FileNotFoundError: .*\); remove"):
        list(batches(dataset, torch.arange(30).split(4), 1))


def test_broken_images_are_left_out_after_one_pass(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_image(folder / "b" / "11.png")
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(str(folder), skip_broken=True, memory=0)
    assert "1 of 30 images in" in caplog.text
    held = load_dataset(str(folder), skip_broken=True)
    assert len(dataset) == 29
    assert not dataset.in_memory
    assert_equal(whole(dataset), whole(held))
    assert dataset.fingerprint(exact=True) == held.fingerprint(exact=True)


def test_resized_arrays_are_resized_as_they_are_read() -> None:
    held, dataset = load_dataset("digits", image_size=11), load_dataset("digits", image_size=11, memory=0)
    assert held.in_memory
    assert not dataset.in_memory
    assert dataset.info == held.info
    assert held.info.preparation == "resized from 8x8"
    indices = torch.randperm(1500, generator=torch.Generator().manual_seed(0)).split(64)
    for batch, expected in zip(batches(dataset, indices, 0), batches(held, indices), strict=True):
        assert_equal(batch, expected)
    assert load_dataset("digits", memory=0).in_memory  # its source is in memory anyway


def test_training_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": folder, "channels": (32,), "attention": (), "layers": 1, "batch_size": 4, "steps": 4}
    options |= {"sample_every": 0, "tensorboard": False, "progress": False, "threads": 1}
    train(tmp_path / "whole", **options)
    train(tmp_path / "ahead", **options | {"steps": 2}, data_memory=0)
    train(tmp_path / "ahead", **options, data_memory="1kB", num_workers=1, resume=True)  # a resumed run may change them
    held, ahead = (tmp_path / run / "checkpoints" / "latest" / "optimizer.safetensors" for run in ("whole", "ahead"))
    assert held.read_bytes() == ahead.read_bytes()


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[(0, 0), (5, 5), ("5", 5), ("5B", 5), ("200MiB", 200 << 20), ("2GiB", 2 << 30), ("500MB", 500_000_000)],
        *[("1.5 GiB", 3 << 29), ("2kb", 2000), ("1TiB", 1 << 40), (" 3KB ", 3000)],
    ],
)
def test_sizes_are_read(value: int | str, number: int) -> None:
    assert checked_bytes("train", "data_memory", value) == number


@pytest.mark.parametrize("value", ["", "GiB", "-1", "2iB", "2G", "2 XB", "1e9", "nan", "2GiBs", "٢GiB", -1])
def test_other_sizes_are_refused(value: int | str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DataOptions: expected data_memory to be "):
        train(tmp_path / "run", data_memory=value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [None, 1.5, True])
def test_other_types_of_sizes_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="DataOptions: expected data_memory to be a number of bytes or text such as 2GiB, got "):
        train(tmp_path / "run", data_memory=value)
