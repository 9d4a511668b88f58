"""The CUDA kernels inside the built module (ddpm_fast/_native*.so), for every architecture that it was built for."""

from __future__ import annotations

import re
from pathlib import Path

import sass
from figures import Figures

ITEM_BYTES = {"float": 4, "BFloat16": 2, "Float16": 2}


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
        return f"no {' and no '.join(missing)} to read machine code with"
    return Path(str(backend.native().__file__))


def compiler(module: Path) -> str:
    """That made the machine code: figures of another one differ."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", module.read_bytes())
    return f"nvcc {found.group(1).decode()}" if found else "an unknown compiler"


def elements(kernel: sass.Kernel, name: str) -> float:
    """Elements that a thread handles on the hot path: as many as it stores in vectors or, where it stores none, loads.

    The first type in a kernel's name is that of its vectors. A kernel without vectors counts for one element a thread.
    """
    moved = kernel.hot_bytes("ST", wide=True) or kernel.hot_bytes("LD", wide=True)
    types = [word for word in re.findall(r"\w+", name.partition("<")[2]) if word in ITEM_BYTES]
    return max(moved / ITEM_BYTES[types[0]], 1) if types else 1


def figures(module: Path) -> dict[str, dict[str, Figures]]:
    """Kernel -> architecture -> figures."""
    found: dict[str, dict[str, Figures]] = {}
    kernels = list(sass.kernels(module))
    for kernel, name in zip(kernels, sass.demangled([kernel.name for kernel in kernels]), strict=True):
        found.setdefault(name, {})[kernel.architecture] = Figures.of(kernel, elements(kernel, name))
    return found
