"""Items that are decoded as they are used, and the processes that read them ahead, batch by batch."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import assert_equal, drawn, encoded, flip_bits, read_data, write
from runs import QUIET, assert_same_weights, train
from test_data_tables import write_folder

from ddpm_fast.data import loader
from ddpm_fast.data.items import ItemDataset, read_batch
from ddpm_fast.data.loader import batches
from ddpm_fast.forms import Bytes

COUNT = 300  # items of an archive, or of arrays
KINDS: dict[str, dict[str, Any]] = {
    "archive": {"data": "archive.zip"},
    "rows": {"data": "rows.npy"},
    "classes": {"data": "images"},
    "class folders with conditions": {"data": "images", "condition": "conditions"},
    "arrays with rows": {"data": "arrays.npz", "condition": "rows of conditions.npy"},
    "resized arrays": {"data": "arrays.npz", "image_size": 5},
    "resized images": {"data": "images", "image_size": 5},
    "table": {"data": "table"},
}


def images(seed: int = 0) -> dict[str, bytes]:
    """Return 30 images of 8x8 pixels in two classes, by name."""
    random = np.random.default_rng(seed)
    return {f"{'ab'[i % 2]}/{i:02d}.png": encoded(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for i in range(30)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "images", images())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a data set of each kind, but for tables."""
    root, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    pixels = random.integers(0, 256, (COUNT, 8, 8), np.uint8)
    files = {
        "images": images(),
        "conditions": images(1),
        "rows.npy": random.normal(size=(40, 8, 8, 2)),
        "rows of conditions.npy": random.normal(size=(COUNT, 8, 8)),
        "arrays.npz": {"arr_0": pixels, "arr_1": np.arange(COUNT) % 3},
        "archive.zip": {f"{number}.png": encoded(each) for number, each in enumerate(pixels)},
    }
    return write(root, files)


def loaded(sources: Path, kind: str, **options: Any) -> ItemDataset:
    """Load a data set of one kind."""
    if kind == "table" and not (sources / kind).exists():  # the library for them may be missing
        write_folder(sources / kind)
    paths = {name: str(sources / value) if isinstance(value, str) else value for name, value in KINDS[kind].items()}
    return read_data(**paths | options)


# ------------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_items_in_memory(kind: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are forked when this process has already read from the same file."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # more workers are no warning
    held, dataset = loaded(sources, kind), loaded(sources, kind, data_memory=0)
    assert (held.in_memory, dataset.in_memory) == (True, False)
    assert (dataset.info, len(dataset)) == (held.info, len(held))
    assert dataset.fingerprint(exact=True) == held.fingerprint(exact=True)
    indices, before = drawn(dataset), torch.get_rng_state()
    expected = [read_batch(held, each) for each in indices]
    for num_workers in (0, 1, 2):
        for batch, wanted in zip(batches(dataset, indices, num_workers), expected, strict=True):
            assert_equal(batch, wanted)
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(dataset[-1], held[-1])
    with pytest.raises(IndexError):
        dataset[len(held)]


def test_workers_that_are_started_anew_read_the_right_items(sources: Path) -> None:
    """Python 3.14 starts processes by a server, on macOS by themselves. They get the data set as a pickle."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["ddpm_fast.data.load"])  # saves time
    try:
        for dataset in (loaded(sources, "class folders with conditions", data_memory=0), loaded(sources, "arrays with rows")):
            indices = drawn(dataset)
            for each, batch in zip(indices, batches(dataset, indices, 2), strict=True):
                assert_equal(batch, read_batch(dataset, each))
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        ("archive", {"first": 5, "colors": "rgb", "condition": "mask"}),
        ("classes", {"skip_broken": True, "image_size": 4, "condition": "low-resolution:2"}),
        ("rows", {"image_size": 4, "data_range": (-9, 9)}),
    ],
)
def test_a_pickled_data_set_reads_the_same_items(kind: str, options: dict[str, Any], memory: int | None, sources: Path) -> None:
    dataset = loaded(sources, kind, **options, data_memory=memory)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy.info, len(copy), copy.in_memory) == (dataset.info, len(dataset), dataset.in_memory)
    for index in [0, 3, len(dataset) - 1]:
        assert_equal(copy[index], dataset[index])
    assert copy.fingerprint() == dataset.fingerprint()


# ------------------------------------------------------------------------------------------------------------------ workers


def test_workers_read_what_is_not_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "DECODING_WORKERS", 1)
    for memory, workers in ((None, 0), (0, 1)):
        with closing(batches(read_data(str(folder), data_memory=memory), [torch.arange(4)] * 9)) as read:
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

    read = batches(read_data(str(folder), data_memory=0), indices(), num_workers)
    for number, _ in enumerate(read, 1):
        assert taken[0] == min(20, number + 2 * num_workers)
    assert number == 20


@pytest.mark.parametrize("end", ["closed", "forgotten"])
def test_a_reader_that_is_closed_or_forgotten_stops_its_workers(folder: Path, end: str) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    read = batches(read_data(str(folder), data_memory=0), (torch.arange(4) for _ in itertools.count()), 2)  # endless indices
    next(read)
    assert len(multiprocessing.active_children()) == 2
    if end == "closed":
        read.close()
    else:
        del read
    assert not multiprocessing.active_children()
    assert handler in (signal.getsignal(signal.SIGCHLD), signal.SIG_DFL)  # PyTorch sets its own once


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_that_end_all_processes_are_left_to_the_parent(folder: Path, name: str) -> None:
    """A launcher sends SIGTERM to each process, a terminal SIGINT and SIGHUP. The parent finishes its step first."""
    dataset = read_data(str(folder), data_memory=0)
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


# ------------------------------------------------------------------------------------------------------------------- memory


def test_memory_decides_where_images_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    needed = 30 * 3 * 8 * 8
    assert read_data(str(folder), data_memory=needed).in_memory
    with caplog.at_level(logging.INFO):
        assert not read_data(str(folder), data_memory=needed - 1).in_memory
    assert "as they are used, because all take 0.0 MB, more than 0.0 MB" in caplog.text
    assert read_data("digits", data_memory=0).in_memory  # its source is in memory anyway


def test_sizes_are_checked_without_decoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.data.pictures.decoded", lambda *_: pytest.fail("an image was decoded"))
    read_data(str(folder), data_memory=0)
    (folder / "a" / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"got 1 of 31 that it cannot: a/text\.png \(UnidentifiedImageError\); remove"):
        read_data(str(folder), data_memory=0, image_size=8)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("damage", "reason"), [(lambda file: flip_bits(file, 50, 255), ""), (Path.unlink, "FileNotFoundError: ")]
)
def test_a_broken_image_is_an_error_of_its_batch(
    damage: Callable[[Path], None], reason: str, num_workers: int, folder: Path
) -> None:
    dataset = read_data(str(folder), data_memory=0)
    damage(folder / "b" / "11.png")  # number 20
    read = batches(dataset, torch.arange(30).split(4), num_workers)
    for _ in range(5):
        next(read)
    wanted = rf"expected images that Pillow can read in .*images, got b/11\.png \({reason}.*\); remove them; in training, skip"
    with pytest.raises(ValueError, match=f"^{wanted}"):
        next(read)
    assert not multiprocessing.active_children()


def test_training_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    options = QUIET | {"data": folder, "channels": [32], "batch_size": 4, "steps": 4}
    train(tmp_path / "whole", **options)
    train(tmp_path / "ahead", **options | {"steps": 2}, data_memory=0)
    train(tmp_path / "ahead", **options, data_memory="1kB", num_workers=1, resume=True)  # a resumed run may change them
    assert_same_weights(tmp_path / "whole", tmp_path / "ahead")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[(0, 0), (5, 5), ("5", 5), ("5B", 5), ("200MiB", 200 << 20), ("2GiB", 2 << 30), ("500MB", 500_000_000)],
        *[("1.5 GiB", 3 << 29), ("2kb", 2000), ("1TiB", 1 << 40), (" 3KB ", 3000)],
    ],
)
def test_sizes_are_read(value: int | str, number: int) -> None:
    assert Bytes.parse("data_memory", value) == number


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        *((value, ValueError, "") for value in ("", "GiB", "-1", "2iB", "2G", "2 XB", "1e9", "nan", "2GiBs", "٢GiB", -1)),
        *((value, TypeError, "a number of bytes or text such as 200MiB, 2GiB or 500MB, got ") for value in (None, 1.5, True)),
    ],
)
def test_other_sizes_are_refused(value: Any, kind: type[Exception], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=f"DataOptions: expected data_memory to be {wanted}"):
        train(tmp_path / "run", data_memory=value)
    assert not (tmp_path / "run").exists()
