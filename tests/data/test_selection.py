"""What needs no model: bounds, exact and near duplicates."""

import random
from dataclasses import replace
from itertools import combinations

import pytest

from alignpipe.config import SelectionConfig
from alignpipe.data.records import Demonstration, Message
from alignpipe.data.selection import (
    Refusal,
    exact_duplicates,
    jaccard,
    near_duplicates,
    refusals,
    script_share,
    shingles,
)

ALL = SelectionConfig(
    drop_duplicates=False,
    near_duplicates=None,
    min_tokens=None,
    max_tokens=None,
    scripts=[],
    min_script_share=0.9,
    method="none",
    diversity="none",
    keep=1.0,
)


def test_exact_duplicates_point_at_the_first_whatever_the_white_space() -> None:
    assert exact_duplicates(["a b", "c", "a  b\n", "c", "A b"]) == [None, None, 0, 1, None]


def test_jaccard_of_shingles_is_that_by_hand() -> None:
    one, other = shingles("The cat sat on the mat"), shingles("the cat sat on the rug")
    # the-cat-sat, cat-sat-on, sat-on-the in common; on-the-mat and on-the-rug not.
    assert jaccard(one, other) == pytest.approx(3 / 5)
    assert shingles("Two words") == {("two", "words")}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(threshold: float) -> None:
    chance = random.Random(0)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(chance.choices(words, k=chance.randint(2, 12))) for _ in range(60)]
    for _ in range(60):
        changed = chance.choice(texts).split()
        changed[chance.randrange(len(changed))] = chance.choice(words)
        texts.append(" ".join(changed))
    kept: list[int] = []
    expected: list[int | None] = []
    for index, text in enumerate(texts):
        like = next((k for k in kept if jaccard(shingles(text), shingles(texts[k])) >= threshold), None)
        expected.append(like)
        kept += [index] if like is None else []
    found = near_duplicates(texts, threshold)
    assert found == expected
    assert any(like is not None for like in found)
    left = [texts[index] for index, like in enumerate(found) if like is None]
    assert all(jaccard(shingles(a), shingles(b)) < threshold for a, b in combinations(left, 2))


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        ("Hello, world 123!", ["latin"], 1.0),
        ("Привет abc", ["latin"], 3 / 9),
        ("안녕 Hello", ["hangul", "latin"], 1.0),
        ("漢字 ひら カナ ab", ["cjk"], 2 / 8),
        ("123 ?!", ["latin"], 1.0),
    ],
)
def test_script_share_counts_letters_alone(text: str, scripts: list[str], share: float) -> None:
    assert script_share(text, scripts) == pytest.approx(share)


def _row(asked: str, said: str) -> Demonstration:
    return Demonstration((Message("user", asked), Message("assistant", said)))


def test_refusals_name_the_reason_and_the_row_that_is_repeated() -> None:
    rows = [
        _row("What is it?", "short"),
        _row("What color is the sky over there?", "It is blue as everybody knows."),
        _row("What color is the sky over there?", "It is  blue as everybody knows."),
        _row("What color is the sky over there?", "It is blue as everybody thinks."),
        _row("Какого цвета?", "Синего цвета, как все знают."),
        _row("What is it?", "A long one."),
    ]
    config = replace(
        ALL, drop_duplicates=True, near_duplicates=0.7, min_tokens=2, max_tokens=50, scripts=["latin"]
    )
    assert refusals(rows, [1, 9, 9, 9, 9, 51], config) == [
        Refusal("too_short"),
        None,
        Refusal("exact_duplicate", 1),
        Refusal("near_duplicate", 1),
        Refusal("other_script"),
        Refusal("too_long"),
    ]
    assert refusals(rows, [1, 9, 9, 9, 9, 51], ALL) == [None] * 6


def test_selection_is_on_with_any_of_its_bounds() -> None:
    assert not ALL.is_on
    for change in (
        {"drop_duplicates": True},
        {"near_duplicates": 0.8},
        {"min_tokens": 3},
        {"scripts": ["latin"]},
        {"method": "random"},
        {"diversity": "kcenter"},
    ):
        assert replace(ALL, **change).is_on  # type: ignore[arg-type]
