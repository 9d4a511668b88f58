"""Folders before any work: those that cannot be used, and advice about those that are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpm_fast.errors import UnusablePath
from ddpm_fast.resources import check_writable, existing_folder, no_folder, size_text


def test_existing_folder_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert existing_folder(Path("a/b")) == tmp_path


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("runs/mien", "does not exist; did you mean 'runs/mine'?"),
        ("runs/mien/", "does not exist; did you mean 'runs/mine'?"),
        ("./runs/mien", "does not exist; did you mean 'runs/mine'?"),
        (Path("modal"), "does not exist; did you mean 'model'?"),
        (Path("rums"), "does not exist"),  # runs holds no model itself
        ("runs/other", "does not exist: 'runs' has no such folder"),
        ("run/mine", "does not exist; did you mean 'runs/mine'?"),
        ("google/ddpm-cifar10-32", "does not exist: there is no folder 'google'"),
        ("./google/ddpm", "does not exist: there is no folder 'google'"),
        ("../google/ddpm", "does not exist: there is no folder '../google'"),
        ("~/models/ddpm", "does not exist: there is no folder '~/models'"),
        ("/no/such", "does not exist: there is no folder '/no'"),
        ("a/b/c", "does not exist: there is no folder 'a/b'"),
        ("file", "is a file"),
        ("elsewhere", "does not exist"),
        ("runs/" + "x" * 300, "does not exist: 'runs' has no such folder"),
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
    assert no_folder(path) == f"{os.fspath(path)!r}, which {wanted}"


def test_folders_that_cannot_be_written_are_refused_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable("run_dir", tmp_path / "a" / "b", tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UnusablePath, match=r"^expected run_dir to be in a folder, got '.*file/b', and '.*file' is a file"):
        check_writable("run_dir", tmp_path / "file" / "b", tmp_path / "file" / "b")
    with pytest.raises(OSError, match=r"^expected run_dir to be a path that can be written, got: .*File name too long"):
        check_writable("run_dir", tmp_path / ("x" * 300) / "b", tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UnusablePath, match=r"^expected run_dir to be in a folder that may be written to, got"):
        check_writable("run_dir", tmp_path / "a", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sizes_read_well() -> None:
    assert [size_text(size) for size in (0, 3e6, 2.5e9, 1e14)] == ["0.0 MB", "3.0 MB", "2.5 GB", "100,000.0 GB"]
