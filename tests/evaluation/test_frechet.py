"""The Frechet distance against its closed form, and against SciPy's matrix root."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import frechet_distance


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


@pytest.mark.parametrize(("a", "b"), [((4, 4), (50, 4)), ((50, 4), (50, 3)), ((50,), (50, 4))])
def test_too_few_rows_and_other_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"frechet_distance: expected a and b to be features \[N, D\] and \[M, D\]"):
        frechet_distance(torch.zeros(a), torch.zeros(b))
