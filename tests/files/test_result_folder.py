"""Folders that one process writes at a time: training runs and images of write_samples."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from runs import train

from ddpm_fast.errors import UnusablePath
from ddpm_fast.files.result_folder import LOCK, ResultFolder
from ddpm_fast.files.writing import PREFIX


class Cakes(ResultFolder):
    """A kind of folder."""

    argument = "out"
    record_name = "recipe.json"
    hint = "name another folder"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_second_process_is_told_who_writes(tmp_path: Path) -> None:
    folder, context = Cakes(tmp_path / "run"), multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def hold() -> None:
        with folder.locked():
            sender.send("held")
            time.sleep(600)

    holder = context.Process(target=hold, daemon=True)
    holder.start()
    assert receiver.recv() == "held"
    with pytest.raises(BlockingIOError, match=r"no other process to write to .*run', got one that holds "):
        train(tmp_path / "run", sample_every=0, checkpoint_minutes=0, steps=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    holder.kill()  # releases the lock, whose file stays
    holder.join()
    folder.check_new()
    for _ in range(2):
        with folder.locked():
            assert (folder.path / LOCK).is_file()


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    wanted = r"^expected out to be a folder whose .ddpm_fast-lock can be locked, got: \[Errno 21\]"
    with pytest.raises(UnusablePath, match=wanted), Cakes(tmp_path).locked():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UnusablePath, match="to be a path whose folders can be made"), Cakes(tmp_path / "file").locked():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_that_leaves_the_context_keeps_the_lock_of_its_parent(tmp_path: Path) -> None:
    folder = Cakes(tmp_path)
    with folder.locked():
        child = -1
        try:
            with folder.__class__(tmp_path / "other").locked():
                child = os.fork()
        finally:
            if child == 0:
                os._exit(0 if (tmp_path / LOCK).exists() else 1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(BlockingIOError), folder.locked():
            pass


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files in /proc")
def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    folder, context = Cakes(tmp_path), multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def list_files() -> None:
        sender.send([os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()])

    with folder.locked():
        child = context.Process(target=list_files)
        child.start()
        opened = receiver.recv()
        child.join()
    assert opened
    assert str((tmp_path / LOCK).resolve()) not in opened


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with Cakes(tmp_path / "run").locked(), Cakes(tmp_path / "run").locked():
        assert caplog.text.count("run is not locked, so no other process may write to it meanwhile") == 2


def test_a_link_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    folder, victim = Cakes(tmp_path / "out"), tmp_path / "victim"
    folder.path.mkdir()
    victim.write_text("mine")
    (folder.path / LOCK).symlink_to(victim)
    with pytest.raises(UnusablePath, match=r"whose .ddpm_fast-lock can be locked, got: "), folder.locked():
        pass
    assert victim.read_text() == "mine"


def test_a_folder_is_new_unless_it_has_files(tmp_path: Path) -> None:
    folder = Cakes(tmp_path / "out")
    folder.check_new()
    folder.path.mkdir()
    (folder.path / f"{PREFIX}0123.tmp").touch()
    folder.check_new()
    (folder.path / "cake.png").touch()
    with pytest.raises(UnusablePath, match=r"^expected out to be new or empty, got '.*out', which has 'cake.png'; name"):
        folder.check_new()
    with pytest.raises(UnusablePath, match=r"^expected out to be a folder, got '.*cake.png', which is a file$"):
        Cakes(folder.path / "cake.png").check_new()
