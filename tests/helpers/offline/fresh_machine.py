"""A fresh machine for the tests, with no network and no data set, so that `make check` needs neither.

`begin` acts on this process and those that it forks. Through PYTHONPATH and sitecustomize.py, it also acts on each Python that
these start. It does not watch code outside Python, such as gloo's. If `connect` is given a name, Python resolves it before
the connection is refused.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[2] / "build" / "cache-of-tests"  # in place of ~/.cache; matplotlib keeps its list of fonts there
HIDDEN = "DDPM_FAST_TESTS_HIDE"  # variable with the folders of data sets, for the processes that a test starts
DEBIAN = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
PUBLISHED = "ddpm_fast.data.published"

_hidden: tuple[str, ...] = ()  # folders that do not exist for this process; empty: it may use everything


def begin() -> None:
    """Refuse the network and hide the data sets, in this process and those that it starts. A second call does nothing."""
    global _hidden
    if _hidden:
        return
    if HIDDEN not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        os.environ[HIDDEN] = os.pathsep.join((DEBIAN, os.path.join(cache, "ddpm_fast")))
        os.environ["XDG_CACHE_HOME"] = str(CACHE)
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(HERE) not in folders:  # as in pytest, also if a test that started it has another PYTHONPATH
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), *folders)))
    _hidden = tuple(os.environ[HIDDEN].split(os.pathsep))
    sys.addaudithook(_refuse)  # cannot be removed, so it looks at _hidden
    sys.meta_path.insert(0, _Finder())
    _name_debian(CACHE / "no-data-set")


@contextmanager
def lifted() -> Iterator[None]:
    """Use the machine as it is, for a test marked `data_sets`."""
    global _hidden
    hidden, variables = _hidden, {name: os.environ[name] for name in (HIDDEN, "XDG_CACHE_HOME", "PYTHONPATH")}
    _hidden = ()
    del os.environ[HIDDEN]
    os.environ["XDG_CACHE_HOME"] = os.path.dirname(hidden[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in variables["PYTHONPATH"].split(os.pathsep) if p != str(HERE))
    _name_debian(Path(DEBIAN))
    try:
        yield
    finally:
        _hidden = hidden
        os.environ.update(variables)
        _name_debian(CACHE / "no-data-set")


# ------------------------------------------------------------------------------------------------------------------ network


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Raise what a machine without network and data sets would raise."""
    if not _hidden:
        return
    if event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(_hidden):
            why = "hidden from tests, because a fresh machine lacks it; a test marked `data_sets` sees it"
            raise FileNotFoundError(errno.ENOENT, why, path)
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple) and isinstance(address[0], (str, bytes)):  # paths are Unix sockets, numbers the kernel's
            _check_host(event, address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        _check_host(event, arguments[0])


def _check_host(event: str, host: object) -> None:
    """Raise a ConnectionRefusedError unless `host` is this machine."""
    import ipaddress
    import socket

    name = "" if host is None else os.fsdecode(host).partition("%")[0]  # type: ignore[arg-type] # the scope of an address
    try:
        address = ipaddress.ip_address(name)
        is_here = address.is_loopback or address.is_unspecified
    except ValueError:
        short = name.lower().partition(".")[0]
        is_here = short in ("", "localhost", "ip6-localhost", socket.gethostname().lower().partition(".")[0])
    if not is_here:
        what = f"{event} to {name!r} was refused, because tests run without a network"
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"{what}; a test marked `data_sets` has it")


# ---------------------------------------------------------------------------------------------------------------- data sets


def _name_debian(folder: Path) -> None:
    """Replace FASHION_MNIST_DEBIAN, because no event tells of a call of `Path.is_file`."""
    module = sys.modules.get(PUBLISHED)
    if hasattr(module, "FASHION_MNIST_DEBIAN"):
        module.FASHION_MNIST_DEBIAN = folder  # type: ignore[union-attr]


class _Finder:
    """A finder that replaces FASHION_MNIST_DEBIAN as soon as the module that defines it has run."""

    def find_spec(self, name: str, path: list[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != PUBLISHED or not _hidden:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_replace(module: ModuleType) -> None:
                run(module)
                _name_debian(CACHE / "no-data-set")

            spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec
