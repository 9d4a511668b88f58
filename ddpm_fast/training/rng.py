"""Random draws of a training run, counter-based like the noise of the ops.

A resumed run needs no generator state.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import sample_seeds

_ROUNDS: Final = 12  # as few bits need many; even, so that the halves of the Feistel network end as they began
_LEAST_BITS: Final = 6
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


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
        keys = sample_seeds(seed, 8).tolist()
        self._order, self._timesteps, self._noise, self._label_dropout, self._flips, self._torch, *others = keys
        self.weights_seed, self._conditions = others

    def _words(self, key: int, step: int) -> Tensor:
        """Return 63 random bits for each sample of the step, int64 [B] >= 0."""
        return sample_seeds(key, self._batch_size, step * self._batch_size) & 0x7FFFFFFFFFFFFFFF

    def indices(self, step: int, size: int, num_steps: int = 1) -> Tensor:
        """Return indices into a data set of `size` images for some steps, int64 [num_steps B].

        Each epoch is a new permutation. Batches continue across its end. A permutation is computed item by item, so it takes
        no memory.
        """
        samples = np.arange(step * self._batch_size, (step + num_steps) * self._batch_size)  # numpy starts no threads
        epochs = samples // size
        keys = sample_seeds(self._order, int(epochs[-1] - epochs[0]) + 1, int(epochs[0])).numpy().view(np.uint64)
        places = _permuted((samples % size).astype(np.uint64), keys[epochs - epochs[0]], size)
        return torch.from_numpy(places.view(np.int64))

    def timesteps(self, step: int, num_timesteps: int) -> Tensor:
        """Return timesteps t, uniform in 0 .. num_timesteps - 1, int64 [B]."""
        return self._words(self._timesteps, step) % num_timesteps

    def sample_seeds(self, step: int) -> Tensor:
        """Return the seeds of the samples' noise and dropout, int64 [B]."""
        return sample_seeds(self._noise, self._batch_size, step * self._batch_size)

    def condition_seeds(self, step: int) -> Tensor:
        """Return random bits for the samples' conditions, int64 [B]."""
        return sample_seeds(self._conditions, self._batch_size, step * self._batch_size)

    def label_is_dropped(self, step: int, probability: float) -> Tensor:
        """Return which samples are trained without their label, bool [B], true with `probability`."""
        uniform = (self._words(self._label_dropout, step) >> 10).double() * 2.0**-53  # in [0, 1)
        return uniform < probability

    def is_flipped(self, step: int) -> Tensor:
        """Return which samples are mirrored left to right, bool [B], true for half of them."""
        return self._words(self._flips, step) % 2 == 1

    def torch_seed(self, micro_batch: int) -> int:
        """Return the seed of PyTorch's generator, which a user's own layers may draw from, for a micro-batch of the run."""
        return int(sample_seeds(self._torch, 1, micro_batch))


def _permuted(items: NDArray[np.uint64], keys: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Return the place of each item in a permutation of 0 .. size - 1.

    A Feistel network permutes the numbers of as many bits as the last item has. A number that is not below `size` is
    permuted again (cycle walking, Black and Rogaway 2002).

    Args:
        items: [N].
        keys: [N], the keys of their permutations.
        size: Number of items.
    """
    bits = max(_LEAST_BITS, (size - 1).bit_length())
    items, outside = items.copy(), np.arange(len(items))
    while len(outside):
        low, high = bits - bits // 2, bits // 2  # widths of the halves
        key, left, right = keys[outside], items[outside] >> np.uint64(low), items[outside] & np.uint64((1 << low) - 1)
        for _ in range(_ROUNDS):
            key = key + _GOLDEN
            left, right = right, left ^ (_mixed(key ^ right) & np.uint64((1 << high) - 1))
            low, high = high, low
        items[outside] = (left << np.uint64(low)) | right
        outside = outside[items[outside] >= size]
    return items


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each number: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
