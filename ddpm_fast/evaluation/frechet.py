"""The Frechet distance between two sets of images, from their features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_float
from ..errors import InvalidValue, expect
from ..inference import Interface
from ..inference.model import device_and_dtype, evaluation_mode
from ..nn import UNet


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the Frechet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64 (Heusel et al. 2017, eq. 6).

    Args:
        a: Features [N, D]. N is above D, so that the covariance can have full rank.
        b: Features [M, D]. M is above D too.

    Raises:
        ValueError: The shapes do not fit, there are too few rows, or a feature is not finite.
        TypeError: An argument is not a floating tensor.
    """
    for name, features in (("a", a), ("b", b)):
        check_float("frechet_distance", name, features)
        if features.is_meta or not features.isfinite().all():
            got = "a tensor on the meta device" if features.is_meta else "NaN or infinity"
            raise InvalidValue("frechet_distance", name, "to have finite values", got)
    expect(
        a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] < min(len(a), len(b)),
        "frechet_distance",
        "a and b",
        "to be features [N, D] and [M, D] with N and M above D",
        f"{list(a.shape)} and {list(b.shape)}",
    )
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(each.T)) for each in (a, b))  # torch.cov of one feature is 0-d
    # tr (cov_a cov_b)^(1/2) is the sum of the roots of the eigenvalues of the symmetric r cov_b r, r = cov_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * overlap))


@torch.inference_mode()
def network_features(model: UNet, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return what the middle block of a network computes of images, at timestep 0 and without a class: its means over pixels.

    The Frechet distance of such features ranks samplers of one network.

    Args:
        model: The network, with D channels in its middle block.
        images: [N, C, H, W] in [-1, 1].
        batch_size: Run this many images at a time.

    Returns:
        float32 [N, D] on the CPU.
    """
    device, dtype = device_and_dtype(model)
    no_label, found = Interface.of(model).no_label, list[Tensor]()
    keep = model.mid_block.register_forward_hook(lambda block, given, h: found.append(h.float().mean(dim=(2, 3)).cpu()))
    with keep, evaluation_mode(model):
        for x in images.to(device, dtype).split(batch_size):
            model(x, 0, None if no_label is None else torch.full((len(x),), no_label, device=device))
    return torch.cat(found)
