"""Each break does what its name says, on token ids, and the rate counts what the model prefers."""

from collections.abc import Sequence

import pytest

from alignpipe.data.examples import Example
from alignpipe.data.records import Message, Ranking
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.stress import BREAKS, CUT, best_answers, broken_examples, stress_report

ANSWERS = [
    ((Message("user", "How many?"),), "It is 3. That is all."),
    ((Message("user", "Who?"),), "Nobody"),
    ((Message("user", "Where?"),), "Nobody"),
]


def _text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(
        [token for token, learnt in zip(example.ids, example.mask, strict=True) if learnt]
    )


def test_breaks_change_the_text_in_their_own_way(tokenizer: Tokenizer) -> None:
    broken = broken_examples(ANSWERS, tokenizer, 128)
    texts = {name: [_text(pair[1], tokenizer) for pair in pairs] for name, pairs in broken.items()}
    assert texts["filler"][:2] == [
        "It is 3. That is all. There is more to say.",
        "Nobody There is more to say.",
    ]
    assert texts["flattery"][0] == "Great question! It is 3. That is all."
    assert texts["doubled"][:2] == ["It is 3. That is all. That is all.", "Nobody Nobody"]
    # The next answer that is another one: never the own text again.
    assert texts["other_answer"] == ["Nobody", "It is 3. That is all.", "It is 3. That is all."]
    for pairs in broken.values():
        for (whole, _), (_, text) in zip(pairs, ANSWERS, strict=True):
            assert _text(whole, tokenizer) == text


def test_the_cut_takes_the_token_that_ends_the_response_and_nothing_else(tokenizer: Tokenizer) -> None:
    for whole, cut in broken_examples(ANSWERS, tokenizer, 128)[CUT]:
        assert whole.ids[-1] in tokenizer.stop_ids
        assert cut.ids == whole.ids[:-1]
        assert cut.ids[-1] not in tokenizer.stop_ids
        assert cut.mask == whole.mask[:-1]


def test_rows_too_long_and_breaks_that_change_nothing_are_left_out(tokenizer: Tokenizer) -> None:
    alone = broken_examples(ANSWERS[1:], tokenizer, 128)
    assert alone["other_answer"] == []
    assert len(alone["filler"]) == 2
    whole = alone["filler"][0][0]
    short = broken_examples(ANSWERS[1:2], tokenizer, len(whole.ids))
    assert short["filler"] == []
    assert len(short[CUT]) == 1


def test_rate_is_how_often_the_broken_one_scores_higher(tokenizer: Tokenizer) -> None:
    broken = broken_examples(ANSWERS, tokenizer, 128)

    def longer(examples: Sequence[Example]) -> list[float]:
        return [float(len(example.ids)) for example in examples]

    report = stress_report(broken, longer)
    rates = {name: found["rate"] for name, found in report.items()}
    # By length: what is added wins, what is cut loses; of the three swapped answers two are longer.
    assert rates == {"filler": 1, "flattery": 1, "doubled": 1, "other_answer": pytest.approx(2 / 3), CUT: 0}
    assert report["filler"]["rows"] == 3
    low, high = report["other_answer"]["ci95"]
    assert 0 < low < 2 / 3 < high < 1
    assert all(
        found["rate"] == 0.5 for found in stress_report(broken, lambda rows: [1.0] * len(rows)).values()
    )
    assert set(report) == {*BREAKS, CUT}


def test_best_answers_take_the_response_ranked_first() -> None:
    ranking = Ranking((Message("user", "Who?"),), ("a", "b", "c"), (2.0, 1.0, 3.0))
    assert best_answers([ranking]) == [((Message("user", "Who?"),), "b")]
