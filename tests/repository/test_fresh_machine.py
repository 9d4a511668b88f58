"""Tests, and the processes that they start, have neither the network nor a data set: `make check` passes on a fresh machine."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import fresh_machine
import pytest
from items import read_data

from ddpm_fast.data import published

# Runs in processes of all kinds. A process that is not guarded would wait for 192.0.2.1, which nobody has (RFC 5737).
PROBE = """
import os, socket
from pathlib import Path

def refused(call, *words):
    try:
        call()
    except OSError as error:
        assert all(word in str(error) for word in words), error
        return type(error)
    raise AssertionError(f"not refused: {words}")

def connect(host):
    with socket.socket() as one:
        one.settimeout(1)
        one.connect((host, 80))

def send(host):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"", (host, 80))

for call, hosts in (
    (connect, ["192.0.2.1"]),
    (send, ["192.0.2.1"]),
    (lambda host: socket.create_connection((host, 80), 1), ["192.0.2.1", "www.example.org"]),
    (lambda host: socket.getaddrinfo(host, 80), ["192.0.2.1", "www.example.org"]),
    (socket.gethostbyname, ["www.example.org"]),
):
    for host in hosts:
        assert refused(lambda: call(host), "tests run without a network", host) is ConnectionRefusedError

with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(("localhost", server.getsockname()[1])).close()
for one in socket.socketpair():  # Unix sockets
    one.close()
socket.getaddrinfo("localhost", 0)
try:
    socket.getaddrinfo(socket.gethostname(), 0)
except socket.gaierror:  # a machine may not know its own name, but nothing of ours refuses it
    pass

for folder in ("/usr/share/datasets/fashion-mnist", os.path.join(CACHE_BEFORE, "ddpm_fast")):
    for call in (lambda: open(folder + "/file"), lambda: os.listdir(folder), lambda: list(Path(folder).iterdir())):
        assert refused(call, "hidden from tests") is FileNotFoundError
"""


@pytest.fixture
def probe() -> str:
    return f"CACHE_BEFORE = {os.path.dirname(os.environ[fresh_machine.HIDDEN].split(os.pathsep)[1])!r}\n{PROBE}"


def test_this_process(probe: str) -> None:
    exec(probe, {})
    assert not published.FASHION_MNIST_DEBIAN.exists()
    assert not (published._default_folder() / "cifar-10-binary.tar.gz").exists()
    wanted = rf"load_dataset: expected FashionMNIST in '{re.escape(str(fresh_machine.CACHE))}/ddpm_fast' or from .*"
    with pytest.raises(OSError, match=wanted + "because tests run without a network"):
        read_data("fashion-mnist")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # it is about fork
def test_multiprocessing(method: str, probe: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"the system has no {method}")
    process = multiprocessing.get_context(method).Process(target=exec, args=(probe, {}))  # type: ignore[attr-defined]
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_test_may_be_given_the_machine() -> None:
    with fresh_machine.lifted():
        assert Path(fresh_machine.DEBIAN) == published.FASHION_MNIST_DEBIAN
        assert not published._default_folder().is_relative_to(fresh_machine.CACHE)
        numeric = "import socket; socket.getaddrinfo('192.0.2.1', 80)"  # asks no server
        exec(numeric, {})
        subprocess.run([sys.executable, "-c", numeric], check=True)
    with pytest.raises(ConnectionRefusedError):
        exec(numeric, {})
    assert subprocess.run([sys.executable, "-c", numeric], stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [True, False])
def test_a_python_hides_the_folders_that_the_package_reads(hidden: bool) -> None:
    script = "from ddpm_fast.data.published import FASHION_MNIST_DEBIAN\nfrom ddpm_fast.data import published\n"
    script += "print(FASHION_MNIST_DEBIAN, published._default_folder())"
    with nullcontext() if hidden else fresh_machine.lifted():
        done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    own, cache = done.stdout.split()
    assert own == (str(fresh_machine.CACHE / "no-data-set") if hidden else fresh_machine.DEBIAN)
    assert (cache == str(fresh_machine.CACHE / "ddpm_fast")) == hidden


@pytest.mark.data_sets
def test_marked_tests_run_with_full_alone(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("full")
    socket.getaddrinfo("192.0.2.1", 80)
