"""Where the rows of a batch are laid."""

import pytest

from alignpipe.data.collate import collate
from alignpipe.data.encoding import Example
from alignpipe.data.packing import MIN_SHARED, Branch, Span, lay_out, spans

LONG = list(range(5, 5 + MIN_SHARED))


def row(prompt: list[int], num_learnt: int) -> Example:
    return Example(prompt + [3] * num_learnt, [False] * len(prompt) + [True] * num_learnt)


def test_spans_of_the_same_prompt_are_one_group():
    other = [*LONG[:-1], 4]
    found = spans([row(LONG, 2), row(other, 1), row(LONG, 5)])
    assert found == (Span(18, 16, 0), Span(17, 16, 1), Span(21, 16, 0))


def test_rows_without_a_learnt_token_share_nothing():
    found = spans([Example(LONG, [False] * 16), Example(LONG, [False] * 16)])
    assert [span.group for span in found] == [0, 1]


def test_spans_are_their_own_groups_where_nothing_is_to_be_shared():
    found = spans([row(LONG, 2), row(LONG, 5)], shared=False)
    assert lay_out(found) == (Branch(0, 18, 0, 0), Branch(18, 39, 1, 0))


def test_lay_out_leaves_a_shared_prompt_out_of_later_rows():
    rows = (Span(18, 16, 0), Span(17, 16, 1), Span(21, 16, 0))
    assert lay_out(rows) == (Branch(0, 18, 0, 0), Branch(18, 35, 1, 0), Branch(35, 40, 0, 16))


def test_lay_out_shares_no_short_prompt():
    rows = (Span(18, 15, 0), Span(21, 15, 0))
    assert [branch.shared for branch in lay_out(rows)] == [0, 0]


@pytest.mark.parametrize("chosen", [[2, 0], [2, 1], [0, 1, 2]])
def test_part_of_a_batch_is_laid_out_as_if_collated_so(chosen):
    examples = [row(LONG, 2), row(LONG, 4), row(LONG, 1)]
    part = collate(examples, 0).part(chosen)
    again = collate([examples[index] for index in chosen], 0)
    assert part.input_ids.tolist() == again.input_ids.tolist()
    assert part.loss_mask.tolist() == again.loss_mask.tolist()
    assert part.lengths.tolist() == again.lengths.tolist()
    assert lay_out(part.spans) == lay_out(again.spans)
