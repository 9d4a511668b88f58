"""Several processes as torchrun starts them, for tests."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run_ranks(
    size: int, arguments: Sequence[str], folder: Path, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Run Python in `size` processes with torchrun's variables. They find each other through a port that is free now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + timeout
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=deadline - time.monotonic())
            out = re.sub(r"^\[Gloo\] .*\n", "", out, flags=re.MULTILINE)  # from PyTorch 2.9
            done.append(subprocess.CompletedProcess(arguments, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done
