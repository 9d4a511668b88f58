"""Readers of files beside the mutations of their files.

A reader passes if it returns, or raises a ValueError, TypeError or OSError that names the file. It has ten minutes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gzip
import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from items import encoded, read_data, write
from mutations import bytes_of, json_of, safetensors_of, torch_of

from ddpm_fast import NoiseSchedule, Objective
from ddpm_fast.data import published
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.pretrained import _read_scheduler
from ddpm_fast.training.checkpoint import Checkpoints, read_state, why_damaged
from ddpm_fast.training.export import write_scheduler
from ddpm_fast.training.options import STRUCTS
from ddpm_fast.training.run import FORMAT, RunFolder

TINY: dict[str, Any] = {
    "sample_size": [4, 4],
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4],
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "add_attention": False,
    "num_class_embeds": 3,
    "class_names": ["cat", "dog"],
}
WEIGHTS, LEGACY, CONFIG = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "config.json"
SCHEDULERS = ("ours", "theirs", "columns")
CHECKPOINT = "checkpoints/step-00000007"
MEMORY = 2 << 30  # bytes by which a target's process may grow
# A scheduler_config.json of diffusers.
THEIRS = {
    "_class_name": "DDPMScheduler",
    **{"num_train_timesteps": 5, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2"},
    **{"trained_betas": None, "variance_type": None, "lambda_min_clipped": -float("inf"), "rescale_betas_zero_snr": True},
}
RUN = {
    "format": FORMAT,
    "starter": "train",
    "options": {name: value for struct in STRUCTS for name, value in struct().recorded().items()},
    "unet": UNetConfig.from_dict(TINY).to_dict(),
    "objective": Objective(NoiseSchedule.cosine(5)).to_config(),
    "dataset": {
        **{"images": 5, "shape": [1, 4, 4], "classes": ["cat", "dog"], "preparation": "not resized"},
        "fingerprint": {"sample": "0" * 64, "exact": "1" * 64},
    },
    "threads": 1,
    "versions": {"torch": "2.13.0"},
}
IDX = b"\0\0\x08\x02" + (3).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes(range(15))
IMAGES = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
ARCHIVE = dict.fromkeys(("a.png", "b/c.png"), encoded(IMAGES[0])) | {
    "dataset.json": json.dumps({"labels": [["a.png", 1], ["b/c.png", 0]]})
}

Mutate = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A reader of files.

    Attributes:
        write: A function that writes valid files into a folder.
        files: The files to mutate.
        mutate: A function that returns mutated content.
        read: A function that reads from the folder.
    """

    write: Callable[[Path], object]
    files: tuple[str, ...]
    mutate: Mutate
    read: Callable[[Path], object]


def network(folder: Path) -> None:
    torch.manual_seed(0)
    UNet(**TINY).save_pretrained(folder)


def legacy_network(folder: Path) -> None:
    network(folder)
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / LEGACY)
    (folder / WEIGHTS).unlink()


def schedulers(folder: Path) -> None:
    write_scheduler(folder / "ours", Objective(NoiseSchedule.sigmoid(5), "v_prediction"))
    write_scheduler(folder / "columns", Objective(NoiseSchedule.cosine(3), torch.tensor([[0.5, 1.0]] * 3)))
    write(folder / "theirs" / "scheduler_config.json", json.dumps(THEIRS).encode())


def checkpoint(folder: Path) -> None:
    files = {"unet/a": b"a" * 10, "b": b"b" * 20}
    Checkpoints(folder).add(7, {"seconds": 1.5, "losses": [0.5, 0.25]}, lambda folder: write(folder, files), keep=1)


def read_checkpoint(folder: Path) -> None:
    why_damaged(folder / CHECKPOINT)  # says it without an error
    read_state(folder / CHECKPOINT)


def mutate_json(random: Random, content: bytes) -> bytes:
    if random.random() < 0.3:
        return bytes_of(random, content)
    return json_of(random, json.loads(content)).encode(errors="surrogatepass")


def mutate_state(random: Random, content: bytes) -> bytes:
    """Mutate it, and often sign the result, so that the checksum does not hide what comes after it."""
    mutated = mutate_json(random, content)
    if random.random() < 0.3:
        return mutated
    with suppress(ValueError, RecursionError, AttributeError, KeyError, TypeError):
        values = json.loads(mutated)
        values.pop("sha256")
        text = json.dumps(values, sort_keys=True).encode()
        return json.dumps({**values, "sha256": hashlib.sha256(text).hexdigest()}).encode()
    return mutated


def mutate_idx(random: Random, content: bytes) -> bytes:
    if content[:2] == b"\x1f\x8b" and random.random() < 0.5:
        return gzip.compress(bytes_of(random, gzip.decompress(content)), mtime=0)
    return bytes_of(random, content)


TARGETS: dict[str, Target] = {
    "network-config": Target(network, (CONFIG,), mutate_json, UNet.from_pretrained),
    "safetensors": Target(network, (WEIGHTS,), safetensors_of, UNet.from_pretrained),
    "torch-bin": Target(legacy_network, (LEGACY,), torch_of, UNet.from_pretrained),
    "scheduler-config": Target(
        schedulers,
        tuple(f"{name}/scheduler_config.json" for name in SCHEDULERS),
        mutate_json,
        lambda folder: [_read_scheduler(folder / name) for name in SCHEDULERS],
    ),
    "run-config": Target(
        lambda folder: write(folder / CONFIG, json.dumps(RUN).encode()),
        (CONFIG,),
        mutate_json,
        lambda folder: RunFolder(folder).read_config(),
    ),
    "state": Target(checkpoint, (f"{CHECKPOINT}/state.json",), mutate_state, read_checkpoint),
    "idx": Target(
        lambda folder: write(folder, {"a": IDX, "b.gz": gzip.compress(IDX, mtime=0)}),
        ("a", "b.gz"),
        mutate_idx,
        lambda folder: [published.read_idx(folder / name, (5,)) for name in ("a", "b.gz")],
    ),
    **{
        file: Target(
            lambda folder, file=file, content=content: write(folder / file, content, zipfile.ZIP_DEFLATED),
            (file,),
            bytes_of,
            lambda folder, file=file: read_data(str(folder / file)),
        )
        for file, content in {
            "a.npy": IMAGES.astype(np.float32),
            "a.npz": {"arr_0": IMAGES, "arr_1": np.array([1, 0])},
            "a.zip": ARCHIVE,
        }.items()
    },
}


def reset_peak() -> int:
    """Let the peak of memory be what the process has now, and return it. What ran before must not hide what follows."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what follows could use memory that was freed and not returned
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the most bytes that the process has had in memory since `reset_peak`, or 0 if the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def fuzz(name: str, numbers: Iterable[int], folder: Path) -> int:
    """Read mutated files. Return how many were refused; raise an AssertionError for one that fails otherwise."""
    target = TARGETS[name]
    target.write(folder)
    files = [folder / file for file in target.files]
    contents = [file.read_bytes() for file in files]
    target.read(folder)  # valid
    before = reset_peak()
    refused = 0
    for number in numbers:
        random = Random(zlib.crc32(f"{name} {number}".encode()))
        place = random.randrange(len(files))
        files[place].write_bytes(target.mutate(random, contents[place]))
        faulthandler.dump_traceback_later(600, exit=True, file=sys.__stderr__)
        try:
            target.read(folder)
        except Exception as error:
            if not isinstance(error, (ValueError, TypeError, OSError)) or str(folder) not in str(error):
                raise AssertionError(f"{name} {number}: {type(error).__name__}: {str(error)[:1000]}") from error
            refused += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        files[place].write_bytes(contents[place])
    grown = peak() - before
    assert grown < MEMORY, f"{name}: the process grew by {grown >> 20} MiB"
    return refused
