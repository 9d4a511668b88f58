"""Processes for tests: several as torchrun starts them, or one as the target of `multiprocessing`.

PyTorch and the package are imported once, and the processes are forked from there. Importing takes most of a test's time.
"""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    first = next(i for i, argument in enumerate(arguments) if argument in ("-c", "-m"))
    parent = subprocess.Popen(
        [sys.executable, *arguments[:first], __file__, str(size), *arguments[first:]],
        env={**os.environ, **shared},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        codes, _ = parent.communicate(timeout=timeout)
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
    done = []
    for rank, code in enumerate(json.loads(codes)):
        out, err = (_output(folder, rank, name) for name in ("out", "err"))
        texts = [file.read_text() for file in (out, err)]
        texts[0] = re.sub(r"^\[Gloo\] .*\n", "", texts[0], flags=re.MULTILINE)  # from PyTorch 2.9
        out.unlink()
        err.unlink()
        done.append(subprocess.CompletedProcess(arguments, code, *texts))
    return done


def _output(folder: Path, rank: int, name: str) -> Path:
    return folder / f".rank{rank}.{name}"


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


def exit_with_python(errors: Path, *arguments: str) -> NoReturn:
    """Run Python in this process, with standard error in a file, and exit with its status."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    sys.exit(_run(*arguments))


def _main() -> None:
    """Fork the ranks, and print their exit statuses."""
    import ddpm_fast.cli
    import ddpm_fast.sampling.sample_files
    import ddpm_fast.training.loop  # noqa: F401

    children = []
    for rank in range(int(sys.argv[1])):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for number, name in ((1, "out"), (2, "err")):
            descriptor = os.open(_output(Path(), rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
        code = _run(*sys.argv[2:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    _main()
