"""Which sample comes when: the order of training and of evaluation as pure functions of seed and position.

Nothing here keeps random state. Sample i of epoch e is a function of (seed, e, i), so the stream is the same for any
number of workers and ranks, and a run that resumes needs only the number of batches it has done.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from datamodules.errors import DataError

Key = tuple[int, int, int]
"""(row to read, seed of its augmentation, index to report). Index −1 is padding: read, never counted."""


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64 in [0, 2^63): splitmix64 (Steele et al. 2014) over the values in turn; broadcasts."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(value) for value in values)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state >> np.uint64(1))


def epoch_order(n: int, length: int, seed: int, epoch: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The order of one epoch: positions into the n training samples, int64 (length,).

    Without weights it is a permutation, followed by further permutations where length exceeds n (a few-shot set smaller
    than a batch). With weights (n,), summing to 1, samples are drawn with replacement.
    """
    if weights is not None:
        return _generator(seed, epoch, 0).choice(n, size=length, p=weights)
    passes = [_generator(seed, epoch, part).permutation(n) for part in range(-(-length // n))]
    return np.concatenate(passes)[:length]


def _generator(seed: int, epoch: int, part: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, part))))


def divide_batch(batch_size: int, world: int, max_per_device: int | None = None) -> tuple[int, int]:
    """Divide a global batch over ranks and accumulation steps.

    Returns:
        (batch per device and step, accumulation steps).

    Raises:
        DataError: The batch does not divide evenly.
    """
    if batch_size < 1 or batch_size % world:
        raise DataError(
            f"batch_size {batch_size} does not divide over {world} devices",
            where="data.batch_size (the global batch)",
            valid=f"multiples of {world}",
        )
    local = batch_size // world
    if max_per_device is None or local <= max_per_device:
        return local, 1
    steps = next(count for count in range(-(-local // max(1, max_per_device)), local + 1) if local % count == 0)
    return local // steps, steps


def balance_weights(labels: np.ndarray) -> np.ndarray:
    """Sampling weights (N,), summing to 1, that give every class the same expected share.

    A multi-class sample weighs 1 / frequency of its class. A multi-label sample weighs as much as its rarest positive
    label, where "none positive" counts as one more label; unknown cells do not count.
    """
    if labels.ndim == 1:
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        weights = 1.0 / counts[inverse]
    else:
        positive = labels == 1
        columns = np.concatenate([positive, ~positive.any(axis=1, keepdims=True)], axis=1)
        weights = np.where(columns, 1.0 / np.maximum(columns.sum(axis=0), 1), 0.0).max(axis=1)
    return np.asarray(weights / weights.sum())


class StreamSampler(Sampler[list[Key]]):
    """Batches of training samples, of which rank r of w takes the positions p ≡ r (mod w) of each global batch.

    An epoch has floor(N / batch) full batches (the tail differs from epoch to epoch), or one batch where N is smaller.

    Args:
        rows: Table rows of the training set, int64 (N,).
        batch_size: Global batch.
        seed: Seed of the stream.
        rank: This process.
        world: Number of processes.
        accumulate: Steps of gradient accumulation; each yields its part of the global batch.
        total_steps: For step-based training: one pass chains the epochs up to this many global batches.
        weights: Sampling weights (N,), or None for permutations.
        position: Says how many (device) batches have been done; without it passes are counted here.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        total_steps: int | None = None,
        weights: np.ndarray | None = None,
        position: Callable[[], int] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.weights = rows, batch_size, seed, weights
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.batches_per_epoch = max(1, len(rows) // batch_size)
        self.total_steps = total_steps
        self._position = position
        self._done = 0
        # One epoch's order at a time: the last one is asked for again by every batch of the epoch.
        self._order = lru_cache(maxsize=1)(self._make_order)

    def __len__(self) -> int:
        steps = self.batches_per_epoch if self.total_steps is None else self.total_steps
        return steps * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        start = self._position() if self._position is not None else self._done
        stop = (start // len(self) + 1) * len(self)
        self._done = stop
        for batch in range(start, stop):
            yield self.batch(batch)

    def batch(self, number: int) -> list[Key]:
        """The keys of this rank's device batch `number`, counted from the start of training."""
        step, part = divmod(number, self.accumulate)
        epoch, step_in_epoch = divmod(step, self.batches_per_epoch)
        positions = step_in_epoch * self.batch_size + np.arange(self.rank, self.batch_size, self.world)
        positions = np.split(positions, self.accumulate)[part]
        rows = self.rows[self._order(epoch)[positions]].tolist()
        return list(zip(rows, mix(self.seed, epoch, positions).tolist(), rows, strict=True))

    def _make_order(self, epoch: int) -> np.ndarray:
        return epoch_order(len(self.rows), self.batches_per_epoch * self.batch_size, self.seed, epoch, self.weights)


class EvaluationSampler(Sampler[list[Key]]):
    """Batches of evaluation samples: every row once over all ranks, unpadded; a row's seed is its own, always the same.

    A rank that would have no sample reads one row marked as padding (index −1), since Lightning needs a batch.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        mine = rows[rank::world].tolist()
        self.keys: list[Key] = list(zip(mine, mix(0, rows[rank::world]).tolist(), mine, strict=True))
        if not self.keys and len(rows):
            self.keys = [(int(rows[0]), 0, -1)]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.keys), self.batch_size):
            yield self.keys[start : start + self.batch_size]
