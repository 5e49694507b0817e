"""Where a tensor in a file finds its elements in a tensor in memory.

Memory and files don't always agree on what a tensor is: transformers 5 holds all experts of a layer as one tensor
and files hold one tensor an expert. As long as the file's tensor is a strided view of the memory's, it is a list of
runs: stretches of consecutive elements. A process that holds only a part of the memory's tensor (a shard of whole
rows, which is one stretch of its elements) writes and reads the intersection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Runs:
    """Run ``i`` is elements ``[starts[i], starts[i] + length)`` in memory and ``[i*length, (i+1)*length)`` in the file."""

    length: int
    starts: np.ndarray

    @classmethod
    def whole(cls, count: int) -> Runs:
        """A tensor that is the same in memory and in the file."""
        return cls(count, np.zeros(1 if count else 0, dtype=np.int64))

    @classmethod
    def of_view(cls, offset: int, shape: Sequence[int], stride: Sequence[int]) -> Runs:
        """The runs of a strided view, in units of elements."""
        if 0 in shape:
            return cls(0, np.zeros(0, dtype=np.int64))
        dimensions = [(extent, step) for extent, step in zip(shape, stride) if extent != 1]
        length = 1
        while dimensions and dimensions[-1][1] == length:
            length *= dimensions.pop()[0]
        starts = np.array([offset], dtype=np.int64)
        for extent, step in dimensions:
            starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * step).ravel()
        return cls(length, starts)

    def within(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Intersect with the memory's elements ``[start, start + count)``.

        Yields:
            (element within that stretch, element within the file's tensor, number of elements)
        """
        low = np.maximum(self.starts, start)
        high = np.minimum(self.starts + self.length, start + count)
        for run in np.nonzero(low < high)[0].tolist():
            yield int(low[run]) - start, run * self.length + int(low[run] - self.starts[run]), int(high[run] - low[run])
