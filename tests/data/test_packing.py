"""Where the rows of a batch are laid."""

import numpy as np
import pytest

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.data.packing import MIN_SHARED, Branch, lay_out

LONG = list(range(5, 5 + MIN_SHARED))


def row(prompt: list[int], num_learnt: int) -> Example:
    return Example(prompt + [3] * num_learnt, [False] * len(prompt) + [True] * num_learnt)


def test_lay_out_leaves_what_two_rows_begin_with_out_of_the_later_one():
    rows = ([*LONG, 3, 3], [*LONG[:-1], 3, 3], [*LONG, 3, 4, 4, 4])
    assert lay_out(rows) == (Branch(0, 18, 0, 0), Branch(18, 35, 1, 0), Branch(35, 38, 0, 17))


def test_lay_out_shares_no_short_beginning():
    rows = ([*LONG[:-1], 3, 3], [*LONG[:-1], 4, 4])
    assert [branch.shared for branch in lay_out(rows)] == [0, 0]


def test_lay_out_shares_with_the_first_of_the_rows_that_are_most_alike():
    rows = ([*LONG, 1], [*LONG, 2, 1], [*LONG, 2, 2], [*LONG, 2, 3])
    assert [(branch.root, branch.shared) for branch in lay_out(rows)] == [(0, 0), (0, 16), (1, 17), (1, 17)]


def test_lay_out_leaves_each_row_its_last_token():
    whole = [*LONG, 1]
    assert lay_out((whole, whole, LONG)) == (Branch(0, 17, 0, 0), Branch(17, 18, 0, 16), Branch(18, 34, 2, 0))
    assert lay_out((whole, [*whole, 0], whole))[1:] == (Branch(17, 18, 0, 17), Branch(18, 19, 0, 16))


def test_lay_out_lays_rows_whole_where_nothing_is_to_be_shared():
    rows = ([*LONG, 3, 3], [*LONG, 3, 4])
    assert lay_out(rows, shared=False) == (Branch(0, 18, 0, 0), Branch(18, 36, 1, 0))


def test_stretches_give_back_every_row():
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 2, draw.integers(1, 60)).tolist() for _ in range(30)]
    # Each begins as some other does, for some way.
    rows += [[*rows[number][: draw.integers(60)], 5, *rows[number][:3]] for number in range(30)]
    laid = [token for row, branch in zip(rows, lay_out(rows), strict=True) for token in row[branch.shared :]]
    found: list[list[int]] = []
    for branch in lay_out(rows):
        shared = found[branch.root][: branch.shared] if branch.shared else []
        found.append(shared + laid[branch.start : branch.end])
    assert found == rows
    assert len(laid) < sum(map(len, rows)) - 30 * MIN_SHARED / 2


@pytest.mark.parametrize("chosen", [[2, 0], [2, 1], [0, 1, 2]])
def test_part_of_a_batch_is_laid_out_as_if_collated_so(chosen):
    examples = [row(LONG, 2), row(LONG, 4), row(LONG, 1)]
    part = collate(examples, 0).part(chosen)
    again = collate([examples[index] for index in chosen], 0)
    assert part.input_ids.tolist() == again.input_ids.tolist()
    assert part.loss_mask.tolist() == again.loss_mask.tolist()
    assert part.lengths.tolist() == again.lengths.tolist()
    assert lay_out(part.rows) == lay_out(again.rows)
