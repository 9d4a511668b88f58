"""The CUDA kernels inside the built module (ddpm_fast/_native*.so), for every architecture that it was built for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sass
from sass import Figures

FLOAT = 4
ITEM_BYTES = {"float": 4, "BFloat16": 2, "Float16": 2, "unsigned char": 1}


def module() -> Path | str:
    """The module's file, or why there is no CUDA code to read."""
    from ddpm_fast.ops import backend

    error = backend.native_error()
    if error is not None:
        return f"the compiled module did not load: {error}"
    if not backend.native().build_info()["cuda_archs"]:
        return f"the compiled module has no CUDA kernels: {backend.native().build_info()['cuda_why_not']}"
    missing = [name for name in ("cuobjdump", "c++filt") if sass.tool(name) is None]
    if missing:
        where = f": {sass.CUOBJDUMP_IS_IN}" if "cuobjdump" in missing else ""
        return f"no {' and no '.join(missing)} to read machine code with{where}"
    return Path(str(backend.native().__file__))


def compiler(module: Path) -> str:
    """That made the machine code: figures of another one differ."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", module.read_bytes())
    return f"nvcc {found.group(1).decode()}" if found else "an unknown compiler"


# Bytes that the simplest call of an elementwise kernel reads and writes, by the types in the kernel's name; noise it draws.
# Every option beyond that reads or writes more.
TENSORS = {
    "noise_kernel": ((), (0,)),
    "q_sample_kernel": ((1,), (0,)),
    "reverse_step_kernel": ((0, 1), (0,)),
    "denoising_loss_kernel": ((0,), ()),
    "denoising_loss_backward_kernel": ((0,), (0,)),
}


# Sigmoids that a group norm's kernel computes for an element, by its third argument: input read once, statistics, apply.
SIGMOIDS = {"group_norm_silu": (1, 0, 1), "group_norm_silu_backward": (2, 1, 1)}

# The path that the figures count, printed with the table.
COUNTED = {
    "elementwise": f"""{", ".join(TENSORS)}: whole vectors in the simplest call, which draws its noise. Options that read or
        write tensors are off. The loss's sum over a tile counts: each thread takes part in it once.""",
    "group norms": """contiguous_kernel, channels_last_kernel: whole vectors, with SiLU. Backward kernels also make the sums of
        deviations, as for float32 or the gradient of shift. Weight, bias, shift and scale are absent: they are read once a
        channel. Loads, sweeps over a thread's elements and stores count. Shuffles, barriers and the merges between them do
        not: how often those run depends on the launch. The column of merges has them, with each loop once.""",
    "others": """scalar_kernel, with SiLU, and kernels of a few numbers: a thread's whole way, each loop once, as if for one
        element.""",
}


def constant(header: str, name: str) -> int:
    """Return a constant of the kernels' sources."""
    text = (Path(__file__).parents[2] / "csrc/cuda" / header).read_text(encoding="utf-8")
    (found,) = re.findall(rf"\b{name} = (\d+)", text)
    return int(found)


def counted(kernel: sass.Kernel, name: str) -> tuple[list[tuple[Sequence[sass.Instruction], float]], int]:
    """Return the paths that `COUNTED` describes, with a thread's elements on each, and the number of instructions in merges."""
    function, _, arguments = name.partition(" ")[2].rstrip(">").partition("<")
    words = arguments.split(", ")
    types = [ITEM_BYTES[word] for word in words if word in ITEM_BYTES]
    width = sass.WIDE // types[0] if types else 1  # elements of a vector
    if function in TENSORS:
        per_thread = constant("tiles.h", "kPerThread")
        # Staged: the noise is drawn by a loop of its own, and the main one, unrolled or not, finds it in shared memory.
        loop = kernel.main_loop(staged=True) if words[-1] == "true" else None
        elements = kernel.body(loop, inner=False).shared // FLOAT if loop is not None else per_thread
        wide = [[types[i] for i in of if types[i] * width >= sass.WIDE] for of in TENSORS[function]]
        accesses = sass.Accesses(*(sum(elements * size // sass.WIDE for size in of) for of in wide))
        path = kernel.hot_path(accesses, staged=loop is not None)
        return [(path, elements), *([(kernel.drawing_loop(), per_thread)] if loop is not None else [])], 0
    if function in ("contiguous_kernel", "channels_last_kernel"):  # group norm: <type, vectors that a thread holds, pass>
        vectors = int(words[1])
        whole, elements = kernel.tiled_path(vectors), vectors * width
        path = sass.element_work(whole)
        sigmoids, expected = sum(i.matches(sass.SIGMOID) for i in path), elements * SIGMOIDS[name.split()[0]][int(words[2])]
        if sigmoids != expected:
            raise ValueError(f"{name}: its path computes {sigmoids} sigmoids for {elements} elements, {expected} expected")
        return [(path, elements)], len(whole) - len(path)
    return [(kernel.hot_path(), 1)], 0


def figures(module: Path) -> dict[str, dict[str, Figures]]:
    """Kernel -> architecture -> figures."""
    found: dict[str, dict[str, Figures]] = {}
    kernels = list(sass.kernels(module))
    for kernel, name in zip(kernels, sass.demangled([kernel.name for kernel in kernels]), strict=True):
        if kernel.architecture in found.setdefault(name, {}):
            raise ValueError(f"two kernels are called {name}")
        found[name][kernel.architecture] = Figures.of(kernel, *counted(kernel, name))
    return found
