"""Processes for tests: several as torchrun starts them, or one as the target of `multiprocessing`.

A server imports PyTorch and the package once, and all processes are forked from it. Importing takes most of a test's time.
"""

import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

PRELOADED = (  # torch.optim imports torch._dynamo, and the digits are scikit-learn's
    *("ddpm_fast.cli", "ddpm_fast.sampling.sample_files", "ddpm_fast.training.loop"),
    *("torch._dynamo", "sklearn.datasets"),
)


@cache
def server() -> ForkServerContext:
    """Return the context of `multiprocessing` whose processes have one thread and the imported package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        ensure_running()
    return context


def free_port() -> int:
    """Return the number of a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def start_python(arguments: Sequence[str], folder: Path, rank: int = 0, variables: Mapping[str, str] = os.environ) -> Any:
    """Return a process that runs Python with -c or -m. Its output goes to `output(folder, rank, name)`, "out" or "err"."""
    process = server().Process(target=_main, args=(arguments, folder, rank, dict(variables)), daemon=True)
    process.start()
    return process


def output(folder: Path, rank: int, name: str) -> Path:
    """Return the file with the output of a process."""
    return folder / f".rank{rank}.{name}"


def run_ranks(
    size: int, arguments: Sequence[str], folder: Path, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Run Python in `size` processes with torchrun's variables. They find each other through a port that is free now.

    Args:
        size: Number of processes.
        arguments: Arguments of Python: -W options, then -c or -m with theirs.
        folder: Working folder. It receives the output in files, which are removed.
        timeout: Seconds after which all are killed, and TimeoutExpired is raised.
    """
    shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [
        start_python(arguments, folder, rank, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
    ]
    try:
        for process in ranks:
            process.join(timeout)
            if process.is_alive():
                raise subprocess.TimeoutExpired([*arguments], timeout)
    finally:
        for process in ranks:
            process.kill()
    done = []
    for rank, process in enumerate(ranks):
        texts = []
        for name in ("out", "err"):
            file = output(folder, rank, name)
            texts.append(re.sub(r"^\[Gloo\] .*\n", "", file.read_text(), flags=re.MULTILINE))  # from PyTorch 2.9
            file.unlink()
        done.append(subprocess.CompletedProcess(arguments, process.exitcode, *texts))
    return done


def _main(arguments: Sequence[str], folder: Path, rank: int, variables: dict[str, str]) -> NoReturn:
    """Run Python in this process, and exit with its status."""
    os.environ |= variables
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output(folder, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    code = _run(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(kind: str, program: str, *arguments: str) -> int:
    """Run a program as `python -c` or `python -m` does. Return the exit status."""
    if kind == "-W":
        warnings.simplefilter(program)  # type: ignore[arg-type]
        return _run(*arguments)
    sys.argv = [kind, *arguments]
    try:
        if kind == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
