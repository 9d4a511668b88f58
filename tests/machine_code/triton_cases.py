"""The Triton kernels, compiled offline for three GPU generations: no GPU is needed, and none is used.

    python tests/machine_code/triton_cases.py q_sample-bfloat16,noise-float32 80,90,100

compiles what these calls would launch and writes the figures as JSON. Triton's interpreter, which the other tests run in,
cannot compile, so this is a process of its own. Without architectures it makes the calls as a GPU would, up to the compiler.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sass
import torch
from sass import Figures
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200

# The path that the figures count, printed with the table.
COUNTED = {
    "all": """the launch that the case makes: Triton compiles SiLU, options and absent inputs in or out. It is once around the
        loop with the most wide accesses or, if no loop has any, the whole way. Reductions count."""
}

# ------------------------------------------------------------------------------------------------------ launcher calls

Call = Callable[[], None]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def cases() -> dict[str, Call]:
    from kernel_calls import launch_triton

    from ddpm_fast.plan import COLUMNS

    n = 4
    half, index = torch.bfloat16, tensor(n, dtype=torch.int64)
    x, h = tensor(n, 3, 32, 32), tensor(n, 3, 32, 32, dtype=half)
    x_last = tensor(n, 3, 32, 32, channels_last=True)
    pair = tensor(2 * n, 6, 32, 32, dtype=half)  # guidance and learned variance
    schedule = {"t": index, "table": tensor(1000, 2)}
    plan = {"table": tensor(1000, len(COLUMNS)), "seeds": index}
    drawn = {**schedule, "seeds": index}

    def call(name: str, results: dict[str, Tensor], **arguments: Any) -> Call:
        return lambda: launch_triton(name, results, **arguments)

    def norm(c: int, size: int, dtype: torch.dtype, last: bool, *, backward: bool = False) -> Call:
        a, w, m, s = tensor(n, c, size, size, dtype=dtype, channels_last=last), tensor(c), tensor(n, 32), tensor(n, c)
        arguments = {"x": a, "weight": w, "bias": w, "shift": s, "num_groups": 32, "eps": 1e-5, "silu": True}
        if not backward:
            return call("group_norm_silu", {"y": a, "mean": m, "rstd": m}, **arguments)
        results = {"grad_x": a, "grad_weight": w, "grad_bias": w, "grad_shift": s}
        return call("group_norm_silu_backward", results, grad_y=a, mean=m, rstd=m, **arguments)

    return {
        "noise-float32": call("noise", {"out": x}, seeds=index, stream=3),
        "q_sample-bfloat16": call("q_sample", {"x_t": h}, x_0=h, **schedule, seeds=index),
        "q_sample-uint8": call("q_sample", {"x_t": h}, x_0=tensor(n, 3, 32, 32, dtype=torch.uint8), **schedule, seeds=index),
        "q_sample-given-noise-channels_last": call("q_sample", {"x_t": x_last}, x_0=x_last, **schedule, noise=x_last),
        "reverse_step-float32": call("reverse_step", {"x_prev": x}, x_t=x, model_output=x, **plan, steps=index[:1], variance=0),
        "reverse_step-everything": call(
            *("reverse_step", {"x_prev": x, "x_0": x}),
            **{"x_t": x, "model_output": pair, **plan, "steps": index, "x_0_prev": x, "guidance_scale": 3.0, "variance": 2},
        ),
        "reverse_step-float32-channels_last": call(
            "reverse_step", {"x_prev": x_last}, x_t=x_last, model_output=x_last, **plan, steps=index, variance=0
        ),
        "denoising_loss-bfloat16": call("denoising_loss", {"losses": tensor(n)}, model_output=h, **drawn),
        "denoising_loss_backward-float32": call(
            "denoising_loss_backward", {"grad_model_output": x}, grad_losses=tensor(n), model_output=x, **drawn
        ),
        "group_norm_silu-float32": norm(128, 32, torch.float32, False),
        "group_norm_silu-bfloat16": norm(128, 32, half, False),
        "group_norm_silu-bfloat16-channels_last": norm(512, 16, half, True),
        "group_norm_silu-split": norm(128, 256, half, False),
        "group_norm_silu-split-channels_last": norm(128, 256, half, True),
        "group_norm_silu_backward-float32": norm(128, 32, torch.float32, False, backward=True),
        "group_norm_silu_backward-bfloat16-channels_last": norm(512, 16, half, True, backward=True),
        "group_norm_silu_backward-split-channels_last": norm(128, 256, half, True, backward=True),
    }


QUICK = (
    "q_sample-bfloat16",
    "reverse_step-everything",
    "group_norm_silu-bfloat16-channels_last",
    "group_norm_silu_backward-float32",
)


def sizes_of_one() -> dict[str, Call]:
    """Triton makes constants of integers that are 1: they must compile too. Nothing here is held against a budget."""
    from kernel_calls import launch_triton

    from ddpm_fast.plan import COLUMNS

    index, one = tensor(1, dtype=torch.int64), tensor(1)
    x, last, m = tensor(1, 1), tensor(1, 3, 1, 1).as_strided((1, 3, 1, 1), (3, 1, 4, 4)), tensor(1, 1)
    wide = tensor(1, 4096, 4, 4)  # one chunk, though not resident
    schedule = {"t": index, "table": tensor(1000, 2), "seeds": index}
    loss = {"model_output": x, "x_0": x, **schedule}
    plan = {"table": tensor(1000, len(COLUMNS)), "steps": index, "seeds": index, "variance": 0}

    def norm(x: Tensor) -> None:
        w, s = tensor(x.shape[1]), tensor(*x.shape[:2])
        small = {"weight": w, "bias": w, "shift": s, "scale": s, "scale_shift": s}
        arguments = {"x": x, "num_groups": 1, "eps": 1e-5, "silu": True, **small}
        launch_triton("group_norm_silu", {"y": x, "mean": m, "rstd": m}, **arguments)
        gradients = {"grad_x": x} | {f"grad_{name}": value for name, value in small.items()}
        launch_triton("group_norm_silu_backward", gradients, grad_y=x, mean=m, rstd=m, **arguments)

    return {
        "one-q_sample": lambda: launch_triton("q_sample", {"x_t": x}, x_0=x, **schedule),
        "one-reverse_step": lambda: launch_triton(
            "reverse_step", {"x_prev": last, "x_0": last}, x_t=last, model_output=last, **plan, x_0_prev=last
        ),
        "one-denoising_loss": lambda: launch_triton("denoising_loss", {"losses": one}, **loss),
        "one-denoising_loss_backward": lambda: launch_triton(
            "denoising_loss_backward", {"grad_model_output": x}, grad_losses=one, **loss
        ),
        "one-group_norm_silu": lambda: norm(x),
        "one-group_norm_silu-split": lambda: norm(wide),
    }


# ---------------------------------------------------------------------------------------------------------- compilation


def compiled(names: Iterable[str], architectures: Sequence[int] = ARCHITECTURES) -> dict[str, dict[str, Figures]]:
    """Kernel -> architecture -> figures, from a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, ",".join(names), ",".join(map(str, architectures))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return {
        kernel: {architecture: Figures(**figures) for architecture, figures in of.items()}
        for kernel, of in json.loads(done.stdout).items()
    }


class Driver:
    """The methods of an H100's driver that Triton's launcher calls."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def launches_of(call: Call) -> list[tuple[Any, ...]]:
    """Return the kernel and the arguments of each launch. Triton's own launcher takes them, up to the compiler."""
    import triton
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, ...]] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self, args, kwargs))

    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = lambda **_: True  # do not compile
    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = None
    return launches


def compile_case(name: str, call: Call, architectures: list[int]) -> Iterator[tuple[str, str, Figures]]:
    """Kernel, architecture and figures of all that the call would launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    launches = launches_of(call)
    assert launches, name
    for kernel, args, kwargs in launches:
        source, options, bound = specialize(kernel, args, kwargs)
        tile = math.prod(bound.get(axis) or 1 for axis in ("PIXELS", "CHANNELS", "WIDTH", "GROUPS"))
        for architecture in architectures:
            result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(result.asm["cubin"])
                file.flush()
                (code,) = sass.kernels(Path(file.name))
            elements = tile / (32 * result.metadata.num_warps)
            yield f"{name} {kernel.__name__}", f"sm_{architecture}", Figures.of(code, [(code.hot_path(), elements)])


def specialize(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return what Triton would compile for a launch: constants, types, and which arguments are multiples of 16."""
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8"}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: bound.pop(name) for name in set(bound) - set(kernel.arg_names)}
    assert set(options) <= {"num_warps", "enable_fp_fusion"}, options
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = types[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options, bound


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests/helpers"))  # for kernel_calls
    names, architectures = (argument.split(",") for argument in sys.argv[1:])
    every = sizes_of_one() | cases()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        for kernel, architecture, figures in compile_case(name, every[name], [int(a) for a in architectures if a]):
            found.setdefault(kernel, {})[architecture] = asdict(figures)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
