"""The Frechet distance against its closed form, and against SciPy's matrix root."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_fast import Moments, frechet_distance


def features(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_identical_sets_have_distance_0() -> None:
    assert frechet_distance(features(50), features(50)[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_feature_has_the_closed_form(dtype: torch.dtype) -> None:
    a, b = features(50, 1).to(dtype), features(70, 1, seed=1).to(dtype) * 3 + 1
    wide = a.double(), b.double()
    expected = (wide[0].mean() - wide[1].mean()).square() + (wide[0].std() - wide[1].std()).square()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_covariances_that_do_not_commute_give_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(60) @ features(4, seed=1), features(70, seed=2) @ features(4, seed=3)
    product = torch.cov(a.T) @ torch.cov(b.T)
    root = float(linalg.sqrtm(product.numpy()).real.trace())
    expected = float((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


NO_COVARIANCE = "to have a covariance, which is symmetric and has no negative eigenvalue"
ROWS = r"to be features \[N, D\] with N above D"


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (torch.zeros(4, 4), torch.zeros(50, 4), f"a {ROWS}"),
        (torch.zeros(50), torch.zeros(50, 4), f"a {ROWS}"),
        (torch.zeros(50, 4), torch.zeros(3, 4), f"b {ROWS}"),
        (torch.zeros(50, 4), torch.zeros(50, 3), "a and b to have equally many features, got 4 and 3"),
        (torch.zeros(50, 4), Moments(torch.zeros(4), torch.zeros(4, 3)), r"b to be moments \[D\] and \[D, D\], got \[4\] and"),
        (torch.zeros(50, 4), Moments(torch.zeros(4), torch.full((4, 4), math.nan)), "b to have finite values"),
        (Moments(torch.zeros(4), -torch.eye(4)), torch.zeros(50, 4), f"a {NO_COVARIANCE}, got another matrix"),
        (torch.zeros(50, 4), Moments(torch.zeros(4), torch.ones(4, 4).tril()), f"b {NO_COVARIANCE}, got another matrix"),
        (Moments(torch.zeros(2), 1 - torch.eye(2)), torch.zeros(50, 2), f"a {NO_COVARIANCE}, got another matrix"),
        # The first has no variance where the second's is negative.
        (Moments(torch.zeros(2), torch.ones(2, 2)), Moments(torch.zeros(2), 1 - torch.eye(2)), f"b {NO_COVARIANCE}"),
    ],
)
def test_too_few_rows_and_other_shapes_are_refused(a: torch.Tensor, b: torch.Tensor | Moments, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"frechet_distance: expected {wanted}"):
        frechet_distance(a, b)


def test_moments_give_the_distance_of_their_features() -> None:
    a, b = features(60), features(70, seed=2)
    moments = Moments(b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, moments) == frechet_distance(a, b) == pytest.approx(frechet_distance(moments, a), rel=1e-9)


def test_sets_that_vary_in_other_directions_have_a_distance() -> None:
    """The overlap of their covariances is rounding alone, also below 0."""
    directions = torch.linalg.qr(features(8)[:, :4])[0].double()  # [8, 4]
    a, b = (Moments(torch.zeros(8), part @ part.T) for part in directions.split(2, 1))
    assert frechet_distance(a, b) == pytest.approx(4, abs=1e-5)
