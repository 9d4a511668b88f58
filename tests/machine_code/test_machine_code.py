"""Machine code of the CUDA and the Triton kernels, read without a GPU: no local memory, no atomics, and within the budgets."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import budgets
import build_age
import native
import pytest
import sass
import triton_cases
from sass import Figures

ROOT = Path(__file__).resolve().parents[2]

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


OTHERS = tuple(name for name in triton_cases.cases() if name not in triton_cases.QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("names", [triton_cases.QUICK, OTHERS], ids=["quick", "others"])
def test_triton_kernels(names: tuple[str, ...]) -> None:
    triton = pytest.importorskip("triton")
    if sass.tool("cuobjdump") is None:
        pytest.skip(f"no cuobjdump to read machine code with: {sass.CUOBJDUMP_IS_IN}")
    compiler, budget = budgets.load("triton")
    assert {kernel.split()[0] for kernel in budget} == set(triton_cases.cases()), "a budget of a case that is gone"
    of_these = {kernel: value for kernel, value in budget.items() if kernel.split()[0] in names}
    check(triton_cases.compiled(names), of_these, f"triton {triton.__version__}" == compiler)


def test_triton_takes_all_launches() -> None:
    """Its launcher refuses names that it has itself, and parameters without a value. The interpreter does not."""
    pytest.importorskip("triton")
    triton_cases.compiled(triton_cases.cases() | triton_cases.sizes_of_one(), ())


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    pytest.importorskip("triton")
    found = triton_cases.compiled(triton_cases.sizes_of_one(), (90,))
    assert found
    assert all(figures.atomics == 0 for of in found.values() for figures in of.values())


# ------------------------------------------------------------------------------------------------ the gates can fail

FIGURES = Figures(registers=40, spills=0, atomics=0, instructions=20.0, mufu=1.5, wide=90, merges=100)
BUDGETS = {"k": {"sm_90": {name: getattr(FIGURES, name) for name in budgets.SLACK}}}


def complaints(figures: Figures = FIGURES, kernel: str = "k", **options: bool) -> list[str]:
    return list(budgets.complaints({kernel: {"sm_90": figures}}, BUDGETS, **options))


@pytest.mark.parametrize(
    ("change", "same_compiler", "complaint"),
    [
        ({}, True, None),
        ({"registers": 38, "instructions": 19.5, "mufu": 1.46, "wide": 92}, True, None),
        ({"instructions": 20.1}, True, "worse than the budget of 20.0"),
        ({"wide": 89}, True, "wide: 89, worse than the budget of 90"),
        ({"merges": 101}, True, "merges: 101, worse than the budget of 100"),
        ({"registers": 37}, True, "registers: 37, better than the budget of 40: tighten it"),
        ({"instructions": 19.0}, True, "tighten it"),
        ({"wide": 93}, True, "tighten it"),
        # Another compiler may be somewhat worse.
        ({"registers": 44, "instructions": 24.0}, False, None),
        ({"instructions": 15.0}, False, None),
        ({"instructions": 26.0}, False, "worse than the budget of 20.0"),
        ({"spills": 1}, False, "1 accesses to local memory"),
    ],
)
def test_what_differs_from_the_budget_is_said(change: dict[str, Any], same_compiler: bool, complaint: str | None) -> None:
    said = complaints(replace(FIGURES, **change), same_compiler=same_compiler)
    assert len(said) == (complaint is not None)
    assert complaint is None or complaint in said[0]


def test_kernels_and_budgets_come_in_pairs() -> None:
    assert complaints(kernel="other") == ["other on sm_90 has no budget", "k on sm_90: a budget without a kernel"]


def test_budgets_of_architectures_that_were_not_compiled_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "FILE", tmp_path / "budgets.json")
    two, one = {"sm_80": FIGURES, "sm_100": FIGURES}, {"sm_80": FIGURES}
    for compiler, found, wanted in (
        ("nvcc 1", {"k": two, "gone": one}, {"k": two.keys(), "gone": one.keys()}),
        ("nvcc 1", {"k": one}, {"k": two.keys()}),
        ("nvcc 2", {"k": one}, {"k": one.keys()}),
    ):
        budgets.update({"native": (compiler, found)})
        assert {kernel: of.keys() for kernel, of in budgets.load("native")[1].items()} == wanted


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
    path = code.hot_path()
    assert addresses(path) == [0x60, 0x70, 0x80, 0x90, 0xA0, 0xB0]  # with the optional FMUL, without the tail's MUFU
    assert native.counted(code, "group_norm_silu contiguous_kernel<Float16, 4, 1>") == ([(path, 32)], 0)
    figures = Figures.of(code, [(path, 4), (path[:2], 8)])
    assert figures == Figures(32, 0, atomics=1, instructions=1.8, mufu=0, wide=86)  # 6 / 4 + 2 / 8; 48 of 56 bytes


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


def test_calls_are_subroutines_where_they_return() -> None:
    jump = kernel(LISTING.replace("@P2 BRA 0x60", "@P2 CALL.REL.NOINC 0xd0"))
    assert jump.blocks[0xC0].successors == [0xD0]
    subroutine = LISTING.replace("MUFU.EX2 R7, R7", "CALL.REL.NOINC 0xe0").replace("BRA 0xe0", "RET.REL.NODEC R2 0x0 ")
    assert kernel(subroutine).blocks[0x20].successors == [0xD0]


def test_names_lose_what_depends_on_the_build() -> None:
    namespace = "46_GLOBAL__N__6c67d052_13_group_norm_cu_9002201d"
    mangled = [f"_ZN9ddpm_fast4cuda{namespace}11axpy_kernelINS_7Float16ELi4ELb0EEEvPKT_PS3_xf"]
    if sass.tool("c++filt") is None:
        pytest.skip("no c++filt")
    assert sass.demangled(mangled) == ["group_norm axpy_kernel<Float16, 4, false>"]


# --------------------------------------------------------------------------------------------------------- planted bugs


def listing(*lines: str) -> str:
    """A listing of instructions, one after the other. `name:` names the next one, and branches take names."""
    code = [line for line in lines if not line.endswith(":")]
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(code))
    labels = [i for i, line in enumerate(lines) if line.endswith(":")]
    for before, i in enumerate(labels):
        text = re.sub(rf"\bto {lines[i][:-1]}\b", f"{16 * (i - before):#x}", text)
    return text + "\n"


SIGMOIDS = ["MUFU.EX2 R8, R4", "MUFU.RCP R8, R8", "FMUL R4, R4, R8"] * 8  # one vector, eight halves
LOAD, STORE = "LDG.E.128 R4, desc[UR4][R28.64]", "STG.E.128 desc[UR4][R30.64], R4"
SHUFFLED = ["SHFL.BFLY PT, R9, R10, 0x10, 0x1f", "FADD R10, R10, R9"]
MERGE = ["merge:", "LDS R9, [R20]", *["FADD R10, R10, R9"] * 50, "@P3 BRA to merge"]
MERGE_BY_WARPS = [*SHUFFLED, *MERGE]
NORM = "group_norm_silu contiguous_kernel<BFloat16, 1, 0>"


def norm(plain: int = 5, silu: list[str] | None = None, merge: list[str] | None = None) -> str:
    """A norm of one vector a thread: load, sum, merge, then with or without SiLU, and store."""
    sums = [LOAD, *["FADD R10, R10, R4"] * 4]
    with_silu = [*(SIGMOIDS if silu is None else silu), STORE, "EXIT"]
    without = ["off:", *["FMUL R4, R4, R11"] * plain, STORE, "EXIT"]
    return listing(*sums, *(merge or SHUFFLED), "@P0 BRA to off", *with_silu, *without)


def figures_of(text: str, name: str = NORM, registers: int = 40, stack: int = 0) -> Figures:
    code = replace(kernel(text, stack), registers=registers)
    return Figures.of(code, *native.counted(code, name))


SOUND = figures_of(norm())


@pytest.mark.parametrize("plain", [1, 90], ids=["shorter", "longer"])
def test_the_path_of_a_norm_has_silu(plain: int) -> None:
    """A way without SiLU is shorter or longer, and the one with it reads a parameter late."""
    late = ["LDG.E R12, desc[UR4][R34.64]", *SIGMOIDS]
    assert figures_of(norm(plain)) == SOUND
    assert figures_of(norm(plain, late)).mufu == SOUND.mufu == 2


@pytest.mark.parametrize("sigmoids", [SIGMOIDS[3:], SIGMOIDS * 2], ids=["fewer", "more"])
def test_a_norm_without_its_sigmoids_is_refused(sigmoids: list[str]) -> None:
    with pytest.raises(ValueError, match="sigmoids for 8 elements, 8 expected"):
        figures_of(norm(silu=sigmoids))


@pytest.mark.parametrize("merge", [SHUFFLED * 4, ["BAR.SYNC 0x0", *MERGE], [*MERGE_BY_WARPS, "BAR.SYNC 0x0", *SHUFFLED]])
def test_a_merge_does_not_count_however_long_it_is(merge: list[str]) -> None:
    figures = figures_of(norm(merge=[*merge, *SHUFFLED]))
    left_out = sum(not line.endswith(":") for line in merge) + 1  # and the last shuffle
    assert figures == replace(SOUND, merges=left_out)


@pytest.mark.parametrize(
    ("line", "more"),
    [("FADD R{}, R10, R{}", 1), ("FADD R12, R10, R9", 0)],
    ids=["of-the-vector-in-registers", "of-other-numbers"],
)
def test_a_sweep_between_barriers_counts(line: str, more: int) -> None:
    sweep = [line.format(12 + i, 4 + i % 4) for i in range(8)]
    figures = figures_of(norm(merge=["BAR.SYNC 0x0", *sweep, "BAR.SYNC 0x0"]))
    assert figures.instructions == pytest.approx(SOUND.instructions + more, abs=0.1)


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ([LOAD, "BAR.SYNC 0x0", "LDS.128 R4, [R20]", "BAR.SYNC 0x0", "FADD R8, R7, R7", "BAR.SYNC 0x0"], [0x0]),
        ([LOAD, "BAR.SYNC 0x0", "@P0 CS2R R4, SRZ", "BAR.SYNC 0x0", "FADD R8, R4, R4"], [0x0, 0x40]),
        (["LDG.E.ENL2.256 R12, R4, desc[UR4][R28.64]", "BAR.SYNC 0x0", "FADD R8, R15, R15"], [0x0, 0x20]),
    ],
    ids=["written-over", "conditionally", "256-bits"],
)
def test_a_register_that_was_written_over_is_no_vector(lines: list[str], kept: list[int]) -> None:
    assert addresses(sass.element_work(sass.parse(listing(*lines)))) == kept


@pytest.mark.parametrize(
    ("text", "more", "complaint"),
    [
        (norm().replace("FADD R10, R10, R4", "STL [R1], R10", 1), {}, "1 accesses to local memory"),
        (norm(), {"stack": 8}, "1 accesses to local memory"),
        (norm().replace("FADD R10, R10, R9", "RED.E.ADD.F32 desc[UR4][R2.64], R10"), {}, "1 atomic operations"),
        (norm(), {"registers": 43}, "registers: 43, worse"),
        (norm().replace("FADD R10, R10, R4", "FADD R10, R10, R4 ;\n        /*0018*/    NOP", 1), {}, "instructions: "),
        (norm().replace("FADD R10, R10, R4", "MUFU.RCP R10, R4"), {}, "mufu: 2.5, worse"),
        (norm().replace("FADD R10, R10, R4", "LDG.E R10, desc[UR4][R34.64]"), {}, "wide: 67, worse"),
    ],
    ids=["spill", "stack", "atomic", "registers", "instructions", "mufu", "wide"],
)
def test_a_bug_in_a_kernel_is_found(text: str, more: dict[str, int], complaint: str) -> None:
    budget = {NORM: {"sm_90": {name: getattr(SOUND, name) for name in budgets.SLACK}}}
    (said,) = budgets.complaints({NORM: {"sm_90": figures_of(text, **more)}}, budget)
    assert complaint in said


# ------------------------------------------------------------------------------------------------------- compiled here


def cubin(source: Path, architecture: str, *options: str) -> Path:
    """Compile a source, and return the file with its machine code."""
    missing = [name for name in ("nvcc", "cuobjdump", "c++filt") if sass.tool(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    command = [sass.tool("nvcc"), "-cubin", f"-arch={architecture}", *options, "-o", source.with_suffix(".cubin"), source]
    subprocess.run(command, check=True)
    return source.with_suffix(".cubin")


# Too many blocks for the registers; vectors that are accessed word by word, as if they were not aligned.
COMPILED_BUGS = {
    "none": ("noise.cu", "", "", ""),
    "spill": ("noise.cu", "__launch_bounds__(kMostThreads)", "__launch_bounds__(kMostThreads, 8)", "accesses to local memory"),
    "narrow": ("vector.h", "alignas(width > kWidth<T> ? kVectorBytes : sizeof(T) * width)", "alignas(4)", "no way with"),
}


@pytest.mark.slow
@pytest.mark.sources
@pytest.mark.parametrize(("file", "before", "after", "complaint"), COMPILED_BUGS.values(), ids=COMPILED_BUGS)
def test_a_bug_in_a_compiled_kernel_is_found(file: str, before: str, after: str, complaint: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / file
    text = source.read_text(encoding="utf-8")
    assert before in text
    source.write_text(text.replace(before, after) if before else text, encoding="utf-8")
    compiled = cubin(source.with_name("noise.cu"), "sm_90a", "-O3", "--fmad=false", "-std=c++20", f"-I{tmp_path / 'csrc'}")
    try:
        found = native.figures(compiled)
        budget = {kernel: budgets.load("native")[1][kernel] for kernel in found}
        said = list(budgets.complaints(found, budget, same_compiler=False))
    except ValueError as error:
        said = [str(error)]
    assert any(complaint in each for each in said) if complaint else said == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_square_root_is_sqrtf_for_ordinary_arguments(tmp_path: Path, architecture: str) -> None:
    """csrc/cuda/intrinsics.h takes a square root with the instructions of sqrtf, without the test for extreme arguments.

    That is correctly rounded as long as they are the same instructions.
    """
    (tmp_path / "root.cu").write_text("__global__ void root(float* x) { *x = sqrtf(*x); }\n", encoding="utf-8")
    (root_kernel,) = sass.kernels(cubin(tmp_path / "root.cu", architecture))
    code = root_kernel.code
    x, reciprocal = (next(i for i in code if i.matches(name)).operands.split(",")[0] for name in ("LDG", "MUFU"))
    # Ordinary: the bits less 0x0d000000 are not above 0x727fffff, so from 2^-101 on.
    assert any(i.matches("IADD3|VIADD") and f"{x}, -0xd000000" in i.operands for i in code)
    assert any(i.matches("ISETP.GT.U32") and "0x727fffff" in i.operands for i in code)
    first = next(n for n, i in enumerate(code) if i.matches("FMUL"))
    root, half, residue, result = (i.operands.split(",")[0] for i in code[first : first + 4])
    assert [f"{i.opcode.partition('.')[0]} {i.operands}" for i in code[first : first + 4]] == [
        f"FMUL {root}, {x}, {reciprocal}",
        f"FMUL {half}, {reciprocal}, 0.5",
        f"FFMA {residue}, -{root}, {root}, {x}",
        f"FFMA {result}, {residue}, {half}, {root}",
    ]
