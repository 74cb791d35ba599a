"""Win rates against closed forms: ties, two lengths, and the slope of the penalised likelihood by autograd."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from alignpipe.evaluation.win_rate import (
    differences,
    fit_logistic,
    length_controlled_win_rate,
    preferences,
    win_rate,
)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_ties_are_half_a_win() -> None:
    won = preferences(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [1.0], [5.0]]))
    assert won.tolist() == [[0.5], [1.0], [0.0]]
    assert win_rate(won).value == 0.5


def test_every_sample_meets_every_other_of_its_prompt() -> None:
    scores, against = np.array([[1.0, 3.0]]), np.array([[2.0, 0.0]])
    assert preferences(scores, against).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert differences(scores, against).tolist() == [[-1.0, 1.0, 1.0, 3.0]]


def test_both_sides_of_a_comparison_add_up_to_one() -> None:
    random = np.random.default_rng(0)
    one, two = random.integers(0, 4, (50, 1)) * 1.0, random.integers(0, 4, (50, 1)) * 1.0
    lengths = random.integers(1, 40, (2, 50, 1)) * 1.0
    mine, theirs = (
        length_controlled_win_rate(preferences(*scores), differences(*size)).value
        for scores, size in (((one, two), lengths), ((two, one), lengths[::-1]))
    )
    assert mine + theirs == pytest.approx(1.0)
    assert win_rate(preferences(one, two)).value + win_rate(preferences(two, one)).value == 1.0


def test_two_lengths_have_a_closed_form() -> None:
    # d = +5 in 20 pairs of which 16 are won, -5 in 20 of which 8 are: theta is the mean of the two logits.
    longer = np.array([[5.0]] * 20 + [[-5.0]] * 20)
    won = np.array([[1.0]] * 16 + [[0.0]] * 4 + [[1.0]] * 8 + [[0.0]] * 12)
    found = length_controlled_win_rate(won, longer, ridge=0.0)
    assert found.value == pytest.approx(_sigmoid((_logit(0.8) + _logit(0.4)) / 2), abs=1e-9)
    assert found.low < found.value < found.high
    # The plain rate is 0.6; what length gave is taken off nothing here, since it gave as often as it took.
    assert win_rate(won).value == pytest.approx(0.6)
    theta, phi = fit_logistic(won.ravel(), np.tanh(longer.ravel() / 5), np.ones((1, 40)), 0.0)[0]
    assert phi == pytest.approx((_logit(0.8) - _logit(0.4)) / 2 / math.tanh(1))
    assert theta == pytest.approx((_logit(0.8) + _logit(0.4)) / 2)


def test_policy_that_wins_by_length_alone_is_brought_down() -> None:
    # Won by sigmoid(3 tanh(d / std)) and nothing else, and mostly longer.
    random = np.random.default_rng(1)
    longer = random.normal(8.0, 6.0, (1500, 1)).round()
    chance = 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))
    won = (random.random((1500, 1)) < chance) * 1.0
    assert win_rate(won).value > 0.8
    found = length_controlled_win_rate(won, longer)
    assert found.low < 0.5 < found.high
    assert found.value == pytest.approx(0.5, abs=0.08)


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    won = np.array([[1.0], [1.0], [0.5], [0.0], [1.0]])
    assert length_controlled_win_rate(won, np.zeros((5, 1))).value == pytest.approx(0.7)
    assert length_controlled_win_rate(won, np.full((5, 1), 3.0), ridge=1e9).value == pytest.approx(0.7)


def test_all_won_is_all_won() -> None:
    longer = np.array([[1.0], [2.0]])
    assert tuple(length_controlled_win_rate(np.ones((2, 1)), longer)) == (1.0, 1.0, 1.0)
    assert tuple(length_controlled_win_rate(np.zeros((2, 1)), longer)) == (0.0, 0.0, 0.0)
    assert length_controlled_win_rate(np.full((2, 1), 0.5), longer).value == pytest.approx(0.5)


def test_length_that_decides_everything_has_a_finite_answer() -> None:
    longer = np.array([[3.0], [4.0], [-3.0], [-4.0]])
    found = length_controlled_win_rate((longer > 0) * 1.0, longer)
    assert found.value == pytest.approx(0.5, abs=1e-9)


def test_fit_is_where_the_slope_of_the_penalised_loss_is_zero() -> None:
    random = np.random.default_rng(2)
    x, y = np.tanh(random.normal(size=60)), random.choice([0.0, 0.5, 1.0], 60)
    weights = random.integers(0, 3, (4, 60)) * 1.0
    for row, found in zip(weights, fit_logistic(y, x, weights, 1.0), strict=True):
        at = torch.tensor(found, requires_grad=True)
        logits = at[0] + at[1] * torch.tensor(x)
        loss = binary_cross_entropy_with_logits(
            logits, torch.tensor(y), weight=torch.tensor(row), reduction="sum"
        )
        (loss + at[1] ** 2 / 2).backward()
        assert at.grad is not None and at.grad.abs().max() < 1e-7


def test_order_of_prompts_changes_no_rate() -> None:
    random = np.random.default_rng(3)
    won, longer = random.choice([0.0, 0.5, 1.0], (30, 1)), random.integers(-9, 9, (30, 1)) * 1.0
    order = random.permutation(30)
    assert length_controlled_win_rate(won[order], longer[order]).value == pytest.approx(
        length_controlled_win_rate(won, longer).value, abs=1e-12
    )


def test_length_counts_in_deviations_and_levels_off() -> None:
    random = np.random.default_rng(4)
    longer = random.normal(3.0, 9.0, (80, 1)).round()
    won = random.choice([0.0, 0.5, 1.0], (80, 1))
    covariate = np.tanh(longer / longer.std()).ravel()
    theta = fit_logistic(won.ravel(), covariate, np.ones((1, 80)), 1.0)[0, 0]
    assert length_controlled_win_rate(won, longer).value == pytest.approx(_sigmoid(theta), abs=1e-9)
