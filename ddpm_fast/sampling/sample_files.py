"""Many images as files: a folder of PNGs or an npz. Several processes draw them, and continue what was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import Ranges, check_int, check_path
from ..distributed import Processes, joined
from ..errors import InvalidValue, UnusablePath
from ..files.images import to_uint8
from ..files.writing import write_json
from ..inference import FrozenUNet
from ..inference.model import Model, device_and_dtype, inference_form, model_config
from ..plan import SamplingPlan
from ..resources import check_free_space
from .arguments import ClassLabels, checked_request, checked_setup
from .progress import progress_bar
from .sample_formats import Pixels, SampleFormat, files_of
from .sampler import Sampler

_CALLER: Final = SampleFormat.caller
_FORMAT: Final = 1  # a manifest's
_COUNTER: Final = "ddpm_fast/images_written"  # a key of the processes' store
_APART: Final = timedelta(hours=24)  # between the ends of the first process and the last
_POLL: Final = 0.1  # seconds


def write_samples(
    out: str | os.PathLike[str],
    model: Model,
    plan: SamplingPlan,
    num_samples: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    class_labels: ClassLabels = None,
    guidance_scale: float | None = None,
    condition: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shape: Sequence[int] | None = None,
    progress: bool = True,
) -> Path:
    """Draw images and write them to files: many, by several processes, in any number of sessions.

    The ending of `out` chooses the format:

    - `.npz`: `arr_0` uint8 [num_samples, H, W, C] and, with class labels, `arr_1` int64 [num_samples], as guided-diffusion has.
    - Any other: a folder of PNGs `000000/000123.png`, a folder for each 1000 images, and `dataset.json` with the labels or
      null, as EDM has. `.zip` is refused.

    Values in [-1, 1] become 0..255 by `to_uint8`. Images of one channel are grey PNGs (mode L), and have C = 1 in an npz. If
    the model's config has a `data_range`, an npz holds float32 of that range.

    If a call was interrupted or killed, the same call continues: it draws the blocks of `batch_size` images that are not whole
    yet. `manifest.json`, in the folder or the npz, has the arguments and SHA-256 digests of the plan, the weights, the
    labels and the condition. Until an npz is whole, its blocks are in the folder `<out>.parts`. A whole one is not drawn
    again.

    The weights of a `FrozenUNet` are the tensors that it holds, which `freeze` may round differently on another kind of CPU.
    Pass the `UNet` to continue on another machine. A model whose weights are unknown, such as a function, starts a new `out`
    and cannot continue one.

    Under torchrun, `accelerate launch` or Slurm, all processes make this call, and each draws its share of the blocks. They see
    the same file system. A block is always one batch, so the files do not depend on the number of processes.

    Args:
        out: File or folder to write. Missing folders are made.
        model: See `Sampler`.
        plan: From `ddpm_plan`, `ddim_plan`, ...
        num_samples: Number of images, at most 2^32.
        seed: Seed of all noise. Image i is image i of `sample` with this seed and batch size.
        batch_size: Images per network evaluation, and per block.
        class_labels: See `sample`.
        guidance_scale: See `sample`.
        condition: See `sample`. Image i is drawn with row i.
        dtype: See `Sampler`.
        device: Device to run on. None: the model's. If that is a GPU and there are several processes, each takes the GPU of
            its local rank.
        shape: (C, H, W) of an image, with C = 1 or 3. A folder may have C = 4, and an npz any C. None: see
            `Sampler`.
        progress: Show a progress bar, in rank 0, of the images of all processes.

    Returns:
        The path, in every process, when all images are there.

    Raises:
        ValueError: An argument is out of range or does not fit the model, an image is not finite, or `out` has images of
            another call. The message names the field of the manifest that differs.
        TypeError: An argument has an unsupported type.
        UnusablePath: `out` has other files, or is in a folder that cannot be written to. It is an OSError.
        BlockingIOError: Another call on this machine writes to `out`. Where there are no locks, a warning is logged.
        OSError: `out` cannot be written, or has too little free space.
        ProcessLost: Another process has failed or ended. It is a RuntimeError.
        KeyboardInterrupt: The call was interrupted. The message says how many images are written.
    """
    check_path(_CALLER, "out", out)
    check_int(_CALLER, "seed", seed, -(1 << 63), (1 << 64) - 1)
    check_int(_CALLER, "batch_size", batch_size, 1, 1 << 32)
    shape, checked_device = checked_setup(_CALLER, model, plan, dtype, device, shape, None)
    request = checked_request(
        *(_CALLER, model, checked_device, shape, num_samples),
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        condition=condition,
        progress=progress,
        num_kept=batch_size,
    )
    labels = None if class_labels is None or request.labels is None else request.labels.cpu()
    ranges = model_config(model).get("data_range")
    numbers = None if labels is None else labels.numpy()
    files = files_of(out, num_samples, shape, numbers, pictures=ranges is None)
    blocks = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]
    with ExitStack() as locks, joined(_CALLER) as processes, processes.barrier(_APART) as arrive:
        sampler = Sampler(model, plan, dtype=dtype, device=_device(processes, model, device), shape=shape)
        manifest = {
            "format": _FORMAT,
            "kind": files.kind,
            "num_samples": num_samples,
            "shape": list(shape),
            "seed": seed,
            "batch_size": batch_size,
            "guidance_scale": None if request.guidance_scale is None else float(request.guidance_scale),
            "dtype": str(sampler.dtype).removeprefix("torch."),
            "plan": _plan_digest(plan),
            "weights": _weights_digest(model),
            "labels": None if labels is None else _digest(labels.numpy()),
            "condition": None if condition is None else _digest(condition.detach().cpu().float().numpy()),
        }
        missing = _missing(processes, files, manifest, blocks, locks)
        mine = missing[processes.rank :: processes.size]
        with _interruptible(processes, files, blocks, manifest), _written(processes, blocks, missing, progress) as written:
            for block in mine:
                part = slice(block.start, block.stop)
                images = sampler(
                    len(block),
                    seed=request.seeds[part],
                    class_labels=None if labels is None else labels[part],
                    guidance_scale=guidance_scale,
                    condition=None if condition is None else condition[part],
                    progress=False,
                )
                files.write(block, _values(images, block, ranges if files.dtype != "|u1" else None))
                written(len(block))
            _wait(arrive(), written)
            if processes.is_first:
                files.finish(blocks, manifest)
            _wait(arrive(), written)
    return files.result


def _device(processes: Processes, model: Model, device: torch.device | str | None) -> torch.device | str | None:
    """Return the device of this process: a GPU of its own if no device is named."""
    model_device, _ = device_and_dtype(model)
    if device is None and processes.size > 1 and model_device.type == "cuda" and isinstance(model, nn.Module):
        return processes.own_gpu(_CALLER)
    return device


def _values(images: Tensor, block: range, ranges: Ranges | None) -> Pixels:
    """Return images [N, C, H, W] as uint8 [N, H, W, C], or as floats with ranges that -1 and 1 stand for.

    Raise a ValueError if one is not finite.
    """
    finite = images.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        index = block.start + int((~finite).nonzero()[0])
        raise InvalidValue(_CALLER, "images", "to be finite", f"NaN or infinity in image {index}")
    if ranges is None:
        values = to_uint8(images)
    else:
        low, high = images.new_tensor(ranges, dtype=torch.float64).T[:, :, None, None]  # [C, 1, 1]
        values = ((images.double() + 1) * ((high - low) / 2) + low).float()
    pixels: Pixels = values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


# --------------------------------------------------------------------------------------------------------------- processes


def _missing(
    processes: Processes, files: SampleFormat, manifest: Mapping[str, Any], blocks: Sequence[range], locks: ExitStack
) -> list[range]:
    """Return the blocks that are not written, the same in all processes. Rank 0 locks the folder, and begins what is new."""

    def is_new() -> bool:
        if not files.agrees(manifest):
            files.check_new()
            return True
        if manifest["weights"] is None:
            wanted = f"to be a module with weights or a FrozenUNet to go on with {str(files.result)!r}"
            raise InvalidValue(_CALLER, "model", wanted, "a function or object whose weights are unknown; choose another out")
        return False

    def begin() -> list[float]:
        begins = is_new()
        if begins:
            check_free_space(_CALLER, "out", files.result, files.space(blocks[-1].stop))
        if begins or files.path.exists():  # an archive that is whole needs no folder
            locks.enter_context(files.locked())
            begins = is_new()  # another call may have ended just now
        files.remove_leftovers()
        missing = [not files.has(block) for block in blocks]
        count = sum(len(block) for block, is_missing in zip(blocks, missing, strict=True) if is_missing)
        check_free_space(_CALLER, "out", files.result, files.space(count))
        if begins:
            write_json(files.record, manifest)
        if processes.store is not None:
            processes.store.set(_COUNTER, "0")  # before the others begin
        return [float(each) for each in missing]

    found = processes.on_first(begin)
    if found is None and not files.agrees(manifest):
        got = f"{str(files.result)!r}, in which rank {processes.rank} finds nothing"
        raise UnusablePath(_CALLER, "out", "to be in a folder that all processes see", got)
    flags = processes.from_first(found or [0.0] * len(blocks))
    return [block for block, flag in zip(blocks, flags, strict=True) if flag]


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


def _wait(all_arrived: Callable[[], bool], written: Callable[[int], None]) -> None:
    """Wait for the other processes, and show what they write. Ctrl-C ends the wait."""
    while not all_arrived():
        written(0)
        time.sleep(_POLL)
    written(0)


@contextmanager
def _interruptible(
    processes: Processes, files: SampleFormat, blocks: Sequence[range], manifest: Mapping[str, Any]
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


def _weights_digest(model: Model) -> str | None:
    """Return a digest of a network's configuration, weights and buffers, or None if it shows none."""
    named: dict[str, Any] = {}
    model = inference_form(model)
    if isinstance(model, FrozenUNet):
        named = model.tensors()
    elif isinstance(model, nn.Module):
        named = model.state_dict()
        frozen = {f"{p}.{n}": v for p, m in model.named_modules() for n, v in vars(m).items() if isinstance(v, FrozenUNet)}
        for path, network in frozen.items():
            named |= {f"{path}.{name}": tensor for name, tensor in network.tensors().items()}
    if not named:
        return None
    digest = hashlib.sha256(json.dumps(dict(model_config(model)), sort_keys=True, default=repr).encode())
    for name, values in sorted(named.items()):
        if isinstance(values, Tensor):  # a module may have extra state of any type
            digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
