"""Who runs a U-Net on a CPU, each in a process of its own: ddpm_fast's inference form, its peers, and a floor.

A process loads the network from a folder, makes its own form of it and runs it once; then it times calls whenever it is told
to. So nobody disturbs the memory, threads and caches of others, and the time to a first image is that of a program. Runtimes
that do without PyTorch run without it: nothing here imports torch before it is needed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
OURS, FLOOR = "ddpm_fast", "oneDNN alone"
DTYPES = ("float32", "bf16")
_EXPORTERS = ("torch", "diffusers")


@dataclass(frozen=True)
class Job:
    """Which network is run, and how.

    Args:
        folder: holds the network, in `network/`, and what is made of it.
        batch, size: images, and their pixels a side.
        dtype: one of DTYPES.
        program: what a contestant's process runs; it calls `serve`.
    """

    program: ClassVar[str] = __file__
    folder: str
    batch: int
    size: int
    dtype: str = "float32"
    threads: int = 1

    @property
    def network(self) -> Path:
        return Path(self.folder, "network")

    def inputs(self) -> tuple[Array, Array]:
        """X float32 [N, C, H, W] and t int64 [N]; image i and its timestep are the same in any batch."""
        channels = json.loads((self.network / "config.json").read_text(encoding="utf-8"))["in_channels"]
        draws = [np.random.default_rng(i) for i in range(self.batch)]
        x = np.stack([draw.standard_normal((channels, self.size, self.size), dtype=np.float32) for draw in draws])
        return x, np.array([draw.integers(1000) for draw in draws])

    def exported(self, suffix: str) -> Path:
        return Path(self.folder, f"{self.batch}x{self.size}{suffix}")


class Runner(Protocol):
    """A network ready to run on a job's inputs."""

    def output(self) -> Array | None:
        """float32 [N, C, H, W]; None from the floor."""

    def seconds(self, calls: int) -> float:
        """What a call takes, of `calls` in a row."""


@dataclass(frozen=True)
class Forward:
    """A Runner: the whole network."""

    call: Callable[[Array, Array], Array]
    x: Array
    t: Array

    def output(self) -> Array:
        return self.call(self.x, self.t)

    def seconds(self, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            self.call(self.x, self.t)
        return (time.perf_counter() - began) / calls


@dataclass(frozen=True)
class Runtime:
    """A contestant.

    Args:
        load: the network of a job, ready to run.
        needs: modules that have to be installed.
        suffix: of the file that its users make beforehand, by `export`; without it, it starts from the network itself.
    """

    load: Callable[[Job], Runner]
    needs: tuple[str, ...] = ("torch",)
    dtypes: tuple[str, ...] = DTYPES
    suffix: str | None = None
    export: Callable[[Job, Path], None] | None = None

    def why_not(self, dtype: str) -> str | None:
        """Why it cannot take part, or None."""
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        return None if dtype in self.dtypes else f"has no {dtype}"


# ------------------------------------------------------------------------------------------------------ in PyTorch


def _torch_dtype(job: Job) -> Any:
    import torch

    return {"float32": torch.float32, "bf16": torch.bfloat16}[job.dtype]


def _in_torch(job: Job, network: Callable[[Any, Any], Any]) -> Forward:
    import torch

    torch.set_num_threads(job.threads)

    @torch.no_grad()
    def call(x: Array, t: Array) -> Array:
        y: Array = network(torch.from_numpy(x), torch.from_numpy(t)).float().numpy()
        return y

    return Forward(call, *job.inputs())


def ours(job: Job) -> Runner:
    import ddpm_fast

    return _in_torch(job, ddpm_fast.freeze(ddpm_fast.UNet.from_pretrained(job.network), _torch_dtype(job)))


def eager(job: Job) -> Runner:
    """Diffusers' UNet2DModel in channels_last."""
    return _in_torch(job, _channels_last(job))


def compiled(job: Job) -> Runner:
    """torch.compile of the same; its weights are constants, which inductor prepacks."""
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _in_torch(job, torch.compile(_channels_last(job), dynamic=False))


def _channels_last(job: Job) -> Callable[[Any, Any], Any]:
    import torch

    dtype = _torch_dtype(job)
    network = diffusers().UNet2DModel.from_pretrained(job.network, torch_dtype=dtype).eval()
    network = network.to(memory_format=torch.channels_last)

    def run(x: Any, t: Any) -> Any:
        return network(x.to(dtype, memory_format=torch.channels_last), t, return_dict=False)[0]

    return run


@functools.cache
def diffusers() -> Any:
    """The library, silent and offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


# ------------------------------------------------------------------------------------------------ exported beforehand


def _exportable(job: Job) -> tuple[Any, tuple[Any, Any]]:
    """A module from tensors to a tensor, and example inputs."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = diffusers().UNet2DModel.from_pretrained(job.network)

        def forward(self, x: Any, t: Any) -> Any:
            return self.network(x, t, return_dict=False)[0]

    x, t = job.inputs()
    return Module().eval(), (torch.from_numpy(x), torch.from_numpy(t))


def export_openvino(job: Job, path: Path) -> None:
    import openvino
    import torch

    module, inputs = _exportable(job)
    with torch.no_grad():
        model = openvino.convert_model(module, example_input=inputs, input=[list(each.shape) for each in inputs])
    openvino.save_model(model, path, compress_to_fp16=False)


def load_openvino(job: Job) -> Runner:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bf16": "bf16"}[job.dtype],
    }
    request = openvino.Core().compile_model(job.exported(".xml"), "CPU", options).create_infer_request()
    return Forward(lambda x, t: request.infer([x, t], share_inputs=True, share_outputs=True)[0], *job.inputs())


def export_onnx(job: Job, path: Path) -> None:
    import torch

    module, inputs = _exportable(job)
    torch.onnx.export(module, inputs, path, input_names=["x", "t"], dynamo=True, verbose=False)


def load_onnx(job: Job) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads rest while others have their turn
    session = onnxruntime.InferenceSession(job.exported(".onnx"), options, providers=["CPUExecutionProvider"])
    return Forward(lambda x, t: session.run(None, {"x": x, "t": t})[0], *job.inputs())


# ----------------------------------------------------------------------------------------------------------- the floor


@dataclass(frozen=True)
class Floor:
    """A Runner: distinct convolutions and matrix products of a network, each hot in cache, and how often the network has it."""

    ops: tuple[tuple[Callable[[], object], int], ...]

    def output(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        total = 0.0
        for op, count in self.ops:
            op()
            began = time.perf_counter()
            for _ in range(calls):
                op()
            total += (time.perf_counter() - began) / calls * count
        return total


def floor(job: Job) -> Runner:
    """Every convolution and matrix product of the network alone, by oneDNN with weights packed beforehand.

    Without what depends on the timestep only, which a table can hold.
    """
    import torch

    import ddpm_fast

    torch.set_num_threads(job.threads)
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
        raise RuntimeError("this build of torch has no mkldnn_reorder_conv2d_weight")
    model = ddpm_fast.UNet.from_pretrained(job.network, dtype=_torch_dtype(job))
    with torch.no_grad():
        ops = [(prepacked(what, shape, module), count) for (what, shape), (module, count) in products(model, job).items()]
    return Floor(tuple(ops))


def products(model: Any, job: Job) -> dict[tuple[str, tuple[int, ...]], tuple[Any, int]]:
    """(what a layer is, shape of its input) -> such a layer and how many there are."""
    import torch

    from ddpm_fast.nn.layers import Attention

    found: dict[tuple[str, tuple[int, ...]], tuple[Any, int]] = {}

    def seen(module: Any, inputs: tuple[Any, ...]) -> None:
        shape = (job.batch, *inputs[0].shape[1:])
        if isinstance(module, Attention) or len(shape) > 2:  # a linear layer of [N, channels] depends on time only
            key = (repr(module), shape)
            found[key] = (module, found.get(key, (module, 0))[1] + 1)

    kinds = (torch.nn.Conv2d, torch.nn.Linear, Attention)
    hooks = [module.register_forward_pre_hook(seen) for module in model.modules() if isinstance(module, kinds)]
    x, t = (torch.from_numpy(each[:1]) for each in job.inputs())
    with torch.no_grad():
        model(x, t)  # shapes but for the batch
    for hook in hooks:
        hook.remove()
    return found


def prepacked(what: str, shape: tuple[int, ...], layer: Any) -> Callable[[], object]:
    """A call of one of these layers; of attention, what is between its linear layers."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    if isinstance(layer, torch.nn.Conv2d):
        x = torch.randn(shape, dtype=layer.weight.dtype).to(memory_format=torch.channels_last)
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        weight = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.detach().to_mkldnn(), *geometry, x.shape)
        bias, convolution = layer.bias.detach(), torch.ops.mkldnn._convolution_pointwise
        return lambda: convolution(x, weight, bias, *geometry, "none", [], "")
    if isinstance(layer, torch.nn.Linear):
        x, weight, bias = torch.randn(shape, dtype=layer.weight.dtype), layer.weight.detach(), layer.bias.detach()
        return lambda: linear(x, weight, bias)
    n, channels, height, width = shape
    heads = (n, layer.num_heads, height * width, channels // layer.num_heads)
    q, k, v = torch.randn(3, *heads, dtype=layer.to_q.weight.dtype)
    return lambda: scaled_dot_product_attention(q, k, v)


RUNTIMES: dict[str, Runtime] = {
    OURS: Runtime(ours),
    "diffusers": Runtime(eager, _EXPORTERS),
    "torch.compile": Runtime(compiled, _EXPORTERS),
    "OpenVINO": Runtime(load_openvino, (*_EXPORTERS, "openvino"), suffix=".xml", export=export_openvino),
    "ONNX Runtime": Runtime(
        load_onnx, (*_EXPORTERS, "onnxruntime", "onnx", "onnxscript"), ("float32",), suffix=".onnx", export=export_onnx
    ),
    FLOOR: Runtime(floor),
}


# ------------------------------------------------------------------------------------------------------- the processes


class RuntimeFailed(Exception):
    """A contestant's process ended; the text says what it said last."""


class Process:
    """A contestant at work: started, loaded and run once.

    Attributes:
        first_image: seconds from the start of the process to the end of its first call.
        load, first_call: the parts of that after the interpreter's start. Importing is part of loading.
    """

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.job = name, job
        self.errors = Path(job.folder, f"{name}.txt")
        began = time.perf_counter()
        self._process = _start(name, job, self.errors)
        reply = self._reply()
        self.first_image = time.perf_counter() - began
        self.load: float = reply["load"]
        self.first_call: float = reply["first call"]

    def output(self) -> Array | None:
        path = Path(self.job.folder, f"{self.name}.npy")
        self._say(f"output {path}")
        return np.load(path) if self._reply()["has output"] else None

    def seconds(self, calls: int) -> float:
        """What a call takes, of `calls` in a row; several, which are short, follow one that wakes threads and caches."""
        self._say(f"time {calls}")
        seconds: float = self._reply()["seconds"]
        return seconds

    def peak(self) -> int | None:
        """Bytes of memory that the process had at most so far; None where the system does not tell."""
        self._say("peak")
        peak: int | None = self._reply()["peak"]
        return peak

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.communicate()

    def _say(self, words: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then no reply will come
            print(words, file=self._process.stdin, flush=True)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeFailed(_last_words(self.errors, self._process.returncode))
        reply: dict[str, Any] = json.loads(line)
        return reply


def export(name: str, job: Job) -> None:
    """Makes the file that a runtime starts from, unless it is there.

    Raises:
        RuntimeFailed: the exporter did.
    """
    suffix = RUNTIMES[name].suffix
    if suffix is None or job.exported(suffix).is_file():
        return
    errors = Path(job.folder, f"{name}.txt")
    process = _start(name, job, errors, "export")
    process.communicate()
    if process.returncode:
        job.exported(suffix).unlink(missing_ok=True)
        raise RuntimeFailed(_last_words(errors, process.returncode))


def _start(name: str, job: Job, errors: Path, *mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, job.program, name, json.dumps(asdict(job)), *mode]
    # What inductor compiled for others would be found in its usual folder: first calls would not be first ones.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(job.folder, "inductor"))}
    with errors.open("w", encoding="utf-8") as said:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)


def _last_words(errors: Path, status: int) -> str:
    lines = errors.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"its process ended with status {status}")


def proc_status(key: str) -> int | None:
    """Bytes that Linux accounts for this process under `key` (VmRSS, VmHWM, ...); None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def serve(contestants: Mapping[str, Runtime], job_type: type[Job]) -> None:
    """A contestant's process: replies are lines of JSON."""
    name, job, mode = sys.argv[1], job_type(**json.loads(sys.argv[2])), sys.argv[3:]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    runtime = contestants[name]
    if mode == ["export"]:
        assert runtime.suffix is not None
        assert runtime.export is not None
        runtime.export(job, job.exported(runtime.suffix))
        return
    began = time.perf_counter()
    runner = runtime.load(job)
    loaded = time.perf_counter()
    output = runner.output()
    reply(**{"load": loaded - began, "first call": time.perf_counter() - loaded})
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "output":
            if output is not None:
                np.save(argument, output)
            reply(**{"has output": output is not None})
        elif command == "peak":
            reply(peak=proc_status("VmHWM"))
        else:
            calls = int(argument)
            if calls > 1:
                runner.seconds(1)
            reply(seconds=runner.seconds(calls))


if __name__ == "__main__":
    serve(RUNTIMES, Job)
