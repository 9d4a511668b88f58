"""Memory and disk space: what cannot fit is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpm_fast import resources
from ddpm_fast.errors import UnusablePath
from ddpm_fast.resources import (
    check_free_memory,
    check_writable,
    existing_folder,
    free_memory,
    no_folder,
    size_text,
)


def answer(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Let the system's files have these texts, and the others be missing."""
    monkeypatch.setattr(resources, "_lines", lambda file: files.get(str(file), "").splitlines())


def test_free_memory_is_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {"/proc/meminfo": "MemTotal: 99 kB\nMemFree: 5 kB\nMemAvailable: 7 kB\n"})
    assert free_memory() == 7 * 1024
    answer(monkeypatch, {})
    assert free_memory() is None
    check_free_memory("caller", "num", 5, 1 << 80)  # nothing is known, so nothing is refused


@pytest.mark.parametrize(
    ("groups", "limit_files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n", "memory.max": "9000\n"}),
        ("0::/\n", {"memory.max": "5000\n"}),
        ("3:cpu:/x\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "5000\n", "x/memory.max": "1\n"}),
        ("4:memory:/of/the/host\n", {"memory/memory.limit_in_bytes": "5000\n"}),
    ],
)
def test_a_containers_limit_counts(groups: str, limit_files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"/sys/fs/cgroup/{name}": text for name, text in limit_files.items()}
    answer(monkeypatch, {"/proc/meminfo": "MemAvailable: 7 kB\n", "/proc/self/cgroup": groups, **files})
    assert free_memory() == 5000


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system has no /proc")
def test_this_machine_says_how_much_memory_is_free() -> None:
    free = free_memory()
    assert free is not None
    assert 1 << 20 < free < 1 << 50


def test_memory_is_refused_with_both_amounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 3_000_000_000)
    check_free_memory("sample", "num_samples", 5, 3_000_000_000)
    wanted = "sample: expected num_samples to fit into memory, got 7, which needs about 3,200.5 GB of 3.0 GB"
    with pytest.raises(ValueError, match=wanted):
        check_free_memory("sample", "num_samples", 7, 3_200_500_000_000)


def test_existing_folder_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert existing_folder(Path("a/b")) == tmp_path


HUB = "; a model of the Hugging Face hub is downloaded first: hf download {} --local-dir {}"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("runs/mien", "none; did you mean 'runs/mine'?"),
        ("runs/mien/", "none; did you mean 'runs/mine'?"),
        ("./runs/mien", "none; did you mean 'runs/mine'?"),
        (Path("modal"), "none; did you mean 'model'?"),
        (Path("rums"), "none"),  # runs holds no model itself
        ("runs/other", "none: 'runs' has no such folder"),
        (
            "google/ddpm-cifar10-32",
            "none: there is no folder 'google'" + HUB.format("google/ddpm-cifar10-32", "ddpm-cifar10-32"),
        ),
        ("./google/ddpm", "none: there is no folder 'google'"),
        ("../google/ddpm", "none: there is no folder '../google'"),
        ("~/models/ddpm", "none: there is no folder '~/models'"),
        ("/no/such", "none: there is no folder '/no'"),
        ("a/b/c", "none: there is no folder 'a/b'"),
        ("file", "a file"),
        ("elsewhere", "none"),
        ("runs/" + "x" * 300, "none: 'runs' has no such folder"),
    ],
)
def test_a_model_folder_that_is_missing_has_advice(
    path: str | Path, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    Path("runs/mine/config.json").touch()
    Path("model/unet").mkdir(parents=True)
    Path("file").touch()
    Path("runs/miem").touch()  # no folder
    assert no_folder(path) == f"{os.fspath(path)!r}, which is {wanted}"


def test_folders_that_cannot_be_written_are_refused_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable("train", "run_dir", tmp_path / "a" / "b", tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(
        UnusablePath, match=r"train: expected run_dir to be in a folder, got '.*file/b', and '.*file' is a file"
    ):
        check_writable("train", "run_dir", tmp_path / "file" / "b", tmp_path / "file" / "b")
    with pytest.raises(OSError, match=r"train: expected run_dir to be a path that can be written, got: .*File name too long"):
        check_writable("train", "run_dir", tmp_path / ("x" * 300) / "b", tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UnusablePath, match="train: expected run_dir to be in a folder that may be written to, got"):
        check_writable("train", "run_dir", tmp_path / "a", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sizes_read_well() -> None:
    assert [size_text(size) for size in (0, 3e6, 2.5e9, 1e14)] == ["0.0 MB", "3.0 MB", "2.5 GB", "100,000.0 GB"]
