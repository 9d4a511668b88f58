"""Teams of threads and programs of kernels: the same bits for any number of threads, and neither races nor hangs."""

from __future__ import annotations

import ctypes  # noqa: F401 (the scripts of other processes use it)
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import kernel_calls  # noqa: F401 (also theirs)
import pytest
import torch
from kernel_calls import with_threads
from torch import Tensor

import ddpm_fast  # noqa: F401 (theirs)
from ddpm_fast.ops import backend
from ddpm_fast.ops.attention import attention_op, attention_tiles_op
from ddpm_fast.ops.fused_op import FusedOp
from ddpm_fast.ops.group_norm_affine import group_norm_affine_op
from ddpm_fast.ops.packed_conv import conv_ops, pack_weights
from ddpm_fast.ops.resample import resample_op

TESTS = Path(__file__).parents[1]
THREADS = [1, 2, 3, 5, 8]
SAFETY_NET = 120  # seconds after which a process counts as hanging; no test takes nearly as long

pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module")
only_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses what only Linux has")

Call = tuple[str, tuple[Any, ...]]
Run = Callable[..., Tensor]


class Collector:
    """CPU kernels that collect calls instead of running them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._module = backend.native().cpu

    def __getattr__(self, name: str) -> Any:
        if name not in self._module.fields:
            return getattr(self._module, name)
        return lambda *values: self.calls.append((name, values))


def run(op: FusedOp, *arguments: Any, out: Tensor | None = None) -> Tensor:
    result: Tensor = op.run("native", arguments, saves=False, out=() if out is None else (out,))[0]
    return result


def collected(function: Callable[[], Any]) -> tuple[list[Call], Any]:
    """Return the kernel calls that a function makes, and the function's result, whose tensors they will write."""
    collector = Collector()
    with mock.patch.dict(backend.KERNELS, cpu=collector):
        result = function()
    return collector.calls, result


def program_of(function: Callable[[], Any], threads: int) -> tuple[Any, Any]:
    calls, result = collected(function)
    return backend.native().cpu.Program(calls, threads), result


def network(dtype: torch.dtype = torch.float32, n: int = 3, size: int = 18, channels: int = 72) -> Callable[[], list[Tensor]]:
    """Return a function that calls every kernel of programs, each on the results of others, and returns all results."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = randn(n, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = randn(channels, channels, 3, 3) / 25
    packed = {
        method: pack_weights(weight, method.split()[0], dtype, upsample="up" in method)
        for method in (
            "winograd",
            "direct",
            "winograd up",
            "direct up",
            *(("tiles", "tiles up") if dtype == torch.bfloat16 else ()),
        )
    }
    qkv = pack_weights(randn(3 * channels, channels, 1, 1) / 8, "direct", dtype)
    joined = pack_weights(randn(channels, 2 * channels, 3, 3) / 36, "winograd", dtype)
    bias, shift = randn(channels), randn(n, channels)

    def compute() -> list[Tensor]:
        same, double = (channels, size, size, 3, 1, 1), (channels, 2 * size, 2 * size, 3, 1, 1)
        affine = run(group_norm_affine_op, x, None, 8, bias, bias, 1e-5, shift, None, None)
        results = [affine]
        for method, kernel in conv_ops.items():
            if method not in packed:
                continue
            y = run(kernel, x, None, affine, True, packed[method], bias, x, 2.0, False, *same)
            up = run(kernel, y, None, None, False, packed[f"{method} up"], None, None, 1.0, True, *double)
            results += [y, up]
        half = (channels, size // 2, size // 2, 3, 2, 1)
        strided = run(conv_ops["direct"], y, None, None, False, packed["direct"], None, None, 1.0, False, *half)
        both = run(group_norm_affine_op, x, y, 8, None, None, 1e-5, None, None, None)
        y = run(conv_ops["winograd"], x, y, both, True, joined, bias, None, 1.0, False, *same)
        heads = run(conv_ops["direct"], y, None, None, False, qkv, None, None, 1.0, False, 3 * channels, size, size, 1, 1, 0)
        heads = heads.permute(0, 2, 3, 1).flatten(1, 2)
        attended = run(attention_op, heads, 4, 0.25)
        if "tiles" in packed:
            results.append(run(attention_tiles_op, heads, 4, 0.25))
        mean = run(resample_op, y, affine, True, False)
        back = run(resample_op, mean, affine, False, True)
        return [*results, strided, both, y, heads, attended, mean, back]

    return compute


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for i, (result, exact) in enumerate(zip(results, expected, strict=True)):
        assert exact.isfinite().all(), i
        assert torch.equal(result, exact), i


def run_process(script: str) -> str:
    """Run a script in a new process, with the names of this module and all kernels, and return what it prints."""
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    names = "from test_threads import *\nkernel_calls.pretend(pytest.MonkeyPatch(), **kernel_calls.for_any_cpu())"
    command = [sys.executable, "-W", "ignore", "-c", f"{names}\n{script}"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=SAFETY_NET)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ----------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", backend.MATRIX_DTYPES)
@pytest.mark.usefixtures("matrix_kernels")
def test_threads_and_programs_change_no_bit(dtype: torch.dtype) -> None:
    compute = network(dtype)
    expected = with_threads(1, compute)
    for threads in THREADS:
        assert_same(with_threads(threads, compute), expected)
        program, results = program_of(compute, threads)
        assert len(program) == (15 if dtype == torch.bfloat16 else 12)  # with tiles or without
        for _ in range(3):
            for result in results:
                result.fill_(torch.nan)
            program()
            assert_same(results, expected)


# ---------------------------------------------------------------------------------------------------------------- races


def chain(stages: int) -> Callable[[], Tensor]:
    """Return a function of many short kernels. Each reads what the one before wrote, some of it written by other threads."""
    small = torch.randn(6, 64, 1, 128, generator=torch.Generator().manual_seed(1))
    small = small.contiguous(memory_format=torch.channels_last)
    tiny = torch.tensor([0.0, 1.0, 0.125])[None, :, None].expand(6, 3, 64).contiguous()

    def compute() -> Tensor:
        x = small.clone(memory_format=torch.preserve_format)
        large = torch.empty(6, 64, 2, 256).contiguous(memory_format=torch.channels_last)
        affine = torch.empty(6, 3, 64)
        for _ in range(stages // 3):
            run(group_norm_affine_op, x, None, 4, None, None, 1e-5, None, None, None, out=affine)
            run(resample_op, x, affine, False, True, out=large)
            run(resample_op, large, tiny, True, False, out=x)
        return x

    return compute


@pytest.mark.parametrize("threads", [2, 3, 4, 8])
def test_thousands_of_short_loops(threads: int) -> None:
    compute = chain(3000)
    expected = with_threads(1, compute)
    program, x = program_of(compute, threads)
    start = x.clone()
    for _ in range(4):
        x.copy_(start)
        program()
        assert torch.equal(x, expected)


def test_loops_of_one_item() -> None:
    """Every member wants it, and all but one wait."""
    x = torch.zeros(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    one = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1)

    def compute() -> Tensor:
        large = torch.empty(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
        for _ in range(2500):
            run(resample_op, x, one, False, True, out=large)
            run(resample_op, large, None, False, False, out=x)
        return x

    for threads in (2, 4, 8):
        program, _ = program_of(compute, threads)
        for rounds in range(1, 4):
            program()
            assert (x == 2500 * rounds).all()
        x.zero_()


@pytest.mark.usefixtures("matrix_kernels")
def test_python_threads_with_a_program_each() -> None:
    jobs = [(network(n=n, size=10), threads) for n, threads in ((1, 2), (2, 3), (3, 2), (4, 4))]
    expected = [with_threads(1, compute) for compute, _ in jobs]
    programs = [program_of(compute, threads) for compute, threads in jobs]
    gate = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        program, results = programs[i]
        gate.wait()
        for _ in range(20):
            for result in results:
                result.fill_(torch.nan)
            program()
            assert_same(results, expected[i])

    with ThreadPoolExecutor(len(jobs)) as workers:
        list(workers.map(work, range(len(jobs))))


@pytest.mark.usefixtures("matrix_kernels")
def test_one_program_of_two_python_threads() -> None:
    compute = network()
    expected = with_threads(1, compute)
    program, results = program_of(compute, 2)
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda _: [program() for _ in range(20)], range(2)))
    program()
    assert_same(results, expected)


# --------------------------------------------------------------------------------------------------------- surroundings


def check_all(threads: int = 2) -> None:
    """Check ops and a program against one thread."""
    compute = network(n=2, size=10)
    expected = with_threads(1, compute)
    assert_same(with_threads(threads, compute), expected)
    program, results = program_of(compute, threads)
    program()
    assert_same(results, expected)


# OpenMP's threads are not in the child of a fork, and would be waited for.
FORKED = """
compute = network(n=2, size=10)
expected = with_threads(2, compute)
program, results = program_of(compute, 2)
program()
child = os.fork()
if child == 0:
    status = 1
    try:
        torch.set_num_threads(1)  # PyTorch's own loops would hang
        for result in results:
            result.fill_(torch.nan)
        program()
        assert_same(results, expected)
        own, results = program_of(compute, 2)
        own()
        assert_same(results, expected)
        calls, results = collected(compute)
        for name, values in calls:
            fields = backend.native().cpu.fields[name]
            assert fields[-1] == "stream_or_threads"
            getattr(backend.native().cpu, name)(*values[:-1], 2)
        assert_same(results, expected)
        status = 0
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
check_all()
print("forked")
"""
# With 2 levels, a parallel region within another one starts threads too.
NESTED = """
openmp = ctypes.CDLL("libgomp.so.1")
openmp.omp_get_level.restype = ctypes.c_int

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    if openmp.omp_get_thread_num() == 0:
        level = openmp.omp_get_level()
        check_all()
        print("in level", level)

for levels in (1, 2):
    openmp.omp_set_max_active_levels(levels)
    check_all()
    openmp.GOMP_parallel(body, None, 2, 0)
openmp.omp_set_max_active_levels(1)
"""
# The module's threads are torch's: two runtimes would each start their own, and fight for the processors.
RUNTIMES = """
libraries = {line.split()[-1] for line in open("/proc/self/maps")}
print(sum("gomp" in path or "iomp" in path or "libomp" in path for path in libraries), "OpenMP runtime")
"""
# The calling thread raises a MemoryError, whichever thread had no memory: an exception that leaves a parallel region ends the
# process. Both convolutions need 64 MB for each thread, and the shifted group 64 MB next to the 64 MB of its result.
MEMORY = """
import resource
channels = 1 << 18
x = torch.ones(2, channels, 1, 64).contiguous(memory_format=torch.channels_last)
packed = torch.ones(1, 1, channels, backend.native().cpu.panel, 1)
arguments = (x, None, None, False, packed, None, None, 1.0, False, 8, 1, 64, 1, 1, 0)
compute = lambda: run(conv_ops["direct"], *arguments)
program, y = program_of(compute, 2)
check_all()  # starts the threads
maps, shift = torch.zeros(2, 8, 2**21, 1, dtype=torch.float16), torch.ones(2, 8, dtype=torch.float16)
norm = lambda: ddpm_fast.group_norm_silu(maps, 1, shift=shift, backend="native")
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
limits = resource.getrlimit(resource.RLIMIT_AS)
convolution, shifted = lambda: with_threads(2, compute), lambda: with_threads(2, norm)
for function, room in ((program, 32), (convolution, 32), (program, 32), (shifted, 72)):
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + (room << 20), limits[1]))
    try:
        function()
    except MemoryError:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, limits)
program()
assert (y == channels).all()
check_all()
"""
ONE_PROCESSOR = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
check_all(2)
check_all(4)
compute = chain(300)
program, x = program_of(compute, 2)
program()
assert torch.equal(x, with_threads(1, compute))
print("on one processor")
"""
PRINTED = ["forked", "in level 1", "in level 1", "1 OpenMP runtime", *4 * ["MemoryError"], "on one processor"]


@only_linux
@pytest.mark.skipif(not backend.BUILD.get("openmp"), reason="the build has no OpenMP")
def test_forks_parallel_regions_little_memory_and_one_processor() -> None:
    """One process does all, because starting it takes most of the time."""
    assert run_process(FORKED + NESTED + RUNTIMES + MEMORY + ONE_PROCESSOR).splitlines() == PRINTED


# ------------------------------------------------------------------------------------------------------------ interface

NAMES = (
    "time_terms, network_input, group_norm_affine, conv_direct, conv_winograd, conv_winograd_large, conv_tiles, resample, "
    "attention, attention_tiles, reverse_step, count_step"
)


@pytest.mark.parametrize("name", ["noise", "conv_winograd_upsampled_gradient", "attention_backward", "nothing"])
def test_other_kernels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Program: expected a kernel to be one of {NAMES}, got '{name}'"):
        backend.native().cpu.Program([(name, ())], 2)


def changed(call: Call, number: int, value: object) -> Call:
    name, values = call
    return name, (*values[:number], value, *values[number + 1 :])


@pytest.mark.parametrize(
    ("change", "threads", "error"),
    [
        (lambda call: (call[0], call[1][:-1]), 2, "resample: expected 11 arguments, got 10"),
        (lambda call: changed(call, 2, 7), 2, "resample: expected x to be a tensor or None, got int"),
        (lambda call: changed(call, 6, None), 2, "resample: expected height to be a number in range, got None"),
        (lambda call: call, 0, "Program: expected threads to be positive, got 0"),
        (lambda call: call, -1, "Program: expected threads to be positive, got -1"),
        *(
            (change, 2, r"Program: expected a call to be \(name, values\), got ")
            for change in (lambda call: call[0], lambda call: call[:1], lambda call: [*call], lambda call: (*call, 2))
        ),
    ],
)
def test_errors_are_those_of_the_kernels(change: Callable[[Call], Any], threads: int, error: str) -> None:
    calls, _ = collected(chain(3))
    with pytest.raises((TypeError, ValueError), match=error):
        backend.native().cpu.Program([change(calls[1])], threads)


def test_a_program_without_calls() -> None:
    program = backend.native().cpu.Program((), 2)
    program()
    assert len(program) == 0


def test_a_program_holds_its_tensors() -> None:
    program, x = program_of(chain(30), 2)
    program()
    held = weakref.ref(x)
    del x
    assert held() is not None
    program()
    del program
    assert held() is None


# -------------------------------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("OMP_STACKSIZE", "16k", False),
        ("OMP_STACKSIZE", " 255 ", False),
        ("OMP_STACKSIZE", "200000B", False),
        ("GOMP_STACKSIZE", "64 K", False),
        ("OMP_STACKSIZE", "256", True),
        ("OMP_STACKSIZE", "4M", True),
        ("OMP_STACKSIZE", "nonsense", True),  # OpenMP ignores it too
    ],
)
def test_stacks_too_small_for_the_kernels_are_named(
    name: str, value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    if wanted:
        assert backend._load_native() is backend.native()
        return
    message = rf"expected the environment's {name} to be unset or at least 256K, got '{value}'"
    with pytest.warns(RuntimeWarning, match=message):
        assert re.fullmatch(message, str(backend._load_native()))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_no_frame_of_a_kernel_is_near_the_smallest_stack() -> None:
    """Functions make room by one subtraction from the stack pointer, or page by page."""
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(backend.native().__file__)], capture_output=True, text=True
    )
    sizes = [int(size, 16) for size in re.findall(r"sub +\$0x([0-9a-f]{1,7}),%rsp", code.stdout)]
    assert max(sizes, default=0) < backend._LEAST_STACK // 2
