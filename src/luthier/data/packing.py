"""Samples into rows: best-fit decreasing, which wastes little and looks at each sample once."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Place items into rows of at most ``capacity``; returns the items' indices for each row, fullest row first.

    The longest item is placed first, each into the row it fills best; ties go by index, so the answer is a function
    of its arguments. Raises ValueError for an item longer than a row.
    """
    rows: list[list[int]] = []
    filled: list[int] = []
    free: list[tuple[int, int]] = []  # (room left, row), ascending
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"an item of {length} does not fit into a row of {capacity}")
        place = bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([])
            filled.append(0)
            room, row = capacity, len(rows) - 1
        else:
            room, row = free.pop(place)
        rows[row].append(item)
        filled[row] += length
        if room > length:
            insort(free, (room - length, row))
    return [rows[row] for row in sorted(range(len(rows)), key=lambda row: (-filled[row], row))]
