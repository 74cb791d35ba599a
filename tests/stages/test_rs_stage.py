"""Rejection sampling: which response is kept, and the curve of the best of n."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpipe.evaluation.responses import Response
from alignpipe.stages.rs import _best, _copies, _curve
from tests.project import Project

EOS = 2
PROMPT = [10, 11, 12, 13, 14, 15]


def _folder(project: Project) -> Path:
    return project.outputs / "runs" / (project.outputs / "latest").read_text().strip() / "rs"


def _metrics(project: Project) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((_folder(project) / "alignpipe.json").read_text())["metrics"]
    return metrics


def _response(*ids: int, finished: bool = True) -> Response:
    return Response([*ids, EOS] if finished else list(ids), "", finished)


def test_curve_goes_from_the_mean_to_the_best(finished: Project) -> None:
    metrics = _metrics(finished)
    curve = metrics["best_of_n"]
    assert len(curve) == 3
    assert curve == sorted(curve)
    assert curve[0] < curve[-1]
    assert curve[0] == pytest.approx(metrics["reward_mean"], abs=1e-6)
    assert curve[-1] == pytest.approx(metrics["reward_best"], abs=1e-6)


def test_curve_stands_in_the_metrics_for_every_n(finished: Project) -> None:
    line = json.loads((_folder(finished) / "metrics.jsonl").read_text().splitlines()[0])
    logged = [line[f"rs/best_of_{n}"] for n in (1, 2, 3)]
    assert logged == pytest.approx(_metrics(finished)["best_of_n"])
    assert line["rs/reward_mean"] == pytest.approx(logged[0])
    assert line["rs/reward_best"] == pytest.approx(logged[2])


def test_curve_of_known_rewards() -> None:
    # Best of two of (1, 2, 4): pairs give 2, 4, 4; of (0, 0, 3): 0, 3, 3.
    rewards = np.array([[4.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    assert _curve(rewards) == pytest.approx([(7 / 3 + 1) / 2, (10 / 3 + 2) / 2, (4 + 3) / 2])


def test_training_rows_are_the_best_and_the_replayed(copied: Project) -> None:
    metrics = _metrics(copied)
    asked = 3 * metrics["without_eos"]
    assert asked > 0
    copied.run("pipeline.order=[rs]", "stages.rs.replay=0")
    alone = _metrics(copied)
    # The same seed samples the same responses; four parts of them and one of demonstrations.
    assert alone["without_eos"] == metrics["without_eos"]
    assert alone["best_of_n"] == pytest.approx(metrics["best_of_n"])
    assert metrics["rows"] == alone["rows"] + round(alone["rows"] * 0.2 / 0.8)


def test_best_is_the_highest_score() -> None:
    responses = [_response(20, 21), _response(22, 23), _response(24, 25)]
    assert _best(PROMPT, responses, np.array([0.1, 0.9, 0.5])) == 1


def test_unfinished_response_is_never_chosen() -> None:
    responses = [_response(20, 21), _response(22, 23, finished=False)]
    assert _best(PROMPT, responses, np.array([-5.0, 5.0])) == 0


def test_empty_response_is_never_chosen() -> None:
    assert _best(PROMPT, [_response(), _response(20)], np.array([5.0, -5.0])) == 1


def test_copy_of_the_prompt_is_never_chosen() -> None:
    responses = [_response(*PROMPT[1:]), _response(20, 21)]
    assert _best(PROMPT, responses, np.array([5.0, -5.0])) == 1


def test_tie_goes_to_the_shorter() -> None:
    responses = [_response(20, 21, 22), _response(20, 21), _response(20, 21, 22, 23)]
    assert _best(PROMPT, responses, np.array([1.0, 1.0, 1.0])) == 1


def test_nobody_is_chosen_where_nobody_can_be() -> None:
    responses = [_response(), _response(20, finished=False), _response(*PROMPT)]
    assert _best(PROMPT, responses, np.array([1.0, 2.0, 3.0])) is None


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
    assert _copies(PROMPT, [*response, EOS]) is copied
