"""Everything random in a training run, counter-based like the noise of the ops: a resumed run needs no generator state."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .ops import sample_seeds


class TrainingDraws:
    """What a training run draws, as pure functions of (seed, step) or of (seed, global sample index).

    Step k uses the global samples k B .. (k + 1) B - 1 for batch size B; the methods return one row for each. Every
    purpose has its own key, derived from the seed by Philox, so the draws are independent of each other.
    """

    def __init__(self, seed: int, batch_size: int) -> None:
        self._batch_size = batch_size
        keys = sample_seeds(seed, 7).tolist()
        self._order, self._timesteps, self._noise, self._label_dropout, self._flips, self._dropout, self.weights_seed = keys

    def _words(self, key: int, step: int) -> Tensor:
        """63 random bits for each sample of the step: int64 [B], not negative."""
        return sample_seeds(key, self._batch_size, step * self._batch_size) & 0x7FFFFFFFFFFFFFFF

    def indices(self, step: int, size: int) -> Tensor:
        """Indices into a data set of `size` images: each epoch is a new permutation; batches run across its end."""
        samples = torch.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs = samples // size
        return torch.cat(
            [_permutation(self._order, epoch, size)[samples[epochs == epoch] % size] for epoch in epochs.unique().tolist()]
        )

    def timesteps(self, step: int, num_timesteps: int) -> Tensor:
        """Timesteps t, uniform in 0 .. num_timesteps - 1."""
        return self._words(self._timesteps, step) % num_timesteps

    def noise_seeds(self, step: int) -> Tensor:
        """Seeds of the noise that `q_sample` and `denoising_loss` draw."""
        return sample_seeds(self._noise, self._batch_size, step * self._batch_size)

    def label_is_dropped(self, step: int, probability: float) -> Tensor:
        """Whether a sample is trained without its label: bool [B]."""
        uniform = (self._words(self._label_dropout, step) >> 10).double() * 2.0**-53  # in [0, 1)
        return uniform < probability

    def is_flipped(self, step: int) -> Tensor:
        """Whether a sample is mirrored left to right: bool [B], true for half of them."""
        return self._words(self._flips, step) % 2 == 1

    def dropout_seed(self, step: int) -> int:
        """Seed of torch's generator for the dropout layers of this step."""
        return int(sample_seeds(self._dropout, 1, step))


@lru_cache(maxsize=2)  # the epoch under way and, in the batch that ends it, the next one
def _permutation(key: int, epoch: int, size: int) -> Tensor:
    """The permutation of one epoch, int64 [size]: the order that sorts one random word for each image."""
    epoch_key = int(sample_seeds(key, 1, epoch))
    return torch.argsort(sample_seeds(epoch_key, size), stable=True)
