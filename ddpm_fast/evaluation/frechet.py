"""The Frechet distance between two sets of images, from their features."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..checks import check_float
from ..errors import InvalidValue, expect, public
from ..inference import interface_of
from ..inference.model import device_and_dtype, evaluation_mode
from ..nn import UNet

_ROUNDING: Final = 1e-5  # errors of a float32 covariance, relative to its largest value


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] of features. Floating."""

    mean: Tensor
    cov: Tensor


@public()
def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Compute the Frechet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64 (Heusel et al. 2017, eq. 6).

    Args:
        a: Features [N, D], or their `Moments`. N is above D, so that the covariance can have full rank.
        b: Features [M, D], or their `Moments`. M is above D too.

    Raises:
        ValueError: The shapes do not fit, there are too few rows, a value is not finite, or `Moments` have a matrix that is
            no covariance.
        TypeError: An argument is not floating.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments("a", a), _moments("b", b)
    expect(len(mean_a) == len(mean_b), "a and b", "to have equally many features", f"{len(mean_a)} and {len(mean_b)}")
    # tr (cov_a cov_b)^(1/2) is the sum of the roots of the eigenvalues of the symmetric r cov_b r, r = cov_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * overlap))


def _moments(name: str, given: Tensor | Moments) -> Moments:
    """Return mean and covariance in float64. Raise unless they are finite and fit."""
    for values in given if isinstance(given, tuple) else (given,):
        check_float(name, values)
        if values.is_meta or not values.isfinite().all():
            got = "a tensor on the meta device" if values.is_meta else "NaN or infinity"
            raise InvalidValue(name, "to have finite values", got)
    if isinstance(given, Tensor):
        fits = given.dim() == 2 and 0 < given.shape[1] < len(given)
        expect(fits, name, "to be features [N, D] with N above D", list(given.shape))
        given = given.double()
        return Moments(given.mean(0), torch.atleast_2d(torch.cov(given.T)))  # torch.cov of one feature is 0-d
    mean, cov = given
    fits = mean.dim() == 1 and mean.numel() > 0 and cov.shape == (len(mean), len(mean))
    expect(fits, name, "to be moments [D] and [D, D]", f"{list(mean.shape)} and {list(cov.shape)}")
    mean, cov = mean.double(), cov.double()
    error = _ROUNDING * cov.abs().max()
    fits = bool((cov - cov.T).abs().max() <= error) and bool(torch.linalg.eigvalsh(cov).min() >= -error)
    expect(fits, name, "to have a covariance, which is symmetric and has no negative eigenvalue", "another matrix")
    return Moments(mean, cov)


@torch.inference_mode()
def network_features(model: UNet, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return what the middle block of a network computes of images, at timestep 0 and without a class: its means over pixels.

    The Frechet distance of such features ranks samplers of one network. Without a label for no class, all are of class 0.

    Args:
        model: The network, with D channels in its middle block.
        images: [N, C, H, W] in [-1, 1].
        batch_size: Run this many images at a time.

    Returns:
        float32 [N, D] on the CPU.
    """
    device, dtype = device_and_dtype(model)
    labels, found = interface_of(model).labels, list[Tensor]()
    keep = model.mid_block.register_forward_hook(lambda block, given, h: found.append(h.float().mean(dim=(2, 3)).cpu()))
    with keep, evaluation_mode(model):
        for x in images.to(device, dtype).split(batch_size):
            model(x, 0, labels.blank(len(x)).to(device) if labels.reads else None)
    return torch.cat(found)
