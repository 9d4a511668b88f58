"""Build the native module with CMake; everything else is in pyproject.toml.

DDPM_FAST_NO_NATIVE=1 builds nothing (the reference and Triton families work without it), DDPM_FAST_CUDA_ARCHS="80;90a"
chooses the CUDA architectures (none: no CUDA), CXX the compiler.
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

NO_COMPILER = """error: ddpm_fast needs a C++20 compiler to build its native kernels, and found {found}.
Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or name it in CXX.
To install without the native kernels: DDPM_FAST_NO_NATIVE=1 pip install ..."""


NO_HEADERS = """error: ddpm_fast needs Python's C headers to build its native kernels, and found no {header}.
Install them (Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel).
To install without the native kernels: DDPM_FAST_NO_NATIVE=1 pip install ..."""

FAILED = """error: ddpm_fast could not build its native kernels; the reason is above.
To install without the CUDA ones: DDPM_FAST_CUDA_ARCHS=none pip install ...
To install without any of them: DDPM_FAST_NO_NATIVE=1 pip install ..."""


def check_requirements() -> None:
    """Stop with one clear message where there is no C++ compiler, or no Python.h."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, candidates)):
        sys.exit(NO_COMPILER.format(found=f"no CXX={named!r}" if named else "none of " + ", ".join(candidates)))
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        sys.exit(NO_HEADERS.format(header=header))


class CMakeBuild(build_ext):
    """Runs CMake, which owns the sources and the flags, and leaves the library where setuptools looks for it."""

    def build_extension(self, ext: Extension) -> None:
        check_requirements()
        scripts = sysconfig.get_path("scripts")  # of an environment that is used without being activated
        path = os.environ["PATH"] + os.pathsep + scripts
        programs = {name: shutil.which(name, path=path) for name in ("cmake", "ninja")}
        if None in programs.values() or importlib.util.find_spec("pybind11") is None:
            sys.exit("error: ddpm_fast needs cmake, ninja and pybind11 to be built: pip install cmake ninja pybind11")
        import pybind11  # a build requirement: not there when only metadata is asked for

        build = Path(self.build_temp).resolve()
        commands = [
            [
                programs["cmake"],
                *([] if (build / "build.ninja").exists() else ["--fresh"]),  # what failed is not remembered
                *("-S", Path(__file__).resolve().parent, "-B", build, "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={programs['ninja']}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DDDPM_FAST_VERSION={self.distribution.get_version()}",
                f"-DDDPM_FAST_OUTPUT={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
            ],
            [programs["cmake"], "--build", build],
        ]
        for command in commands:
            if subprocess.run(command).returncode != 0:
                sys.exit(FAILED)
        Path(self.get_ext_fullpath(ext.name)).touch()  # newer than its sources, also where none of them changed a byte of it


if int(setuptools.__version__.split(".")[0]) < 77:  # pip brings a newer one; in place it is the environment's
    sys.exit(f"error: ddpm_fast needs setuptools 77 or later to be built, and found {setuptools.__version__}")
native = [] if os.environ.get("DDPM_FAST_NO_NATIVE") == "1" else [Extension("ddpm_fast._native", sources=[])]
setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})
