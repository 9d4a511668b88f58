"""Processes for tests: several as torchrun starts them, or one as the target of `multiprocessing`.

PyTorch and the package are imported once in a server for each process of the tests, and the processes are forked from there.
Importing would take most of a test's time.
"""

import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NoReturn
from unittest import mock

IMPORTED = ("ddpm_fast.cli", "ddpm_fast.sampling.sample_files", "ddpm_fast.training.loop", "sklearn.datasets")


def forking() -> ForkServerContext:
    """Return the context of `multiprocessing` whose processes have imported PyTorch, with one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def run_ranks(
    size: int, arguments: Sequence[str], folder: Path, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Run Python in `size` processes with torchrun's variables. They find each other through a port that is free now.

    Args:
        size: Number of processes.
        arguments: Arguments of Python: "-W ignore" or not, then -c or -m with theirs.
        folder: Working folder. It receives the output in files, which are removed.
        timeout: Seconds after which all are killed, and TimeoutExpired is raised.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    context = forking()
    ranks = []
    for rank in range(size):
        variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=_run_rank, args=(folder, rank, variables, [*arguments])))
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise subprocess.TimeoutExpired([*arguments], timeout)
    finally:
        for process in ranks:
            if process.is_alive():
                os.killpg(process.pid or 0, signal.SIGKILL)
                process.join()
    done = []
    for rank, process in enumerate(ranks):
        out, err = (_output(folder, rank, name) for name in ("out", "err"))
        texts = [file.read_text() for file in (out, err)]
        texts[0] = re.sub(r"^\[Gloo\] .*\n", "", texts[0], flags=re.MULTILINE)  # from PyTorch 2.9
        out.unlink()
        err.unlink()
        done.append(subprocess.CompletedProcess(arguments, process.exitcode or 0, *texts))
    return done


def _output(folder: Path, rank: int, name: str) -> Path:
    return folder / f".rank{rank}.{name}"


def _run_rank(folder: Path, rank: int, variables: dict[str, str], arguments: list[str]) -> NoReturn:
    """Run Python in this process as a rank, with its output in files, and exit with its status."""
    os.setsid()  # so that its own processes can be killed with it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path.insert(0, "")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(_output(folder, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    sys.exit(_run(*arguments))


def exit_with_python(errors: Path, *arguments: str) -> NoReturn:
    """Run Python in this process, with standard error in a file, and exit with its status."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    sys.exit(_run(*arguments))


def _run(kind: str, program: str, *arguments: str) -> int:
    """Run a program as `python -c` or `python -m` does. Return the exit status."""
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
