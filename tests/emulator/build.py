"""Builds the emulated kernels: csrc/cuda/*.cu compiled by g++ against include/, with the runtime, as a Python module.

Objects are kept under build/emulator, by the hash of all that goes into them; a build that changes nothing takes no time.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"

DYNAMIC_SHARED_BYTES = 232448  # runtime/dynamic_shared.h says the same
FENCE = 1024  # bytes behind every __shared__ variable

FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall", "-Wextra"]
SANITIZERS = {
    # Calls of loads, stores and undefined behaviour: runtime/sanitizers.cpp defines both.
    "thread": [
        "-fsanitize=thread",
        "--param=tsan-instrument-func-entry-exit=0",
        "-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero",
    ],
    # Local arrays too, but nothing else; its own library has to be loaded first.
    # Calls compile in half the time of inline checks.
    "address": ["-fsanitize=address", "--param=asan-globals=0", "--param=asan-instrumentation-with-call-threshold=0"],
}
KERNEL_FLAGS = [
    *FLAGS,
    "-O1",
    "-ffp-contract=off",  # as nvcc --fmad=false
    "-fno-strict-aliasing",
    "-fno-extern-tls-init",  # an `extern __shared__` array needs no initialisation
    "-fno-gnu-unique",  # several builds live in one process
    "-ftrivial-auto-var-init=pattern",  # variables that nobody has set hold nonsense, not a lucky zero
    "-Werror=uninitialized",
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-unused-function",
    "-include", "cuda_runtime.h",
]  # fmt: skip


def why_not() -> str | None:
    """The reason why there can be no emulator here, or None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator is for Linux on x86-64"
    if shutil.which("g++") is None:
        return "the emulator is built with g++, and there is none"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulator is built with pybind11, which is not installed"
    return None


Edit = tuple[str, str, str]  # a file of csrc/cuda, a text that has to be there, and what takes the place of the first


def build(sanitizer: str = "thread", edits: tuple[Edit, ...] = (), sources: tuple[str, ...] = ()) -> Path:
    """The path of the module, built if need be.

    Args:
        sanitizer: "thread", the one that finds most, or "address".
        edits: to a copy of the sources, for the tests that plant bugs.
        sources: the .cu files that the edits concern; the others are as in the ordinary build.
    """
    import pybind11

    csrc, own_headers = ROOT / "csrc", f"-I{HERE / 'include'}"
    headers = [*csrc.rglob("*.h"), *(HERE / "include").rglob("*.h"), *(HERE / "runtime").glob("*.h"), Path(__file__)]
    compiler = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    salt = _hash(_digest(headers), compiler, sys.version)

    kernels = []
    # First, so that the linker takes inline functions from these. So the code that launches kernels must use no function of the
    # standard library that reports are made of, such as std::to_string: its instrumented copy would check the runtime itself.
    if edits:
        edited = _edited_copy(edits)
        flags = [*KERNEL_FLAGS, *SANITIZERS[sanitizer], own_headers, f"-I{edited}"]
        kernels += [(edited / "cuda" / name, flags) for name in sources]
    flags = [*KERNEL_FLAGS, *SANITIZERS["thread" if edits else sanitizer], own_headers, f"-I{csrc}"]
    kernels += [(path, flags) for path in sorted((csrc / "cuda").glob("*.cu")) if path.name not in sources]

    own_flags = [*FLAGS, "-O2", "-DEMULATOR_RUNTIME", own_headers, f"-I{csrc}", f"-I{HERE}"]
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    poison = SANITIZERS["address"] if sanitizer == "address" else []
    own = [(HERE / "module.cpp", [*own_flags, *python])]
    own += [(path, [*own_flags, *poison]) for path in sorted((HERE / "runtime").glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(partial(_compile, salt), *zip(*kernels, *own, strict=True)))
    return _link(objects[: len(kernels)], objects[len(kernels) :], sanitizer)


def address_environment() -> dict[str, str]:
    """Return the environment in which Python can load the build with AddressSanitizer."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


@cache
def load(path: Path) -> ModuleType:
    """The module at `path`. Builds do not share state, so they have to differ in their full names."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(salt: str, source: Path, flags: list[str]) -> Path:
    """Compile a source. The assembly of a .cu file gets a fence behind every thread-local, that is, __shared__, variable."""

    def make(part: Path) -> None:
        if source.suffix != ".cu":
            _run(["g++", *flags, "-c", str(source), "-o", str(part)])
            return
        assembly = part.with_suffix(".s")
        _run(["g++", *flags, "-x", "c++", "-S", str(source), "-o", str(assembly)])
        assembly.write_text(_with_fences(assembly.read_text()))
        _run(["g++", "-c", str(assembly), "-o", str(part)])
        assembly.unlink()

    return _made(CACHE / f"{source.stem}-{_hash(salt, flags, source.read_text())}.o", make)


def _with_fences(assembly: str) -> str:
    lines, shared = [], False
    for line in assembly.splitlines():
        if re.match(r"\t\.(section|text|data|bss)\b", line):
            shared = ".tbss" in line
        lines.append(line)
        if shared and line.startswith("\t.zero"):
            lines.append(f"\t.zero\t{FENCE}")
    return "\n".join(lines) + "\n"


def _link(kernels: list[Path], others: list[Path], sanitizer: str) -> Path:
    """Kernels first, between two markers: what thread-local variables lie between are shared memory."""
    target = CACHE / _hash(kernels, others) / "emulated.so"

    def make(part: Path) -> None:
        begin, end = target.with_name("begin.o"), target.with_name("end.o")
        for file, text in ((begin, _BEGIN), (end, _dynamic_shared(kernels) + _END)):
            _run(["g++", "-x", "assembler", "-c", "-", "-o", str(file)], text)
        library = SANITIZERS["address"][:1] if sanitizer == "address" else []
        objects = [str(path) for path in (begin, *kernels, end, *others)]
        _run(["g++", "-shared", "-Wl,-Bsymbolic", *library, *objects, "-o", str(part)])

    return _made(target, make)


_MARKER = """
\t.section .tbss,"awT",@nobits
\t.balign 1024
\t.globl {name}
\t.hidden {name}
\t.type {name}, @tls_object
\t.size {name}, 1
{name}:
\t.zero 1
\t.section .note.GNU-stack,"",@progbits
"""
_BEGIN = _MARKER.format(name="emulator_shared_begin")
_END = _MARKER.format(name="emulator_shared_end")


def _dynamic_shared(kernels: Iterable[Path]) -> str:
    """One block of memory under the names of all `extern __shared__` arrays: thread-local variables that nobody defines."""
    names = set()
    for kernel in kernels:
        symbols = subprocess.run(["readelf", "-sW", str(kernel)], check=True, capture_output=True, text=True).stdout
        names |= {
            words[7] for words in map(str.split, symbols.splitlines()) if len(words) == 8 and words[3:7:3] == ["TLS", "UND"]
        }
    text = '\t.section .tbss,"awT",@nobits\n\t.balign 1024\n'
    for name in ["emulator_dynamic_shared", *sorted(names)]:
        text += (
            f"\t.globl {name}\n\t.hidden {name}\n\t.type {name}, @tls_object\n\t.size {name}, {DYNAMIC_SHARED_BYTES}\n{name}:\n"
        )
    return text + f"\t.zero {DYNAMIC_SHARED_BYTES}\n\t.zero {FENCE}\n"


def _edited_copy(edits: tuple[Edit, ...]) -> Path:
    """A copy of what kernels are compiled from, in a folder named after the edits and the original."""
    original = [*(ROOT / "csrc" / "common").iterdir(), *(ROOT / "csrc" / "cuda").iterdir()]

    def make(part: Path) -> None:
        shutil.rmtree(part, ignore_errors=True)
        for kind in ("common", "cuda"):
            shutil.copytree(ROOT / "csrc" / kind, part / kind)
        for file, old, new in edits:
            path = part / "cuda" / file
            before, found, after = path.read_text().partition(old)
            if not found:
                raise ValueError(f"The sources have changed, and a text to edit is not in {file}: {old!r}")
            path.write_text(before + new + after)

    return _made(CACHE / f"edited-{_hash(edits, _digest(original))}", make)


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """Return a file or a folder of the cache. If it does not exist, one thread of one process makes it, under another name."""
    lock, part = CACHE / "locks" / f"{target.parent.name}-{target.name}", target.with_name(f"{target.name}.part")
    for each in (lock, target):
        each.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not target.exists():
            make(part)
            part.rename(target)
    return target


def _run(command: list[str], text: str | None = None) -> None:
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
