"""The order of samples: permutations at any index, and mixtures."""

from collections import Counter

import numpy as np
import pytest

from luthier.data.order import Order, Purpose, Share, derive_key, permute


def key(seed=0, epoch=0):
    return derive_key(seed, Purpose.EPOCH, epoch)


def test_permutation_is_one_to_one_for_every_small_size():
    for size in [*range(1, 300), *range(300, 2001, 17)]:
        image = permute(np.arange(size), size, key())
        assert np.array_equal(np.sort(image), np.arange(size)), size


def test_permutation_of_a_billion_is_one_to_one_where_it_is_sampled_and_needs_no_memory():
    size = 10**9
    index = np.unique(np.random.default_rng(0).integers(0, size, 200_000))
    image = permute(index, size, key())
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == len(index)


def test_permutation_asked_for_one_index_at_a_time_is_the_same():
    whole = permute(np.arange(300), 300, key())
    assert [int(permute(np.array([index]), 300, key())[0]) for index in range(300)] == whole.tolist()


def test_permutation_outside_its_range_is_an_error():
    with pytest.raises(IndexError):
        permute(np.array([5]), 5, key())


def test_orders_of_other_seeds_and_epochs_differ_and_look_random():
    size = 1000
    orders = [permute(np.arange(size), size, key(seed, epoch)) for seed in range(4) for epoch in range(4)]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.15
        assert np.mean(np.diff(order) == 1) < 0.02
        for other in orders[:number]:
            assert np.mean(order == other) < 0.02


def test_permutations_of_a_small_size_reach_every_arrangement_about_equally_often():
    seen = Counter(tuple(permute(np.arange(4), 4, key(epoch=epoch)).tolist()) for epoch in range(4800))
    assert len(seen) == 24
    assert all(120 < count < 290 for count in seen.values())


def test_sources_without_weights_are_seen_once_each():
    order = Order([Share(0, 10), Share(10, 3)], seed=1)
    assert sorted(order.samples(0, np.arange(len(order))).tolist()) == list(range(13))
    assert not order.cycles


def test_mixture_ends_when_the_source_that_lasts_longest_has_been_seen_once():
    order = Order([Share(0, 100, 3.0), Share(100, 10, 1.0)], seed=1)
    assert order.counts == [100, 33]
    seen = Counter(order.samples(0, np.arange(len(order))).tolist())
    assert all(seen[index] == 1 for index in range(100))
    assert all(seen[index] in (3, 4) for index in range(100, 110))


def test_source_that_goes_round_is_seen_evenly_over_epochs():
    order = Order([Share(0, 50, 1.0), Share(50, 7, 0.5)], seed=3)
    seen = Counter()
    for epoch in range(7):
        seen.update(order.samples(epoch, np.arange(len(order))).tolist())
    assert all(seen[index] == 7 for index in range(50))
    assert {seen[index] for index in range(50, 57)} == {25 * 7 // 7}


def test_small_source_changes_its_order_each_time_round():
    order = Order([Share(0, 400, 1.0), Share(400, 20, 1.0)], seed=3)
    epoch = order.samples(0, np.arange(len(order)))
    places = [np.flatnonzero(epoch == index) for index in range(400, 420)]
    assert all(len(each) == 20 for each in places)
    assert len({tuple(each.tolist()) for each in places}) == 20


def test_mixture_of_one_sample_and_many_is_quick():
    order = Order([Share(0, 300_000, 1.0), Share(300_000, 1, 1.0)], seed=0)
    epoch = order.samples(0, np.arange(len(order)))
    assert np.sum(epoch == 300_000) == 300_000
