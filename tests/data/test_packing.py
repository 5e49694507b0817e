"""Packing: every sample once, no row too long, little waste."""

import numpy as np
import pytest

from luthier.data.packing import best_fit_decreasing


@pytest.mark.parametrize("seed", range(30))
def test_every_item_is_placed_once_and_no_row_is_too_long(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 300))
    lengths = random.integers(1, capacity + 1, int(random.integers(1, 400))).tolist()
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    fills = [sum(lengths[item] for item in row) for row in rows]
    assert max(fills) <= capacity
    assert fills == sorted(fills, reverse=True)
    assert best_fit_decreasing(lengths, capacity) == rows


def test_rows_are_within_a_fifth_of_the_fewest_possible():
    lengths = np.random.default_rng(0).integers(1, 500, 2000).tolist()
    rows = best_fit_decreasing(lengths, 1024)
    assert len(rows) <= 1.02 * sum(lengths) / 1024 + 1


def test_items_take_the_row_they_fill_best():
    assert best_fit_decreasing([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        best_fit_decreasing([3, 11], 10)
