"""The native module as a build: published vectors, one result for every instruction set, one OpenMP runtime, clear errors."""

import contextlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import build_age
import pytest
import torch

import ddpm_fast
from ddpm_fast import reference
from ddpm_fast.ops import OPS, backend, why_not

_native = pytest.importorskip("ddpm_fast._native")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.again

# philox4x32-10 of Random123's kat_vectors: counter, key, words. Digits of pi in the last.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(_native.philox4x32(counter, key)) == words


def test_philox_blocks_equal_the_reference() -> None:
    seed, stream, first, blocks = -(2**62) - 12345, 0xFFFFFFF0, 2**32 - 5, 5  # the top of every range
    words = torch.empty(blocks, 4, dtype=torch.int32)
    _native.philox(seed, stream, first, blocks, words.data_ptr())
    assert torch.equal(words.long() & 0xFFFFFFFF, reference.philox(torch.tensor([seed]), stream, first, blocks)[:, 0].T)


# Prints the instruction set, then the normals of two samples as hexadecimal bytes: contiguous, channels_last by two threads.
# The module is loaded by its path: it needs neither torch nor the rest of the package.
DRAW = """
import array, importlib.util, sys

class Tensor:
    def __init__(self, code, values):
        self.values = array.array(code, values)

    def data_ptr(self):
        return self.values.buffer_info()[0]

spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
n, c, hw = map(int, sys.argv[2:5])
seeds, out = Tensor("q", [5, -7]), Tensor("f", bytes(4 * n * c * hw))
print(native.build_info()["isa"])
for channels_last, threads in ((0, 1), (1, 2)):
    native.cpu.noise(0, out, seeds, 9, n, c, hw, channels_last, threads)
    print(out.values.tobytes().hex())
"""


def _draw(isa: str, shape: tuple[int, int, int]) -> "subprocess.CompletedProcess[str]":
    arguments = [sys.executable, "-c", DRAW, _native.__file__, *map(str, shape)]
    return subprocess.run(arguments, env=os.environ | {"DDPM_FAST_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", _native.build_info()["isas"])
def test_every_instruction_set_draws_the_same_bits(isa: str) -> None:
    """The float32 normals of the reference, to the last bit; a set that this processor lacks falls back to the best it has."""
    n, c, height, width = 2, 3, 97, 101  # planes and samples that end within a block and within a vector
    normals = reference.noise((n, c, height, width), torch.tensor([5, -7]), 9, torch.float32)
    result = _draw(isa, (n, c, height * width))
    assert result.returncode == 0, result.stderr
    used, contiguous, channels_last = result.stdout.split()
    sets = _native.build_info()["isas"]
    assert used == sets[min(sets.index(isa), sets.index(_best()))]
    assert contiguous == normals.numpy().tobytes().hex()
    assert channels_last == normals.permute(0, 2, 3, 1).contiguous().numpy().tobytes().hex()


def _best() -> str:
    return _draw("", (2, 1, 1)).stdout.split()[0]


def test_an_unknown_instruction_set_is_an_error() -> None:
    result = _draw("sse9", (2, 1, 1))
    assert result.returncode != 0
    assert "DDPM_FAST_ISA: expected one of the compiled instruction sets, got 'sse9'" in result.stderr


def test_build_info() -> None:
    build = _native.build_info()
    assert build["version"] == ddpm_fast.__version__
    assert build["isas"][0] == "baseline"
    assert build["isa"] in build["isas"]
    assert build["processor_isa"] in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    assert bool(build["cuda_archs"]) != bool(build["cuda_why_not"])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads what Linux says of x86-64"
)
def test_the_processor_is_the_system_s() -> None:
    (vendor, *_) = re.findall(r"^vendor_id\s*: (\w+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{vendor} \d+", _native.build_info()["processor"])


def test_a_module_is_old_by_the_content_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CMakeLists.txt", "csrc/digest.py", "csrc/a.cpp", "csrc/cuda/b.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name) if (ROOT / name).exists() else (tmp_path / name).touch()
    digest = runpy.run_path(str(tmp_path / "csrc/digest.py"))["digest"]()
    monkeypatch.setitem(backend.BUILD, "sources", digest)
    os.utime(tmp_path / "csrc/a.cpp", (2**31, 2**31))  # newer than any module
    assert build_age.why_old(tmp_path) is None
    (tmp_path / "csrc/cuda/b.cu").rename(tmp_path / "csrc/b.cu")
    assert build_age.why_old(tmp_path) == "csrc or CMakeLists.txt has changed"
    monkeypatch.setattr(backend, "BUILD", {})
    assert build_age.why_old(tmp_path) is None  # there is no module


# --------------------------------------------------------------------------------------------------- values of a call


NOISE: dict[str, Any] = {"dtype": 0, "out": None, "seeds": None, "stream": 0, "n": 0, "c": 1, "hw": 4, "channels_last": False}
NOISE |= {"stream_or_threads": 1}


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("out", 5, "noise: expected out to be a tensor or None, got int"),
        ("seeds", "x", "noise: expected seeds to be a tensor or None, got str"),
        ("stream", -1, "noise: expected stream to be a number in range, got -1"),
        ("stream", 2**32, "noise: expected stream to be a number in range, got 4294967296"),
        ("n", 2**63, "noise: expected n to be a number in range, got 9223372036854775808"),
        ("c", 1.0, "noise: expected c to be a number in range, got 1.0"),
        ("hw", None, "noise: expected hw to be a number in range, got None"),
        ("channels_last", 2, "noise: expected channels_last to be a number in range, got 2"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_its_field(field: str, value: object, error: str) -> None:
    values = NOISE | {field: value}
    assert tuple(values) == _native.cpu.fields["noise"]
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        _native.cpu.noise(*values.values())


def test_values_of_every_kind() -> None:
    _native.cpu.noise(*NOISE.values())
    _native.cpu.noise(*(NOISE | {"out": torch.empty(0), "channels_last": 1}).values())
    with pytest.raises(TypeError, match="noise: expected 9 arguments, got 2"):
        _native.cpu.noise(0, None)  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------------------- setup.py

NOWHERE = Path("nowhere", "Python.h")


def _setup(folder: Path, *options: str, before: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run setup.py after a line of Python, without what the caller's environment says of the build."""
    arguments = ["-c", f"import runpy, sysconfig\n{before}\nrunpy.run_path('setup.py')", "-q"]
    arguments += options or ("build_ext", "--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib"))
    unset = ("CXX", "DDPM_FAST_COMPILED_ISAS", "DDPM_FAST_NO_NATIVE")
    variables = {name: value for name, value in os.environ.items() if name not in unset} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


def _program(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


OLD_COMPILER = 'exec g++ -Wno-builtin-macro-redefined -D__GNUC__=9 -D__GNUC_MINOR__=4 "$@"'


@pytest.mark.sources
@pytest.mark.parametrize(
    ("before", "environment", "said"),
    [
        ("", {"PATH": "{folder}"}, ["apt-get install g++", "DDPM_FAST_NO_NATIVE=1"]),
        ("", {"PATH": "{folder}", "CXX": "c++-99"}, ["found no CXX='c++-99'"]),
        pytest.param(
            *("", {"CXX": "{folder}/old-g++"}),
            ["ddpm_fast needs g++ 11 or clang++ 14", "found GNU 9.4", "DDPM_FAST_NO_NATIVE=1"],
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes an old compiler of g++"),
        ),
        (
            "sysconfig.get_path = lambda *args, **options: 'nowhere'",
            *({}, [f"no {NOWHERE}", "apt-get install python3-dev"]),
        ),
    ],
    ids=["no compiler", "another compiler", "old compiler", "no headers"],
)
def test_what_a_build_lacks_is_one_clear_error(
    tmp_path: Path, before: str, environment: dict[str, str], said: list[str]
) -> None:
    _program(tmp_path / "old-g++", OLD_COMPILER)
    result = _setup(tmp_path, before=before, **{name: value.format(folder=tmp_path) for name, value in environment.items()})
    text = " ".join(result.stderr.split())  # CMake wraps its lines
    assert result.returncode != 0
    assert "Traceback" not in text
    assert text.count("error:") == 1
    assert [words for words in said if words not in text] == []


@pytest.mark.sources
@pytest.mark.parametrize(("command", "option", "status"), [("dist_info", "--output-dir", 1), ("egg_info", "--egg-base", 0)])
def test_metadata_without_a_compiler_is_the_same_error(tmp_path: Path, command: str, option: str, status: int) -> None:
    """An installation asks for it before it downloads the dependencies. A source distribution needs no compiler."""
    result = _setup(tmp_path, command, option, str(tmp_path), PATH=str(tmp_path))
    assert result.returncode == status, result.stderr
    assert ("ddpm_fast needs a C++20 compiler" in result.stderr) == bool(status)


@pytest.mark.sources
@pytest.mark.parametrize(
    ("options", "environment", "isas"),
    [
        (["--inplace"], {}, "native"),
        ([], {}, "all"),
        (["--inplace"], {"DDPM_FAST_COMPILED_ISAS": "all"}, "all"),
        ([], {"DDPM_FAST_COMPILED_ISAS": "native"}, "native"),
    ],
    ids=str,
)
def test_which_instruction_sets_are_compiled(
    tmp_path: Path, options: list[str], environment: dict[str, str], isas: str
) -> None:
    """Builds in place are for this processor, and wheels are for all."""
    _program(tmp_path / "cmake", 'echo "for $DDPM_FAST_COMPILED_ISAS"\nexit 1')
    before = f"""get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *args, **options: {str(tmp_path)!r} if name == "scripts" else get_path(name, *args, **options)
"""
    result = _setup(tmp_path, "build_ext", "--build-temp", str(tmp_path / "build"), *options, before=before, **environment)
    assert result.stdout == f"for {isas}\n", result.stderr


@pytest.mark.sources
def test_no_native_builds_nothing(tmp_path: Path) -> None:
    result = _setup(tmp_path, PATH=str(tmp_path), DDPM_FAST_NO_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("_native*"))


# ----------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.skipif(not _native.build_info()["cuda_archs"], reason=f"no CUDA: {_native.build_info()['cuda_why_not']}")
def test_cuda_kernels_load_anywhere_and_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cudart is linked statically: the module loads without a driver, and its CPU half runs."""
    x = torch.randn(2, 8, 4, 4)
    assert torch.isfinite(ddpm_fast.group_norm_silu(x, 4, backend="native")).all()
    device = torch.device("cuda", 0)
    for op in set(OPS) - {"conv3x3", "attention", "group_norm_affine"}:
        assert hasattr(_native.cuda, op)
    if torch.cuda.is_available():
        assert why_not("native", "noise", device) is None
        return
    driver, toolkit = _native.cuda.versions()
    assert driver < toolkit
    assert toolkit >= 12000
    reason = _native.cuda.why_not()
    assert "CUDA" in reason
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())  # this torch may have no CUDA at all
    monkeypatch.setattr(backend, "_CUDA_REASONS", {})
    assert str(why_not("native", "noise", device)).startswith(f"{reason} (compiled with CUDA {toolkit // 1000}.")
    assert "float64" in str(why_not("native", "noise", device, torch.float64))


A100 = torch.device("cuda", 0)
_ON_A100 = ((2, 3), SimpleNamespace(device=A100), 0, torch.float32, False)  # arguments of the op `noise`


def _on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (8, 0),
    said: str | None = None,
    versions: tuple[int, int] = (13000, 13000),
) -> None:
    """Stand in for a GPU, and for a build without CUDA or one whose CUDA runtime says `said` of it."""
    monkeypatch.setattr(backend, "_CUDA_REASONS", {})
    backend._warn_once_without_cuda.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    if said is None:
        monkeypatch.delitem(backend.KERNELS, "cuda", raising=False)
        monkeypatch.setitem(backend.BUILD, "cuda_why_not", "no nvcc was found when it was built")
    else:
        cuda = SimpleNamespace(why_not=lambda: said, versions=lambda: list(versions))
        monkeypatch.setitem(backend.KERNELS, "cuda", cuda)
        monkeypatch.setitem(backend.BUILD, "cuda_archs", ["sm_90a", "compute_100"])


INSUFFICIENT = "CUDA driver version is insufficient for CUDA runtime version"
NO_IMAGE = "no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("gpu", "reason", "remedy"),
    [
        ({}, "no nvcc was found when it was built", "with nvcc 12 or later on PATH: pip install"),
        ({"capability": (7, 5)}, "no nvcc was found", "They need a GPU of compute capability 8.0 or later."),
        (
            {"said": INSUFFICIENT, "versions": (12040, 13000)},
            f"{INSUFFICIENT} (compiled with CUDA 13.0 for sm_90a compute_100, the driver supports CUDA 12.4)",
            "Update the driver to one for CUDA 13, or compile with an older nvcc: pip install",
        ),
        (
            {"said": NO_IMAGE},
            f"{NO_IMAGE} (compiled with CUDA 13.0 for sm_90a compute_100, the driver supports CUDA 13.0)",
            "To compile them for all visible GPUs",
        ),
        ({"said": NO_IMAGE, "versions": (13000, 12080)}, "with CUDA 12.8 for", "To compile them for all visible GPUs"),
    ],
    ids=["no nvcc", "old GPU", "old driver", "another architecture", "newer driver"],
)
def test_a_gpu_that_compiled_kernels_cannot_use_warns_once(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], reason: str, remedy: str
) -> None:
    _on_a_gpu(monkeypatch, **gpu)

    def choose(name: str | None) -> str:
        return OPS["noise"].choose(name, _ON_A100, False)

    assert choose("reference") == "reference"  # a backend that is asked for by name is no surprise
    with pytest.warns(RuntimeWarning, match=f"cannot run on cuda:0: .*{re.escape(reason)}.*{re.escape(remedy)}"):
        choose(None)
    choose(None)  # a second warning would be an error


def test_a_gpu_that_compiled_kernels_can_use_warns_never(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_gpu(monkeypatch, said="")
    assert OPS["noise"].choose(None, _ON_A100, False) == "native"
    backend.warn_without_cuda(A100)  # as for an op that has no CUDA kernel


@pytest.mark.parametrize(
    ("build", "environment", "said"),
    [
        (
            {"isas": ["baseline", "avx512_bf16"], "isa": "baseline", "processor_isa": "avx2"},
            {},
            "has avx2 and runs those for base",
        ),
        ({"isas": ["baseline", "avx2"], "isa": "avx2", "processor_isa": "avx512"}, {}, "compiled for baseline and avx2. This"),
        ({"isas": ["baseline", "avx2"], "isa": "avx2", "processor_isa": "avx2"}, {}, None),
        ({"isas": ["baseline", "avx2"], "isa": "baseline", "processor_isa": "avx2"}, {"DDPM_FAST_ISA": "baseline"}, None),
        ({"isas": ["baseline"], "isa": "baseline"}, {}, None),
    ],
    ids=["lesser processor", "better processor", "its processor", "capped", "older module"],
)
def test_kernels_that_were_compiled_for_another_processor(
    monkeypatch: pytest.MonkeyPatch, build: dict[str, Any], environment: dict[str, str], said: str | None
) -> None:
    monkeypatch.delenv("DDPM_FAST_ISA", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend, "BUILD", build)
    reason = backend.why_not_best_isa()
    if said is None:
        assert reason is None
    else:
        assert said in str(reason)
        assert "To compile for it: pip install" in str(reason)


# -------------------------------------------------------------------------------------- which CUDA kernels are compiled


def _configure(tmp_path: Path, gpus: str = "", build: Path | None = None, **variables: str) -> tuple[int, str]:
    """Return CMake's exit status and output, with a nvidia-smi that prints `gpus` and an nvcc that fails.

    It goes on in the folder `build`, as setup.py does, or begins in a new one.
    """
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    _program(programs / "nvidia-smi", f'printf "{gpus}"')
    names = ("FORCE_CUDA", "DDPM_FAST_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDACXX")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CUDACXX": _program(programs / "nvcc", "exit 1")}
    cmake = shutil.which("cmake", path=os.environ["PATH"] + os.pathsep + sysconfig.get_path("scripts"))
    if cmake is None:
        pytest.skip("needs cmake")
    command = [cmake, "-S", str(ROOT), "-B", str(build or tmp_path / "build"), "-DDDPM_FAST_VERSION=0"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DDDPM_FAST_LIBRARY=_native.so"]
    result = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    said = " ".join((result.stdout + result.stderr).split())
    if variables.get("CUDACXX") == "" and "CUDA kernels for" in said:
        pytest.skip("CMake finds another nvcc")
    return result.returncode, said


OLD_GPUS = {"TORCH_CUDA_ARCH_LIST": "6.1;7.0+PTX"}
KNOWN = " ".join(f"compute_{number}" for number in (50, 60, 70, 75, 80, 86, 87, 89, 90, 100, 101, 120))
NVCC_12_8 = f'if [ "$1" = --list-gpu-arch ]; then echo {KNOWN}; else exec {shutil.which("nvcc")} "$@"; fi'
NO_NVCC = "expected nvcc 12.0 or later, but no nvcc was found"


@pytest.mark.sources
@pytest.mark.parametrize(
    ("gpus", "variables", "wanted"),
    [
        ("", {}, "no GPU was visible when it was built. To compile the CUDA kernels as well: FORCE_CUDA=1 pip install"),
        ("7.5\\n", {}, "a GPU of compute capability 7.5, and its CUDA kernels need 8.0"),
        ("9.0\\n", {"CUDACXX": ""}, "no nvcc was found when it was built"),
        ("", {"TORCH_CUDA_ARCH_LIST": "8.0", "CUDACXX": ""}, "no nvcc was found when it was built"),
        (
            *("9.0\\n", OLD_GPUS),
            "it was built for TORCH_CUDA_ARCH_LIST, which names GPUs of compute capability 6.1, 7.0+PTX",
        ),
    ],
)
def test_cuda_kernels_that_are_left_out_are_explained_once(
    tmp_path: Path, gpus: str, variables: dict[str, str], wanted: str
) -> None:
    status, said = _configure(tmp_path, gpus, **variables)
    assert status == 0, said
    assert said.count(wanted) == 1, said
    assert "FORCE_CUDA=1" not in said or variables != OLD_GPUS  # it would not help


@pytest.mark.sources
@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"FORCE_CUDA": "1"}, f"FORCE_CUDA=1: {NO_NVCC}"),
        ({"DDPM_FAST_CUDA_ARCHS": "80"}, f"DDPM_FAST_CUDA_ARCHS=80: {NO_NVCC}"),
        ({"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}, f"FORCE_CUDA=1: {NO_NVCC}"),
        ({"DDPM_FAST_CUDA_ARCHS": "80", "TORCH_CUDA_ARCH_LIST": "8.0"}, f"DDPM_FAST_CUDA_ARCHS=80: {NO_NVCC}"),
        (
            {"TORCH_CUDA_ARCH_LIST": "Hopper"},
            "TORCH_CUDA_ARCH_LIST: expected compute capabilities such as '8.0 9.0+PTX', got 'Hopper'",
        ),
        (
            OLD_GPUS | {"FORCE_CUDA": "1"},
            "FORCE_CUDA=1: expected TORCH_CUDA_ARCH_LIST to have a compute capability of 8.0 or later, got 6.1, 7.0+PTX",
        ),
    ],
)
def test_cuda_kernels_that_cannot_be_compiled_are_an_error(tmp_path: Path, variables: dict[str, str], wanted: str) -> None:
    status, said = _configure(tmp_path, **variables)
    assert status != 0
    assert wanted in said


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configured")


@pytest.mark.sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="asks nvcc which compiler it is")
@pytest.mark.parametrize(
    ("gpus", "variables", "expected"),
    [
        # CMake asks nvcc for seconds, so these are slow.
        pytest.param("9.0\n9.0\n", {}, "90a-real", marks=pytest.mark.slow),
        pytest.param("8.6\n7.5\n", {}, "86-real", marks=pytest.mark.slow),
        pytest.param("9.0\n99.9\n", {}, r"90a-real;\d+-virtual", marks=pytest.mark.slow),  # newer than nvcc
        pytest.param("8.0\n", {"DDPM_FAST_CUDA_ARCHS": "90a"}, "90a", marks=pytest.mark.slow),
        pytest.param("", {"FORCE_CUDA": "1"}, "80-real;90a-real;100", marks=pytest.mark.slow),
        pytest.param(
            "",
            {"TORCH_CUDA_ARCH_LIST": "7.5 8.6;9.0+PTX", "FORCE_CUDA": "1"},
            "86-real;90a-real;90-virtual",
            marks=pytest.mark.slow,
        ),
        pytest.param("8.6\n", {"TORCH_CUDA_ARCH_LIST": "8.0", "DDPM_FAST_CUDA_ARCHS": "90a"}, "90a", marks=pytest.mark.slow),
        ("9.0\n", {"FORCE_CUDA": "1", "DDPM_FAST_CUDA_ARCHS": "none"}, None),
        # A driver compiles PTX of 10.0 for a GPU of 10.3, which nvcc does not know, and none of 12.0.
        pytest.param("10.3\n8.0\n", {"CUDACXX": "{folder}/nvcc-12.8"}, "100-virtual;80-real", marks=pytest.mark.slow),
    ],
)
def test_which_architectures_are_compiled(
    tmp_path: Path, configured: Path, gpus: str, variables: dict[str, str], expected: str | None
) -> None:
    _program(tmp_path / "nvcc-12.8", NVCC_12_8)
    compiler = variables.get("CUDACXX", str(shutil.which("nvcc"))).format(folder=tmp_path)
    build = None if "CUDACXX" in variables else configured  # A folder keeps its compiler.
    status, said = _configure(tmp_path, gpus, build, **variables | {"CUDACXX": compiler})
    assert status == 0, said
    if expected is None:
        assert "it was built with DDPM_FAST_CUDA_ARCHS=none" in said
    else:
        assert re.search(f"CPU kernels, and CUDA kernels for {expected} ", said), said


def test_a_tensor_s_gpu_is_the_current_one_while_kernels_are_asked_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read off the current card how to cut the work up: of two unlike ones, the workspace would fit the wrong one."""
    current, calls = [0], []

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    def workspace(*fields: object) -> int:
        calls.append((current[0], "workspace"))
        return 0

    def kernel(*fields: object) -> None:
        calls.append((current[0], fields[-1]))

    op = OPS["group_norm_silu"]
    monkeypatch.setitem(backend.KERNELS, "cuda", SimpleNamespace(group_norm_silu=kernel, group_norm_silu_workspace=workspace))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    values = (None,) * len(op.kernel.fields)
    for index in (0, 1):
        op.kernel._launch_on_gpu(values, torch.device("cuda", index))
    assert calls == [(0, "workspace"), (0, 70), (1, "workspace"), (1, 71)]
    assert current == [0]


# ---------------------------------------------------------------------------------------------- what a second build does


def _build_folder(tmp_path: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run setup.py's choice of a build folder for an editable install, with a copy of setup.py."""
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    script = """
import runpy, setuptools, sys
setuptools.setup = lambda **arguments: None
module = runpy.run_path("setup.py")
command = module["CMakeBuild"](setuptools.Distribution())
command.build_temp, command.editable_mode = sys.argv[1], True
print(command.build_folder())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "temporary")]
    environment = os.environ | variables
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.sources
def test_an_editable_install_keeps_its_objects_until_the_compiler_changes(tmp_path: Path) -> None:
    folder = Path(_build_folder(tmp_path).stdout.strip())
    assert folder.is_relative_to(tmp_path / "build")  # and not in the temporary folder, which setuptools removes
    (folder / "object.o").touch()
    assert Path(_build_folder(tmp_path).stdout.strip()) == folder
    assert (folder / "object.o").exists()
    _build_folder(tmp_path, CXXFLAGS="-g")
    assert not (folder / "object.o").exists()
