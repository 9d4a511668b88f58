"""csrc/cuda/intrinsics.h takes a square root with the instructions of sqrtf, without the test for extreme arguments.

That is correctly rounded as long as they are the same instructions, which is seen here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import sass

SOURCE = """
__global__ void root(float* x) { *x = sqrtf(*x); }
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_square_root_is_sqrtf_for_ordinary_arguments(tmp_path: Path, architecture: str) -> None:
    nvcc = sass.tool("nvcc")
    if nvcc is None or sass.tool("cuobjdump") is None:
        pytest.skip("no nvcc, or no cuobjdump to read machine code with")
    (tmp_path / "root.cu").write_text(SOURCE, encoding="utf-8")
    cubin = tmp_path / "root.cubin"
    subprocess.run([nvcc, f"-arch={architecture}", "-cubin", "-o", cubin, tmp_path / "root.cu"], check=True)
    (kernel,) = sass.kernels(cubin)
    code = kernel.code
    x = next(i for i in code if i.matches("LDG")).operands.split(",")[0]
    # Ordinary: the bits less 0x0d000000 are not above 0x727fffff, so from 2^-101 on.
    reciprocal = next(i for i in code if i.matches("MUFU")).operands.split(",")[0]
    assert any(i.matches("IADD3|VIADD") and f"{x}, -0xd000000" in i.operands for i in code)
    assert any(i.matches("ISETP.GT.U32") and "0x727fffff" in i.operands for i in code)
    # And then: root = x r, half = r / 2, residue = x - root^2, root + residue half.
    first = next(n for n, i in enumerate(code) if i.matches("FMUL"))
    root, half, residue, result = code[first : first + 4]
    names = [i.operands.split(",")[0] for i in (root, half, residue)]
    assert [i.opcode.partition(".")[0] for i in (root, half, residue, result)] == ["FMUL", "FMUL", "FFMA", "FFMA"]
    assert root.operands == f"{names[0]}, {x}, {reciprocal}"
    assert half.operands == f"{names[1]}, {reciprocal}, 0.5"
    assert residue.operands == f"{names[2]}, -{names[0]}, {names[0]}, {x}"
    assert result.operands.split(", ", 1)[1] == f"{names[2]}, {names[1]}, {names[0]}"
