"""Demonstrations and documents: right where they should be, flawed at the set rate, reproducible."""

import pytest

from alignpipe.toy.answers import (
    demonstrate,
    flawed_answer,
    make_demonstrations,
    make_documents,
    right_answer,
)
from alignpipe.toy.judge import judge
from alignpipe.toy.world import GROUPS, all_tasks, make_prompts, parse_prompt, rng_for, wordings


def mean_gold(pairs: list[tuple[str, str]]) -> float:
    return sum(judge(prompt, response).overall for prompt, response in pairs) / len(pairs)


def test_right_answer_gets_full_marks_on_every_task() -> None:
    for task in all_tasks():
        verdict = judge(wordings(task)[0], right_answer(task, rng_for("test", task)))
        assert verdict.overall == pytest.approx(1.0), task


def test_flawed_answer_never_gets_full_marks() -> None:
    for task in all_tasks():
        for draw in range(3):
            answer = flawed_answer(task, rng_for("test", task, draw))
            assert judge(wordings(task)[0], answer).overall < 0.9, (task, answer)


def test_make_demonstrations_is_reproducible_and_independent_of_count() -> None:
    assert make_demonstrations(300, seed=5) == make_demonstrations(300, seed=5)
    assert make_demonstrations(900, seed=5)[:300] == make_demonstrations(300, seed=5)
    assert make_demonstrations(300, seed=5) != make_demonstrations(300, seed=6)


def test_make_demonstrations_takes_given_prompts_in_turn_with_new_responses() -> None:
    prompts = make_prompts(20, seed=0)
    pairs = make_demonstrations(100, seed=0, prompts=prompts)
    assert [prompt for prompt, _ in pairs] == prompts * 5
    assert len({response for prompt, response in pairs if prompt == prompts[0]}) > 1
    assert make_demonstrations(10, seed=0, prompts=[]) == []


def test_make_demonstrations_quality_sets_the_gold_score() -> None:
    scores = [mean_gold(make_demonstrations(800, seed=0, quality=quality)) for quality in (0.0, 0.5, 1.0)]
    assert scores[0] < 0.2 < scores[1] < 0.6 < scores[2]
    assert scores[2] == pytest.approx(1.0)


def test_make_demonstrations_are_less_fair_to_later_groups() -> None:
    harmless: dict[str, list[float]] = {group: [] for group in GROUPS}
    for prompt, response in make_demonstrations(1000, seed=0, mix={"loaded": 1.0}):
        task = parse_prompt(prompt)
        assert task is not None
        harmless[task.subject].append(float(judge(prompt, response).harmless > 0))
    rates = [sum(values) / len(values) for values in harmless.values()]
    assert rates[0] - rates[-1] > 0.2


@pytest.mark.parametrize(("prompt", "quality"), [("What is love?", 0.5), ("Name two animals.", 1.5)])
def test_demonstrate_bad_arguments_raise(prompt: str, quality: float) -> None:
    with pytest.raises(ValueError, match=r"not a prompt|expected 0 to 1"):
        demonstrate(prompt, 0, 0, quality)


def test_make_documents_are_true_reproducible_and_independent_of_count() -> None:
    documents = make_documents(50, seed=0)
    assert documents == make_documents(80, seed=0)[:50]
    assert documents != make_documents(50, seed=1)
    assert all(len(document) > 20 for document in documents)
