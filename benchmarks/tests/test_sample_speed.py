"""The file that the comparison of samplers writes, and its warning on a busy machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import pytest
import sample_speed

TINY = ["--model", "tiny", "--batch", "1", "--steps", "2", "--rounds", "1"]


@pytest.mark.parametrize("policy", ["default", "passive"])
@pytest.mark.parametrize(("load", "rounds", "reason"), [
    (0.2, (1.0, 1.0, 1.01), None),
    (None, (1.0, 1.0, 1.01), None),
    (2.1, (1.0, 1.0, 1.01), "other programs were running (load average 2.1)"),
    (0.2, (1.0, 1.2, 2.0), "the quartiles of diffusers are 42% of its median apart"),
])  # fmt: skip
def test_a_busy_machine_is_said_in_one_line(
    load: float | None, rounds: tuple[float, ...], reason: str | None, policy: str
) -> None:
    said = sample_speed.why_doubtful(load, {"diffusers": common.Times(rounds)}, policy)
    advice = "close other programs" + (", or set OMP_WAIT_POLICY=passive" if policy == "default" else "")
    assert said == (reason and f"warning: the ratios may be too high, because {reason}: {advice}")


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


def test_the_built_in_model_is_compared_with_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    """DDPMPipeline passes no class labels."""
    pytest.importorskip("diffusers")
    out = tmp_path / "out.json"
    sample_speed.main(["--batch", "1", "--steps", "2", "--rounds", "1", "--out", str(out)])
    (section,) = json.loads(out.read_text()).values()
    assert [row["sampler"] for row in section["rows"]] == ["plain PyTorch", "diffusers DDPMPipeline", "ddpm_fast"]
