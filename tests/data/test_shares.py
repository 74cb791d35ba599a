"""Shares: disjoint, stable under everything but the text."""

from collections import Counter
from itertools import chain

import pytest

from alignpipe.config import SharesConfig
from alignpipe.data.records import Demonstration, Message, Prompt, Text
from alignpipe.data.shares import in_share, share_of
from alignpipe.errors import ConfigError

SHARES = SharesConfig(sft=0.4, preference=0.25, rl=0.2, eval=0.15)
TEXTS = [f"prompt {number}" for number in range(4000)]


def test_share_of_many_texts_meets_the_fractions() -> None:
    counts = Counter(share_of(text, SHARES) for text in TEXTS)
    for name, fraction in {"sft": 0.4, "preference": 0.25, "rl": 0.2, "eval": 0.15}.items():
        assert abs(counts[name] / 4000 - fraction) < 0.03


def test_share_of_eval_does_not_move_when_others_change() -> None:
    other = SharesConfig(sft=0.05, preference=0.75, rl=0.05, eval=0.15)
    first = {text for text in TEXTS if share_of(text, SHARES) == "eval"}
    second = {text for text in TEXTS if share_of(text, other) == "eval"}
    assert first == second


def test_share_of_white_space_does_not_count() -> None:
    assert all(
        share_of(f"  {text}\n", SHARES) == share_of(text.replace(" ", "\t"), SHARES) for text in TEXTS[:100]
    )


def test_share_of_other_salt_gives_other_split() -> None:
    moved = sum(share_of(text, SHARES) != share_of(text, SHARES, "salt") for text in TEXTS)
    assert 2000 < moved < 3600


def test_share_of_zero_fraction_gets_nothing() -> None:
    shares = SharesConfig(sft=0.9, preference=0.0, rl=0.0, eval=0.1)
    assert {share_of(text, shares) for text in TEXTS} == {"sft", "eval"}


def test_in_share_parts_are_disjoint_and_whole() -> None:
    records = [Prompt((Message("user", text),)) for text in TEXTS[:500]]
    parts = [in_share(records, name, SHARES) for name in ("sft", "preference", "rl", "eval")]
    assert Counter(chain.from_iterable(parts)) == Counter(records)
    assert len(in_share(records, "train", SHARES)) == 500 - len(parts[3])
    assert in_share(records, "all", SHARES) == records


def test_in_share_same_prompt_in_other_records_falls_alike() -> None:
    prompt = Message("user", "What is it?")
    records = [Prompt((prompt,)), Demonstration((prompt, Message("assistant", "That.")))]
    assert {len(in_share(records, name, SHARES)) for name in ("sft", "preference", "rl", "eval")} == {0, 2}
    assert in_share([Text("What is it?")], share_of("What is it?", SHARES), SHARES)


def test_in_share_unknown_share_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean train"):
        in_share([], "trian", SHARES)
