"""FID, KID and the Inception Score, by torchmetrics on features of torch-fidelity's Inception network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor, nn

from ..distributed.processes import Processes, together
from ..errors import InvalidValue, expect
from ..nn.checkpoint import load_tensors
from ..resources import import_extra
from ..sampling.progress import progress_bar

FEATURES: Final = 2048
_SUBSET: Final = 1000  # images of a subset of KID


class _Features(nn.Identity):
    """The features themselves, in place of the network that torchmetrics would run once for each figure."""

    num_features = FEATURES


def load_inception(weights: str | os.PathLike[str] | None, device: torch.device) -> nn.Module:
    """Return torch-fidelity's network, from uint8 [N, 3, H, W] to features [N, 2048] and logits without their bias [N, 1008].

    Args:
        weights: File of the weights. None: the standard ones, in PyTorch's cache or downloaded into it.
        device: Where it runs.

    Raises:
        ImportError: torch-fidelity is missing.
        ValueError: The weights cannot be had, or do not fit.
    """
    extractor = import_extra("torch_fidelity.feature_extractor_inceptionv3", "eval").FeatureExtractorInceptionV3
    if weights is not None:
        load_tensors(weights)  # refuses what torch-fidelity would unpickle
    try:
        network: nn.Module = extractor("inception", ["2048", "logits_unbiased"], None if weights is None else str(weights))
    except Exception as error:  # those of the connection and of damaged files have many types
        got = f"{weights}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InvalidValue("inception", "to be weights of torch-fidelity's network, downloaded or in a file", got) from error
    return network.to(device)


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
        torch.manual_seed(0)  # which draws subsets and parts
        kernel_mean, kernel_std = kernel.compute()
        figures = {
            "frechet_distance": distance.compute(),
            "kernel_inception_distance_mean": kernel_mean,
            "kernel_inception_distance_std": kernel_std,
        }
        if counts[0] > FEATURES:  # the score of few is bounded by their number
            figures |= dict(zip(("inception_score_mean", "inception_score_std"), score.compute(), strict=True))
    return {name: float(value) for name, value in figures.items()}
