"""Peers: what ddpm_fast is compared with, how to build it, and why it is missing.

    OPS        one op:            build(call, case) -> a function of the case's floating tensors
    NETWORKS   one evaluation:    build(job) -> a call, which returns its output, in a process of its own
    TRAINING   one training step: build(job) -> a call, in a process of its own

ddpm_fast stands in each table itself. Nothing here imports torch at the top: processes.py says why.

    python benchmarks/peers.py     makes the environments of peers that do not fit into one with the others
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import venv
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import ENVIRONMENTS, Array, Job, interpreter

if TYPE_CHECKING:
    from op_calls import Call
    from op_cases import Case
    from torch import Tensor

OURS, TRAINER, PLAIN, DIFFUSERS = "ddpm_fast", "ddpm_fast Trainer", "plain PyTorch", "diffusers"


@dataclass(frozen=True)
class Peer:
    """A competitor.

    Attributes:
        build: Make it ready to run.
        needs: Modules that must be installed.
        dtypes: Dtypes in which it computes.
        suffix: Suffix of the file that it starts from, if that is not the network's folder.
        export: Write that file.
        environment: Environment of its own, or "" for this one.
        caps: Its instruction set can be capped, as DDPM_FAST_ISA caps ours.
    """

    build: Callable[..., Any]
    needs: tuple[str, ...] = ("torch",)
    dtypes: tuple[str, ...] = ("float32", "bf16")
    suffix: str = ""
    export: Callable[[Job, Path], None] | None = None
    environment: str = ""
    caps: bool = True

    def why_not(self, dtype: str = "float32") -> str | None:
        """Return why it cannot run, or None if it can."""
        if not self.caps and (isa := os.environ.get("DDPM_FAST_ISA")):
            return f"its instruction set cannot be capped to {isa}"
        if self.environment:
            if not interpreter(self.environment).exists():
                return "it has no environment: make peers"
        elif missing := [module for module in self.needs if not installed(module)]:
            return f"{', '.join(missing)} not installed"
        return None if dtype in self.dtypes else f"has no {dtype}"

    def export_once(self, job: Job) -> None:
        """Write the file that it starts from, unless it exists."""
        path = job.exported(self.suffix)
        if self.export is not None and not path.is_file():
            self.export(job, path)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def split(table: Mapping[str, Peer], names: Iterable[str], dtype: str) -> tuple[list[str], dict[str, str]]:
    """Return the names of peers that can run, and why the others cannot."""
    missing = {name: reason for name in names if (reason := table[name].why_not(dtype)) is not None}
    return [name for name in names if name not in missing], missing


# --------------------------------------------------------------------------------------------------------------- ops

Function = Callable[..., "Tensor"]
Evaluation = Callable[[], Array]


def _backend(name: str) -> Callable[[Call, Case], Function]:
    """Return how to build an op in one backend."""

    def build(call: Call, case: Case) -> Function:
        return lambda **tensors: replace(call, arguments=_replaced(call.arguments, tensors))(name)[0]

    return build


def _replaced(arguments: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Replace arguments by tensors, which have the names that `Call.tensors` gives them."""

    def each(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(each(f"{name}.{i}", part) for i, part in enumerate(value))
        return tensors.get(name, value)

    return {name: each(name, value) for name, value in arguments.items()}


def has_idiom(case: Case) -> bool:
    """Return whether `idioms.py` has the eager code of a case. The reference stands in for the others."""
    from ddpm_fast.plan import COLUMNS

    options = case.options
    if case.op == "reverse_step":
        plan = options["plan"]
        unknown = [COLUMNS.index(name) for name in ("k2", "k3", "k4")]
        through_x_0 = plan.variance == "fixed" and not plan.coefficients[:, unknown].any()
        return through_x_0 and options.get("step") != "sample" and options.keys() <= {"plan", "step", "source"}
    if case.op == "denoising_loss":
        plain = options.get("prediction", "epsilon") == "epsilon" and options.get("reduction", "mean") == "mean"
        return plain and not options.get("weight")
    if case.op == "group_norm_silu":
        return not options.get("scale_shift")
    return case.op in ("noise", "q_sample")


def eager_op(call: Call, case: Case, epsilon: Tensor | None = None) -> Function:
    """Return what people write in eager PyTorch. It draws its own noise unless `epsilon` or the case gives it."""
    import idioms
    import torch

    if not has_idiom(case):
        return _backend("reference")(call, case)
    arguments = call.arguments
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))

    def like(x: Tensor) -> Tensor | None:
        return None if epsilon is None else epsilon.to(x.dtype)

    if case.op == "noise":
        memory_format = arguments.get("memory_format", torch.contiguous_format)
        empty = torch.empty(arguments["shape"], dtype=arguments["dtype"], device=device, memory_format=memory_format)
        return lambda: torch.randn_like(empty) if epsilon is None else epsilon.to(empty.dtype)
    if case.op == "q_sample":
        dtype = arguments.get("dtype") or arguments["x_0"].dtype
        alpha_bars = arguments["schedule"].alpha_bars.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        t = arguments["t"]
        if case.options.get("uint8"):
            images = arguments["x_0"]
            return lambda noise=None: idioms.add_noise(
                x := images.to(dtype) * (2 / 255) - 1, t, alpha_bars, like(x) if noise is None else noise
            )
        return lambda x_0, noise=None: idioms.add_noise(x_0, t, alpha_bars, like(x_0) if noise is None else noise)
    if case.op == "reverse_step":
        row = idioms.rows_of(arguments["plan"])[int(arguments["step"])]
        return lambda x_t, model_output, noise=None: idioms.reverse_step(
            x_t, model_output, row, like(x_t) if noise is None else noise
        )
    if case.op == "denoising_loss":  # its noise was drawn before, for x_t
        drawn = torch.randn_like(arguments["x_0"]) if epsilon is None else epsilon
        return lambda model_output, x_0, noise=drawn: torch.nn.functional.mse_loss(model_output, noise.to(model_output.dtype))
    fixed = {name: arguments[name] for name in ("num_groups", "eps", "activation")}
    return lambda **tensors: idioms.group_norm_silu(**fixed, **tensors)


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Return torch.compile of a function whose backward pass may run again."""
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    return torch.compile(function, mode=mode, dynamic=False)


OPS = {
    "native": Peer(_backend("native")),
    "triton": Peer(_backend("triton"), ("triton",)),
    "reference": Peer(_backend("reference")),
    "eager": Peer(eager_op),
    # Its calls are captured as a CUDA graph, as ours are. That is what mode="reduce-overhead" adds.
    "compile": Peer(lambda call, case: compiled(eager_op(call, case))),
}

# ---------------------------------------------------------------------------------------------------------- networks


def _from_numpy(job: Job, network: Callable[..., Tensor]) -> Evaluation:
    import torch

    torch.set_num_threads(job.threads)
    inputs = [torch.from_numpy(each) for each in job.inputs()]

    @torch.no_grad()
    def call() -> Array:
        y: Array = network(*inputs).float().numpy()
        return y

    return call


def _dtype(job: Job) -> Any:
    import common

    return common.DTYPES[job.dtype]


def _ours(job: Job) -> Evaluation:
    import ddpm_fast

    return _from_numpy(job, ddpm_fast.freeze(ddpm_fast.UNet.from_pretrained(job.network), _dtype(job)))


def _eager(job: Job, wrap: Callable[[Any], Any] = lambda network: network) -> Evaluation:
    """Run diffusers' UNet2DModel in channels_last."""
    import torch

    dtype = _dtype(job)
    network = _diffusers_unet(job, dtype).to(memory_format=torch.channels_last)

    def run(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        y: Tensor = network(x.to(dtype, memory_format=torch.channels_last), t, *labels, return_dict=False)[0]
        return y

    return _from_numpy(job, wrap(run))


def _diffusers_unet(job: Job, dtype: Any) -> Any:
    import idioms

    return idioms.diffusers().UNet2DModel.from_pretrained(job.network, torch_dtype=dtype).eval()


def _compiled(job: Job) -> Evaluation:
    """Compile the same. Its weights are constants, which inductor prepacks."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _eager(job, compiled)


def _zentorch(job: Job) -> Evaluation:
    """Compile the same with AMD's backend. It is faster at contiguous maps."""
    import torch
    import torch._inductor.config
    import zentorch  # noqa: F401 (registers the backend)

    torch._inductor.config.freezing = True
    dtype = _dtype(job)
    network = torch.compile(_diffusers_unet(job, dtype), backend="zentorch", dynamic=False)
    return _from_numpy(job, lambda x, *others: network(x.to(dtype), *others, return_dict=False)[0])


def _exportable(job: Job) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a module from tensors to a tensor, and example inputs."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _diffusers_unet(job, torch.float32)

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Any:
            return self.network(x, t, labels, return_dict=False)[0]

    return Module().eval(), tuple(torch.from_numpy(each) for each in job.inputs())


def _export_openvino(job: Job, path: Path) -> None:
    import openvino
    import torch

    module, inputs = _exportable(job)
    with torch.no_grad():
        model = openvino.convert_model(module, example_input=inputs, input=[list(each.shape) for each in inputs])
    openvino.save_model(model, path, compress_to_fp16=False)


def _openvino(job: Job) -> Evaluation:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bf16": "bf16"}[job.dtype],
    }
    request = openvino.Core().compile_model(job.exported(".xml"), "CPU", options).create_infer_request()
    inputs = list(job.inputs())
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]  # type: ignore[no-any-return]


def _export_onnx(job: Job, path: Path) -> None:
    import torch

    module, inputs = _exportable(job)
    torch.onnx.export(module, inputs, path, input_names=_INPUTS[: len(inputs)], dynamo=True, verbose=False)


def _onnx(job: Job) -> Evaluation:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads rest while others have their turn
    session = onnxruntime.InferenceSession(job.exported(".onnx"), options, providers=["CPUExecutionProvider"])
    inputs = dict(zip(_INPUTS, job.inputs(), strict=False))
    return lambda: session.run(None, inputs)[0]  # type: ignore[no-any-return]


def _export_ncnn(job: Job, path: Path) -> None:
    """Write the network for one image, which is all that ncnn takes."""
    import pnnx
    import torch

    module, inputs = _exportable(replace(job, batch=1))
    with torch.no_grad():
        pnnx.export(module, str(path.with_name(path.name.partition(".")[0] + ".pt")), inputs, fp16=False)
    # The conversion of the timestep to float32, which ncnn does not know, is left to the caller.
    path.write_text(path.read_text(encoding="utf-8").replace("Tensor.to  ", "Noop       "), encoding="utf-8")


def _ncnn(job: Job) -> Evaluation:
    import ncnn
    import numpy as np

    network = ncnn.Net()
    network.opt.num_threads = job.threads
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(network.opt, option, False)  # with them its error is 100 times that of float32
    path = job.exported(".ncnn.param")
    network.load_param(str(path))
    network.load_model(str(path.with_suffix(".bin")))
    x, t, *labels = job.inputs()
    numbers = [t.astype(np.float32), *(each.astype(np.int32) for each in labels)]

    def call() -> Array:
        outs = []
        for image, *others in zip(x, *numbers, strict=True):
            extractor = network.create_extractor()
            arrays = [image, *(np.array([other]) for other in others)]  # an ncnn.Mat does not keep its array alive
            for i, array in enumerate(arrays):
                extractor.input(f"in{i}", ncnn.Mat(array))
            outs.append(np.array(extractor.extract("out0")[1]))
        return np.stack(outs)

    return call


_INPUTS = ("x", "t", "labels")
_EXPORTERS = ("torch", "diffusers")
NETWORKS = {
    OURS: Peer(_ours),
    DIFFUSERS: Peer(_eager, _EXPORTERS),
    "torch.compile": Peer(_compiled, _EXPORTERS),
    "OpenVINO": Peer(_openvino, (*_EXPORTERS, "openvino"), suffix=".xml", export=_export_openvino),
    "ONNX Runtime": Peer(
        _onnx, (*_EXPORTERS, "onnxruntime", "onnx", "onnxscript"), ("float32",), suffix=".onnx", export=_export_onnx, caps=False
    ),
    "zentorch": Peer(_zentorch, (*_EXPORTERS, "zentorch"), environment="zentorch", caps=False),
    "ncnn": Peer(
        *(_ncnn, (*_EXPORTERS, "ncnn", "pnnx"), ("float32",)),
        suffix=".ncnn.param",
        export=_export_ncnn,
        environment="ncnn",
        caps=False,
    ),
}

# ---------------------------------------------------------------------------------------------------------- training


def _trainer(kind: str, *, compile: bool = False) -> Callable[[Job], Callable[[], None]]:
    """Return how to build a training step of the job's network: `Trainer`'s, or that of ours, diffusers' or a plain one."""

    def build(job: Job) -> Callable[[], None]:
        import common
        import idioms
        import torch
        from trainer_step import trainer_step

        import ddpm_fast

        torch.set_num_threads(job.threads)
        keeping = ddpm_fast.kept_memory() if job.kept else nullcontext()
        keeping.__enter__()
        config, memory_format = idioms.NETWORKS[job.network_name], common.FORMATS[job.memory_format]
        if kind == TRAINER:
            options = {"precision": job.dtype, "channels_last": job.memory_format == "channels_last"}
            step = trainer_step(config, job.batch, job.device, **options)
        else:
            network = {DIFFUSERS: idioms.diffusers_unet, PLAIN: idioms.plain}.get(kind, lambda model: model)
            model = network(idioms.random_unet(config)).to(job.device, memory_format=memory_format).train()
            loss = idioms.loss_ours if kind == OURS else idioms.loss_peer
            take = idioms.train_step(loss, torch.compile(model) if compile else model, job.dtype == "bf16")
            step = partial(take, idioms.Batch(job.batch, job.size, job.device, memory_format))

        def run(keeping: Any = keeping) -> None:  # memory is kept while this lives
            step()
            common.synchronize(job.device)

        return run

    return build


TRAINING = {
    f"{DIFFUSERS} + eager PyTorch": Peer(_trainer(DIFFUSERS), _EXPORTERS),
    f"{DIFFUSERS} + torch.compile": Peer(_trainer(DIFFUSERS, compile=True), _EXPORTERS),
    PLAIN: Peer(_trainer(PLAIN)),
    f"{PLAIN} + torch.compile": Peer(_trainer(PLAIN, compile=True)),
    TRAINER: Peer(_trainer(TRAINER)),
    OURS: Peer(_trainer(OURS)),
}


def make_environments() -> None:
    """Install the peers that need an environment of their own, each with this PyTorch's version."""
    torch = version("torch").partition("+")[0]
    for name, requirements in ENVIRONMENTS.items():
        python = interpreter(name)
        venv.create(python.parents[1], with_pip=True)
        needed = [requirement.format(torch=torch, series=torch.rpartition(".")[0]) for requirement in requirements]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", *needed], check=True)


if __name__ == "__main__":
    make_environments()
