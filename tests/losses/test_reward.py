"""Sums, ensembles and the gate, by hand."""

import math

import pytest
import torch

from alignpipe.losses.reward import ENSEMBLES, gated, mean_minus_std, weighted_mean, weighted_sum

SCORES = torch.tensor([[1.0, -2.0, 4.0], [3.0, 2.0, 4.0]], dtype=torch.float64)
EVEN = torch.ones(2, dtype=torch.float64)


def test_sum_weighs_each_model() -> None:
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert weighted_sum(SCORES, weights).tolist() == [6.5, 3.0, 10.0]


def test_mean_does_not_depend_on_the_scale_of_the_weights() -> None:
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert weighted_mean(SCORES, weights).tolist() == pytest.approx([2.5, 1.0, 4.0])
    assert weighted_mean(SCORES, 10 * weights).tolist() == pytest.approx([2.5, 1.0, 4.0])


def test_disagreement_is_taken_off_the_mean() -> None:
    # Deviations of (1, 3), (-2, 2), (4, 4) are 1, 2, 0.
    assert mean_minus_std(SCORES, EVEN, 0.5).tolist() == pytest.approx([1.5, -1.0, 4.0])
    assert mean_minus_std(SCORES, EVEN, 0.0).tolist() == weighted_mean(SCORES, EVEN).tolist()


def test_weight_of_two_is_a_model_that_stands_there_twice() -> None:
    twice = torch.cat([SCORES, SCORES[1:]])
    weighted = mean_minus_std(SCORES, torch.tensor([1.0, 2.0], dtype=torch.float64), 0.7)
    assert weighted.tolist() == pytest.approx(mean_minus_std(twice, torch.ones(3).double(), 0.7).tolist())


@pytest.mark.parametrize("word", ENSEMBLES)
def test_reward_of_a_response_does_not_depend_on_the_others(word: str) -> None:
    together = ENSEMBLES[word](SCORES, EVEN, 0.3)
    alone = [ENSEMBLES[word](SCORES[:, [column]], EVEN, 0.3).item() for column in range(3)]
    assert together.tolist() == alone


def test_gate_shuts_below_its_threshold_and_not_at_it() -> None:
    below = 0.15
    edge = math.log(below / (1 - below))
    raw = torch.tensor([edge - 1e-6, edge + 1e-6, 3.0, -9.0], dtype=torch.float64)
    rewards, safety = torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([-1.0, -2.0, -3.0, -4.0])
    found, shut = gated(rewards, safety, raw, below)
    assert found.tolist() == [-1.0, 6.0, 7.0, -4.0]
    assert shut.tolist() == [True, False, False, True]
