"""FID, KID and the Inception Score, by torchmetrics on features of torch-fidelity's Inception network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from ..distributed.processes import Processes, together
from ..errors import InvalidValue, UnusablePath, expect
from ..files.writing import file_sha256
from ..nn.checkpoint import load_tensors
from ..resources import import_extra
from ..sampling.progress import progress_bar

FEATURES: Final = 2048
STANDARD: Final = "6726825d"
"""What the SHA-256 of the weights begins with by which FIDs are compared."""
_SUBSET: Final = 1000  # images of a subset of KID


class _Features(nn.Identity):
    """The features themselves, in place of the network that torchmetrics would run once for each figure."""

    num_features = FEATURES


def load_inception(weights: str | os.PathLike[str] | None, device: torch.device) -> tuple[nn.Module, str]:
    """Return torch-fidelity's network and the SHA-256 of its weights. Nothing is unpickled.

    It maps uint8 [N, 3, H, W] to features [N, 2048] and logits without their bias [N, 1008].

    Args:
        weights: File of the weights. None: the standard ones, in PyTorch's cache or downloaded into it.
        device: Where it runs.

    Raises:
        OSError: The weights cannot be downloaded.
        ValueError: The file is damaged or has other weights.
        ImportError: torch-fidelity is missing.
    """
    fidelity = import_extra("torch_fidelity.feature_extractor_inceptionv3", "eval")
    file = Path(torch.hub.get_dir(), "checkpoints", Path(fidelity.URL_INCEPTION_V3).name) if weights is None else Path(weights)
    if weights is None and not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(fidelity.URL_INCEPTION_V3, str(file), STANDARD)
        except Exception as error:  # those of the connection have many types
            wanted, remedy = (
                f"the weights of Inception from {fidelity.URL_INCEPTION_V3}",
                f"put them at {file} or pass --inception",
            )
            raise UnusablePath("", wanted, f"{error}; {remedy}") from error
    digest = file_sha256(file)
    wanted = f"to have a SHA-256 that begins with {STANDARD}"
    expect(weights is not None or digest.startswith(STANDARD), repr(str(file)), wanted, digest)
    load_tensors(file)  # refuses what torch-fidelity would unpickle
    try:
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))
    except (RuntimeError, TypeError, AttributeError) as error:  # load_state_dict's
        reason = str(error).partition("\n")[0]
        raise InvalidValue(repr(str(file)), "to hold torch-fidelity's weights of Inception", reason) from error
    return network.to(device), digest


@torch.inference_mode()
def inception_scores(
    network: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: Callable[[range], Tensor],
    reference: Callable[[range], Tensor],
    counts: tuple[int, int],
    processes: Processes,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = True,
) -> dict[str, float]:
    """Return the Frechet distance, KID, and the Inception Score of enough images. Each process reads its share of the images.

    KID has 100 subsets of 1000 images, or of all if there are fewer. The Inception Score has 10 parts.

    Args:
        network: See `load_inception`.
        images: Returns uint8 images [N, 1 or 3, H, W] by their numbers. Grey is repeated.
        reference: The same for those that they are compared with.
        counts: Numbers of both.
        processes: The processes.
        batch_size: Images that the network reads at once.
        device: Its device.
        progress: Show a bar in rank 0, of its share.

    Raises:
        ValueError: A feature is not finite, or there are fewer images than processes.
        ProcessLost: Another process has failed or ended.
    """
    metrics = import_extra("torchmetrics.image", "eval")
    fits = min(counts) >= processes.size
    expect(fits, "images", f"to be {processes.size} or more, one for each process", min(counts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they keep features in memory
        group = {"process_group": processes.control}  # its tensors are on the CPU
        distance = metrics.FrechetInceptionDistance(_Features(), **group)
        kernel = metrics.KernelInceptionDistance(_Features(), subset_size=min(_SUBSET, *counts), **group)
        score = metrics.InceptionScore(_Features(), **group)
    cuda = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext()
    # Contiguous shares: their features are gathered in the order of the images, whatever the number of processes.
    shares = [range(*(count * (processes.rank + i) // processes.size for i in (0, 1))) for count in counts]
    with cuda, progress_bar(sum(map(len, shares)), "inception", "image", shown=progress and processes.is_first) as bar:
        for read, share, real in zip((images, reference), shares, (False, True), strict=True):
            found = list[tuple[Tensor, ...]]()
            for part in (share[i : i + batch_size] for i in range(0, len(share), batch_size)):
                found.append(tuple(each.cpu() for each in network(read(part).expand(-1, 3, -1, -1).to(device))))
                wanted = f"to give finite features of images {part.start} to {part.stop - 1}"
                expect(all(each.isfinite().all() for each in found[-1]), "inception", wanted, "NaN or infinity")
                bar.update(len(part))
            features, logits = map(torch.cat, zip(*found, strict=True))
            # One update each, because processes may have different numbers of batches.
            distance.update(features, real=real)
            kernel.update(features.double(), real=real)
            if not real:
                score.update(logits)
    with together(), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)  # which draws subsets and parts
        kernel_mean, kernel_std = kernel.compute()
        figures = {
            "frechet_distance": distance.compute(),
            "kernel_inception_distance_mean": kernel_mean,
            "kernel_inception_distance_std": kernel_std,
        }
        if counts[0] > FEATURES:  # the score of few is bounded by their number
            figures |= dict(zip(("inception_score_mean", "inception_score_std"), score.compute(), strict=True))
    return {name: float(value) for name, value in figures.items()}
