"""The machine code of the Triton kernels, compiled offline for three GPU generations: no GPU is needed, and none is used.

Checked: nothing spills to local memory, no atomics (results would depend on timing), tensors move in 16-byte accesses, and the
number of instructions an element stays in its budget (at 3.35 TB/s an H100 can issue 76 for 8 bytes).

Triton's interpreter, which the other tests run in, cannot compile: so this file runs itself in a process without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200


class Case(NamedTuple):
    """A launcher call, and for each kernel that it launches: instructions an element of the tile, and the tensors that it
    must read and write in 16-byte accesses, one letter each: f (float32) or h (half). None: a small kernel of no weight."""

    call: Callable[[], None]
    budgets: tuple[tuple[float, str, str] | None, ...]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def cases() -> dict[str, Case]:
    from ddpm_fast.triton_kernels.denoising_loss import denoising_loss, denoising_loss_backward
    from ddpm_fast.triton_kernels.group_norm_silu import group_norm_silu, group_norm_silu_backward
    from ddpm_fast.triton_kernels.noise import noise
    from ddpm_fast.triton_kernels.q_sample import q_sample
    from ddpm_fast.triton_kernels.reverse_step import reverse_step

    n = 4
    half = torch.bfloat16
    index = tensor(n, dtype=torch.int64)
    schedule, plan, loss = tensor(1000, 2), tensor(1000, 10), tensor(n)
    x, h = tensor(n, 3, 32, 32), tensor(n, 3, 32, 32, dtype=half)
    x_last = tensor(n, 3, 32, 32, channels_last=True)
    pair = tensor(2 * n, 6, 32, 32, dtype=half)  # guidance and learned variance

    def norm(c: int, size: int, dtype: torch.dtype, last: bool) -> Callable[[], None]:
        a, w, m, s = tensor(n, c, size, size, dtype=dtype, channels_last=last), tensor(c), tensor(n, 32), tensor(n, c)
        return lambda: group_norm_silu(a, m, m, a, w, w, s, None, None, 32, 1e-5, True)

    def norm_backward(c: int, size: int, dtype: torch.dtype, last: bool) -> Callable[[], None]:
        a, w, m, s = tensor(n, c, size, size, dtype=dtype, channels_last=last), tensor(c), tensor(n, 32), tensor(n, c)
        return lambda: group_norm_silu_backward(a, w, w, s, None, None, a, a, m, m, w, w, s, None, None, 32, True)

    return {
        "noise-float32": Case(lambda: noise(x, index, 3), ((58, "", "f"),)),
        "q_sample-bfloat16": Case(lambda: q_sample(h, h, index, schedule, None, index), ((62, "h", "h"),)),
        "q_sample-given-noise-channels_last": Case(
            lambda: q_sample(x_last, x_last, index, schedule, x_last, None), ((12, "ff", "f"),)
        ),
        "reverse_step-float32": Case(
            lambda: reverse_step(x, None, x, x, plan, index[:1], None, index, None, None, 0), ((72, "ff", "f"),)
        ),
        "reverse_step-everything": Case(
            lambda: reverse_step(x, x, x, pair, plan, index, None, index, x, 3.0, 2), ((105, "ffhhh", "ff"),)
        ),
        "reverse_step-float32-channels_last": Case(
            lambda: reverse_step(x_last, None, x_last, x_last, plan, index, None, index, None, None, 0), ((95, "", ""),)
        ),
        "denoising_loss-bfloat16": Case(lambda: denoising_loss(loss, h, h, index, schedule, None, index, 0), ((75, "h", ""),)),
        "denoising_loss_backward-float32": Case(
            lambda: denoising_loss_backward(x, loss, x, x, index, schedule, None, index, 0), ((62, "f", "f"),)
        ),
        "group_norm_silu-float32": Case(norm(128, 32, torch.float32, False), ((38, "f", "f"),)),
        "group_norm_silu-bfloat16": Case(norm(128, 32, half, False), ((32, "h", "h"),)),
        "group_norm_silu-bfloat16-channels_last": Case(norm(512, 16, half, True), ((40, "h", "h"),)),
        "group_norm_silu-split": Case(norm(128, 256, half, False), ((22, "h", ""), (32, "h", "h"))),
        "group_norm_silu-split-channels_last": Case(norm(128, 256, half, True), ((32, "h", ""), (40, "h", "h"))),
        "group_norm_silu_backward-float32": Case(norm_backward(128, 32, torch.float32, False), ((70, "ff", "f"), None)),
        "group_norm_silu_backward-bfloat16-channels_last": Case(norm_backward(512, 16, half, True), ((85, "hh", "h"), None)),
        "group_norm_silu_backward-split-channels_last": Case(
            norm_backward(128, 256, half, True), ((72, "hh", ""), None, (40, "hh", "h"), None)
        ),
    }


def sizes_of_one() -> dict[str, Case]:
    """Triton makes constants of integers that are 1: they must compile too."""
    from ddpm_fast.triton_kernels.denoising_loss import denoising_loss, denoising_loss_backward
    from ddpm_fast.triton_kernels.group_norm_silu import group_norm_silu, group_norm_silu_backward
    from ddpm_fast.triton_kernels.q_sample import q_sample
    from ddpm_fast.triton_kernels.reverse_step import reverse_step

    index, schedule, plan, one = tensor(1, dtype=torch.int64), tensor(1000, 2), tensor(1000, 10), tensor(1)
    x, last, m = tensor(1, 1), tensor(1, 3, 1, 1).as_strided((1, 3, 1, 1), (3, 1, 4, 4)), tensor(1, 1)
    wide = tensor(1, 4096, 4, 4)  # one chunk, though not resident

    def norm(x: Tensor) -> None:
        w, s = tensor(x.shape[1]), tensor(*x.shape[:2])
        group_norm_silu(x, m, m, x, w, w, s, s, s, 1, 1e-5, True)
        group_norm_silu_backward(x, w, w, s, s, s, x, x, m, m, w, w, s, s, s, 1, True)

    return {
        "one-q_sample": Case(lambda: q_sample(x, x, index, schedule, None, index), ()),
        "one-reverse_step": Case(lambda: reverse_step(last, last, last, last, plan, index, None, index, last, None, 0), ()),
        "one-denoising_loss": Case(lambda: denoising_loss(one, x, x, index, schedule, None, index, 2), ()),
        "one-denoising_loss_backward": Case(lambda: denoising_loss_backward(x, one, x, x, index, schedule, None, index, 2), ()),
        "one-group_norm_silu": Case(lambda: norm(x), ()),
        "one-group_norm_silu-split": Case(lambda: norm(wide), ()),
    }


QUICK = (
    "q_sample-bfloat16",
    "reverse_step-everything",
    "group_norm_silu-bfloat16-channels_last",
    "group_norm_silu_backward-float32",
)


# ------------------------------------------------------------------------- the process that compiles, without the interpreter


def compile_case(case: Case, architectures: list[int]) -> list[dict[str, Any]]:
    """Figures of each kernel that the call would launch, for each architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, ...]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record
    case.call()
    figures = []
    for position, (kernel, args, kwargs) in enumerate(launches):
        source, options, bound = specialize(kernel, args, kwargs)
        for architecture in architectures:
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            tile = 1
            for name in ("PIXELS", "CHANNELS", "WIDTH", "GROUPS"):
                tile *= bound.get(name) or 1
            figures.append(
                {"kernel": kernel.__name__, "architecture": architecture, "position": position}
                | {"tile": tile, "threads": 32 * compiled.metadata.num_warps}
                | count(compiled.asm["cubin"])
            )
    return figures


def specialize(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What Triton would compile for a launch: constants, types, and which arguments are multiples of 16."""
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
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


def count(cubin: bytes) -> dict[str, int]:
    """Registers, local memory, and instructions by kind, from Triton's own copy of cuobjdump."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    while instructions[-1] in ("NOP", "BRA"):  # padding
        instructions.pop()

    def matching(pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in instructions)

    def resource(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", listing)
        assert found is not None, listing[:500]
        return int(found.group(1))

    return {
        "registers": resource("REG"),
        "local": resource("STACK") + resource("LOCAL") + matching(r"LDL|STL"),
        "instructions": len(instructions),
        "atomics": matching(r"ATOM|RED\b"),
        "wide_loads": matching(r"LDG\.E.*\b128"),
        "wide_stores": matching(r"STG\.E.*\b128"),
        "stores": matching(r"STG\b"),
    }


if __name__ == "__main__":
    every = sizes_of_one() | cases()
    json.dump({name: compile_case(every[name], [int(a) for a in sys.argv[2:]]) for name in sys.argv[1].split(",")}, sys.stdout)
    sys.exit()


# ------------------------------------------------------------------------------------------------------------- the tests

pytest.importorskip("triton")


def compiled(names: tuple[str, ...], architectures: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, ",".join(names), *map(str, architectures)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return figures


@pytest.fixture(scope="module")
def quick() -> dict[str, list[dict[str, Any]]]:
    return compiled(QUICK, ARCHITECTURES)


def check(case: Case, figures: list[dict[str, Any]]) -> None:
    assert len(figures) == len(case.budgets) * len(ARCHITECTURES), figures
    for kernel in figures:
        assert kernel["local"] == 0, kernel
        assert kernel["atomics"] == 0, kernel
        limits = case.budgets[kernel["position"]]
        if limits is None:
            continue
        budget, loads, stores = limits
        assert kernel["instructions"] * kernel["threads"] / kernel["tile"] <= budget, kernel
        for tensors, accesses in ((loads, "wide_loads"), (stores, "wide_stores")):
            tile_bytes = sum({"f": 4, "h": 2}[letter] for letter in tensors) * kernel["tile"]
            assert kernel[accesses] * 16 * kernel["threads"] >= tile_bytes, (accesses, kernel)


@pytest.mark.parametrize("name", QUICK)
def test_machine_code(name: str, quick: dict[str, list[dict[str, Any]]]) -> None:
    check(cases()[name], quick[name])


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    names = tuple(sizes_of_one())
    for kernels in compiled(names, ARCHITECTURES[1:2]).values():
        assert kernels
        assert all(kernel["atomics"] == 0 for kernel in kernels)


@pytest.mark.slow
def test_machine_code_of_every_case() -> None:
    every = cases()
    figures = compiled(tuple(name for name in every if name not in QUICK), ARCHITECTURES)
    for name, kernels in figures.items():
        check(every[name], kernels)
