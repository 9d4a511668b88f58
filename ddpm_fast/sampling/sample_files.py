"""Many images as files: a folder of PNGs or an npz. Several processes draw them, and continue what was stopped."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Unpack

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int, check_path
from ..distributed import Processes, joined
from ..errors import InvalidValue, UnusablePath, expect
from ..files.images import in_range, to_uint8
from ..files.writing import write_json
from ..forms import Pairs
from ..inference.model import model_config
from ..options import checked, taking
from ..plan import SamplingPlan
from .options import EditOptions
from .progress import progress_bar
from .sample_formats import Pixels, SampleFiles
from .sampler import Sampler

_FORMAT: Final = 1  # a manifest's
_COUNTER: Final = "ddpm_fast/images_written"  # a key of the processes' store
_APART: Final = timedelta(hours=24)  # between the ends of the first process and the last
_POLL: Final = 0.1  # seconds


@checked()
@taking(EditOptions)
def write_samples(
    out: str | os.PathLike[str],
    sampler: Sampler,
    num_samples: int,
    *,
    share_gpu: bool = False,
    **options: Unpack[EditOptions],
) -> Path:
    """Draw images and write them to files: many, by several processes, in any number of sessions.

    The ending of `out` chooses the format:

    - `.npz`: `arr_0` uint8 [num_samples, H, W, C] and, with class labels, `arr_1` int64 [num_samples], as guided-diffusion
      writes them.
    - None, or that of a folder that exists: a folder of PNGs `000000/000123.png`, a folder for each 1000 images, and
      EDM's `dataset.json`, which has the labels or null.

    Values in [-1, 1] become 0..255 by `to_uint8`. Images of one channel are grey PNGs (mode L), and have C = 1 in an npz. If
    the model's config has a `data_range`, an npz holds float32 of that range.

    If a call was interrupted or killed, the same call continues: it draws the blocks of `batch_size` images that are not whole
    yet. A manifest has the arguments and SHA-256 digests of the plan, the weights, the labels and the condition:
    `manifest.json` in the folder, or the comment of the zip file that an npz is. Until an npz is whole, its blocks are in the
    folder `<out>.parts`. A whole one is not drawn again.

    A model whose weights are unknown, such as a function, starts a new `out` and cannot continue one.

    Under torchrun, `accelerate launch` or Slurm, all processes make this call, and each draws its share of the blocks. They see
    the same file system. A block is always one batch, so the files do not depend on the number of processes.

    Args:
        out: File or folder to write. Missing folders are made.
        sampler: A Sampler, of images with C = 1 or 3. A folder may have C = 4, and an npz any C.
        num_samples: Number of images, at most 2^32.
        share_gpu: Allow several processes on one GPU.
        **options: See `EditOptions`. The seed is an int: image i is image i of the sampler with this seed and batch size.
            Without a batch_size, a network evaluation and a block have 64 images. Without labels, the classes take turns.

    Returns:
        The path, in every process, when all images are there.

    Raises:
        ValueError: An argument is out of range or does not fit the sampler, an image is not finite, `out` has images of
            another call, or two processes have one GPU. The message names the field of the manifest that differs.
        TypeError: An argument has an unsupported type, or is unknown.
        UnusablePath: `out` has other files, or is in a folder that cannot be written to. It is an OSError.
        BlockingIOError: Another call on this machine writes to `out`. Where there are no locks, a warning is logged.
        OSError: `out` cannot be written.
        ProcessLost: Another process has failed or ended. It is a RuntimeError.
        KeyboardInterrupt: The call was interrupted. The message says how many images are written.
    """
    batch_size, seed, shape = options.get("batch_size"), options.get("seed", 0), sampler.shape
    batch_size = 64 if batch_size is None else batch_size
    check_path("out", out)
    check_int("seed", seed, -(1 << 63), (1 << 64) - 1)
    request = sampler.request(num_samples, options, struct=EditOptions)
    scale, condition = request.given["guidance_scale"], request.given["condition"]
    kind, labels = sampler.interface.labels, None if request.labels is None else request.labels.cpu()
    # Guidance also reads the label for no class.
    given = None if labels is None else _digest(torch.cat([labels, kind.blank(1)]).numpy())
    if labels is not None and kind.are_none(labels):
        labels = None
    ranges = model_config(sampler.network).get("data_range")
    files = SampleFiles(out, num_samples, shape, labels, pictures=ranges is None)
    blocks = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]
    with ExitStack() as locks, joined(_APART) as processes:
        _check_own_gpu(processes, sampler.device, share_gpu)
        manifest = {
            "format": _FORMAT,
            "kind": files.kind,
            "num_samples": num_samples,
            "shape": list(shape),
            "seed": seed,
            "batch_size": batch_size,
            "guidance_scale": None if scale is None else float(scale),
            "dtype": str(sampler.dtype).removeprefix("torch."),
            "plan": _plan_digest(sampler.plan),
            "weights": sampler.digest(),
            "labels": given,
            "condition": None if condition is None else _digest(condition.detach().cpu().float().numpy()),
        }
        missing = _missing(processes, files, manifest, blocks, locks)
        mine, shown = missing[processes.rank :: processes.size], request.given["progress"]
        with _interruptible(processes, files, blocks, manifest), _written(processes, blocks, missing, shown) as written:
            for block in mine:
                images, _ = sampler.draw(request.part(slice(block.start, block.stop), progress=False))
                files.write(block, _values(images, block, ranges if files.dtype != "|u1" else None))
                written(len(block))
            _wait(processes.arrive(), written)
            if processes.is_first:
                files.finish(blocks, manifest)
            _wait(processes.arrive(), written)
    return files.result


def _check_own_gpu(processes: Processes, device: torch.device, share_gpu: bool) -> None:
    """Raise a ValueError if another process has the same GPU, whatever number it has there."""
    place = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else f"rank {processes.rank}"
    if "MIG" in (visible := os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        place += visible  # a part of a GPU
    sharing = processes.from_all(place).count(place)
    wanted, got = "to be another GPU in each process", f"{device} in {sharing} processes; share_gpu=True allows it"
    expect(share_gpu or sharing == 1, "device", wanted, got)


def _values(images: Tensor, block: range, ranges: Pairs | None) -> Pixels:
    """Return images [N, C, H, W] as uint8 [N, H, W, C], or as floats with ranges that -1 and 1 stand for.

    Raise a ValueError if one is not finite.
    """
    finite = images.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        index = block.start + int((~finite).nonzero()[0])
        raise InvalidValue("images", "to be finite", f"NaN or infinity in image {index}")
    values = to_uint8(images) if ranges is None else in_range(images, ranges).float()
    pixels: Pixels = values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


# --------------------------------------------------------------------------------------------------------------- processes


def _missing(
    processes: Processes, files: SampleFiles, manifest: Mapping[str, Any], blocks: Sequence[range], locks: ExitStack
) -> list[range]:
    """Return the blocks that are not written, the same in all processes. Rank 0 locks the folder, and begins what is new."""

    def is_new() -> bool:
        if not files.agrees(manifest):
            files.check_new()
            return True
        if manifest["weights"] is None:
            wanted = f"to be a module with weights or a FrozenUNet to go on with {str(files.result)!r}"
            raise InvalidValue("model", wanted, "a function or object whose weights are unknown; choose another out")
        return False

    def begin() -> list[range]:
        begins = is_new()
        if begins or files.path.exists():  # an archive that is whole needs no folder
            locks.enter_context(files.locked())
            begins = is_new()  # another call may have ended just now
        files.remove_leftovers()
        missing = [block for block in blocks if not files.has(block)]
        if begins:
            write_json(files.record, manifest)
        return missing

    found = processes.on_first(begin)
    if found is None and not files.agrees(manifest):
        got = f"{str(files.result)!r}, in which rank {processes.rank} finds nothing"
        raise UnusablePath("out", "to be in a folder that all processes see", got)
    return processes.from_first(found or [])


@contextmanager
def _written(
    processes: Processes, blocks: Sequence[range], missing: Sequence[range], progress: bool
) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts written images, in the store of all processes, and shows their number in rank 0."""
    total, left = (sum(map(len, some)) for some in (blocks, missing))
    own = 0

    def count(images: int) -> None:
        nonlocal own
        own += images
        if not images and not is_shown:
            return  # this process waits, and shows nothing
        everyone = own if processes.size == 1 else processes.count(_COUNTER, images)
        bar.update(total - left + everyone - bar.n)

    is_shown = progress and processes.is_first
    with progress_bar(total, "sampling", "image", shown=is_shown, done=total - left) as bar:
        yield count


def _wait(arrival: Future[int], written: Callable[[int], None]) -> None:
    """Wait for the other processes, and show what they write. Ctrl-C ends the wait."""
    while not arrival.done():
        written(0)
        time.sleep(_POLL)
    arrival.result()
    written(0)


@contextmanager
def _interruptible(
    processes: Processes, files: SampleFiles, blocks: Sequence[range], manifest: Mapping[str, Any]
) -> Iterator[None]:
    """Say at Ctrl-C how many images are written, in rank 0."""
    try:
        yield
    except KeyboardInterrupt:
        if not processes.is_first:
            raise
        count = sum(len(block) for block in blocks if files.has(block))
        total = blocks[-1].stop
        others = "No call can draw the others there" if manifest["weights"] is None else "Start it again to draw the others"
        raise KeyboardInterrupt(f"{count} of {total} images are written to {files.result}. {others}.") from None


# ------------------------------------------------------------------------------------------------------------------ digests


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _plan_digest(plan: SamplingPlan) -> str:
    """Return a digest of what `reverse_step` reads of a plan."""
    digest = hashlib.sha256(f"{plan.prediction} {plan.variance}".encode())
    for values in (plan.timesteps, plan.table()):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
