"""Mutated files: readers return, or raise an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from targets import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    assert 50 < fuzz(name, 200, tmp_path) < 200  # some are refused, some still valid


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_files_are_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 1_500, tmp_path) > 0
