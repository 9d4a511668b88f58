"""Build the native module with CMake. Everything else is in pyproject.toml.

Environment variables:
    DDPM_FAST_NO_NATIVE=1: build nothing. The reference and Triton backends work without the native module.
    FORCE_CUDA=1: compile the CUDA kernels for all architectures, even if no GPU is visible.
    DDPM_FAST_CUDA_ARCHS="80;90a": compile the CUDA kernels for these architectures. "none" compiles none.
    TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX": the same as PyTorch takes it, in numbers, if DDPM_FAST_CUDA_ARCHS is not set.
    DDPM_FAST_COMPILED_ISAS=native: compile the CPU kernels for this processor, and for the baseline without much optimization.
        "all" compiles them for every instruction set. Editable installs are native by default, and wheels are for all.
    CXX: the C++ compiler.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

NO_COMPILER = """error: ddpm_fast needs a C++20 compiler to build its native kernels, and found {found}.
Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or name it in CXX.
To install without the native kernels: DDPM_FAST_NO_NATIVE=1 pip install ..."""


NO_HEADERS = """error: ddpm_fast needs Python's C headers to build its native kernels, and found no {header}.
Install them (Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel).
To install without the native kernels: DDPM_FAST_NO_NATIVE=1 pip install ..."""

FAILED = """error: ddpm_fast could not build its native kernels. The reason is above.
To install without the CUDA kernels: DDPM_FAST_CUDA_ARCHS=none pip install ...
To install without any native kernels: DDPM_FAST_NO_NATIVE=1 pip install ..."""


def check_requirements() -> None:
    """Exit with one clear message if the C++ compiler or Python.h is missing."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, candidates)):
        sys.exit(NO_COMPILER.format(found=f"no CXX={named!r}" if named else "none of " + ", ".join(candidates)))
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        sys.exit(NO_HEADERS.format(header=header))


def toolchain() -> str:
    """Describe what CMake remembers from its first run: the compilers and their flags."""
    variables = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX")
    lines = [f"{name}={os.environ.get(name, '')}" for name in variables]
    for compiler in (os.environ.get("CXX", "c++"), os.environ.get("CUDACXX", "nvcc")):
        command = [*compiler.split(), "--version"]
        if shutil.which(command[0]):
            lines.append(subprocess.run(command, capture_output=True, text=True).stdout)
    return "\n".join(lines)


def pybind11_headers(build: Path) -> Path:
    """Copy pybind11's headers to the build folder. pip's isolated environments change their path, which would recompile."""
    import pybind11  # a build requirement, which is absent if only metadata is asked for

    copy = build / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        part = copy.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), part)
        part.rename(copy)
    return copy


class CMakeBuild(build_ext):
    """Runs CMake, which owns the sources and the flags, and copies the library to where setuptools expects it."""

    def run(self) -> None:
        self.stays_here = bool(self.editable_mode or self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # The environment's own programs come first, activated or not: another CMake would compile everything again.
        path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
        programs = {name: shutil.which(name, path=path) for name in ("cmake", "ninja")}
        if None in programs.values() or importlib.util.find_spec("pybind11") is None:
            sys.exit("error: ddpm_fast needs cmake, ninja and pybind11 to be built: pip install cmake ninja pybind11")

        build = self.build_folder()
        target = Path(self.get_ext_fullpath(ext.name))
        commands = [
            [
                programs["cmake"],
                *([] if (build / "build.ninja").exists() else ["--fresh"]),  # forget a configuration that failed
                *("-S", ROOT, "-B", build, "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={programs['ninja']}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DPYBIND11_INCLUDE={pybind11_headers(build)}",
                f"-DDDPM_FAST_VERSION={self.distribution.get_version()}",
                f"-DDDPM_FAST_LIBRARY={target.name}",
            ],
            [programs["cmake"], "--build", build],
        ]
        isas = os.environ.get("DDPM_FAST_COMPILED_ISAS") or ("native" if self.stays_here else "all")
        environment = os.environ | {"DDPM_FAST_COMPILED_ISAS": isas}
        for command in commands:
            if subprocess.run(command, env=environment).returncode != 0:
                sys.exit(FAILED)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        shutil.copyfile(build / target.name, part)
        part.replace(target)  # a new file: a process that has loaded the old one keeps it

    def build_folder(self) -> Path:
        """Return the folder that keeps the objects from one build to the next. It is emptied if the toolchain changed."""
        temp = Path(self.build_temp)
        if self.editable_mode:  # setuptools then sets a temporary folder, which would compile everything each time
            temp = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = temp.resolve() / "native"
        stamp = build / "toolchain.txt"
        current = toolchain()
        if build.exists() and (not stamp.exists() or stamp.read_text() != current):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        stamp.write_text(current)
        return build


if int(setuptools.__version__.split(".")[0]) < 77:  # pip installs a newer one, unless build isolation is off
    sys.exit(f"error: ddpm_fast needs setuptools 77 or later to be built, and found {setuptools.__version__}")
native = [] if os.environ.get("DDPM_FAST_NO_NATIVE") == "1" else [Extension("ddpm_fast._native", sources=[])]
if native and not {"dist_info", "editable_wheel", "bdist_wheel", "build_ext"}.isdisjoint(sys.argv):
    check_requirements()  # dist_info: pip asks for metadata before it downloads gigabytes of dependencies
setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})
