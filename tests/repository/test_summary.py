"""The last lines of a run of the tests."""

from __future__ import annotations

import summary


def test_each_reason_has_a_line() -> None:
    skipped = {"needs a GPU": 2, "no nvcc,\n   or no cuobjdump": 30}
    assert summary.lines({summary.SLOW: 1234}, skipped) == [
        "not run   1234  slow: `make check-all` runs them",
        "skipped     30  no nvcc, or no cuobjdump",
        "skipped      2  needs a GPU",
    ]
    assert summary.lines({}, {}) == []


def test_rare_reasons_share_the_last_line() -> None:
    skipped = {f"reason {count}": count for count in range(1, 10)}
    assert summary.lines({summary.SLOW: 5}, skipped, most=4) == [
        "not run      5  slow: `make check-all` runs them",
        "skipped      9  reason 9",
        "skipped      8  reason 8",
        "skipped     28  for 7 other reasons: the option -rs lists them",
    ]
    assert summary.lines({summary.SLOW: 5}, {"reason": 1, "other": 1, "third": 1}, most=4)[-1].endswith("third")


def test_a_long_reason_is_cut() -> None:
    (line,) = summary.lines({}, {"x" * 200: 1})
    assert len(line) == 100
    assert line.endswith("x...")
