"""Loaded questions with the group swapped, and the gap between groups worked out by hand."""

import numpy as np
import pytest

from alignpipe.data.counterfactuals import Template, Wording, answered, questions
from alignpipe.evaluation.prejudice import MAX_QUESTIONS, group_gaps, largest_gap, toy_templates
from alignpipe.toy.judge import is_prejudiced
from alignpipe.toy.world import GROUPS, make_prompts, parse_prompt

FIRST, SECOND, THIRD = GROUPS[:3]


def _loaded(count: int) -> list[str]:
    return make_prompts(count, 0, {"loaded": 1.0})


def _asked(rows: dict[str, list[float | None]]) -> tuple[list[Wording], np.ndarray]:
    """Group -> its value in each template; None where the template does not ask about it."""
    wordings, values = [], []
    for group, row in rows.items():
        for at, value in enumerate(row):
            if value is not None:
                wordings.append(Wording((f"template {at}", None), group, f"{at} {group}"))
                values.append(value)
    return wordings, np.array(values)


def test_every_question_is_asked_about_every_group_once() -> None:
    question = _loaded(1)[0]
    wordings = questions(toy_templates([question]))
    assert {wording.group for wording in wordings} == set(GROUPS)
    assert len(wordings) == len(GROUPS)
    assert len({wording.template for wording in wordings}) == 1
    task = parse_prompt(question)
    assert task is not None
    # Its own group first: what is drawn hangs on the place in the list.
    assert (wordings[0].prompt, wordings[0].group) == (question, task.subject)


def test_wordings_that_two_prompts_share_are_asked_once() -> None:
    question = _loaded(1)[0]
    task = parse_prompt(question)
    assert task is not None
    other = next(group for group in GROUPS if group != task.subject)
    shared = [question, question.replace(task.subject, other), question]
    assert len(questions(toy_templates(shared))) == len(GROUPS)


def test_other_prompts_are_left_out() -> None:
    assert toy_templates(make_prompts(20, 0, {"fact": 1.0, "sum": 1.0})) == []


def test_groups_are_asked_alike_even_when_there_are_many_questions() -> None:
    wordings = questions(toy_templates(_loaded(100)))
    assert len({wording.template for wording in wordings}) <= MAX_QUESTIONS
    counts = [sum(wording.group == group for wording in wordings) for group in GROUPS]
    assert len(set(counts)) == 1


def test_world_has_fair_and_prejudiced_answers_to_score() -> None:
    question = _loaded(1)[0]
    task = parse_prompt(question)
    assert task is not None
    wordings = answered(toy_templates([question]))
    about = [wording for wording in wordings if wording.group == task.subject]
    unfair = [is_prejudiced(wording.response or "", task) for wording in about]
    assert sorted(unfair) == [False, False, True, True]
    assert not any("{" in wording.prompt + str(wording.response) for wording in wordings)


def test_gap_is_between_the_best_and_the_worst_treated_group() -> None:
    wordings, gold = _asked({FIRST: [1.0, 0.5], SECOND: [0.25, 0.75], THIRD: [0.5, 0.5]})
    reward = np.array([0.0, 0.0, -1.0, -1.0, 2.0, 2.0])
    gaps = group_gaps(wordings, {"gold": gold, "reward": reward})
    # Means by group: gold 0.75, 0.5, 0.5; reward 0, -1, 2.
    details = gaps.pop("details")
    assert gaps == pytest.approx({"gold_gap": 0.25, "reward_gap": 3.0, "questions": 6.0})
    assert details["gold"]["means"] == pytest.approx({FIRST: 0.75, SECOND: 0.5, THIRD: 0.5})
    assert (details["reward"]["highest"], details["reward"]["lowest"]) == (THIRD, SECOND)
    # The same in both templates, so certain.
    assert details["reward"]["ci95"] == pytest.approx([3.0, 3.0])


def test_groups_are_compared_over_the_templates_they_share() -> None:
    # The third group is asked the easy question alone: 0.9 is what everybody gets there.
    wordings, values = _asked({FIRST: [0.9, 0.1], SECOND: [0.9, 0.3], THIRD: [0.9, None]})
    found = largest_gap(wordings, values)
    assert found["gap"] == pytest.approx(0.1)
    assert (found["highest"], found["lowest"]) == (SECOND, FIRST)


def test_equal_treatment_has_no_gap_and_no_proof_of_one() -> None:
    wordings, values = _asked({group: [0.5, 0.25] for group in GROUPS})
    found = largest_gap(wordings, values)
    assert (found["gap"], found["by_chance"], found["p_value"], found["ci95"]) == (0.0, 0.0, 1.0, [0.0, 0.0])


def test_names_dealt_at_random_show_what_chance_does() -> None:
    # One template, two groups: both ways to deal have the same gap, so it proves nothing.
    found = largest_gap(*_asked({FIRST: [1.0], SECOND: [0.0]}))
    assert (found["gap"], found["by_chance"], found["p_value"]) == (1.0, 1.0, 1.0)
    # Ten templates that all say the same: 2 of 2^10 deals are as uneven.
    found = largest_gap(*_asked({FIRST: [1.0] * 10, SECOND: [0.0] * 10}))
    assert found["p_value"] == pytest.approx(2 / 1024, abs=0.002)
    assert 0.5 < found["by_chance"] < 0.9  # type: ignore[operator]


def test_largest_of_many_gaps_without_prejudice_passes_the_bound_of_chance_one_time_in_twenty() -> None:
    random = np.random.default_rng(0)
    passed, plain = 0, 0
    for trial in range(20):
        wordings, values = _asked({f"g{group}": list(random.random(12)) for group in range(8)})
        found = largest_gap(wordings, values, trial)
        passed += found["gap"] > found["by_chance"]  # type: ignore[operator]
        plain += found["ci95"][0] > 0  # type: ignore[index,operator]
    assert passed <= 3
    # The interval of the two groups that were picked for their gap says "above 0" nearly always.
    assert plain > 8


def test_order_of_questions_changes_no_gap() -> None:
    random = np.random.default_rng(1)
    wordings, values = _asked({group: list(random.random(5)) for group in GROUPS})
    order = random.permutation(len(wordings))
    one = largest_gap(wordings, values)
    two = largest_gap([wordings[at] for at in order], values[order])
    assert (one["gap"], one["highest"], one["lowest"]) == (
        pytest.approx(two["gap"]),
        two["highest"],
        two["lowest"],
    )


def test_responses_make_rows_of_their_own_and_questions_are_asked_once() -> None:
    templates = [
        Template("Are {group} kind?", ("A", "B"), "Yes, {group} are."),
        Template("Are {group} kind?", ("A", "B"), "No."),
        Template("Who are {group}?", ("A", "B")),
    ]
    assert [w.prompt for w in questions(templates)] == [
        "Are A kind?",
        "Are B kind?",
        "Who are A?",
        "Who are B?",
    ]
    assert [w.response for w in answered(templates)] == ["Yes, A are.", "Yes, B are.", "No.", "No."]
