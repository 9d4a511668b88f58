"""benchmark_neighbours.py: how the work is started, and the neighbours' end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import benchmark_neighbours
import common
import pytest
from peers import OURS
from processes import Job


@pytest.mark.parametrize("policy", [None, "active"])
def test_work_beside_neighbours(tmp_path: Path, policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    started, loops, start = list[tuple[str, int, str | None]](), list[subprocess.Popen[bytes]](), subprocess.Popen

    def watched(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        loops.append(start(*arguments, **options))
        return loops[-1]

    class Worker:
        """A peer's process that takes a second for each neighbour."""

        def __init__(self, name: str, job: Job) -> None:
            started.append((name, job.batch, os.environ.get("OMP_WAIT_POLICY")))

        def seconds(self, calls: int) -> float:
            return float(sum(loop.poll() is None for loop in loops)) / calls

        def close(self) -> None:
            pass

    monkeypatch.setattr(benchmark_neighbours.subprocess, "Popen", watched)
    monkeypatch.setattr(benchmark_neighbours, "Process", Worker)
    monkeypatch.setattr(benchmark_neighbours, "export", lambda name, job: None)
    monkeypatch.setattr(common, "cores", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    job = Job(str(tmp_path), 16, 32)
    for name in (OURS, benchmark_neighbours.TRAINS, benchmark_neighbours.PASSIVE):
        taken = benchmark_neighbours.seconds(name, job, 1)
        assert {count: spread.median for count, spread in taken.items()} == {0: 0, 1: 1, 2: 2}
        assert all(loop.poll() is not None for loop in loops)
        assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.delattr(benchmark_neighbours, "export")
    with pytest.raises(NameError):
        benchmark_neighbours.seconds(OURS, job, 1)
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert started == [(OURS, 16, None), (OURS, 32, None), (OURS, 32, "passive")]
