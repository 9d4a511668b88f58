"""The file that the comparison of samplers writes, and its warning on a busy machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import common
import pytest
import sample_speed

TINY = ["--model", "tiny", "--batch", "1", "--steps", "2", "--rounds", "1"]


def test_a_file_is_written_if_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The results in the repository are those of quiet machines."""
    monkeypatch.setattr(common, "default_output", lambda device: tmp_path / "tracked.json")
    monkeypatch.setattr(sample_speed, "installed", lambda name: False)  # to be quick
    sample_speed.main(TINY)
    said = capsys.readouterr().out
    assert "ancestral sampling: median [quartiles]" in said
    assert said.splitlines()[-1] == "no file was written: --out FILE writes the results"
    assert not list(tmp_path.iterdir())
    sample_speed.main([*TINY, "--out", str(tmp_path / "named.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["named.json"]
    (section,) = json.loads((tmp_path / "named.json").read_text()).values()
    assert section["machine"]["wait_policy"] == os.environ["OMP_WAIT_POLICY"]  # tests/helpers/environment.py sets it


def test_a_failure_is_the_exit_status_without_a_file_too(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="1"):
        sample_speed.main(["--model", "no such folder"])
    assert "failed: no such folder: " in capsys.readouterr().out


def test_a_picture_needs_a_file_next_to_it(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        sample_speed.main([*TINY, "--plot"])
    assert "name their file: --out FILE" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["default", "passive"])
def test_a_busy_machine_is_said_in_one_line(policy: str) -> None:
    steady, unsteady = common.Times((1.0, 1.0, 1.01)), common.Times((1.0, 1.2, 2.0))
    assert sample_speed.why_doubtful(0.2, {"ours": steady}, policy) is None
    assert sample_speed.why_doubtful(None, {}, policy) is None
    busy = sample_speed.why_doubtful(2.1, {"ours": steady}, policy)
    varied = sample_speed.why_doubtful(0.2, {"ours": steady, "diffusers": unsteady}, policy)
    both = sample_speed.why_doubtful(2.1, {"ours": steady, "diffusers": unsteady}, policy)
    load, spread = "other programs were running (load average 2.1)", "the quartiles of diffusers are 42% of its median apart"
    advice = "close other programs" + (", or set OMP_WAIT_POLICY=passive" if policy == "default" else "")
    start = f"warning: the ratios {'may be several times too high' if policy == 'default' else 'are less certain'}, because"
    assert busy == f"{start} {load}: {advice}"
    assert varied == f"{start} {spread}: {advice}"
    assert both == f"{start} {load} and {spread}: {advice}"


def test_rows_are_saved_after_each_round_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_speed, "installed", lambda name: False)
    machine = {"commit": "1234567", "device": "a card", "load_average": None, "wait_policy": "passive"}
    monkeypatch.setattr(common, "machine", lambda device: machine)  # a changed tree does everything again
    out, calls, last = tmp_path / "out.json", [], 3
    words = [*TINY[:-1], "2", "--trusted", "--go-on", "--out", str(out)]

    def seconds_of(*_: Any) -> float:
        calls.append(len(calls))
        if len(calls) > last:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(sample_speed, "seconds_of", seconds_of)
    with pytest.raises(KeyboardInterrupt):  # in the second round of two samplers
        sample_speed.main(words)
    (section,) = json.loads(out.read_text()).values()
    assert (section["machine"]["rounds"], len(section["rows"])) == (1, 2)
    last = 100
    sample_speed.main(words)
    assert json.loads(out.read_text()).popitem()[1]["machine"]["rounds"] == 2
    done = len(calls)
    sample_speed.main(words)
    assert len(calls) == done
