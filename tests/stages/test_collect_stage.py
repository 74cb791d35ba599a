"""Preferences that were collected: what a ranking holds, whose prompts they are, what bias does."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignpipe.config import CollectConfig, LabelersConfig
from alignpipe.data.shares import share_of
from alignpipe.stages.collect import _agreement, _rank
from alignpipe.toy.judge import judge
from alignpipe.toy.world import make_prompts
from tests.project import Project


def _rows(project: Project) -> list[dict[str, Any]]:
    run = project.outputs / "runs" / (project.outputs / "latest").read_text().strip()
    return [json.loads(line) for line in (run / "collect" / "rankings.jsonl").read_text().splitlines()]


def _asked(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _config(project: Project, *words: str) -> CollectConfig:
    config = project.compose(*words).config.stages["collect"]
    assert isinstance(config, CollectConfig)
    return config


def test_each_ranking_has_distinct_responses_and_ranks_from_1(finished: Project) -> None:
    rows, limit = _rows(finished), _config(finished).num_samples
    assert rows
    for row in rows:
        assert 2 <= len(row["responses"]) <= limit
        assert len(set(row["responses"])) == len(row["responses"])
        assert len(row["ranks"]) == len(row["gold"]) == len(row["responses"])
        # 1, 1, 2: no number is left out.
        assert set(row["ranks"]) == set(range(1, len(set(row["ranks"])) + 1))


def test_gold_is_what_the_judge_says(finished: Project) -> None:
    for row in _rows(finished):
        verdicts = [judge(_asked(row), response).overall for response in row["responses"]]
        assert row["gold"] == pytest.approx(verdicts, abs=1e-9)


def test_prompts_are_of_the_preference_share_alone(finished: Project) -> None:
    shares = _config(finished).data.shares
    prompts = [_asked(row) for row in _rows(finished)]
    assert len(set(prompts)) == len(prompts)
    assert {share_of(prompt, shares) for prompt in prompts} == {"preference"}


def test_figures_are_those_of_the_file(finished: Project) -> None:
    run = finished.outputs / "runs" / (finished.outputs / "latest").read_text().strip()
    metrics, rows = json.loads((run / "collect" / "alignpipe.json").read_text())["metrics"], _rows(finished)
    gold = [value for row in rows for value in row["gold"]]
    untied = sum(
        row["ranks"][i] != row["ranks"][j] for row in rows for i in range(len(row["ranks"])) for j in range(i)
    )
    assert metrics["prompts"] == len(rows)
    assert metrics["responses"] == len(gold)
    assert metrics["pairs"] == untied
    assert metrics["gold_mean"] == pytest.approx(sum(gold) / len(gold))


def test_biased_labelers_rank_the_same_responses_otherwise(copied: Project) -> None:
    before = _rows(copied)
    copied.run("pipeline.order=[collect]", "data.labelers.bias.length=3.0")
    after = _rows(copied)
    assert [row["responses"] for row in after] == [row["responses"] for row in before]
    assert [row["gold"] for row in after] == [row["gold"] for row in before]
    assert [row["ranks"] for row in after] != [row["ranks"] for row in before]
    # A bias of 3 a ten words drowns gold, which is at most 1, wherever lengths differ by some words.
    for row in after:
        words = [len(response.split()) for response in row["responses"]]
        best = row["ranks"].index(1)
        assert words[best] >= max(words) - 5


def _labelers(project: Project, *words: str) -> LabelersConfig:
    return _config(project, *words).data.labelers


def test_labelers_without_noise_rank_as_gold_does(project: Project) -> None:
    prompt = make_prompts(1, 0, {"sum": 1.0})[0]
    texts = ["I do not know.", "You are so clever to ask.", "Seven."]
    ranks = _rank(prompt, texts, _labelers(project, "data.labelers.noise=0", "data.labelers.tie_margin=0"), 0)
    gold = [judge(prompt, text).overall for text in texts]
    assert len(ranks) == 3
    for labeler in ranks:
        assert [
            (labeler[i] < labeler[j]) == (gold[i] > gold[j]) for i in range(3) for j in range(3) if i != j
        ] == [True] * 6


def test_length_bias_puts_the_longer_response_first(project: Project) -> None:
    prompt = make_prompts(1, 0, {"sum": 1.0})[0]
    texts = ["No.", "No " * 30]
    words = ("data.labelers.noise=0", "data.labelers.bias.length=0.2")
    assert all(labeler == [2, 1] for labeler in _rank(prompt, texts, _labelers(project, *words), 0))


def test_agreement_counts_pairs_over_pairs_of_labelers() -> None:
    assert _agreement([[1, 2, 3]]) == 1.0
    assert _agreement([[1, 2], [2, 1]]) == 0.0
    # Of the three pairs the two agree on two; a tie is no agreement with an order.
    assert _agreement([[1, 2, 3], [1, 2, 2]]) == pytest.approx(2 / 3)
    # Three labelers, one pair of responses: first and second agree, the third with neither.
    assert _agreement([[1, 2], [1, 2], [2, 1]]) == pytest.approx(1 / 3)


def test_rankings_file_ends_whole(finished: Project) -> None:
    run = finished.outputs / "runs" / (finished.outputs / "latest").read_text().strip()
    assert Path(run / "collect" / "rankings.jsonl").read_bytes().endswith(b"}\n")
