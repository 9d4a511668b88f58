"""Random draws of a training run, counter-based like the noise of the ops.

A resumed run needs no generator state.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..ops import sample_seeds


class TrainingRng:
    """Random draws of a training run as pure functions of seed and step.

    Step k with batch size B uses the global samples k B .. (k + 1) B - 1. Each method returns one row per
    sample, a function of (seed, global sample index). Each purpose has its own key, derived from the seed
    by Philox, so the draws are independent.

    Args:
        seed: Seed of the run.
        batch_size: B.
    """

    def __init__(self, seed: int, batch_size: int) -> None:
        self._batch_size = batch_size
        keys = sample_seeds(seed, 7).tolist()
        self._order, self._timesteps, self._noise, self._label_dropout, self._flips, self._torch, self.weights_seed = keys

    def _words(self, key: int, step: int) -> Tensor:
        """Return 63 random bits for each sample of the step, int64 [B] >= 0."""
        return sample_seeds(key, self._batch_size, step * self._batch_size) & 0x7FFFFFFFFFFFFFFF

    def indices(self, step: int, size: int) -> Tensor:
        """Return indices into a data set of `size` images, int64 [B].

        Each epoch is a new permutation. Batches continue across its end.
        """
        samples = torch.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs = samples // size
        return torch.cat(
            [_permutation(self._order, epoch, size)[samples[epochs == epoch] % size] for epoch in epochs.unique().tolist()]
        )

    def timesteps(self, step: int, num_timesteps: int) -> Tensor:
        """Return timesteps t, uniform in 0 .. num_timesteps - 1, int64 [B]."""
        return self._words(self._timesteps, step) % num_timesteps

    def sample_seeds(self, step: int) -> Tensor:
        """Return the seeds of the samples' noise and dropout, int64 [B]."""
        return sample_seeds(self._noise, self._batch_size, step * self._batch_size)

    def label_is_dropped(self, step: int, probability: float) -> Tensor:
        """Return which samples are trained without their label, bool [B], true with `probability`."""
        uniform = (self._words(self._label_dropout, step) >> 10).double() * 2.0**-53  # in [0, 1)
        return uniform < probability

    def is_flipped(self, step: int) -> Tensor:
        """Return which samples are mirrored left to right, bool [B], true for half of them."""
        return self._words(self._flips, step) % 2 == 1

    def torch_seed(self, micro_batch: int) -> int:
        """Return the seed of PyTorch's generator for a micro-batch, counted over all steps.

        Layers that a user has added draw from it, and dropout in runs of format 1.
        """
        return int(sample_seeds(self._torch, 1, micro_batch))


@lru_cache(maxsize=2)  # the epoch under way and, in the batch that ends it, the next one
def _permutation(key: int, epoch: int, size: int) -> Tensor:
    """Return the permutation of one epoch, int64 [size]: the order that sorts one random word per image."""
    epoch_key = int(sample_seeds(key, 1, epoch))
    return torch.argsort(sample_seeds(epoch_key, size), stable=True)
