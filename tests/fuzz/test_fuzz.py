"""Mutated files: readers return, or raise an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from targets import TARGETS, fuzz, peak, reset_peak


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    assert 50 < fuzz(name, 200, tmp_path) < 200  # some are refused, some still valid


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system has no peak that can be reset")
def test_memory_that_was_used_before_does_not_hide_what_a_reader_uses() -> None:
    size = 64 << 20
    before = bytes(size).replace(b"\0", b"\1")
    del before
    started = reset_peak()
    during = bytes(size).replace(b"\0", b"\1")
    assert len(during) == size
    assert peak() - started > size // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_files_are_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 1_500, tmp_path) > 0
