"""The Frechet distance between two sets of images, from their features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_float
from ..errors import InvalidValue, expect


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
