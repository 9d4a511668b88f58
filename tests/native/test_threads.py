"""Teams of threads and programs of kernels: the same bits for any number of threads, and neither races nor hangs."""

from __future__ import annotations

import ctypes  # noqa: F401 (the scripts of other processes use it)
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import kernel_calls  # noqa: F401 (also theirs)
import pytest
import torch
from torch import Tensor

import ddpm_fast
from ddpm_fast.ops import backend
from ddpm_fast.ops.attention import attention_op
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


def with_threads(threads: int, function: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def network(dtype: torch.dtype = torch.float32, n: int = 3, size: int = 18, channels: int = 72) -> Callable[[], list[Tensor]]:
    """Return a function that calls every kernel of programs, each on the results of others, and returns all results."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = randn(n, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = randn(channels, channels, 3, 3) / 25
    packed = {
        method: pack_weights(weight, method.split()[0], dtype, upsample="up" in method)
        for method in ("winograd", "direct", "winograd up", "direct up")
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
        assert len(program) == 12
        for _ in range(3):
            for result in results:
                result.fill_(torch.nan)
            program()
            assert_same(results, expected)


@pytest.mark.parametrize("threads", [2, 40])  # 40: more than there are shares
def test_elementwise_kernels_change_no_bit(threads: int) -> None:
    seeds, x = ddpm_fast.sample_seeds(3, 5), torch.randn(5, 3, 64, 64)

    def compute() -> list[Tensor]:
        return [
            ddpm_fast.noise(x.shape, seeds, backend="native"),
            ddpm_fast.group_norm_silu(x, 3, backend="native"),
        ]

    expected = with_threads(1, compute)
    for _ in range(20):
        assert_same(with_threads(threads, compute), expected)


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
    gate, wrong = threading.Barrier(len(jobs)), []

    def work(i: int) -> None:
        program, results = programs[i]
        gate.wait()
        for _ in range(20):
            for result in results:
                result.fill_(torch.nan)
            program()
            wrong.extend(i for result, exact in zip(results, expected[i], strict=True) if not torch.equal(result, exact))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.usefixtures("matrix_kernels")
def test_one_program_of_two_python_threads() -> None:
    compute = network()
    expected = with_threads(1, compute)
    program, results = program_of(compute, 2)
    workers = [threading.Thread(target=lambda: [program() for _ in range(20)]) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
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


@only_linux
def test_a_forked_process_runs_alone() -> None:
    """OpenMP's threads are not in the child, and would be waited for."""
    assert (
        run_process("""
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
print("same")
""")
        == "same\n"
    )


@only_linux
def test_one_processor() -> None:
    assert (
        run_process("""
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
check_all(2)
check_all(4)
compute = chain(300)
program, x = program_of(compute, 2)
program()
assert torch.equal(x, with_threads(1, compute))
print("same")
""")
        == "same\n"
    )


@only_linux
@pytest.mark.skipif(not backend.BUILD.get("openmp"), reason="the build has no OpenMP")
@pytest.mark.parametrize("levels", ["1", "2"])  # 2: a parallel region within another one starts threads too
def test_within_another_parallel_region(levels: str) -> None:
    assert (
        run_process(f"""
openmp = ctypes.CDLL("libgomp.so.1")
openmp.omp_set_max_active_levels({levels})
openmp.omp_get_level.restype = ctypes.c_int
ran = []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    if openmp.omp_get_thread_num() == 0:
        ran.append(openmp.omp_get_level())
        check_all()
        ran.append("same")

check_all()
openmp.GOMP_parallel(body, None, 2, 0)
print(ran)
""")
        == "[1, 'same']\n"
    )


@only_linux
def test_a_thread_without_memory_is_a_memory_error() -> None:
    """The calling thread raises it, whichever thread had none. Both convolutions need 64 MB for each thread."""
    assert (
        run_process("""
import resource
channels = 1 << 18
x = torch.ones(2, channels, 1, 64).contiguous(memory_format=torch.channels_last)
packed = torch.ones(1, 1, channels, backend.native().cpu.panel, 1)
arguments = (x, None, None, False, packed, None, None, 1.0, False, 8, 1, 64, 1, 1, 0)
compute = lambda: run(conv_ops["direct"], *arguments)
program, y = program_of(compute, 2)
check_all()  # starts the threads
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
limits = resource.getrlimit(resource.RLIMIT_AS)
for function in (program, lambda: with_threads(2, compute), program):
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + (32 << 20), limits[1]))
    try:
        function()
    except MemoryError:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, limits)
program()
assert (y == channels).all()
check_all()
""")
        == 3 * "MemoryError\n"
    )


# ------------------------------------------------------------------------------------------------------------ interface

NAMES = (
    "time_terms, network_input, group_norm_affine, conv_direct, conv_winograd, conv_winograd_large, resample, attention, "
    "reverse_step, count_step"
)


@pytest.mark.parametrize("name", ["noise", "conv_winograd_upsampled_gradient", "attention_backward", "nothing"])
def test_other_kernels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Program: expected a kernel to be one of {NAMES}, got '{name}'"):
        backend.native().cpu.Program([(name, ())], 2)


def test_errors_are_those_of_the_kernels() -> None:
    calls, _ = collected(chain(3))
    make = backend.native().cpu.Program
    name, values = calls[1]
    assert name == "resample"
    with pytest.raises(TypeError, match="resample: expected 11 arguments, got 10"):
        make([(name, values[:-1])], 2)
    with pytest.raises(TypeError, match="resample: expected x to be a tensor or None, got int"):
        make([(name, (*values[:2], 7, *values[3:]))], 2)
    with pytest.raises(TypeError, match="resample: expected height to be a number in range, got None"):
        make([(name, (*values[:6], None, *values[7:]))], 2)
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"Program: expected threads to be positive, got {threads}"):
            make(calls, threads)
    for call in (name, (name,), [name, values], (name, values, 2)):
        with pytest.raises(TypeError, match=r"Program: expected a call to be \(name, values\), got "):
            make([call], 2)
    assert len(make((), 2)) == 0
    make([], 2)()


def test_a_program_holds_its_tensors() -> None:
    program, x = program_of(chain(30), 2)
    program()
    held = weakref.ref(x)
    del x
    gc.collect()
    assert held() is not None
    program()
    del program
    gc.collect()
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
