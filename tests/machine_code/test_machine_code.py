"""Machine code of the CUDA and the Triton kernels, read without a GPU: no local memory, no atomics, and within the budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import budgets
import build_age
import native
import pytest
import sass
import triton_cases
from figures import Figures

# ------------------------------------------------------------------------------------------------------------- the gates


def check(found: budgets.Found, budget: budgets.Budgets, same_compiler: bool) -> None:
    said = list(budgets.complaints(found, budget, same_compiler=same_compiler))
    if said:
        pytest.fail("\n".join(said), pytrace=False)


@pytest.mark.slow
def test_cuda_kernels() -> None:
    why_old = build_age.why_old()
    if why_old is not None:
        pytest.fail(f"{why_old}: make build", pytrace=False)
    module = native.module()
    if not isinstance(module, Path):
        pytest.skip(module)
    compiler, budget = budgets.load("native")
    found = native.figures(module)
    assert found, "no kernel was found in the module"
    check(found, budget, native.compiler(module) == compiler)


def check_triton(names: tuple[str, ...]) -> None:
    triton = pytest.importorskip("triton")
    if sass.tool("cuobjdump") is None:
        pytest.skip(f"no cuobjdump to read machine code with: {sass.CUOBJDUMP_IS_IN}")
    compiler, budget = budgets.load("triton")
    found = triton_cases.compiled(names)
    assert {kernel.split()[0] for kernel in found} == set(names)
    of_these = {kernel: value for kernel, value in budget.items() if kernel.split()[0] in names}
    check(found, of_these, f"triton {triton.__version__}" == compiler)


@pytest.mark.slow
def test_triton_kernels() -> None:
    check_triton(triton_cases.QUICK)


@pytest.mark.slow
def test_every_triton_kernel() -> None:
    names = tuple(triton_cases.cases())
    assert {kernel.split()[0] for kernel in budgets.load("triton")[1]} == set(names), "a budget of a case that is gone"
    check_triton(tuple(name for name in names if name not in triton_cases.QUICK))


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    pytest.importorskip("triton")
    found = triton_cases.compiled(triton_cases.sizes_of_one(), (90,))
    assert found
    assert all(figures.atomics == 0 for of in found.values() for figures in of.values())


# ------------------------------------------------------------------------------------------------ the gates can fail

FIGURES = Figures(registers=40, spills=0, atomics=0, instructions=20.0, mufu=1.5, wide=90)
BUDGETS = {"k": {"sm_90": {name: getattr(FIGURES, name) for name in budgets.SLACK}}}


def complaints(figures: Figures = FIGURES, kernel: str = "k", **options: bool) -> list[str]:
    return list(budgets.complaints({kernel: {"sm_90": figures}}, BUDGETS, **options))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 2}, "2 accesses to local memory"),
        ({"atomics": 1}, "1 atomic operations"),
        ({"registers": 41}, "registers: 41, worse than the budget of 40"),
        ({"instructions": 20.1}, "worse than the budget of 20.0"),
        ({"wide": 89}, "wide: 89, worse than the budget of 90"),
        ({"registers": 37}, "registers: 37, better than the budget of 40: tighten it"),
        ({"instructions": 19.0}, "tighten it"),
        ({"wide": 93}, "tighten it"),
    ],
)
def test_what_differs_from_the_budget_is_said(change: dict[str, Any], complaint: str) -> None:
    (said,) = complaints(replace(FIGURES, **change))
    assert complaint in said


def test_what_is_within_the_budget_passes() -> None:
    assert complaints() == []
    assert complaints(replace(FIGURES, registers=38, instructions=19.5, mufu=1.46, wide=92)) == []


def test_another_compiler_may_be_somewhat_worse() -> None:
    assert complaints(replace(FIGURES, registers=44, instructions=24.0), same_compiler=False) == []
    assert complaints(replace(FIGURES, instructions=15.0), same_compiler=False) == []
    assert len(complaints(replace(FIGURES, instructions=26.0), same_compiler=False)) == 1
    assert len(complaints(replace(FIGURES, spills=1), same_compiler=False)) == 1


def test_kernels_and_budgets_come_in_pairs() -> None:
    assert complaints(kernel="other") == ["other on sm_90 has no budget", "k on sm_90: a budget without a kernel"]
    assert complaints(kernel="other", whole=False) == ["other on sm_90 has no budget"]


# ------------------------------------------------------------------------------------------------------------- the reader

LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   LDG.E.CONSTANT R7, desc[UR4][R28.64] ;
        /*0030*/                   MUFU.EX2 R7, R7 ;
        /*0040*/                   STG.E desc[UR4][R28.64], R7 ;
        /*0050*/                   BRA 0xd0 ;
        /*0060*/                   LDG.E.128 R4, desc[UR4][R28.64] ;
        /*0070*/              @!P1 BRA 0x90 ;
        /*0080*/                   FMUL R4, R4, 2 ;
        /*0090*/                   LDG.E.64 R8, desc[UR4][R30.64] ;
        /*00a0*/                   STG.E.128 desc[UR4][R28.64], R4 ;
        /*00b0*/               @P2 BRA 0x60 ;
        /*00c0*/                   RED.E.ADD.F32.FTZ.RN desc[UR4][R2.64], R7 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def kernel(listing: str = LISTING, stack: int = 0) -> sass.Kernel:
    return sass.Kernel("k", "sm_90", 32, stack, 0, sass.parse(listing))


def addresses(path: list[sass.Instruction]) -> list[int]:
    return [instruction.address for instruction in path]


def test_hot_path_is_once_around_the_vector_loop() -> None:
    code = kernel()
    assert len(code.code) == 14  # without padding
    path = code.hot_path()
    assert addresses(path) == [0x60, 0x70, 0x80, 0x90, 0xA0, 0xB0]  # with the optional FMUL, without the tail's MUFU
    assert sass.global_bytes(path, wide=False) == 40
    assert sass.global_bytes(path, "ST", wide=True) == 16
    assert (code.atomics, code.spills) == (1, 0)
    assert native.paths(code, "group_norm_silu contiguous_kernel<Float16, 4, 0>") == [(path, 32)]
    figures = Figures.of(code, [(path, 4), (path[:2], 8)])
    assert (figures.instructions, figures.mufu, figures.wide) == (1.8, 0, 86)  # 6 / 4 + 2 / 8; 48 of 56 bytes


def test_without_a_loop_the_hot_path_is_the_vector_one_to_the_exit() -> None:
    path = kernel(LISTING.replace("@P2 BRA 0x60", "    FADD R1, R1")).hot_path()
    assert addresses(path)[:3] == [0x0, 0x10, 0x60]
    assert path[-1].opcode == "EXIT"


TILE = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R28.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R28.64] ;
        /*0020*/                   LDG.E.128 R12, desc[UR4][R28.64] ;
        /*0030*/               @P0 BRA 0x70 ;
        /*0040*/                   STG.E.128 desc[UR4][R30.64], R4 ;
        /*0050*/               @P1 BRA 0x40 ;
        /*0060*/                   BRA 0xa0 ;
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/                   STG.E.128 desc[UR4][R30.64], R4 ;
        /*0090*/               @P1 BRA 0x70 ;
        /*00a0*/                   EXIT ;
"""


def test_vectors_stored_some_at_a_time_count_as_often_as_they_are() -> None:
    whole, loop = [0x0, 0x10, 0x20, 0x30, 0x70, 0x80, 0x90, 0xA0], [0x70, 0x80, 0x90]
    assert addresses(kernel(TILE).tiled_path(3)) == whole + 2 * loop  # the way with more instructions
    figures = Figures.of(kernel(TILE), [(kernel(TILE).tiled_path(3), 12)])
    assert (figures.instructions, figures.mufu, figures.wide) == (1.2, 0.25, 100)
    tiles = TILE.replace("    EXIT", "@P2 BRA 0x0").rstrip() + "\n        /*00b0*/                   EXIT ;\n"
    assert addresses(kernel(tiles).tiled_path(3)) == whole + 2 * loop  # once around the loop over tiles


OPTIONS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R28.64] ;
        /*0010*/               @P0 BRA 0x40 ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R30.64] ;
        /*0030*/                   FADD R4, R4, R8 ;
        /*0040*/               @P1 BRA 0x60 ;
        /*0050*/                   STG.E.128 desc[UR4][R32.64], R4 ;
        /*0060*/               @P2 BRA 0x90 ;
        /*0070*/                   {noise} ;
        /*0080*/                   FADD R4, R4, R9 ;
        /*0090*/                   STG.E.128 desc[UR4][R34.64], R4 ;
        /*00a0*/                   EXIT ;
"""


def test_options_that_read_or_write_are_off_where_the_accesses_are_given() -> None:
    code = kernel(OPTIONS.format(noise="NOP"))
    assert addresses(code.hot_path()) == list(range(0, 0xB0, 0x10))
    simplest = addresses(code.hot_path(sass.Accesses(loads=1, stores=1)))
    assert simplest == [0x0, 0x10, 0x40, 0x60, 0x70, 0x80, 0x90, 0xA0]
    assert addresses(code.hot_path(sass.Accesses(loads=2, stores=1)))[2:4] == [0x20, 0x30]
    with pytest.raises(ValueError, match="no way with"):
        code.hot_path(sass.Accesses(loads=1, stores=3))
    assert code.hot_path(sass.Accesses(loads=0, stores=0)) == code.hot_path(sass.Accesses(loads=1, stores=1))


def test_the_hot_path_draws() -> None:
    """The hot path has a block of Philox, even if a path without it is longer."""
    products = "\n".join(f"        /*{0x1000 + 16 * i:04x}*/    IMAD.WIDE.U32 R4, R5, R6, RZ ;" for i in range(20))
    drawn = f"        /*0000*/    @P0 BRA 0x2000 ;\n{products}\n        /*1200*/    BRA 0x3000 ;\n"
    given = "\n".join(f"        /*{0x2000 + 16 * i:04x}*/    FADD R4, R5, R6 ;" for i in range(90))
    code = kernel(f"{drawn}{given}\n        /*3000*/    STG.E.128 desc[UR4][R34.64], R4 ;\n        /*3010*/    EXIT ;\n")
    assert sum(i.matches("IMAD.WIDE") for i in code.hot_path()) == 20
    assert len(code.hot_path()) == 24
    assert code.drawing_loop() == []


def test_local_memory_is_seen() -> None:
    assert kernel(LISTING.replace("FMUL R4, R4, 2", "STL [R1], R4")).spills == 1
    assert kernel(stack=16).spills == 1


def test_calls_are_subroutines_where_they_return() -> None:
    jump = LISTING.replace("@P2 BRA 0x60", "@P2 CALL.REL.NOINC 0xd0")
    assert sass.control_flow(kernel(jump).code)[0xC0].successors == [0xD0]
    assert 0xD0 in {s for block in sass.control_flow(kernel(jump).code).values() for s in block.successors}
    subroutine = LISTING.replace("MUFU.EX2 R7, R7", "CALL.REL.NOINC 0xe0").replace("BRA 0xe0", "RET.REL.NODEC R2 0x0 ")
    assert sass.control_flow(kernel(subroutine).code)[0x20].successors == [0xD0]


def test_names_lose_what_depends_on_the_build() -> None:
    namespace = "46_GLOBAL__N__6c67d052_13_group_norm_cu_9002201d"
    mangled = [f"_ZN9ddpm_fast4cuda{namespace}11axpy_kernelINS_7Float16ELi4ELb0EEEvPKT_PS3_xf"]
    if sass.tool("c++filt") is None:
        pytest.skip("no c++filt")
    assert sass.demangled(mangled) == ["group_norm axpy_kernel<Float16, 4, false>"]
