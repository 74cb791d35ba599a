"""PPO on the finished chain: what must hold before the first update, and what each setting does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpipe.config import PPOConfig
from alignpipe.losses.ppo import adapt_kl_coef
from alignpipe.rollout.experience import ResponseRow, minibatches
from alignpipe.rollout.scaling import RunningMoments
from alignpipe.stages.ppo import _scores
from tests.project import PPO_ALONE, Project


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]


def _config(project: Project, *words: str) -> PPOConfig:
    config = project.compose(*PPO_ALONE, *words).config.stage
    assert isinstance(config, PPOConfig)
    return config


def test_first_minibatch_meets_the_policy_that_sampled(copied: Project) -> None:
    lines = _lines(copied.run(*PPO_ALONE, "stage.ppo_epochs=2", "stage.micro_batch_size=4"))
    for line in lines:
        # The policy has changed by the second rollout, and still each begins with itself.
        assert line["ppo/ratio_first"] == pytest.approx(1.0, abs=1e-5)
        assert abs(line["ppo/approx_kl_first"]) < 1e-6
        assert line["ppo/clip_fraction_first"] == 0
    # Averages over all minibatches are not those of the first.
    assert abs(lines[0]["ppo/ratio"] - 1) > 1e-5
    assert lines[0]["ppo/approx_kl"] > 1e-6
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(lines[1]["objective/kl"]) > 1e-3


def test_kl_is_measured_against_the_reference_and_not_the_start(copied: Project) -> None:
    lines = _lines(copied.run(*PPO_ALONE, "stage.policy=latest/rs", "stage.num_rollouts=1"))
    assert abs(lines[0]["objective/kl"]) > 1e-3
    assert lines[0]["ppo/ratio_first"] == pytest.approx(1.0, abs=1e-5)


def test_adaptive_controller_moves_the_coefficient_by_its_formula(copied: Project) -> None:
    words = ("stage.kl_controller=adaptive", "stage.target_kl=0.5", "stage.kl_horizon=100")
    folder = copied.run(*PPO_ALONE, *words)
    config = _config(copied, *words)
    lines = _lines(folder)
    coef = config.kl_coef
    for line in lines:
        assert line["objective/kl_coef"] == pytest.approx(coef)
        responses = config.rollout_size * config.num_samples
        coef = adapt_kl_coef(coef, line["objective/kl"], 0.5, responses, 100)
    # KL of the first rollout is 0: a full error of -0.2 over 16 responses of a horizon of 100.
    assert lines[1]["objective/kl_coef"] == pytest.approx(config.kl_coef * (1 - 0.2 * 16 / 100))
    manifest = json.loads((folder / "ppo" / "alignpipe.json").read_text())
    assert manifest["metrics"]["kl_coef"] == pytest.approx(coef)


def test_fixed_coefficient_stays(copied: Project) -> None:
    lines = _lines(copied.run(*PPO_ALONE))
    assert {line["objective/kl_coef"] for line in lines} == {_config(copied).kl_coef}


def test_penalty_lowers_the_score_by_the_share_of_unfinished_responses(copied: Project) -> None:
    # The first rollout is the same whatever the penalty, since it is sampled before any update.
    without, with_penalty = (
        _lines(copied.run(*PPO_ALONE, "stage.num_rollouts=1", f"stage.missing_eos_penalty={penalty}"))[0]
        for penalty in (0, 3)
    )
    unfinished = 1 - without["objective/finished"]
    assert unfinished > 0
    assert with_penalty["objective/finished"] == without["objective/finished"]
    assert without["objective/score"] - with_penalty["objective/score"] == pytest.approx(
        3 * unfinished, abs=1e-4
    )


def test_scores_are_clipped_and_lowered_for_what_was_cut_off(project: Project) -> None:
    config = _config(project, "stage.score_clip=2", "stage.missing_eos_penalty=1.5")
    given = np.array([0.5, 0.5, 7.0, -7.0])
    scores = _scores(config, given, [True, False, False, True], RunningMoments())
    # The penalty comes after the clip, so that a response which is liked very much still pays it.
    assert scores.tolist() == pytest.approx([0.5, -1.0, 0.5, -2.0])


def test_samples_of_a_rollout_are_each_visited_once_an_epoch(project: Project) -> None:
    config = _config(project, "stage.ppo_epochs=2")
    rows = [ResponseRow(index, 4, 2) for index in range(16)]
    found = list(minibatches(rows, 0, config))
    assert [len(minibatch) for minibatch in found] == [8, 8, 8, 8]
    epochs = [found[:2], found[2:]]
    orders = [[row.index for minibatch in epoch for row in minibatch] for epoch in epochs]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert orders[0] != orders[1]
    again = [row.index for minibatch in minibatches(rows, 1, config) for row in minibatch]
    assert again[:16] != orders[0]
