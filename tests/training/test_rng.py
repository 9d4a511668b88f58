"""The order of the images and the draws of training, as functions of (seed, step)."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from ddpm_fast.training.rng import TrainingRng


def test_every_epoch_is_a_permutation_and_batches_run_across_its_end() -> None:
    draws = TrainingRng(seed=5, batch_size=4)
    order = torch.cat([draws.indices(step, 10) for step in range(10)])  # four epochs of ten
    epochs = order.view(4, 10)
    assert epochs.sort(dim=1).values.eq(torch.arange(10)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    # The global sample index decides, not how the samples are cut into batches; a batch may span several epochs.
    assert torch.equal(TrainingRng(seed=5, batch_size=20).indices(1, 10), order[20:])
    assert not torch.equal(TrainingRng(seed=6, batch_size=20).indices(1, 10), order[20:])


@pytest.mark.parametrize("size", [1, 2, 3, 6, 33, 64, 65, 1000])
def test_permutations_hold_each_item_once_and_each_place_has_any_item(size: int) -> None:
    epochs = TrainingRng(seed=1, batch_size=size).indices(0, size, num_steps=400).view(400, size)
    assert epochs.sort(dim=1).values.eq(torch.arange(size)).all()
    if size in (3, 6, 33, 64, 65):  # chi-square of the item at each place, in standard deviations
        counts = torch.stack([torch.bincount(place, minlength=size) for place in epochs.T]).double()
        freedom = (size - 1) ** 2
        excess = float(((counts - 400 / size) ** 2 / (400 / size)).sum()) - freedom
        assert abs(excess) < 4 * (2 * freedom) ** 0.5  # the draws are fixed: this passes always or never


def test_small_permutations_are_all_as_likely() -> None:
    perms = TrainingRng(seed=1, batch_size=4).indices(0, 4, num_steps=2400).view(2400, 4)
    counts = torch.bincount(perms @ torch.tensor([64, 16, 4, 1])).double()
    counts = counts[counts > 0]
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: above 49.7 with probability 0.001.
    assert float(((counts - 100) ** 2 / 100).sum()) < 49.7


def test_an_epoch_takes_no_memory_and_sample_numbers_are_64_bits_wide() -> None:
    tracemalloc.start()
    draws = TrainingRng(seed=5, batch_size=1 << 14)
    for step in (0, 1 << 40):
        indices = draws.indices(step, 10**12)
        assert len(indices.unique()) == 1 << 14
        assert 0 <= int(indices.min()) < int(indices.max()) < 10**12
        draws.timesteps(step, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20
    # The samples below 2^32 have the seeds that they had when numbers were 32 bits wide; those above have others.
    assert not torch.equal(draws.sample_seeds(0), draws.sample_seeds(1 << 18))


def test_draws_are_functions_of_seed_and_sample() -> None:
    small, large = TrainingRng(3, 8), TrainingRng(3, 16)
    for draw in ("sample_seeds", "condition_seeds", "is_flipped"):
        halves = torch.cat([getattr(small, draw)(step) for step in (4, 5)])
        assert torch.equal(halves, getattr(large, draw)(2)), draw
    assert torch.equal(torch.cat([small.timesteps(step, 1000) for step in (4, 5)]), large.timesteps(2, 1000))
    assert torch.equal(torch.cat([small.label_is_dropped(s, 0.5) for s in (4, 5)]), large.label_is_dropped(2, 0.5))
    assert len({small.torch_seed(step) for step in range(20)}) == 20


def test_draws_have_the_distribution_they_claim() -> None:
    n = 20_000
    draws = TrainingRng(0, n)
    counts = torch.bincount(draws.timesteps(0, 10), minlength=10).double()
    # Chi-square with 9 degrees of freedom: above 27.9 with probability 0.001. The draws are fixed: this passes always or never.
    assert float(((counts - n / 10) ** 2 / (n / 10)).sum()) < 27.9
    for share, drawn in ((0.1, draws.label_is_dropped(0, 0.1)), (0.5, draws.is_flipped(0))):
        deviation = (share * (1 - share) / n) ** 0.5
        assert abs(float(drawn.double().mean()) - share) < 3.3 * deviation
    assert not draws.label_is_dropped(0, 0.0).any()
    assert draws.label_is_dropped(0, 1.0).all()
