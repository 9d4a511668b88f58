"""Files are replaced whole, by any number of writers, and never through a link."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
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
    assert read_json(file, dict) == {"a": 2}
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


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ENOENT, "missing", "other"), False),  # a failed open names its file
        (OSError("a text"), False),
    ],
)
def test_a_full_disk_names_the_file(tmp_path: Path, error: OSError, named: bool) -> None:
    wanted = f"[Errno 28] No space left on device: '{tmp_path / 'a.txt'}'" if named else str(error)
    with pytest.raises(OSError, match=f"^{re.escape(wanted)}$"), replacing(tmp_path / "a.txt"):
        raise error


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "a.txt"
    victim.write_text("mine")
    link.symlink_to(victim)
    write_text(link, "new")
    assert (victim.read_text(), link.read_text()) == ("mine", "new")
    assert not link.is_symlink()


def test_names_of_any_length_and_the_longest(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 251 + ".txt")  # as long as most file systems allow
    write_text(file, "new")
    assert names(tmp_path) == [file.name]


def test_several_writers_of_one_file_neither_fail_nor_tear_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"values": [0] * 1000})

    def write(value: int) -> None:
        for _ in range(100):
            write_json(file, {"values": [value] * 1000})

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, i) for i in range(4)]
        while not all(writer.done() for writer in writers):
            assert len(set(json.loads(file.read_text())["values"])) == 1
    assert [writer.exception() for writer in writers] == 4 * [None]
    assert names(tmp_path) == ["a.json"]


def test_old_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    old, new, foreign = (tmp_path / name for name in (".ddpm_fast-0.tmp", ".ddpm_fast-1.tmp", ".a.tmp"))
    now = time.time()
    for file, written in ((old, now - 2 * 24 * 3600), (new, now), (foreign, now - 2 * 24 * 3600)):
        file.touch()
        os.utime(file, (written, written))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [foreign.name, new.name]
    remove_leftovers(tmp_path / "missing")


@pytest.mark.parametrize("text", ["[1]", "null", "{", '{"a": 1', "[" * 100_000, "\xff"])
def test_files_that_are_no_json_objects(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^expected '.*a\.json' to (be JSON|hold a JSON object), got"):
        read_json(file, dict)


def test_files_beyond_the_limit_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": "' + "x" * (1 << 20) + '"}')
    assert len(read_json(file, dict)["a"]) == 1 << 20
    monkeypatch.setattr(writing, "_MAX_JSON", 1 << 20)
    with pytest.raises(ValueError, match=r"^expected '.*a\.json' to have at most 1 MiB, got more$"):
        read_json(file, dict)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # would wait for a writer
    (tmp_path / "device").symlink_to("/dev/zero")  # would never end
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(FileNotFoundError, match=rf"^expected '.*{name}' to be a file, got something else$"):
            read_json(tmp_path / name, dict)
    with pytest.raises(FileNotFoundError, match=r"^expected '.*missing' to be a file, got none$"):
        read_json(tmp_path / "missing", dict)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        *((kind, r"^expected a to be small, got %s, in '.*a\.json'$") for kind in (InvalidType, InvalidValue)),
        *(
            (kind, r"^expected '.*a\.json' to have valid fields, got: %s$")  # a library's
            for kind in (TypeError, ValueError, OverflowError, RecursionError)
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, kind: type[Exception], wanted: str) -> None:
    def parse(values: dict[str, Any]) -> None:
        parts = ("a", "to be small") if issubclass(kind, ArgumentError) else ()
        raise kind(*parts, values["a"])

    for value, got in (("no such field", "no such field"), ("x" * 10_000, r"x+ \.\.\. x+")):
        write_json(tmp_path / "a.json", {"a": value})
        with pytest.raises(ValueError, match=wanted % got) as error:
            read_json(tmp_path / "a.json", parse)
        assert len(str(error.value)) < 1000
