"""Run a peer in a process of its own: it loads a network, runs it once, and then times calls on request.

So no peer disturbs the memory, threads and caches of another, and the time to the first image is that of a program.
Nothing here imports torch, so peers that do without PyTorch run without it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TURN_SECONDS = 0.1  # shorter calls are repeated
_ROOT = Path(__file__).resolve().parents[1]

# Requirements of the environments of peers that have one of their own.
_COMMON = ("torch~={torch}", "diffusers", "safetensors", "numpy")
ENVIRONMENTS = {"zentorch": (*_COMMON, "zentorch=={series}.*"), "ncnn": (*_COMMON, "ncnn", "pnnx")}

# Caps that PyTorch's and OpenVINO's oneDNN and PyTorch's own kernels read, beside DDPM_FAST_ISA. OpenVINO has further kernels,
# which nothing caps.
_CAPS = {
    "baseline": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "ATEN_CPU_CAPABILITY": "avx512"},
    "amx": {},
}


def interpreter(environment: str) -> Path:
    """Return the Python of an environment. "": this one."""
    return _ROOT / "build" / "peers" / environment / "bin" / "python" if environment else Path(sys.executable)


@dataclass(frozen=True)
class Job:
    """A network, and how to run it.

    Attributes:
        folder: Folder with the network in `network/`, and what is exported from it.
        batch: Images of a call.
        size: Pixels a side.
        dtype: A name from `common.DTYPES`.
        kept: Keep freed memory in the process (`kept_memory`).
        table: Module and name of the table of peers.
        network_name: A network of `idioms.NETWORKS`, for training, which needs no folder.
    """

    folder: str
    batch: int
    size: int
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    memory_format: str = "channels_last"
    kept: bool = False
    table: str = "peers.NETWORKS"
    network_name: str = "cifar10-32"

    @property
    def network(self) -> Path:
        return Path(self.folder, "network")

    def inputs(self) -> tuple[Array, ...]:
        """Return x float32 [N, C, H, W], t int64 [N], and class labels int64 [N] if the network has classes.

        Image i, its timestep and its label are the same in any batch.
        """
        config = json.loads((self.network / "config.json").read_text(encoding="utf-8"))
        shape, classes = (config["in_channels"], self.size, self.size), config.get("num_class_embeds")
        draws = [np.random.default_rng(i) for i in range(self.batch)]
        x = np.stack([draw.standard_normal(shape, dtype=np.float32) for draw in draws])
        numbers = [np.array([draw.integers(each) for draw in draws]) for each in (1000, classes) if each]
        return x, *numbers

    def exported(self, suffix: str) -> Path:
        return Path(self.folder, f"{self.batch}x{self.size}{suffix}")


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """Return the seconds of a call, out of `calls` in a row."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions of those modules that are installed."""
    found = {}
    for module in modules:
        with suppress(PackageNotFoundError):
            found[module] = version(module)
    return found


class PeerFailed(Exception):
    """A peer's process ended. The text is its last line."""


class Process:
    """A peer at work: started, loaded and run once.

    Attributes:
        job: What it runs.
        first_image: Seconds from the start of the process until its first call has ended and its output is saved.
        about: Seconds of "import and load" and of the "first call" in it, and the "versions" of its libraries.
        used: CPU seconds of all threads per call, of each time that `seconds` was called.
        peak: Peak memory of the process in bytes when `seconds` was called last: the GPU's if it runs on one, or else resident
            memory, which is None on other systems than Linux.
    """

    def __init__(self, name: str, job: Job) -> None:
        self.job = job
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`close` closes it)
        began = time.perf_counter()
        self._process = _start(name, job, self._said)
        self.about = self._reply()
        self.first_image = time.perf_counter() - began
        self.used: list[float] = []
        self.peak: int | None = None

    def output(self) -> Array:
        """Return what the first call returned."""
        return np.load(self.about["output"])

    def seconds(self, calls: int) -> float:
        """Return the seconds of a call, out of `calls` in a row. Several follow one that wakes threads and caches."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then no reply will come
            print(calls, file=self._process.stdin, flush=True)
        reply = self._reply()
        self.used.append(reply["cpu"])
        self.peak = reply["peak"]
        return float(reply["seconds"])

    def calls_per_turn(self) -> int:
        return math.ceil(TURN_SECONDS / self.seconds(1))

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.communicate()
        self._said.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            with self._said:
                raise PeerFailed(_last_line(self._said, self._process.returncode))
        reply: dict[str, Any] = json.loads(line)
        return reply


def export(name: str, job: Job) -> None:
    """Write the file that a peer starts from, in a process, unless it exists.

    Raises:
        PeerFailed: The exporter failed.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = _start(name, job, said, "export")
        process.communicate()
        if process.returncode:
            raise PeerFailed(_last_line(said, process.returncode))


def _start(name: str, job: Job, said: Any, *mode: str) -> subprocess.Popen[str]:
    python = interpreter(_peer(name, job).environment)
    command = [str(python), __file__, name, json.dumps(asdict(job)), *mode]
    # Inductor's usual folder would have what was compiled for others: first calls would not be first ones. One that is named
    # in the environment stays.
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(Path(job.folder, "inductor")), **os.environ}
    environment |= _CAPS.get(os.environ.get("DDPM_FAST_ISA", ""), {})
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)


def _peer(name: str, job: Job) -> Any:
    module, _, table = job.table.rpartition(".")
    return getattr(importlib.import_module(module), table)[name]


def _last_line(said: Any, status: int) -> str:
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else f"its process ended with status {status}"


def serve(name: str, job: Job, *mode: str) -> None:
    """Write the peer's file in mode "export". Else run it once, and time as many calls as each line of the input says."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    peer = _peer(name, job)
    if mode == ("export",):
        peer.export_once(job)
        return
    began = time.perf_counter()
    call = peer.build(job)
    loaded = time.perf_counter()
    first = call()
    about = {"import and load": loaded - began, "first call": time.perf_counter() - loaded, "versions": versions(peer.needs)}
    if first is not None:
        about["output"] = str(Path(job.folder, f"output of {os.getpid()}.npy"))
        np.save(about["output"], first)
    reply(**about)
    for line in sys.stdin:
        calls = int(line)
        if calls > 1:
            call()
        before = time.process_time()
        seconds = seconds_of(call, calls)
        reply(seconds=seconds, cpu=(time.process_time() - before) / calls, peak=_peak(job.device))


def _peak(device: str) -> int | None:
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return None


if __name__ == "__main__":
    serve(sys.argv[1], Job(**json.loads(sys.argv[2])), *sys.argv[3:])
