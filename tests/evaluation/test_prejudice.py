"""Loaded questions with the group swapped, and the gap between groups worked out by hand."""

import numpy as np
import pytest

from alignpipe.evaluation.prejudice import MAX_QUESTIONS, Swap, group_gaps, swapped_prompts
from alignpipe.toy.world import GROUPS, make_prompts, parse_prompt

FIRST, SECOND, THIRD = GROUPS[:3]
REFUSAL = "I cannot help with that."


def _loaded(count: int) -> list[str]:
    return make_prompts(count, 0, {"loaded": 1.0})


def test_every_question_is_asked_about_every_group_once() -> None:
    question = _loaded(1)[0]
    swaps = swapped_prompts([question])
    assert {swap.group for swap in swaps} == set(GROUPS)
    assert len(swaps) == len(GROUPS)
    assert len({swap.prompt.replace(swap.group, "*") for swap in swaps}) == 1
    task = parse_prompt(question)
    assert task is not None
    assert Swap(question, task.subject) in swaps


def test_wordings_that_two_prompts_share_are_asked_once() -> None:
    question = _loaded(1)[0]
    task = parse_prompt(question)
    assert task is not None
    other = next(group for group in GROUPS if group != task.subject)
    assert len(swapped_prompts([question, question.replace(task.subject, other), question])) == len(GROUPS)


def test_other_prompts_are_left_out() -> None:
    assert swapped_prompts(make_prompts(20, 0, {"fact": 1.0, "sum": 1.0})) == []


def test_groups_are_asked_alike_even_when_there_are_many_questions() -> None:
    swaps = swapped_prompts(_loaded(100))
    assert len({swap.prompt.replace(swap.group, "*") for swap in swaps}) <= MAX_QUESTIONS
    counts = [sum(swap.group == group for swap in swaps) for group in GROUPS]
    assert len(set(counts)) == 1


def test_gap_is_between_the_best_and_the_worst_treated_group() -> None:
    swaps = [Swap("a", FIRST), Swap("b", FIRST), Swap("c", SECOND), Swap("d", THIRD)]
    gold = np.array([1.0, 0.5, 0.25, 0.5])
    reward = np.array([0.0, 0.0, -1.0, 2.0])
    gaps = group_gaps(swaps, [REFUSAL, "Yes.", "Yes.", REFUSAL], {"gold": gold, "reward": reward})
    # Means by group: gold 0.75, 0.25, 0.5; reward 0, -1, 2; refusals 1/2, 0, 1.
    assert gaps == pytest.approx({"gold_gap": 0.5, "reward_gap": 3.0, "refusal_gap": 1.0, "questions": 4.0})


def test_equal_treatment_has_no_gap() -> None:
    swaps = [Swap(group, group) for group in GROUPS]
    gaps = group_gaps(swaps, [REFUSAL] * len(GROUPS), {"gold": np.full(len(GROUPS), 0.5)})
    assert gaps == {"gold_gap": 0.0, "refusal_gap": 0.0, "questions": float(len(GROUPS))}
