"""Moments merged rollout by rollout are those of all scores at once."""

import json

import numpy as np
import pytest

from alignpipe.rollout.scaling import RunningMoments


def test_merged_moments_are_those_of_everything() -> None:
    chance = np.random.default_rng(0)
    batches = [chance.normal(3, 2, size) for size in (5, 1, 40)]
    moments = RunningMoments()
    for batch in batches:
        moments.add(batch)
        # As a saved state carries them from one rollout to the next.
        moments = RunningMoments(*json.loads(json.dumps(moments.state)))
    whole = np.concatenate(batches)
    assert moments.mean == pytest.approx(whole.mean(), abs=1e-12)
    assert moments.std == pytest.approx(whole.std(), abs=1e-12)


def test_scaled_reward_takes_its_own_scores_in_first() -> None:
    moments = RunningMoments()
    assert moments.scaled(np.array([1.0, 3.0])).tolist() == [-1.0, 1.0]
    # Of 1, 3 and 8: mean 4, deviation sqrt(26 / 3).
    assert moments.scaled(np.array([8.0])).tolist() == pytest.approx([4 / (26 / 3) ** 0.5])


def test_scores_that_do_not_vary_are_only_shifted() -> None:
    assert RunningMoments().scaled(np.array([2.0, 2.0])).tolist() == [0.0, 0.0]
