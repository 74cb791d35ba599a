"""Rankings and labels -> rows of a loss over preferences."""

from alignpipe.data.comparisons import Comparison, compare, examples_of, label, mismatch, ranked_pairs
from alignpipe.data.examples import Example, RankedExample


def _row(prompt: list[int], *responses: list[int], ranks: tuple[float, ...]) -> RankedExample:
    examples = tuple(
        Example(prompt + response, [False] * len(prompt) + [True] * len(response)) for response in responses
    )
    return RankedExample(examples, ranks, None, len(prompt))


RANKING = _row([1, 2], [10], [11], [12, 12], [13], ranks=(2.0, 1.0, 3.0, 2.0))


def _sides(rows: list[Comparison]) -> list[tuple[int | None, int | None]]:
    """The first token of each response."""
    return [
        tuple(None if side is None else side.example.ids[2] for side in (row.chosen, row.rejected))
        for row in rows
    ]


def test_all_pairs_are_those_not_tied_and_best_worst_is_one() -> None:
    assert ranked_pairs((2, 1, 3, 2), "all") == [(1, 0), (0, 2), (1, 2), (1, 3), (3, 2)]
    assert ranked_pairs((2, 1, 3, 2), "best_worst") == [(1, 2)]
    assert ranked_pairs((1, 1), "all") == ranked_pairs((1, 1), "best_worst") == []


def test_compare_puts_the_better_response_first() -> None:
    assert _sides(compare([RANKING], "all")) == [(11, 10), (10, 12), (11, 12), (11, 13), (13, 12)]
    assert _sides(compare([RANKING], "best_worst")) == [(11, 12)]


def test_label_takes_each_response_once_a_side() -> None:
    expected = [(10, None), (None, 10), (11, None), (None, 12), (13, None), (None, 13)]
    assert _sides(label([RANKING], "all")) == expected
    assert _sides(label([RANKING], "best_worst")) == [(11, None), (None, 12)]


def test_label_of_a_response_alone_is_its_rank() -> None:
    rows = [_row([1, 2], [10], ranks=(1.0,)), _row([1, 2], [11], ranks=(2.0,))]
    assert _sides(label(rows, "all")) == [(10, None), (None, 11)]


def test_mismatch_gives_every_prompt_the_response_to_another() -> None:
    rows = label(
        [_row([prompt] * 3, [100 + prompt] * 4, [200 + prompt], ranks=(1.0, 2.0)) for prompt in range(1, 8)],
        "all",
    )
    made = mismatch(rows, seed=3, max_length=5)
    assert [row.responses for row in made] == [row.responses for row in rows]
    partners = []
    for row in made:
        assert row.mismatched is not None
        ids, mask = row.mismatched.example.ids, row.mismatched.example.mask
        assert ids[:3] == row.responses[0].example.ids[:3] and mask == [False] * 3 + [True] * (len(ids) - 3)
        assert ids[3] % 100 != ids[0] and len(ids) <= 5
        partners.append(ids[3])
    # Nobody's response is everybody's partner.
    assert len(set(partners)) > len(rows) // 2
    assert mismatch(rows, seed=3, max_length=5) == made != mismatch(rows, seed=4, max_length=5)
    assert len(list(examples_of(made))) == 2 * len(rows)


def test_mismatch_of_one_prompt_alone_is_its_own_response() -> None:
    rows = label([_row([1, 2], [10], ranks=(1.0,))], "all")
    (made,) = mismatch(rows, seed=0, max_length=9)
    assert made.mismatched is not None and made.mismatched.example == rows[0].responses[0].example
