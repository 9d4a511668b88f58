"""Features of the Inception network and what is computed from them: FID, KID and the Inception Score."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..errors import InvalidValue, expect
from ..files.writing import file_sha256, write_tensors
from ..nn.checkpoint import check_finite, load_safetensors, load_tensors
from ..resources import import_extra
from ..sampling.progress import progress_bar
from .frechet import Moments, frechet_distance

FEATURES: Final = 2048
_BLOCK: Final = 32  # images that the network reads at once: its bits can depend on their number
_PART: Final = 8 * _BLOCK  # images of a file
_FILE: Final = "weights-inception-2015-12-05-6726825d.pth"
_DIGEST: Final = "6726825d"  # begins the SHA-256 of the weights by which FIDs are compared
_URL: Final = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_FILE}"


@dataclass(frozen=True)
class Inception:
    """torch-fidelity's Inception network, with its own resizing to 299x299.

    Attributes:
        network: From uint8 [N, 3, H, W] to features [N, 2048] and logits without their bias [N, 1008].
        digest: The SHA-256 of the file of its weights.
    """

    network: nn.Module
    digest: str

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.network.parameters()).device

    @property
    def is_standard(self) -> bool:
        """True for the weights by which FIDs are compared."""
        return self.digest.startswith(_DIGEST)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the features and logits of uint8 images [N, 1 or 3, H, W], on the CPU. Grey is repeated."""
        found = list[list[Tensor]]()
        is_gpu = self.device.type == "cuda"
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if is_gpu else nullcontext():
            for block in pixels.expand(-1, 3, -1, -1).split(_BLOCK):
                padded = torch.cat([block, block.new_zeros(_BLOCK - len(block), *block.shape[1:])])
                found.append([each[: len(block)].cpu() for each in self.network(padded.to(self.device))])
        features, logits = (torch.cat(each) for each in zip(*found, strict=True))
        return {"features": features, "logits": logits}


def load_inception(caller: str, path: str | os.PathLike[str] | None, device: torch.device) -> Inception:
    """Load the network. Nothing is unpickled.

    Args:
        caller: Name of the calling function for error messages.
        path: File of the weights. None: the standard ones, in PyTorch's cache or downloaded into it.
        device: Where it will run.

    Raises:
        OSError: The weights cannot be downloaded.
        ValueError: The file is damaged or has other weights.
        ImportError: torch-fidelity is missing.
    """
    extractor = import_extra("torch_fidelity.feature_extractor_inceptionv3", "metrics").FeatureExtractorInceptionV3
    file = Path(torch.hub.get_dir(), "checkpoints", _FILE) if path is None else Path(path)
    if path is None and not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_URL, str(file), _DIGEST)
        except Exception as error:  # those of the connection have many types
            wanted = f"the weights of Inception in {str(file)!r} or from {_URL}"
            remedy = f"get the file elsewhere (its SHA-256 begins with {_DIGEST}), and put it there or pass it as --inception"
            raise OSError(f"{caller}: expected {wanted}, got: {error}; to do without that connection, {remedy}") from error
    digest = file_sha256(file)
    wanted = f"to have a SHA-256 that begins with {_DIGEST}"
    expect(path is not None or digest.startswith(_DIGEST), caller, repr(str(file)), wanted, digest)
    weights = load_tensors(caller, file)
    with tempfile.TemporaryDirectory() as folder:  # the extractor would unpickle whatever a file holds
        copy = Path(folder, "weights.pth")
        torch.save(weights, copy)
        try:
            network = extractor("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy))
        except (RuntimeError, TypeError, AttributeError) as error:  # load_state_dict's
            reason = str(error).partition("\n")[0]
            raise InvalidValue(caller, repr(str(file)), "to hold torch-fidelity's weights of Inception", reason) from error
    floating = {name: each for name, each in network.state_dict().items() if each.is_floating_point()}
    check_finite(caller, file, floating)
    return Inception(network.to(device), digest)


def write_features(
    inception: Inception,
    folder: Path,
    count: int,
    read: Callable[[range], Tensor],
    processes: Processes,
    *,
    progress: bool = True,
) -> list[Path]:
    """Write the features of images to safetensors files, each of 256 images. Those that are there are not computed again.

    A file's name is a digest of the weights, the kind of device and the images, so a file is never that of others. It holds the
    SHA-256 of its features, and is written again if they have another one. Each process computes its share. They see the same
    file system.

    Args:
        inception: The network.
        folder: The folder of the files. It exists.
        count: Number of images.
        read: Returns uint8 images [N, 1 or 3, H, W] by their numbers.
        processes: The processes.
        progress: Show a bar in rank 0, of its share.

    Returns:
        The files, in the order of the images, in every process.

    Raises:
        ValueError: A feature is not finite.
    """
    parts = [range(i, min(i + _PART, count)) for i in range(0, count, _PART)]
    mine, names = parts[processes.rank :: processes.size], list[str]()
    with progress_bar(sum(map(len, mine)), "inception", "image", shown=progress and processes.is_first) as bar:
        for part in mine:
            pixels = read(part).contiguous()
            key = f"{inception.digest} {inception.device.type} {list(pixels.shape)}".encode() + pixels.numpy().tobytes()
            file = folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"
            if not _is_whole(file):
                found = inception(pixels)
                wanted = f"to give finite features of images {part.start} to {part.stop - 1}"
                finite = all(each.isfinite().all() for each in found.values())
                expect(finite, "evaluate", "inception", wanted, "NaN or infinity")
                write_tensors(file, found, {"sha256": _sha256(found)})
            names.append(file.name)
            bar.update(len(part))
    shares = processes.from_all(names)
    return [folder / shares[i % processes.size][i // processes.size] for i in range(len(parts))]


def _is_whole(file: Path) -> bool:
    """Return whether a file holds features and their SHA-256."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            named, names = opened.metadata() or {}, opened.keys()
            return bool(named.get("sha256") == _sha256({name: opened.get_tensor(name) for name in names}))
    except (OSError, SafetensorError):
        return False


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of contiguous tensors on the CPU by name."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def read_features(files: Sequence[Path], name: str = "features") -> Tensor:
    """Return what `write_features` has written, "features" float32 [N, 2048] or "logits" [N, 1008]."""
    return torch.cat([load_safetensors("evaluate", file)[name] for file in files])


def moments(files: Sequence[Path]) -> Moments:
    """Return the moments of the features in files, in float64. The files' sums are added in one tree, ((0 + 1) + (2 + 3)) + ...

    So their bits do not depend on the number of processes that wrote them.
    """
    count, total, products = _sums(files)
    mean = total / count
    return Moments(mean, (products - count * mean.outer(mean)) / (count - 1))


def _sums(files: Sequence[Path]) -> tuple[int, Tensor, Tensor]:
    if len(files) == 1:
        x = read_features(files).double()
        return len(x), x.sum(0), x.T @ x
    half = 1 << (len(files) - 1).bit_length() - 1
    left, right = _sums(files[:half]), _sums(files[half:])
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def scores(images: Sequence[Path], reference: Sequence[Path] | Moments) -> dict[str, Any]:
    """Return the Frechet distance, KID unless the reference has moments alone, and the Inception Score of enough images.

    KID and the Inception Score are torch-fidelity's, with its defaults: 100 subsets of 1000 images, or of all where there are
    fewer, and 10 parts.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last digits of products and roots can depend on their number
    try:
        known = reference if isinstance(reference, Moments) else moments(reference)
        found: dict[str, Any] = {"frechet_distance": frechet_distance(moments(images), known)}
    finally:
        torch.set_num_threads(threads)
    if not isinstance(reference, Moments):
        features = read_features(images), read_features(reference)
        found |= kid_features_to_metric(*features, kid_subset_size=min(1000, *map(len, features)), verbose=False)
    logits = read_features(images, "logits")
    if len(logits) > FEATURES:  # the score of few is bounded by their number
        found |= isc_features_to_metric(logits)
    return found
