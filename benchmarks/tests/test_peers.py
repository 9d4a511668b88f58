"""Peers and their processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import common
import idioms
import numpy as np
import peers
import processes
import pytest
import torch
from peers import Peer
from processes import Job, PeerFailed, Process
from small_unets import SMALL


@pytest.fixture
def job(tmp_path: Path) -> Job:
    idioms.random_unet(SMALL).save_pretrained(tmp_path / "network")
    return Job(str(tmp_path), 3, SMALL["sample_size"])


def test_an_image_is_the_same_in_any_batch(job: Job) -> None:
    x, t = job.inputs()
    first_x, first_t = replace(job, batch=1).inputs()
    assert (x.dtype, x.shape) == (np.float32, (3, 2, 16, 16))
    assert np.array_equal(x[:1], first_x)
    assert np.array_equal(t[:1], first_t)


def test_why_a_peer_is_missing() -> None:
    table = {"a": Peer(print, ("torch", "no_such_module")), "b": Peer(print, dtypes=("float32",)), "c": Peer(print)}
    assert peers.split(table, "abc", "bf16") == (["c"], {"a": "no_such_module not installed", "b": "has no bf16"})


def test_peers_get_the_cap_of_the_instruction_set_too(fake: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    uncapped = Peer(print, caps=False)
    monkeypatch.delenv("DDPM_FAST_ISA", raising=False)
    assert uncapped.why_not() is None
    monkeypatch.setenv("DDPM_FAST_ISA", "avx2")
    assert uncapped.why_not() == "its instruction set cannot be capped to avx2"
    process = Process("caps", fake)
    assert process.output().tolist() == ["AVX2", "avx2"]
    process.close()


# A stand-in for peers.py, in the processes that tests start.
FAKE = """
import os
import time

import numpy
from peers import Peer

CAPS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")

def call():
    print("what a library prints")
    time.sleep(0.01)
    return numpy.ones(3)

def export(job, path):
    path.write_text(f"{job.batch / 2}")
    1 / job.batch

PEERS = {
    "right": Peer(lambda job: call, suffix=".onnx", export=export),
    "raises": Peer(lambda job: 1 / 0),
    "exits": Peer(lambda job: exit(3)),
    "caps": Peer(lambda job: lambda: numpy.array([os.environ[name] for name in CAPS])),
}
"""


@pytest.fixture
def fake(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake", raising=False)
    return replace(job, table="fake.PEERS")


def test_a_process_answers(fake: Job) -> None:
    process = Process("right", fake)
    assert 0.01 < process.about["first call"] < process.first_image
    assert process.about["versions"] == {"torch": torch.__version__}
    assert process.output().tolist() == [1, 1, 1]
    assert process.calls_per_turn() <= 10  # a call takes 10 ms at least
    assert process.seconds(4) >= 0.01
    assert len(process.used) == 2
    assert process.peak is None or process.peak > 1 << 20
    process.close()


@pytest.mark.parametrize(("name", "words"), [("raises", "ZeroDivisionError"), ("exits", "ended with status 3")])
def test_a_process_that_fails_says_why(fake: Job, name: str, words: str) -> None:
    with pytest.raises(PeerFailed, match=words):
        Process(name, fake)


def test_an_export_is_one_file_or_says_why_not(fake: Job) -> None:
    processes.export("right", fake)
    assert fake.exported(".onnx").read_text() == "1.5"
    with pytest.raises(PeerFailed, match="ZeroDivisionError"):
        processes.export("right", replace(fake, batch=0))


def test_peers_without_pytorch_do_not_import_it() -> None:
    code = "import peers, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=common.ROOT).returncode == 0
