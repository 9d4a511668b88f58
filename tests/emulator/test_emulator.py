"""The emulator finds bugs: each kind is planted in a kernel of ours, and has to be found in every order of threads.

All bugs of a group are edits of one copy of the sources, compiled once; `emulated.set_planted` chooses the one that is there.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator import build
from op_calls import make_call
from op_cases import Case

import ddpm_fast
from ddpm_fast.ops import backend

PLAN = ddpm_fast.ddpm_plan(ddpm_fast.NoiseSchedule.linear())
ORDERS = ({"order": "natural"}, {"order": "reversed"}, {"order": "shuffled", "seed": 1})


def run(op: str, shape: tuple[int, ...], dtype=torch.float32, channels_last=False, **options) -> Callable[[], object]:
    def call() -> None:
        make_call(Case(op, "planted", shape, options), dtype, channels_last=channels_last)("native")

    return call


def unaligned_q_sample() -> None:
    x_0 = torch.ones(1 + 2 * 32)[1:].view(2, 32)
    ddpm_fast.q_sample(x_0, 3, ddpm_fast.NoiseSchedule.linear(), noise=torch.ones(2, 32), backend="native")


def reverse_step_in_place() -> None:
    x_t = torch.ones(1, 3, 16, 16)
    seeds = ddpm_fast.sample_seeds(0, 1)
    ddpm_fast.reverse_step(x_t, torch.ones_like(x_t), 500, PLAN, seeds=seeds, out=x_t, backend="native")


@dataclass(frozen=True)
class Bug:
    """A bug to plant.

    Attributes:
        name: what is wrong.
        kind: of the report that names it, or the kinds that may; others may come with it.
        edits: (file of csrc/cuda, text, text with the bug). BUG in the latter is true where the bug is to be there.
        run: shows it.
        says: a regular expression of what the report says.
        card: the emulated one to run on.
    """

    name: str
    kind: str
    edits: tuple[tuple[str, str, str], ...]
    run: Callable[[], object]
    says: str = ""
    card: int = 0

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


STAGED = run("noise", (2, 3, 5, 7))  # draws into shared memory
STAGED_VECTORS = run("noise", (2, 8, 4, 4), channels_last=True)
VECTORS = run("noise", (2, 3, 16, 16))  # draws into registers
LOSS = run("denoising_loss", (2, 3, 16, 16))  # two warps
TILES = run("denoising_loss", (2, 3, 40, 40))  # two blocks a sample

STAGED_NOISE = "alignas(kVectorBytes) __shared__ float staged_noise[kMostInTile];"
SUMS = "__shared__ float sums[kMostThreads / kWarp];"
STORE = "store(out + at.offset, x);"
OP = "  Normals<T> op("

ELEMENTWISE = (
    Bug(
        "no barrier between writing and reading shared memory",
        "race",
        (("tiles.h", "staged_noise);\n      __syncthreads();", "staged_noise);\n      if (!BUG) __syncthreads();"),),
        STAGED,
        says="shared .*staged_noise",
    ),
    Bug(
        "a barrier of warps instead of the block",
        "race",
        (("denoising_loss.cu", "  __syncthreads();", "  if (BUG) __syncwarp(); else __syncthreads();"),),
        LOSS,
        says="shared .*sums",
    ),
    Bug(
        "two samples written to one place",
        "race",
        (("tiles.h", "sample * tiling.numel +", "(BUG ? 0 : sample * tiling.numel) +"),),
        VECTORS,
        says=r"out \(",
    ),
    Bug(
        "in place and read by a neighbour",
        "race",
        (("reverse_step.cu", "cuda::load<width>(x_t + at.offset)", "cuda::load<width>(x_t + (BUG ? 0 : at.offset))"),),
        reverse_step_in_place,
        says=r"x_t \(",
    ),
    Bug(
        "two threads that write one half-precision number",
        "race",
        (("tiles.h", "at = {tile.offset + index, 0};", "at = {tile.offset + (BUG ? index / 2 * 2 : index), 0};"),),
        run("q_sample", (2, 3, 5, 7), torch.bfloat16),
        says=r"x_t \(",
    ),
    Bug(
        "warps that nobody has added up",
        "uninitialised",
        (("denoising_loss.cu", "warp < blockDim.x / kWarp", "warp < (BUG ? kMostThreads : blockDim.x) / kWarp"),),
        LOSS,
        says="shared .*sums",
    ),
    Bug(
        "an output read before it is written",
        "uninitialised",
        (("q_sample.cu", "widen(input, x);", "widen(input, x);\n    if (BUG) cuda::load(out + at.offset, x);"),),
        run("q_sample", (2, 3, 5, 7)),
        says=r"x_t \(",
    ),
    Bug(
        "an element left out",
        "unwritten",
        (("q_sample.cu", STORE, f"if (!(BUG && at.offset == 0)) {STORE}"),),
        run("q_sample", (2, 3, 5, 7)),
        says=r"byte 0 of x_t",
    ),
    Bug(
        "an input changed",
        "input written",
        (("q_sample.cu", "    float x[width];", "    if (BUG) const_cast<X*>(x_0)[at.offset] = X{};\n    float x[width];"),),
        run("q_sample", (2, 3, 5, 7)),
        says="x_0",
    ),
    Bug(
        "writes past the end of a tensor",
        "out of bounds",
        (("noise.cu", "store(out + at.offset, normals);", "store(out + at.offset + (BUG ? width : 0), normals);"),),
        VECTORS,
        says=r"out \(6144 bytes\), byte 6144",
    ),
    Bug(
        "reads past the end of a table",
        "out of bounds",
        (("q_sample.cu", "table[2 * t];", "table[2 * t + (BUG ? 2 : 0)];"),),
        run("q_sample", (1, 3, 5, 7), t=999),
        says=r"table \(8000 bytes\), byte 8000",
    ),
    Bug(
        "reads past the end of the seeds",
        "out of bounds",
        (("tiles.h", "noise.seeds[tile.sample]), noise", "noise.seeds[tile.sample + (BUG ? 1 : 0)]), noise"),),
        STAGED,
        says=r"seeds \(16 bytes\)",
    ),
    Bug(
        "a workspace that is too small",
        "out of bounds",
        (("denoising_loss.cu", "return tiles == 1 ? 0 :", "return tiles == 1 ? 0 : BUG ? 4 :"),),
        TILES,
        says=r"workspace \(4 bytes\)",
    ),
    Bug(
        "writes past the end of a shared array",
        "out of bounds",
        (
            (
                "tiles.h",
                "float* const to = staged_noise +",
                "float* const to = (BUG ? staged_noise + kMostInTile : staged_noise) +",
            ),
        ),
        STAGED,
        says=r"shared .*staged_noise \(16384 bytes\), byte 16",
    ),
    Bug(
        "an index past a shared array",
        "out of bounds",
        (("denoising_loss.cu", "sums[warp];", "sums[warp + (BUG ? kMostThreads / kWarp : 0)];"),),
        LOSS,
        says="index 8 of 'float",
    ),
    Bug(
        "an index past a local array",
        "out of bounds",
        (("q_sample.cu", "x[i] = fma(", "x[i + (BUG ? width : 0)] = fma("),),
        run("q_sample", (2, 3, 16, 16)),
        says="index 4 of 'float",
    ),
    Bug(
        "an absent tensor read",
        "illegal address",
        (("reverse_step.cu", "if (x_0_prev2 != nullptr)", "if (BUG || x_0_prev2 != nullptr)"),),
        run("reverse_step", (2, 3, 5, 7), plan=PLAN),
    ),
    Bug(
        "a pointer of the host",
        "illegal address",
        (
            (
                "noise.cu",
                "const Tiling tiling(",
                "std::int64_t here[2] = {};\n    NoiseArgs b = a;\n    if (BUG) b.seeds = here;\n    const Tiling tiling(",
            ),
            ("noise.cu", "a.stream_or_threads.stream(), a,", "a.stream_or_threads.stream(), b,"),
        ),
        STAGED,
    ),
    Bug(
        "vectors of a tensor that is not aligned",
        "misaligned",
        (("q_sample.cu", "&& aligned<X>(a.x_0, kVector)", "&& (BUG || aligned<X>(a.x_0, kVector))"),),
        unaligned_q_sample,
    ),
    Bug(
        "vectors of shared memory that are not aligned",
        "misaligned",
        (("tiles.h", "load(staged_noise + first +", "load(staged_noise + (BUG ? 1 : 0) + first +"),),
        STAGED_VECTORS,
    ),
    Bug(
        "a product that overflows",
        "undefined",
        (
            (
                "noise.cu",
                OP,
                f"  if (BUG) [[maybe_unused]] volatile int product = (static_cast<int>(threadIdx.x) + 3) * 0x30000000;\n{OP}",
            ),
        ),
        STAGED,
        says="multiplication overflows",
    ),
    Bug(
        "a shift by too much",
        "undefined",
        (("noise.cu", OP, f"  if (BUG && 1 << (threadIdx.x + 32) == 1) return;\n{OP}"),),
        STAGED,
        says="shift",
    ),
    Bug(
        "a division by zero",
        "undefined",
        (("noise.cu", OP, f"  if (BUG && tile.rows / static_cast<int>(threadIdx.x / 1024) == 1) return;\n{OP}"),),
        STAGED,
        says="division by zero",
    ),
    Bug(
        "a barrier for half of a block",
        "divergent barrier",
        (("tiles.h", STAGED_NOISE, f"{STAGED_NOISE}\n    if (BUG && threadIdx.x < 16) __syncthreads();"),),
        STAGED,
    ),
    Bug(
        "barriers in both branches",
        "divergent barrier",
        (
            (
                "denoising_loss.cu",
                SUMS,
                f"{SUMS}\n  if (BUG && threadIdx.x % 2)\n    __syncthreads();\n  else if (BUG)\n    __syncthreads();",
            ),
        ),
        LOSS,
    ),
    Bug(
        "a thread that leaves before a barrier",
        "divergent barrier",
        (("denoising_loss.cu", "sum_of_warp(op.sum);", "sum_of_warp(op.sum);\n  if (BUG && threadIdx.x == 63) return;"),),
        LOSS,
    ),
    Bug(
        "a mask that does not name the caller",
        "warp mask",
        (("denoising_loss.cu", "__shfl_xor_sync(0xFFFFFFFF,", "__shfl_xor_sync(BUG ? 0x0000FFFF : 0xFFFFFFFF,"),),
        LOSS,
        says="does not name lane",
    ),
    Bug(
        "lanes that do not come",
        "warp mask",
        (("denoising_loss.cu", "Real value) {", "Real value) {\n  if (BUG && threadIdx.x % kWarp > 15) return value;"),),
        LOSS,
        says=r"names lane \d+, which waits in __syncthreads",
    ),
    Bug(
        "a lane outside the mask read",
        "warp mask",
        (
            (
                "denoising_loss.cu",
                "  for (int distance",
                "  if (BUG && threadIdx.x % kWarp < 16) value += __shfl_xor_sync(0x0000FFFF, value, 16);\n  for (int distance",
            ),
        ),
        LOSS,
        says="which takes no part",
    ),
    Bug(
        "more threads than the launch bounds",
        "launch",
        (
            (
                "tiles.h",
                ".block = dim3(static_cast<unsigned>(threads))",
                ".block = dim3(static_cast<unsigned>(BUG ? 512 : threads))",
            ),
        ),
        STAGED,
        says="512 threads, __launch_bounds__ say 256",
    ),
    Bug(
        "a grid that is too high",
        "launch",
        (("tiles.h", "row_tiles * col_tiles, y,", "row_tiles * col_tiles, BUG ? y + 65535 : y,"),),
        STAGED,
    ),
    Bug(
        "shared memory that was not asked for",
        "launch",
        (
            ("launch.h", "if (dims.shared_bytes > kDefaultShared) {", "if (!BUG && dims.shared_bytes > kDefaultShared) {"),
            (
                "launch.h",
                "config.dynamicSmemBytes = dims.shared_bytes;",
                "config.dynamicSmemBytes = BUG ? 49153 : dims.shared_bytes;",
            ),
        ),
        STAGED,
    ),
    Bug(
        "another thread's local variable",
        "local memory",
        (
            (
                "denoising_loss.cu",
                "  if (threadIdx.x % kWarp == 0) sums",
                "  __shared__ const float* lent;\n"
                "  if (BUG && threadIdx.x == 0) lent = &sum_of_this_warp;\n"
                "  if (BUG) __syncthreads();\n"
                "  if (BUG && threadIdx.x == 1) sums[0] = *lent;\n"
                "  if (threadIdx.x % kWarp == 0) sums",
            ),
        ),
        LOSS,
    ),
    Bug(
        "local variables without end",
        "stack",
        (
            (
                "q_sample.cu",
                "  if (tile.sample >= tiling.n) return;",
                "  if (BUG) []() __attribute__((noinline)) {\n"
                "    volatile float large[20000];\n    for (int i = 0; i < 20000; ++i) large[i] = 0;\n  }();\n"
                "  if (tile.sample >= tiling.n) return;",
            ),
        ),
        run("q_sample", (2, 3, 5, 7)),
    ),
)
CLUSTER = run("group_norm_silu", (2, 2, 64, 64), groups=1)  # contiguous, four blocks each
SHARED = run("group_norm_silu", (1, 64, 8, 8), groups=8, channels_last=True)
SPLIT = run("group_norm_silu", (1, 4, 128, 72), groups=1)  # two kernels, where there are no clusters
BEGIN = "  const SliceTiling& tiling = p.tiling;\n"
ARRIVE = "if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();"
WAIT = "cluster_wait();  // the others have started"

GROUP_NORM = (
    Bug(
        "a peer's memory written before it has started",
        "cluster",
        (("group_norm_silu.cu", ARRIVE, f"if (!BUG) {ARRIVE}"), ("group_norm_slices.h", WAIT, f"if (!BUG) {WAIT}")),
        CLUSTER,
        says="before the first cluster barrier",
        card=1,
    ),
    Bug(
        "no cluster barrier between writing and reading",
        "race|uninitialised",
        (
            (
                "group_norm_slices.h",
                "  cluster_sync();\n}",
                "  if (BUG) __syncthreads(); else cluster_sync();\n}",
            ),
        ),
        CLUSTER,
        says="shared .*of_part",
        card=1,
    ),
    Bug(
        "a cluster barrier that orders no memory",
        "race",
        (
            (
                "group_norm_slices.h",
                "cluster_sync();\n}",
                "if (BUG) { cluster_arrive(); cluster_wait(); } else cluster_sync();\n}",
            ),
        ),
        CLUSTER,
        says="shared .*of_part",
        card=1,
    ),
    Bug(
        "a peer's memory read when it may have exited",
        "cluster",
        (
            (
                "group_norm_silu.cu",
                "merge_all(of_part);\n",
                "merge_all(of_part);\n      if (BUG) moments.mean += in_block(of_part, tiling.parts - 1 - at.part)->x;\n",
            ),
        ),
        CLUSTER,
        says="exits without|has exited",
        card=1,
    ),
    Bug(
        "a rank that there is not",
        "cluster",
        (
            (
                "group_norm_slices.h",
                "if (at.thread < at.tiling.parts) *in_block",
                "if (at.thread < at.tiling.parts + BUG) *in_block",
            ),
        ),
        CLUSTER,
        says="maps to rank 4 of a cluster of 4",
        card=1,
    ),
    Bug(
        "writes past the end of a peer's shared array",
        "out of bounds",
        (("group_norm_slices.h", "in_block(&of_part[at.part],", "in_block(of_part + at.part + (BUG ? kMaxParts : 0),"),),
        CLUSTER,
        says="shared .*of_part",
        card=1,
    ),
    Bug(
        "a block that misses a cluster barrier",
        "deadlock",
        (("group_norm_silu.cu", BEGIN, f"{BEGIN}  if (BUG && blockIdx.x == 1) return;\n"),),
        CLUSTER,
        says="wait in a cluster barrier",
        card=1,
    ),
    Bug(
        "a block that waits at a cluster barrier without having arrived",
        "cluster",
        (("group_norm_silu.cu", ARRIVE, f"if (!BUG || blockIdx.x != 1) {ARRIVE}"),),
        CLUSTER,
        says="without having arrived",
        card=1,
    ),
    Bug(
        "a cluster on a card without",
        "launch",
        (("group_norm_silu.cu", "largest_cluster(kOp))", "BUG ? 8 : largest_cluster(kOp))"),),
        CLUSTER,
        says="a card that has none",
    ),
    Bug(
        "a large cluster that was not asked for",
        "launch",
        (
            ("launch.h", "if (dims.cluster > kPortableCluster) {", "if (!BUG && dims.cluster > kPortableCluster) {"),
            ("launch.h", "cluster.val.clusterDim.x = dims.cluster;", "cluster.val.clusterDim.x = BUG ? 16 : dims.cluster;"),
        ),
        CLUSTER,
        says="a cluster of 16",
        card=1,
    ),
    Bug(
        "too little dynamic shared memory",
        "out of bounds",
        (("group_norm_silu.cu", "floats * sizeof(float),", "floats * sizeof(float) - (BUG ? 8 : 0),"),),
        SHARED,
        says="dynamic shared memory",
    ),
    Bug(
        "no barrier before others' sums are read",
        "race",
        (
            (
                "group_norm_silu.cu",
                "    __syncthreads();\n    const int chunks",
                "    if (!BUG) __syncthreads();\n    const int chunks",
            ),
        ),
        SHARED,
        says="dynamic shared memory",
    ),
    Bug(
        "two blocks that leave their sums in one place",
        "race",
        (
            (
                "group_norm_silu.cu",
                "p.partial[std::int64_t{at.slab} * tiling.parts + at.part] =",
                "p.partial[std::int64_t{at.slab} * tiling.parts + (BUG ? 0 : at.part)] =",
            ),
        ),
        SPLIT,
        says="workspace",
    ),
)
GROUPS = {
    "elementwise": (ELEMENTWISE, ("noise.cu", "q_sample.cu", "reverse_step.cu", "denoising_loss.cu")),
    "group norm": (GROUP_NORM, ("group_norm_silu.cu",)),
}


# AddressSanitizer stops at the first error, and has to be there from the start: each of these takes a process.
ADDRESS = (
    Bug(
        "a pointer that leaves a local array",
        "stack-buffer-overflow",
        (
            (
                "noise.cu",
                OP,
                f"  if (BUG) {{\n    float few[4];\n    float* volatile to = few;\n    to[4] = 0;\n  }}\n{OP}",
            ),
        ),
        STAGED,
    ),
    Bug(
        "writes past the end of a tensor",
        "use-after-poison",
        (("noise.cu", "store(out + at.offset, normals);", "store(out + at.offset + (BUG ? 210 : 0), normals);"),),
        STAGED,
    ),
    Bug(
        "writes past the end of a shared array",
        "use-after-poison",
        (
            (
                "tiles.h",
                "float* const to = staged_noise +",
                "float* const to = (BUG ? staged_noise + kMostInTile : staged_noise) +",
            ),
        ),
        STAGED,
    ),
)


def _edits(bugs: tuple[Bug, ...]) -> tuple[build.Edit, ...]:
    return tuple(
        (file, old, new.replace("BUG", f"(emulator::planted == {i + 1})"))
        for i, bug in enumerate(bugs)
        for file, old, new in bug.edits
    )


_ALL = [pytest.param(group, i, id=str(bug)) for group, (bugs, _) in GROUPS.items() for i, bug in enumerate(bugs)]


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    return {group: build.load(build.build(edits=_edits(bugs), sources=sources)) for group, (bugs, sources) in GROUPS.items()}


@pytest.mark.slow  # it compiles kernels of its own
@pytest.mark.parametrize(("group", "number"), _ALL)
def test_a_planted_bug_is_found(
    modules: dict[str, ModuleType], group: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated, bug = modules[group], GROUPS[group][0][number]
    monkeypatch.setitem(backend.KERNELS, "cpu", emulated)
    emulated.set_device(bug.card)
    emulated.set_order()
    emulated.set_planted(0)
    bug.run()  # nothing is found where nothing is planted
    emulated.set_planted(number + 1)
    for order in ORDERS:
        emulated.set_order(**order)
        with pytest.raises(emulated.Finding) as finding:
            bug.run()
        pattern = f"^({bug.kind}): .*({bug.says})"
        assert re.search(pattern, str(finding.value), re.MULTILINE), f"{order}:\n{finding.value}"


def test_the_example_of_its_document_runs(emulated: ModuleType) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (build.HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    draw = """
import ddpm_fast

ddpm_fast.noise((2, 3, 16, 16), ddpm_fast.sample_seeds(0, 2), backend="native")
assert emulated.take_launches()
"""
    process = subprocess.run([sys.executable, "-c", example + draw], cwd=build.ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("planted", range(1, len(ADDRESS) + 1), ids=map(str, ADDRESS))
def test_address_sanitizer(planted: int) -> None:
    """`test_every_case_with_address_sanitizer` shows that nothing is found where nothing is planted."""
    path = build.build("address", edits=_edits(ADDRESS), sources=("noise.cu",))
    script = f"""
import ctypes, sys
from pathlib import Path
from types import ModuleType
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from emulator import build
{inspect.getsource(_draw)}
emulated = build.load(Path({str(path)!r}))
emulated.set_planted({planted})
_draw(emulated)
"""
    process = _with_address_sanitizer("-c", script)
    assert process.returncode != 0
    assert f"AddressSanitizer: {ADDRESS[planted - 1].kind}" in process.stderr, process.stderr


@pytest.mark.slow
def test_every_case_with_address_sanitizer() -> None:
    tests = Path(__file__).parents[1] / "ops" / "test_emulated.py"
    # AddressSanitizer takes long for a deep grid. The emulator checks the indices there without it.
    options = ("-q", "--full", "-k", "not grid_is_deep")
    process = _with_address_sanitizer("-m", "pytest", *options, str(tests), DDPM_FAST_EMULATOR="address")
    assert process.returncode == 0, process.stdout + process.stderr


def _draw(emulated: ModuleType) -> None:
    """Draw what STAGED draws, without torch, which takes long to start."""
    from functools import partial  # the source of this function runs by itself, too
    from types import SimpleNamespace

    seeds, out = (ctypes.c_int64 * 2)(1, 2), (ctypes.c_float * 210)()
    tensors = [SimpleNamespace(data_ptr=partial(ctypes.addressof, x), nbytes=ctypes.sizeof(x)) for x in (out, seeds)]
    emulated.noise(0, *tensors, 0, 2, 3, 35, False, 0)


def _with_address_sanitizer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **build.address_environment(), **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
