"""Print ddpm_fast/_native.pyi, the types of the compiled module. `make stub` runs it."""

from __future__ import annotations

import re
from typing import Any

from ddpm_fast import _native

HEADER = '''"""The compiled module. csrc/common/args.h explains the arguments of the kernels. `make stub` writes this file.

A kernel takes tensors, or None for an absent one, and does not check them: `ddpm_fast.ops` does. Tensors are dense.

dtype codes: 0 float32, 1 float64, 2 float16, 3 bfloat16, 4 uint8.
stream_or_threads: a number of threads on the CPU, a stream on CUDA.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isa: str  # the instruction set in use
    isas: list[str]  # the compiled instruction sets, worst first
    processor_isa: str  # the best instruction set that this processor has, compiled or not
    amx_bf16: bool  # whether the CPU has matrix units for bfloat16
    cuda_archs: list[str]  # in nvcc's words: sm_ is machine code, compute_ is PTX
    cuda_why_not: str  # empty if cuda_archs is not
    openmp: bool

def build_info() -> BuildInfo: ...
def philox4x32(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def philox(seed: int, stream: int, first_block: int, n_blocks: int, out: int, /) -> None: ...

class Tensor(Protocol):
    def data_ptr(self) -> int: ...

class KernelProgram(Protocol):
    """Kernel calls. Calling it runs them in order, on one team of threads. It holds references to their tensors."""

    def __call__(self) -> None: ...
    def __len__(self) -> int: ...  # the number of calls

class Kernels(Protocol):
    fields: dict[str, tuple[str, ...]]  # the names of each kernel's arguments
'''
CPU = """
class CpuKernels(Kernels, Protocol):
    panel: int  # output channels of a panel of packed weights
    # A call is a kernel's name and its arguments. The kernels:
    # {programs}
    def Program(self, calls: Sequence[tuple[str, tuple[Any, ...]]], threads: int) -> KernelProgram: ...
"""
CUDA = """
class CudaKernels(Kernels, Protocol):
    def versions(self) -> list[int]: ...  # CUDA's, as in 12080: the driver's, or 0 without one, and the compiling toolkit's
    def why_not(self) -> str: ...  # why the kernels cannot run on the current device; empty if they can
"""
SIZES = "    # The bytes of a kernel's workspace. The workspace among the arguments may be None.\n"
FOOTER = """
cpu: CpuKernels
cuda: CudaKernels  # absent if build_info()["cuda_archs"] is empty
"""
CPU_ONLY = "group_norm_affine"  # the first kernel that CUDA lacks


def method(name: str, kernels: Any, *, workspace: bool = False) -> str:
    """Return the stub of a kernel, or of the function that returns the bytes of its workspace."""
    found = re.fullmatch(r"\w+\((.*), /\) -> None", getattr(kernels, name).__doc__)
    assert found is not None
    lines = "".join(f"        {argument},\n" for argument in found[1].split(", "))
    name, result = (f"{name}_workspace", "int") if workspace else (name, "None")
    return f"    def {name}(\n        self,\n{lines}        /,\n    ) -> {result}: ...\n"


def programs() -> str:
    """Return the names of the kernels that a program may call."""
    try:
        _native.cpu.Program([("", ())], 1)
    except ValueError as error:
        found = re.fullmatch(r"Program: expected a kernel to be one of (.*), got ''", str(error))
        assert found is not None
    return found[1]


def stub() -> str:
    """Return the text of _native.pyi."""
    kernels: Any = _native.cpu
    names = list(kernels.fields)
    split = names.index(CPU_ONLY)
    workspaces = [name for name in names if "workspace" in kernels.fields[name]]
    on_cpu = [name for name in workspaces if hasattr(kernels, f"{name}_workspace")]
    return (
        HEADER
        + "".join(method(name, kernels) for name in names[:split])
        + CPU.format(programs=programs())
        + "".join(method(name, kernels) for name in names[split:])
        + SIZES
        + "".join(method(name, kernels, workspace=True) for name in on_cpu)
        + CUDA
        + SIZES
        + "".join(method(name, kernels, workspace=True) for name in workspaces if name not in on_cpu)
        + FOOTER
    )


if __name__ == "__main__":
    print(stub(), end="")
