"""Random numbers that are a hash of (seed, purpose, index), so a draw never depends on what else is drawn.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), one stream an index, vectorised over indices.
"""

import zlib
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment, 2**64 / golden ratio
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


def mixed(words: Words) -> Words:
    """SplitMix64's output function."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(seed: int, purpose: str, index: Ints, count: int) -> Words:
    """Draw `count` random words for every index: uint64 (n, count), a pure function of its arguments."""
    key = np.array([seed % 2**64, zlib.crc32(purpose.encode())], np.uint64)
    streams = mixed(mixed(mixed(key[:1]) + key[1:]) + index.astype(np.uint64) * np.uint64(GOLDEN))
    return mixed(streams[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def uniform(seed: int, purpose: str, index: Ints, *shape: int) -> Floats:
    """Draw uniform numbers in [0, 1) for every index: float64 (n, *shape)."""
    words = random_words(seed, purpose, index, int(np.prod(shape)))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(len(index), *shape)


def normal(seed: int, purpose: str, index: Ints, count: int) -> NDArray[np.float32]:
    """Draw standard normal numbers, quantised to 256 values, for every index: float32 (n, count)."""
    words = random_words(seed, purpose, index, -(-count // 8))
    return NORMAL.take(words.astype("<u8", copy=False).view(np.uint8)[:, :count])
