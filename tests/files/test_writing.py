"""Files are replaced whole, by any number of writers, and never through a link."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.files import writing
from ddpm_fast.files.writing import read_json, remove_leftovers, replacing, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_with_the_users_mode(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    write_json(file, {"a": 2})
    umask = os.umask(0)
    os.umask(umask)
    assert read_json("f", file, dict) == {"a": 2}
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert names(tmp_path) == ["a.json"]


def test_a_failing_writer_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def fail() -> None:
        with replacing(file) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """A failed write has no name. A failed open has one, and errors without a number have a text of their own."""

    def fail(error: OSError) -> None:
        with replacing(tmp_path / "a.txt"):
            raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{tmp_path / 'a.txt'}'")):
        fail(full)
    for error in (OSError(errno.ENOENT, "missing", "other"), OSError("a text")):
        text = str(error)
        with pytest.raises(OSError, match=re.escape(text)) as caught:
            fail(error)
        assert str(caught.value) == text


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = tmp_path / "a.txt"
    link.symlink_to(victim)
    write_text(link, "new")
    assert victim.read_text() == "mine"
    assert not link.is_symlink()
    assert link.read_text() == "new"


def test_names_of_any_length_and_the_longest(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 251 + ".txt")  # as long as most file systems allow
    write_text(file, "new")
    assert names(tmp_path) == [file.name]


def test_several_writers_of_one_file_neither_fail_nor_tear_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"values": [0] * 1000})
    errors: list[BaseException] = []
    done = threading.Event()

    def write(value: int) -> None:
        try:
            for _ in range(100):
                write_json(file, {"values": [value] * 1000})
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                assert len(set(json.loads(file.read_text())["values"])) == 1
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not errors
    assert names(tmp_path) == ["a.json"]


def test_old_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    old, new, foreign = (tmp_path / name for name in (".ddpm_fast-0.tmp", ".ddpm_fast-1.tmp", ".a.tmp"))
    for file in (old, new, foreign):
        file.write_text("x")
    long_ago = time.time() - 2 * 24 * 3600
    for file in (old, foreign):
        os.utime(file, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [foreign.name, new.name]
    remove_leftovers(tmp_path / "missing")


@pytest.mark.parametrize("text", ["[1]", "null", "{", '{"a": 1', "[" * 100_000, "\xff"])
def test_files_that_are_no_json_objects(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"f: expected '.*a\.json' to (be JSON|hold a JSON object), got"):
        read_json("f", file, dict)


def test_files_beyond_the_limit_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": "' + "x" * (1 << 20) + '"}')
    assert len(read_json("f", file, dict)["a"]) == 1 << 20
    monkeypatch.setattr(writing, "_MAX_JSON", 1 << 20)
    with pytest.raises(ValueError, match=r"^f: expected '.*a\.json' to have at most 1 MiB, got more$"):
        read_json("f", file, dict)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # would wait for a writer
    (tmp_path / "device").symlink_to("/dev/zero")  # would never end
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(FileNotFoundError, match=rf"^f: expected '.*{name}' to be a file, got something else$"):
            read_json("f", tmp_path / name, dict)
    with pytest.raises(FileNotFoundError, match=r"^f: expected '.*missing' to be a file, got none$"):
        read_json("f", tmp_path / "missing", dict)


@pytest.mark.parametrize("kind", [InvalidType, InvalidValue])
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, kind: type[ArgumentError]) -> None:
    def parse(values: dict[str, Any]) -> None:
        raise kind("Some.function", "a", "to be small", values["a"])

    file = tmp_path / "a.json"
    write_json(file, {"a": 3})
    with pytest.raises(ValueError, match=r"^f: expected a to be small, got 3, in '.*a\.json'$"):
        read_json("f", file, parse)
    write_json(file, {"a": "x" * 10_000})
    with pytest.raises(ValueError, match=r"^f: expected a to be small, got x+ \.\.\. x+, in '.*a\.json'$") as error:
        read_json("f", file, parse)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", [TypeError, ValueError, OverflowError, RecursionError])
def test_what_a_library_says_of_a_file_is_quoted(tmp_path: Path, kind: type[Exception]) -> None:
    def parse(values: dict[str, Any]) -> None:
        raise kind(values["a"])

    file = tmp_path / "a.json"
    write_json(file, {"a": "no such field"})
    with pytest.raises(ValueError, match=r"^f: expected '.*a\.json' to have valid fields, got: no such field$"):
        read_json("f", file, parse)
