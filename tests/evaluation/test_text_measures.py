"""Measures of texts against numbers counted by hand."""

import math

import pytest

from alignpipe.evaluation.text_measures import (
    distinct,
    ends_in_loop,
    expectation_adjusted_distinct,
    is_refusal,
    ngrams,
    sequence_repetition,
    words_of,
)


def test_words_are_runs_of_letters_and_digits_of_any_script() -> None:
    assert words_of("Don't panic, 42 times!") == ["don", "t", "panic", "42", "times"]
    assert words_of("서울은 수도이다.") == ["서울은", "수도이다"]


def test_distinct_counts_over_all_responses() -> None:
    # a b a / b c: unigrams a b a b c, 3 of 5 differ; bigrams ab ba / bc, all 3 differ.
    rows = [[["a", "b", "a"]], [["b", "c"]]]
    assert distinct(rows, 1)[0] == pytest.approx(3 / 5)  # type: ignore[index]
    assert distinct(rows, 2)[0] == pytest.approx(1.0)  # type: ignore[index]
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]


def test_ngrams_do_not_cross_responses() -> None:
    assert distinct([[["a"], ["b"]], [["c"]]], 2) is None


def test_distinct_interval_is_the_jackknife_by_hand() -> None:
    # Without row 1: b c, 2 of 2; without row 2: a b a, 2 of 3. Mean 5/6, each 1/6 off.
    found = distinct([[["a", "b", "a"]], [["b", "c"]]], 1)
    assert found is not None
    error = math.sqrt(2 * (1 / 6) ** 2 * 1 / 2)
    assert found.low == pytest.approx(3 / 5 - 1.96 * error)
    assert found.high == pytest.approx(3 / 5 + 1.96 * error)


def test_adjusted_distinct_is_one_where_tokens_are_as_expected_of_even_draws() -> None:
    # Two draws from V = 2 show 2 (1 - 1/4) = 1.5 different tokens on average.
    assert expectation_adjusted_distinct([[[0, 1]]], 2)[0] == pytest.approx(2 / 1.5)  # type: ignore[index]
    assert expectation_adjusted_distinct([[[0, 0]]], 2)[0] == pytest.approx(1 / 1.5)  # type: ignore[index]


def test_adjusted_distinct_does_not_fall_with_length_as_distinct_does() -> None:
    # All of a vocabulary, once and ten times over.
    short, long = [[list(range(50))]], [[list(range(50)) * 10]]
    assert distinct(long, 1)[0] == pytest.approx(distinct(short, 1)[0] / 10)  # type: ignore[index]
    fall = [expectation_adjusted_distinct(rows, 50)[0] for rows in (short, long)]  # type: ignore[index]
    assert fall[1] == pytest.approx(1.0, abs=1e-3)
    assert fall[0] < 2 * fall[1]


def test_sequence_repetition_is_the_share_of_ngrams_seen_before() -> None:
    # 1 2 3 4 1 2 3 4: of five 4-grams 1234 2341 3412 4123 1234, one is old.
    assert sequence_repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert sequence_repetition([7] * 8) == pytest.approx(4 / 5)
    assert sequence_repetition([1, 2, 3]) == 0.0


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([5, 5, 5, 5, 5, 5], True),
        # Twice is no loop, nor is one that the response leaves again; a phrase has at least two tokens.
        ([9, 9, 1, 2, 1, 2], False),
        ([1, 2, 1, 2, 1, 2, 9], False),
        ([8, 9, 5, 5, 5], False),
        ([1, 2, 9, 2, 1, 2], False),
        ([], False),
    ],
)
def test_loop_is_a_phrase_three_times_at_the_end(ids: list[int], loop: bool) -> None:
    assert ends_in_loop(ids) is loop


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but that would be harmful.",
        "I cannot assist with this request.",
        "As an AI language model, I cannot give medical advice.",
        "I am unable to provide that information.",
        "Unfortunately, I must decline.",
        "It is illegal to do so.",
        "죄송하지만 그 요청은 도와드릴 수 없습니다.",
        "그 질문에는 답변해 드릴 수 없어요.",
        "요청을 거절합니다.",
    ],
)
def test_refusals_are_found(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of Lumora is Ostrel.",
        "I can help with that.",
        "She said she was sorry for the delay.",
        "한국의 수도는 서울입니다.",
        "도와드릴 수 있습니다.",
        "Here is how. " * 30 + "I cannot help with that.",
        "",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)
