"""Who may be chosen and why not, and the file that carries responses to later rounds."""

from pathlib import Path

import pytest

from alignpipe.evaluation.candidates import (
    REASONS,
    Candidate,
    copies,
    read_candidates,
    refusals,
    write_candidates,
)
from alignpipe.evaluation.responses import Response

EOS = 2
PROMPT = [10, 11, 12, 13, 14, 15]


def _candidate(*ids: int, reward: float = 0.0, finished: bool = True) -> Candidate:
    return Candidate(Response([*ids, EOS] if finished else list(ids), "", finished), reward)


def _reasons(*candidates: Candidate, min_length: int = 1, floor: float | None = None) -> list[str | None]:
    return refusals(PROMPT, candidates, min_length, floor)


def test_each_reason_is_told_for_what_it_is() -> None:
    found = _reasons(
        _candidate(20, 21),
        _candidate(20, 21, finished=False),
        _candidate(),
        _candidate(*PROMPT[1:]),
        _candidate(20, 21, reward=5.0),
        _candidate(22, reward=-3.0),
        floor=-1.0,
    )
    assert found == [None, *REASONS]


def test_first_reason_counts() -> None:
    assert _reasons(_candidate(finished=False, reward=-9.0), floor=0.0) == ["no_eos"]
    assert _reasons(_candidate(20, reward=-9.0), min_length=2, floor=0.0) == ["too_short"]


def test_floor_and_length_are_bounds_that_may_be_met() -> None:
    assert _reasons(_candidate(20, 21, reward=0.5), min_length=2, floor=0.5) == [None]
    assert _reasons(_candidate(), min_length=0) == [None]


@pytest.mark.parametrize(
    ("response", "copied"),
    [
        (PROMPT, True),
        (PROMPT[:3], True),
        (PROMPT[2:5], True),
        (PROMPT[3:], True),
        # A word or two of the question may well be the answer.
        (PROMPT[:2], False),
        ([], False),
        # The same words in another order, with a word between, or with one more.
        (PROMPT[::-1], False),
        ([10, 11, 20, 12], False),
        ([*PROMPT, 16], False),
    ],
)
def test_copies_are_long_parts_of_the_prompt_word_for_word(response: list[int], copied: bool) -> None:
    assert copies(PROMPT, [*response, EOS]) is copied


def test_candidates_come_back_from_their_file_by_prompt(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    broken = Response([5, EOS], "half of a pair \ud83d and 한글", True)
    cut = Response([6, 7], "cut", False)
    write_candidates(["one", "two"], [[Candidate(broken, 0.5), Candidate(cut, -1.0)], []], path)
    assert read_candidates(path) == {"one": [broken, cut]}
