"""Training, export and pictures while system calls fail, are interrupted, or the process is killed in front of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="the faults need Linux and a C compiler"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "system_calls.so"
    source = HERE / "system_calls.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True)
    return path


def inject(library: Path, folder: Path, *tasks: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "injection.py"), str(library), str(folder), *tasks]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent / "helpers")}  # which holds `runs`
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    print(process.stdout)
    return [json.loads(line) for line in process.stdout.splitlines()]


def tasks_of(kind: str) -> tuple[str, ...]:
    """Return tasks with a kind of faults, and every how many of their calls fail."""
    tasks = (f"train,{kind},40", f"resume,{kind},25", f"export,{kind},4", f"picture,{kind},1", f"sample,{kind},3")
    return tasks[:4] if kind == "EINTR" else tasks  # Pillow does not go on with an interrupted write: other names


@pytest.mark.parametrize(
    ("tasks", "tried"),
    [
        pytest.param(("picture,KILL,2", "picture,ENOSPC,2"), 3, id="few"),
        *(pytest.param(tasks_of(kind), 10, id=kind, marks=pytest.mark.slow) for kind in ("KILL", "ENOSPC", "EIO")),
        *(pytest.param(tasks_of(kind), 10, id=kind, marks=pytest.mark.slow) for kind in ("EINTR", "SHORT")),
    ],
)
def test_nothing_that_was_saved_is_lost(tasks: tuple[str, ...], tried: int, library: Path, tmp_path: Path) -> None:
    for counts in inject(library, tmp_path / "f", *tasks):
        assert counts["tried"] >= tried
        assert ("stopped" in counts) == (counts["kind"] not in ("EINTR", "SHORT"))
