"""Many images as files: a folder of PNGs, an npz or a zip. Several processes draw them, and continue what was stopped."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from .atomic import (
    PREFIX,
    flush_names,
    json_text,
    parsed_json,
    read_json,
    remove_leftovers,
    replacing,
    write_bytes,
    write_json,
    write_text,
)
from .checks import check_int, check_path
from .distributed import Processes, joined
from .errors import InvalidValue, UnusablePath
from .images import to_uint8
from .inference import FrozenUNet
from .limits import check_free_space, check_writable
from .locks import locked
from .models import Model, device_and_dtype, inference_form, model_config
from .plan import SamplingPlan
from .requests import ClassLabels, checked_request
from .sampling import Sampler, checked_setup

_CALLER: Final = "write_samples"
_FORMAT: Final = 1  # a manifest's
_MANIFEST: Final = "manifest.json"
_DATASET: Final = "dataset.json"
_COUNTER: Final = "ddpm_fast/images_written"  # a key of the processes' store
_APART: Final = timedelta(hours=24)  # between the ends of the first process and the last
_POLL: Final = 0.1  # seconds
_WRITERS: Final = 8  # threads that write PNGs, which wait for the disk most of the time
_PNG_END: Final = b"IEND\xaeB`\x82"

_log = logging.getLogger("ddpm_fast")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


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
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shape: Sequence[int] | None = None,
    progress: bool = True,
) -> Path:
    """Draw images and write them to files: many, by several processes, in any number of sessions.

    The ending of `out` chooses the format:

    - `.npz`: `arr_0` uint8 [num_samples, H, W, C] and, with class labels, `arr_1` int64 [num_samples], as guided-diffusion has.
    - `.zip`: PNGs `00000/img00000000.png` and `dataset.json` with the labels or null, as EDM has.
    - Any other: a folder of PNGs `000000/000123.png`, a folder for each 1000 images, and the same `dataset.json`.

    Values in [-1, 1] become 0..255 by `to_uint8`. Images of one channel are grey PNGs (mode L), and have C = 1 in an npz.

    If a call was interrupted or killed, the same call continues: it draws the blocks of `batch_size` images that are not whole
    yet. `manifest.json`, in the folder or the archive, has the arguments and SHA-256 digests of the plan, the weights and the
    labels. Until an archive is whole, its blocks are in the folder `<out>.parts`. A whole one is not drawn again.

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
        dtype: See `Sampler`.
        device: Device to run on. None: the model's. If that is a GPU and there are several processes, each takes the GPU of
            its local rank.
        shape: (C, H, W) of an image, with C = 1 or 3. A folder may have C = 4, and an npz any C. None: `in_channels` and
            `sample_size` of the model's config.
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
        progress=progress,
        num_kept=batch_size,
    )
    labels = None if class_labels is None or request.labels is None else request.labels.cpu()
    files = _files(out, num_samples, shape, None if labels is None else labels.numpy())
    blocks = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]
    with ExitStack() as locks, joined(_CALLER) as team, team.barrier(_APART) as arrive:
        sampler = Sampler(model, plan, dtype=dtype, device=_device(team, model, device), shape=shape)
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
        }
        missing = _missing(team, files, manifest, blocks, locks)
        mine = missing[team.rank :: team.size]
        with _interruptible(team, files, blocks, manifest), _written(team, blocks, missing, progress) as written:
            for block in mine:
                part = slice(block.start, block.stop)
                images = sampler(
                    len(block),
                    seed=request.seeds[part],
                    class_labels=None if labels is None else labels[part],
                    guidance_scale=guidance_scale,
                    progress=False,
                )
                files.write(block, _pixels(images, block))
                written(len(block))
            _wait(arrive(), written)
            if team.is_first:
                files.finish(blocks, manifest)
            _wait(arrive(), written)
    return files.out


def _device(team: Processes, model: Model, device: torch.device | str | None) -> torch.device | str | None:
    """Return the device of this process: a GPU of its own if no device is named."""
    model_device, _ = device_and_dtype(model)
    if device is None and team.size > 1 and model_device.type == "cuda" and isinstance(model, nn.Module):
        return team.own_gpu(_CALLER)
    return device


def _pixels(images: Tensor, block: range) -> Pixels:
    """Return images [N, C, H, W] as uint8 [N, H, W, C]. Raise a ValueError if one is not finite."""
    finite = images.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        index = block.start + int((~finite).nonzero()[0])
        raise InvalidValue(_CALLER, "images", "to be finite", f"NaN or infinity in image {index}")
    pixels: Pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


# --------------------------------------------------------------------------------------------------------------- processes


def _missing(
    team: Processes, files: _Files, manifest: Mapping[str, Any], blocks: Sequence[range], locks: ExitStack
) -> list[range]:
    """Return the blocks that are not written, the same in all processes. Rank 0 locks the folder, and begins what is new."""

    def begin() -> list[float]:
        if not files.folder.exists() and not files.agrees(manifest):  # an archive that is whole needs no folder
            check_free_space(_CALLER, "out", files.out, files.space(blocks[-1].stop))
            try:
                files.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # such as in /proc, where all looks writable
                raise UnusablePath(_CALLER, "out", "to be a path whose folders can be made", error) from error
        if files.folder.exists():
            locks.enter_context(_alone(files))
        is_new = not files.agrees(manifest)
        if is_new:
            files.check_new()
        elif manifest["weights"] is None:
            wanted = f"to be a module with weights or a FrozenUNet to go on with {str(files.out)!r}"
            raise InvalidValue(_CALLER, "model", wanted, "a function or object whose weights are unknown; choose another out")
        files.remove_leftovers()
        missing = [not files.has(block) for block in blocks]
        count = sum(len(block) for block, is_missing in zip(blocks, missing, strict=True) if is_missing)
        check_free_space(_CALLER, "out", files.out, files.space(count))
        if is_new:
            write_json(files.folder / _MANIFEST, manifest)
        if team.store is not None:
            team.store.set(_COUNTER, "0")  # before the others begin
        return [float(each) for each in missing]

    found = team.on_first(begin)
    if found is None and not files.agrees(manifest):
        got = f"{str(files.out)!r}, in which rank {team.rank} finds nothing"
        raise UnusablePath(_CALLER, "out", "to be in a folder that all processes see", got)
    flags = team.from_first(found or [0.0] * len(blocks))
    return [block for block, flag in zip(blocks, flags, strict=True) if flag]


@contextmanager
def _alone(files: _Files) -> Iterator[None]:
    """Hold the folder's lock. Go on without it, with a warning, if the file system has none."""
    with ExitStack() as held:
        try:
            descriptor = os.open(files.folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            held.enter_context(locked(descriptor))
        except BlockingIOError:
            raise BlockingIOError(
                f"{_CALLER}: expected no other call to write to {str(files.out)!r}, got one that still does"
            ) from None
        except OSError as error:
            _log.warning("%s is not locked, so no other call may write to it meanwhile: %s", files.out, error)
        yield


@contextmanager
def _written(
    team: Processes, blocks: Sequence[range], missing: Sequence[range], progress: bool
) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts written images, in the store of all processes, and shows their number in rank 0."""
    total, left = (sum(map(len, some)) for some in (blocks, missing))
    own = 0

    def count(images: int) -> None:
        nonlocal own
        own += images
        if not images and bar is None:
            return  # this process waits, and shows nothing
        everyone = own if team.size == 1 else team.count(_COUNTER, images)
        if bar is not None:
            bar.update(total - left + everyone - bar.n)

    bar: Any = None
    if progress and team.is_first:
        from tqdm.auto import tqdm

        interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs fewer lines than a terminal
        bar = tqdm(total=total, initial=total - left, desc="sampling", unit="image", mininterval=interval)
    try:
        yield count
    finally:
        if bar is not None:
            bar.close()


def _wait(all_arrived: Callable[[], bool], written: Callable[[int], None]) -> None:
    """Wait for the other processes, and show what they write. Ctrl-C ends the wait."""
    while not all_arrived():
        written(0)
        time.sleep(_POLL)
    written(0)


@contextmanager
def _interruptible(team: Processes, files: _Files, blocks: Sequence[range], manifest: Mapping[str, Any]) -> Iterator[None]:
    """Say at Ctrl-C how many images are written, in rank 0."""
    try:
        yield
    except KeyboardInterrupt:
        if not team.is_first:
            raise
        count = sum(len(block) for block in blocks if files.has(block))
        total = blocks[-1].stop
        others = "No call can draw the others there" if manifest["weights"] is None else "Start it again to draw the others"
        raise KeyboardInterrupt(f"{count} of {total} images are written to {files.out}. {others}.") from None


# ------------------------------------------------------------------------------------------------------------------ formats


class _Files(ABC):
    """The files of one call.

    Attributes:
        kind: Name of the format in the manifest.
        channels: Numbers of channels that the format has. None: any.
        out: The result: a folder or an archive.
        folder: The folder that receives blocks and the manifest.
        num_samples: Number of images.
        shape: (C, H, W) of an image.
        labels: int64 [num_samples], or None.
    """

    kind: ClassVar[str]
    channels: ClassVar[tuple[int, ...] | None]

    def __init__(self, out: Path, folder: Path, num_samples: int, shape: Sequence[int], labels: np.ndarray | None) -> None:
        self.out, self.folder, self.num_samples, self.shape, self.labels = out, folder, num_samples, tuple(shape), labels
        if len(shape) != 3 or (self.channels is not None and shape[0] not in self.channels):
            one_of = "" if self.channels is None else f" with C one of {', '.join(map(str, self.channels))}"
            raise InvalidValue(_CALLER, "shape", f"to be (C, H, W){one_of} for {str(out)!r}", tuple(shape))
        check_writable(_CALLER, "out", out, folder if folder == out else out.parent)

    def manifest(self) -> dict[str, Any] | None:
        """Return the fields of the manifest in the folder, or None if there is none."""
        path = self.folder / _MANIFEST
        return read_json(_CALLER, path, _fields) if path.exists() else None

    def agrees(self, wanted: Mapping[str, Any]) -> bool:
        """Return False if there is no manifest. Raise a ValueError if it differs in a field."""
        found = self.manifest()
        if found is None:
            return False
        for name, value in wanted.items():
            if found[name] != value:
                raise InvalidValue(
                    _CALLER,
                    name,
                    f"to be {found[name]}, as in the manifest of {str(self.out)!r}",
                    f"{value}; choose another out for other images",
                )
        return True

    def check_new(self) -> None:
        """Raise an UnusablePath if the folder has files."""
        others = [path for path in self.folder.iterdir() if not path.name.startswith(PREFIX)] if self.folder.exists() else []
        if others:
            got = f"{str(self.out)!r}, as {str(self.folder)!r} has {others[0].name!r} and no {_MANIFEST}"
            raise UnusablePath(_CALLER, "out", "to be new or begun by the same call", got)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed."""
        remove_leftovers(self.folder, 0)

    def space(self, missing: int) -> int:
        """Return the bytes that the disk needs if this number of images is missing."""
        return self.size(missing)

    def size(self, images: int) -> int:
        """Return the bytes of this number of images. A PNG needs about as many at most."""
        return images * math.prod(self.shape)

    @abstractmethod
    def has(self, block: range) -> bool:
        """Return whether a block is whole."""

    @abstractmethod
    def write(self, block: range, pixels: Pixels) -> None:
        """Write a block of images, uint8 [n, H, W, C]."""

    @abstractmethod
    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        """Write what needs all blocks."""


class _Folder(_Files):
    """A folder of PNGs."""

    kind = "folder"
    channels = (1, 3, 4)

    def __init__(self, out: Path, num_samples: int, shape: Sequence[int], labels: np.ndarray | None) -> None:
        super().__init__(out, out, num_samples, shape, labels)

    def remove_leftovers(self) -> None:
        for folder in (self.folder, *self.folder.glob("*/")):
            remove_leftovers(folder, 0)

    def has(self, block: range) -> bool:
        return all(_is_png(self.folder / _folder_name(index)) for index in block)

    def write(self, block: range, pixels: Pixels) -> None:
        for name in {_folder_name(index).parent for index in block}:
            (self.folder / name).mkdir(exist_ok=True)

        def write(index: int, image: Pixels) -> None:
            write_bytes(self.folder / _folder_name(index), _png(image))

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(write, block, pixels))

    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        names = [_folder_name(index).as_posix() for index in range(self.num_samples)]
        write_text(self.folder / _DATASET, _dataset_text(names, self.labels))


class _Archive(_Files):
    """An archive, and a folder beside it with a file for each block until the archive is whole."""

    ending: ClassVar[str]  # a block's file has it

    def __init__(self, out: Path, num_samples: int, shape: Sequence[int], labels: np.ndarray | None) -> None:
        super().__init__(out, out.with_name(f"{out.name}.parts"), num_samples, shape, labels)
        if out.exists() and not out.is_file():
            raise InvalidValue(_CALLER, "out", "to be a file", f"{str(out)!r}, which is a folder or a device")

    def manifest(self) -> dict[str, Any] | None:
        if not self.out.exists():
            return super().manifest()
        try:
            with zipfile.ZipFile(self.out) as archive, archive.open(_MANIFEST) as member:
                content = member.read(1 << 20)
        except Exception as error:  # damaged archives raise errors of many types
            got = f"{str(self.out)!r}: {error}"
            raise UnusablePath(_CALLER, "out", "to be new or written by the same call", got) from error
        return parsed_json(_CALLER, self.out, content, _fields)

    def space(self, missing: int) -> int:
        return 0 if self.out.exists() else self.size(missing) + self.size(self.num_samples)

    def has(self, block: range) -> bool:
        return self.out.exists() or self.is_part(self.part(block), block)

    def write(self, block: range, pixels: Pixels) -> None:
        write_bytes(self.part(block), self.encoded(block, pixels))

    def finish(self, blocks: Sequence[range], manifest: Mapping[str, Any]) -> None:
        if not self.out.exists():
            whole = self.folder / self.out.name  # a process that is killed leaves no file beside the result
            with replacing(whole) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                self.add(archive, blocks)
                archive.writestr(zipfile.ZipInfo(_MANIFEST), json_text(manifest))
            whole.replace(self.out)
            flush_names(self.out.parent)
        if self.folder.exists():
            for path in self.folder.iterdir():
                if path.name == self.out.name or re.fullmatch(rf"\d{{10}}\{self.ending}", path.name):
                    path.unlink()
            (self.folder / _MANIFEST).unlink(missing_ok=True)
            with suppress(OSError):  # it has files of others
                self.folder.rmdir()

    def part(self, block: range) -> Path:
        """Return the file of a block."""
        return self.folder / f"{block.start:010d}{self.ending}"

    @abstractmethod
    def is_part(self, path: Path, block: range) -> bool:
        """Return whether a file holds a whole block."""

    @abstractmethod
    def encoded(self, block: range, pixels: Pixels) -> bytes:
        """Return the content of a block's file."""

    @abstractmethod
    def add(self, archive: zipfile.ZipFile, blocks: Sequence[range]) -> None:
        """Copy the blocks' files to the archive, one at a time, and add the labels."""


class _Npz(_Archive):
    """An npz as guided-diffusion has it. A block's file is an npy."""

    kind = "npz"
    channels = None
    ending = ".npy"

    def is_part(self, path: Path, block: range) -> bool:
        header = self.header(len(block))
        with suppress(OSError), path.open("rb") as file:
            whole = len(header) + self.size(len(block))
            return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == whole
        return False

    def encoded(self, block: range, pixels: Pixels) -> bytes:
        return self.header(len(block)) + pixels.tobytes()

    def header(self, images: int) -> bytes:
        """Return what an npy of this number of images begins with."""
        channels, height, width = self.shape
        return _npy_header((images, height, width, channels), "|u1")

    def add(self, archive: zipfile.ZipFile, blocks: Sequence[range]) -> None:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            member.write(self.header(self.num_samples))
            for block in blocks:
                with self.part(block).open("rb") as part:
                    part.seek(len(self.header(len(block))))
                    shutil.copyfileobj(part, member)
        if self.labels is not None:
            header = _npy_header(self.labels.shape, "<i8")
            archive.writestr(zipfile.ZipInfo("arr_1.npy"), header + self.labels.astype("<i8").tobytes())


class _Zip(_Archive):
    """A zip as EDM has it. A block's file is a zip of its PNGs."""

    kind = "zip"
    channels = (1, 3)
    ending = ".zip"

    def is_part(self, path: Path, block: range) -> bool:
        try:
            with zipfile.ZipFile(path) as part:
                return part.namelist() == [_zip_name(index) for index in block] and part.testzip() is None
        except Exception:  # damaged archives raise errors of many types
            return False

    def encoded(self, block: range, pixels: Pixels) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as part:
            for index, image in zip(block, pixels, strict=True):
                part.writestr(zipfile.ZipInfo(_zip_name(index)), _png(image))
        return content.getvalue()

    def add(self, archive: zipfile.ZipFile, blocks: Sequence[range]) -> None:
        for block in blocks:
            with zipfile.ZipFile(self.part(block)) as part:
                for name in part.namelist():
                    archive.writestr(zipfile.ZipInfo(name), part.read(name))
        names = [_zip_name(index) for index in range(self.num_samples)]
        archive.writestr(zipfile.ZipInfo(_DATASET), _dataset_text(names, self.labels))


def _files(
    out: str | os.PathLike[str], num_samples: int, shape: Sequence[int], labels: np.ndarray | None
) -> _Folder | _Npz | _Zip:
    """Return the files of a call, in the format that the ending of `out` chooses."""
    text = os.fspath(out).lower()
    kind = _Npz if text.endswith(".npz") else _Zip if text.endswith(".zip") else _Folder
    return kind(Path(out), num_samples, shape, labels)


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the checked fields of a manifest."""
    import msgspec

    from .schemas import SampleManifest

    return msgspec.structs.asdict(msgspec.convert(values, SampleManifest))


def _folder_name(index: int) -> Path:
    return Path(f"{index - index % 1000:06d}", f"{index:06d}.png")


def _zip_name(index: int) -> str:
    return f"{index:08d}"[:5] + f"/img{index:08d}.png"


def _png(image: Pixels) -> bytes:
    """Return a picture [H, W, C] as PNG."""
    from PIL import Image

    content = io.BytesIO()
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    picture.save(content, format="PNG", compress_level=6)
    return content.getvalue()


def _is_png(path: Path) -> bool:
    """Return whether a file ends as a whole PNG does."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-len(_PNG_END), os.SEEK_END)
        return file.read() == _PNG_END
    return False


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": shape})
    return content.getvalue()


def _dataset_text(names: Sequence[str], labels: np.ndarray | None) -> str:
    """Return EDM's dataset.json."""
    pairs = None if labels is None else [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
    return json.dumps({"labels": pairs})


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
