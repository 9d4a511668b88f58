"""Parity, turns and the record of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import pytest
import torch


def test_wrong_results_have_no_speed() -> None:
    truth = torch.linspace(1, 2, 8, dtype=torch.float64)
    baseline = truth.float() + 1e-5
    common.require_parity("q_sample", truth.float() + 2e-5, baseline, truth)
    for wrong in (truth.float() + 3e-5, truth.float() * float("nan")):
        with pytest.raises(AssertionError, match=r"q_sample: error .* no speed is reported"):
            common.require_parity("q_sample", wrong, baseline, truth)


def test_a_folder_for_the_results_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        common.parse("", ["--out", str(tmp_path)], {})
    assert f"--out: expected a JSON file, got the folder {tmp_path}" in capsys.readouterr().err


def test_everybody_takes_a_turn_in_every_round() -> None:
    order: list[str] = []

    def timer(name: str) -> Any:
        return lambda: float(len(order.append(name) or order))  # type: ignore[func-returns-value]

    times = common.take_turns({name: timer(name) for name in "abc"}, 2)
    assert order == list("abcbca")
    assert times["a"].rounds == (1, 6)
    assert times["b"].speedup_over(times["a"]) == pytest.approx((1, 0.75, 1.25))  # 1/2 and 6/4, round by round


def test_results_of_a_cpu_go_by_model_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "device_name", lambda device: "Some(R) CPU 9 @ 2.40GHz")
    monkeypatch.setattr(common, "cores", lambda: 2)
    monkeypatch.setattr(common, "instruction_set", lambda: "avx512_bf16")
    assert common.default_output("cpu").name == "some-cpu-9-2-cores-avx512-bf16.json"


def test_a_run_keeps_other_sections_and_says_what_failed(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "out.json"
    common.Run(out=out).save("a", [{"ms": common.Spread(1.23456, 1, 2)}])
    run = common.Run(out=out)
    with run.going_on("peer"):
        raise RuntimeError("it crashed")
    run.save("b", [], **{"left out": "x"})
    sections = common.read_results(out)
    assert sections["a"]["rows"] == [{"ms": {"median": 1.235, "low": 1, "high": 2}}]
    assert sections["b"]["machine"]["left out"] == "x"
    with pytest.raises(SystemExit, match="1"):
        run.finish("1 of 2 made")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"1 of 2 made; 1 failed, first: peer: RuntimeError: it crashed; results: {out}"


def test_a_table_is_that_of_a_commit(tmp_path: Path) -> None:
    run = common.Run(out=tmp_path / "out.json")
    for commit, has in (("1234567", True), ("1234567+", False)):  # the latter has other sources than it names
        run.machine["commit"] = commit
        run.save("a", [], rounds=3)
        assert run.has("a", rounds=3) == has
        assert not run.has("a", rounds=2)
        assert not run.has("b", rounds=3)


def test_nothing_is_written_unless_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The results in the repository are those of quiet machines."""
    monkeypatch.setattr(common, "default_output", lambda device: tmp_path / "tracked.json")
    outs = [common.parse(None, words, {}).out for words in ([], ["--out"], ["--out", "named.json"])]
    assert [common.Run(out=out).path for out in outs] == [None, tmp_path / "tracked.json", Path("named.json")]
    unwritten = common.Run(out=None)
    unwritten.save("a", [{"ms": 1.0}], "a table")
    unwritten.picture(None, "a")
    unwritten.finish()
    assert not unwritten.has("a")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.splitlines()[-1] == "no file was written: --out FILE writes the results"


def test_a_commit_is_found_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert common.commit().startswith("sources ")
