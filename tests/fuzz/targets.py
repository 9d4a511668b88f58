"""Readers of files beside the mutations of their files: python tests/fuzz/targets.py [COUNT [TARGET ...]].

A reader passes if it returns, or raises a ValueError, TypeError or OSError that names the file. It has a minute.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gzip
import hashlib
import io
import json
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from mutations import bytes_of, json_of, safetensors_of, torch_of
from PIL import Image

from ddpm_fast import NoiseSchedule, Objective
from ddpm_fast.files.writing import write_json
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.pretrained import _read_scheduler
from ddpm_fast.training.checkpoint import Checkpoints, read_state, why_damaged
from ddpm_fast.training.data import load_dataset, published
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
WEIGHTS, CONFIG, STATE = "diffusion_pytorch_model.safetensors", "config.json", "state.json"
MEMORY = 2 << 30  # bytes by which a target's process may grow

Mutate = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A reader of a file.

    Attributes:
        write: A function that writes valid files into a folder, and returns those to mutate.
        mutate: A function that returns mutated content.
        read: A function that reads from the folder.
    """

    write: Callable[[Path], list[Path]]
    mutate: Mutate
    read: Callable[[Path], object]


def network(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    UNet(**TINY).save_pretrained(folder)
    return [folder / CONFIG]


def weights(folder: Path) -> list[Path]:
    network(folder)
    return [folder / WEIGHTS]


def legacy_weights(folder: Path) -> list[Path]:
    network(folder)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    return [folder / "diffusion_pytorch_model.bin"]


def scheduler(folder: Path) -> list[Path]:
    (folder / "theirs").mkdir()
    write_scheduler(folder / "ours", Objective(NoiseSchedule.sigmoid(5), "v_prediction"))
    write_scheduler(folder / "columns", Objective(NoiseSchedule.cosine(3), torch.tensor([[0.5, 1.0]] * 3)))
    config = {"num_train_timesteps": 5, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2"}
    config |= {
        "trained_betas": None,
        "variance_type": None,
        "lambda_min_clipped": -float("inf"),
        "rescale_betas_zero_snr": True,
    }
    files = [folder / name / "scheduler_config.json" for name in ("ours", "theirs", "columns")]
    files[1].write_text(json.dumps(config))
    return files


def read_scheduler(folder: Path) -> None:
    _read_scheduler(folder / "ours")
    _read_scheduler(folder / "theirs")
    _read_scheduler(folder / "columns")


def run_config(folder: Path) -> list[Path]:
    dataset = {"images": 5, "shape": [1, 4, 4], "classes": ["cat", "dog"], "preparation": "not resized"}
    dataset["fingerprint"] = {"sample": "0" * 64, "exact": "1" * 64}
    write_json(
        folder / CONFIG,
        {
            "format": FORMAT,
            "options": {name: value for struct in STRUCTS for name, value in struct().recorded().items()},
            "unet": UNetConfig.from_dict(TINY).to_dict(),
            "objective": Objective(NoiseSchedule.cosine(5)).to_config(),
            "dataset": dataset,
            "threads": 1,
            "versions": {"torch": "2.13.0"},
        },
    )
    return [folder / CONFIG]


def state(folder: Path) -> list[Path]:
    def write(checkpoint: Path) -> None:
        (checkpoint / "unet").mkdir()
        (checkpoint / "unet" / "a").write_bytes(b"a" * 10)
        (checkpoint / "b").write_bytes(b"b" * 20)

    checkpoint = Checkpoints(folder).add(7, {"seconds": 1.5, "losses": [0.5, 0.25]}, write, keep=1)
    return [checkpoint / STATE]


def read_checkpoint(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "step-00000007"
    why_damaged(checkpoint)  # says it without an error
    read_state("train", checkpoint)


def idx(folder: Path) -> list[Path]:
    content = b"\0\0\x08\x02" + (3).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes(range(15))
    (folder / "a-idx").write_bytes(content)
    (folder / "b-idx.gz").write_bytes(gzip.compress(content, mtime=0))
    return [folder / "a-idx", folder / "b-idx.gz"]


def read_idx(folder: Path) -> None:
    published.read_idx(folder / "a-idx", (5,))
    published.read_idx(folder / "b-idx.gz", (5,))


def npy(folder: Path) -> list[Path]:
    np.save(folder / "a.npy", np.arange(96, dtype=np.float32).reshape(2, 4, 4, 3))
    return [folder / "a.npy"]


def npz(folder: Path) -> list[Path]:
    values = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez_compressed(folder / "a.npz", arr_0=values, arr_1=np.array([1, 0]))
    return [folder / "a.npz"]


def image_archive(folder: Path) -> list[Path]:
    file, image = folder / "a.zip", io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(image, format="PNG")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "b/c.png"):
            archive.writestr(name, image.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [["a.png", 1], ["b/c.png", 0]]}))
    return [file]


def mutate_json(random: Random, content: bytes) -> bytes:
    if random.random() < 0.3:
        return bytes_of(random, content)
    return json_of(random, json.loads(content)).encode(errors="surrogatepass")


def mutate_state(random: Random, content: bytes) -> bytes:
    """Mutate it, and often sign the result, so that the checksum does not hide what comes after it."""
    mutated = mutate_json(random, content)
    try:
        values = json.loads(mutated)
        values.pop("sha256")
        text = json.dumps(values, sort_keys=True).encode()
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return mutated
    signed = json.dumps({**values, "sha256": hashlib.sha256(text).hexdigest()}).encode()
    return signed if random.random() < 0.7 else mutated


def mutate_idx(random: Random, content: bytes) -> bytes:
    if content[:2] == b"\x1f\x8b" and random.random() < 0.5:
        return gzip.compress(bytes_of(random, gzip.decompress(content)), mtime=0)
    return bytes_of(random, content)


TARGETS: dict[str, Target] = {
    "network-config": Target(network, mutate_json, UNet.from_pretrained),
    "safetensors": Target(weights, safetensors_of, UNet.from_pretrained),
    "torch-bin": Target(legacy_weights, torch_of, UNet.from_pretrained),
    "scheduler-config": Target(scheduler, mutate_json, read_scheduler),
    "run-config": Target(run_config, mutate_json, lambda folder: RunFolder(folder).read_config()),
    "state": Target(state, mutate_state, read_checkpoint),
    "idx": Target(idx, mutate_idx, read_idx),
    "npy": Target(npy, bytes_of, lambda folder: load_dataset(str(folder / "a.npy"))),
    "npz": Target(npz, bytes_of, lambda folder: load_dataset(str(folder / "a.npz"))),
    "image-archive": Target(image_archive, bytes_of, lambda folder: load_dataset(str(folder / "a.zip"))),
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


def fuzz(name: str, count: int, folder: Path) -> int:
    """Read `count` mutated files. Return how many were refused; raise an AssertionError for one that fails otherwise."""
    target = TARGETS[name]
    files = target.write(folder)
    contents = [file.read_bytes() for file in files]
    target.read(folder)  # valid
    before = reset_peak()
    refused = 0
    for number in range(count):
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


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    count, names = int((sys.argv[1:] or ["1000"])[0]), sys.argv[2:] or list(TARGETS)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {count} files, {fuzz(name, count, Path(folder))} refused, the others read", flush=True)


if __name__ == "__main__":
    main()
