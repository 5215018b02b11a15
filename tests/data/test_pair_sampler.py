import numpy as np
import pytest

from diffalign.data import keyed
from diffalign.data.sampler import PairSampler
from diffalign.errors import DataError


@pytest.mark.parametrize("window", [None, 4, 100])
def test_every_epoch_draws_each_example_once(window):
    sampler = PairSampler(23, seed=3, window=window)
    epochs = [sampler.indices(23 * epoch, 23) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_indices_are_a_pure_function_of_position():
    whole = PairSampler(10, seed=1).indices(0, 95)
    keyed.order.cache_clear()
    for position, count in [(0, 3), (90, 5), (7, 20), (33, 1), (9, 2)]:
        assert PairSampler(10, seed=1).indices(position, count) == whole[position : position + count]


def test_ranks_slice_the_same_sequence():
    sampler = PairSampler(50, seed=0)
    one = sampler.indices(16, 8)
    assert [i for rank in range(4) for i in PairSampler(50, seed=0).indices(16, 8)[rank * 2 : rank * 2 + 2]] == one


def test_seeds_differ_and_the_order_is_not_the_identity():
    orders = [PairSampler(100, seed=seed).indices(0, 100) for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert list(range(100)) not in orders


def test_a_batch_larger_than_the_data_set_spans_epochs():
    drawn = PairSampler(3, seed=0).indices(0, 8)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]


def test_order_is_fair():
    # Mean place of each example over many epochs: 49.5, standard deviation 28.9 / sqrt(400) = 1.44.
    places = np.array([np.argsort(PairSampler(100, seed=0).indices(100 * e, 100)) for e in range(400)])
    assert np.abs(places.mean(0) - 49.5).max() < 5 * 1.44
    assert np.abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1]) < 5 / 20


def test_window_keeps_blocks_in_order():
    drawn = PairSampler(12, seed=5, window=4).indices(0, 12)
    assert [sorted(drawn[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert drawn != sorted(drawn)


def test_order_is_pinned():
    # Resuming a run on another machine or with another numpy needs the very same order.
    assert PairSampler(8, seed=42).indices(0, 10) == PINNED


PINNED = [7, 3, 0, 6, 2, 4, 5, 1, 6, 1]  # recorded from this implementation


def test_wrong_settings_are_refused():
    with pytest.raises(DataError, match="empty"):
        PairSampler(0, seed=0)
    with pytest.raises(DataError, match="window"):
        PairSampler(3, seed=0, window=0)
