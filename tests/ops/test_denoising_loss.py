"""Weights of the samples' losses."""

from __future__ import annotations

import pytest
import torch
from op_cases import SCHEDULE

from ddpm_fast import NoiseSchedule, Objective, denoising_loss, q_sample, sample_seeds


def test_q_sample_takes_the_objective_of_the_loss() -> None:
    x_0, objective = torch.ones(2, 1, 4, 4), Objective(NoiseSchedule.cosine(10), "v_prediction")
    seeds = sample_seeds(0, 2)
    assert torch.equal(q_sample(x_0, 3, objective, seeds=seeds), q_sample(x_0, 3, objective.schedule, seeds=seeds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_multiplies_its_samples_loss(dtype: torch.dtype) -> None:
    x_0, output = torch.randn(2, 3, 2, 4, 4, dtype=dtype)
    weight, t, seeds = torch.tensor([0.25, 2.0, 0.0]), torch.tensor([3, 300, 999]), sample_seeds(0, 3)
    losses = denoising_loss(output, x_0, t, SCHEDULE, seeds=seeds, reduction="none")
    weighted = denoising_loss(output, x_0, t, SCHEDULE, seeds=seeds, weight=weight, reduction="none")
    assert weighted.dtype == dtype
    assert torch.equal(weighted, losses * weight)
    mean = denoising_loss(output, x_0, t, SCHEDULE, seeds=seeds, weight=weight)
    assert torch.equal(mean, weighted.mean())  # over samples, not over weights
    total = denoising_loss(output, x_0, t, SCHEDULE, seeds=seeds, weight=weight, reduction="sum")
    assert torch.equal(total, weighted.sum())
