"""Order of data: every row once an epoch, nothing but the arguments decides."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpipe.data.order import batches, order


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 300))
def test_order_any_size_is_permutation(seed: int, epoch: int, size: int) -> None:
    assert sorted(order(seed, epoch, size)) == list(range(size))


def test_order_other_seed_or_epoch_differs() -> None:
    assert len({tuple(order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}) == 25


def test_order_over_seeds_is_uniform() -> None:
    places = Counter((order(seed, 0, 4)[0]) for seed in range(2000))
    # Four standard deviations of a fair draw of 500.
    assert all(abs(places[row] - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for row in range(4))


def test_order_known_arguments_stays_as_it_was() -> None:
    # An order that changes between versions would break every run that is under way.
    assert order(0, 0, 10) == (2, 3, 6, 7, 8, 0, 9, 5, 1, 4)


@pytest.mark.parametrize(("size", "batch_size"), [(7, 3), (4, 4), (3, 8), (1, 2)])
def test_batches_two_epochs_have_each_row_twice(size: int, batch_size: int) -> None:
    flat = [row for batch in islice(batches(5, size, batch_size), 2 * size) for row in batch]
    assert Counter(flat[: 2 * size]) == dict.fromkeys(range(size), 2)
    assert sorted(flat[:size]) == list(range(size))


def test_batches_each_epoch_has_its_own_order() -> None:
    flat = [row for batch in islice(batches(5, 20, 10), 6) for row in batch]
    assert [flat[at : at + 20] for at in (0, 20, 40)] == [list(order(5, epoch, 20)) for epoch in range(3)]
    assert flat[:20] != flat[20:40]


@pytest.mark.parametrize("start", [0, 1, 5, 7, 20, 21])
def test_batches_from_cursor_go_on_where_it_stopped(start: int) -> None:
    flat = [row for batch in islice(batches(3, 7, 1), 60) for row in batch]
    resumed = [row for batch in islice(batches(3, 7, 4, start), 8) for row in batch]
    assert resumed == flat[start : start + 32]


@pytest.mark.parametrize(("size", "batch_size", "start"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_batches_impossible_sizes_are_refused(size: int, batch_size: int, start: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        next(batches(0, size, batch_size, start))
