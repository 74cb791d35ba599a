"""Prompts of the embedded world: distinct, reproducible, and understood from their text alone."""

from collections import Counter

import pytest

from alignpipe.toy import lexicon
from alignpipe.toy.world import (
    DEFAULT_MIX,
    GROUPS,
    KINDS,
    Task,
    all_tasks,
    count_prompts,
    make_prompts,
    parse_prompt,
    swap_group,
    wordings,
)


def test_make_prompts_draws_thousands_of_distinct_texts() -> None:
    prompts = make_prompts(8000, seed=0)
    assert len(prompts) == len(set(prompts)) == 8000


def test_make_prompts_depends_on_seed_only() -> None:
    assert make_prompts(500, seed=3) == make_prompts(500, seed=3)
    assert make_prompts(500, seed=3) != make_prompts(500, seed=4)


def test_make_prompts_longer_draw_begins_with_the_shorter() -> None:
    assert make_prompts(3000, seed=1)[:200] == make_prompts(200, seed=1)


def test_make_prompts_follows_the_mix() -> None:
    kinds = Counter(parse_prompt(prompt).kind for prompt in make_prompts(2000, seed=0))  # type: ignore[union-attr]
    total = sum(DEFAULT_MIX.values())
    for kind, weight in DEFAULT_MIX.items():
        assert kinds[kind] / 2000 == pytest.approx(weight / total, abs=0.03)


def test_make_prompts_leaves_out_kinds_of_weight_zero() -> None:
    tasks = [
        parse_prompt(prompt)
        for prompt in make_prompts(600, seed=0, mix={"sum": 1.0, "harm": 2.0, "fact": 0.0})
    ]
    assert {task.kind for task in tasks if task} == {"sum", "harm"}


def test_make_prompts_takes_every_text_when_all_are_asked_for() -> None:
    mix = {"sum": 1.0, "list": 5.0}
    assert len(set(make_prompts(count_prompts(mix), seed=0, mix=mix))) == count_prompts(mix)


@pytest.mark.parametrize(
    ("count", "mix", "message"),
    [
        (1, {"sums": 1.0}, "unknown kind"),
        (1, {"sum": -1.0}, "weight"),
        (1, {"sum": 0.0}, "above 0"),
        (10**6, None, "were asked for"),
    ],
)
def test_make_prompts_bad_arguments_raise(count: int, mix: dict[str, float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_prompts(count, seed=0, mix=mix)


def test_parse_prompt_recovers_the_task_of_every_wording() -> None:
    texts = [(text, task) for task in all_tasks() for text in wordings(task)]
    assert len({text for text, _ in texts}) == len(texts) > 9000
    assert all(parse_prompt(text) == task for text, task in texts)
    assert {task.kind for _, task in texts} == set(KINDS)


def test_parse_prompt_reads_known_examples() -> None:
    assert parse_prompt("Hello. What color is the sky?") == Task("fact", "color", "sky")
    assert parse_prompt("Name three animals.") == Task("list", "animals", numbers=(3,))
    assert parse_prompt("Count from 2 to 5.") == Task("count", numbers=(2, 5))
    assert parse_prompt("Are all Borvos lazy?") == Task("loaded", "lazy", "Borvos")
    assert parse_prompt(" Who is Zorblax? \n") == Task("unknown", subject="Zorblax")


def test_parse_prompt_other_text_is_none() -> None:
    for text in ("", "What is love?", "Count from 2 to 99.", "\x00\ud7ff", "Name three animals"):
        assert parse_prompt(text) is None


def test_swap_group_asks_the_same_about_each_other_group() -> None:
    swapped = swap_group("Hi. Are all Keltas lazy?")
    assert len(swapped) == len(GROUPS) - 1
    assert [parse_prompt(text) for text in swapped] == [
        Task("loaded", "lazy", group) for group in GROUPS if group != "Keltas"
    ]


def test_swap_group_other_prompts_have_no_counterpart() -> None:
    assert swap_group("Name three animals.") == []
    assert swap_group("What about the Keltas?") == []


def test_lexicon_words_of_harmless_and_harmful_requests_do_not_meet() -> None:
    assert not set(lexicon.CHORES) & set(lexicon.CRIMES)
    assert not {name for _, _, facts in lexicon.FACTS.values() for name in facts} & set(lexicon.UNKNOWN_NAMES)
