"""The order of samples, computed at any index without being materialised.

A permutation of ``range(size)`` is a keyed Feistel network over the next power of four, with cycle walking: an image
outside the range is permuted again until it falls inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Every key is a function of (seed, purpose, epoch), so the position in the data is one integer and resuming
costs the same everywhere.

A mixture is a virtual data set: each source takes its share of an epoch and goes round as often as it must, with a
fresh permutation each time round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What a random choice is for; part of every key, so that no two purposes share a stream."""

    EPOCH = 1
    SOURCE = 2
    BATCHES = 3
    HELD_OUT = 4


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words one to one (the finaliser of SplitMix64, Steele et al., 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(seed: int, purpose: Purpose, *parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a 64-bit key for each combination of the parts; arrays among them broadcast."""
    key = _mix(np.atleast_1d(np.uint64(seed & _WORD)))
    for part in (int(purpose), *parts):
        key = _mix(key ^ _mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return key


def scramble(words: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit words under a key, one to one for each key."""
    return _mix(_mix(words ^ key) + key)


def permute(index: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return where a permutation of ``range(size)`` sends each index.

    ``key`` holds one key, or one for each index. Raises IndexError for an index outside the range.
    """
    index = np.atleast_1d(np.asarray(index, dtype=np.int64))
    if index.size and (index.min() < 0 or index.max() >= size):
        raise IndexError(f"index outside range({size})")
    image = index.astype(np.uint64)
    key = np.broadcast_to(key, image.shape)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    outside = np.arange(image.size)
    while outside.size:
        walked = _feistel(image[outside], key[outside], half, low)
        image[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return image.astype(np.int64)


def _feistel(words: NDArray[np.uint64], key: NDArray[np.uint64], half: np.uint64, low: np.uint64) -> NDArray[np.uint64]:
    left, right = words >> half, words & low
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(number))) & low)
    return (left << half) | right


@dataclass(frozen=True)
class Share:
    """One source of a mixture.

    ``start`` and ``size`` say which samples are its own; ``weight`` is its share in samples relative to the others',
    None where every source is simply seen once an epoch.
    """

    start: int
    size: int
    weight: float | None = None


class Order:
    """The order in which an epoch goes through the samples of one or several sources.

    An epoch ends when the source that lasts longest at its weight has been seen once.
    """

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        self._shares = tuple(share for share in shares if share.size)
        self._seed = seed
        self.counts = _epoch_counts(self._shares)
        """Samples an epoch takes from each source that has any."""
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def cycles(self) -> bool:
        """Whether some source is seen more or less than once an epoch, so that epochs differ in their tokens."""
        return any(count != share.size for count, share in zip(self.counts, self._shares, strict=True))

    def samples(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample at each position of an epoch; int64, the shape of ``positions``."""
        virtual = permute(positions, len(self), derive_key(self._seed, Purpose.EPOCH, epoch))
        source_of = np.searchsorted(self._ends, virtual, side="right")
        found = np.empty_like(virtual)
        for number, (share, count, end) in enumerate(zip(self._shares, self.counts, self._ends, strict=True)):
            here = np.flatnonzero(source_of == number)
            within = virtual[here] - (int(end) - count)
            if count == share.size:
                found[here] = share.start + within
                continue
            cycle, place = np.divmod(epoch * count + within, share.size)
            key = derive_key(self._seed, Purpose.SOURCE, number, cycle)
            found[here] = share.start + permute(place, share.size, key)
        return found


def _epoch_counts(shares: Sequence[Share]) -> list[int]:
    if all(share.weight is None for share in shares):
        return [share.size for share in shares]
    weights = [1.0 if share.weight is None else share.weight for share in shares]
    longest = max(share.size / weight for share, weight in zip(shares, weights, strict=True))
    return [max(1, round(weight * longest)) for weight in weights]
