"""The heaviest micro-batches of a plan are those that the training loop cuts."""

from dataclasses import dataclass
from itertools import islice

import pytest

from alignpipe.data.order import batches
from alignpipe.pipeline.heaviest import Length, heaviest
from alignpipe.training.loop import micro_batches


@dataclass(frozen=True)
class Row:
    """As the loop knows it."""

    num_tokens: int
    num_items: int = 1


ITEMS = tuple(Length(20 + 37 * number % 101, 5 + number % 7) for number in range(50))


@pytest.mark.parametrize("place", [0, 1])
def test_heaviest_micro_batch_is_the_one_that_the_loop_cuts(place: int) -> None:
    rows = [Row(int(item.tokens)) for item in ITEMS]
    steps = islice(batches(7, len(rows), 8), 12)
    cut = [list(micro_batches([rows[index] for index in step], 3))[place] for step in steps]
    most = max(sum(row.num_tokens for row in micro) for micro in cut)
    assert heaviest(ITEMS, 7, 12, 8, 3, 1, place).tokens == most / 3


def test_processes_share_the_longest_rows() -> None:
    items = tuple(Length(tokens, 1) for tokens in (8, 7, 6, 5, 4, 3, 2, 1))
    assert heaviest(items, 0, 1, 8, 2, 1, 0) == (7.5, 1)
    assert heaviest(items, 0, 1, 8, 2, 4, 0) == (6, 1)


def test_learnt_tokens_are_those_of_the_same_rows() -> None:
    items = (Length(10, 1), Length(9, 3), Length(2, 9))
    assert heaviest(items, 0, 1, 3, 2, 1, 0) == (9.5, 2)
