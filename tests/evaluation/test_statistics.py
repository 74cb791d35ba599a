"""Bootstrap intervals: known cases, what pairing takes away, and the normal approximation."""

import numpy as np
import pytest

from alignpipe.evaluation.statistics import (
    lower_bound,
    mean_figure,
    mean_interval,
    paired_interval,
    ratio_figure,
    wilson_interval,
)


def test_constant_values_have_an_interval_without_width() -> None:
    assert mean_interval(np.full(20, 0.25)) == (0.25, 0.25)


def test_constant_gain_is_certain_however_the_prompts_vary() -> None:
    before = np.random.default_rng(1).normal(size=200)
    low, high = paired_interval(before + 0.01, before)
    assert low == pytest.approx(0.01)
    assert high == pytest.approx(0.01)


def test_pairing_takes_away_what_the_two_share() -> None:
    random = np.random.default_rng(2)
    before = random.normal(scale=3.0, size=400)
    after = before + 0.2 + random.normal(scale=0.1, size=400)
    low, high = paired_interval(after, before)
    assert low > 0.15
    assert high - low < 0.05
    # The same answers set against those of other prompts say nothing.
    low, high = paired_interval(after, np.roll(before, 1))
    assert high - low > 0.5


def test_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(3).normal(loc=1.0, scale=2.0, size=1000)
    low, high = mean_interval(values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_exchanging_the_two_mirrors_the_interval() -> None:
    random = np.random.default_rng(4)
    one, two = random.normal(size=100), random.normal(size=100)
    low, high = paired_interval(one, two)
    assert paired_interval(two, one) == pytest.approx((-high, -low))


def test_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(5).normal(size=50)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_single_prompt_has_an_interval_of_its_value() -> None:
    assert mean_interval(np.array([0.7])) == (0.7, 0.7)


def test_wilson_interval_is_where_the_score_test_is_at_its_limit() -> None:
    # Its ends solve |rate - p| = 1.96 sqrt(p (1 - p) / n).
    for count, total in ((3, 11), (40, 50), (1, 200)):
        for bound in wilson_interval(count, total):
            distance = abs(count / total - bound) / np.sqrt(bound * (1 - bound) / total)
            assert distance == pytest.approx(1.959964, abs=1e-6)


def test_wilson_interval_of_none_and_of_all_has_a_width() -> None:
    low, high = wilson_interval(0, 10)
    assert low == 0
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert wilson_interval(10, 10) == (pytest.approx(1 - high), pytest.approx(1.0))


def test_lower_bound_is_the_normal_ones_of_a_large_sample() -> None:
    values = np.random.default_rng(5).normal(0.3, 1.0, 2000)
    error = values.std() / np.sqrt(len(values))
    assert lower_bound(values, 0.95) == pytest.approx(values.mean() - 1.645 * error, abs=0.15 * error)
    assert lower_bound(values, 0.5) == pytest.approx(values.mean(), abs=0.15 * error)


def test_figure_is_the_mean_and_its_interval() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0])
    assert tuple(mean_figure(values)) == (0.5, *mean_interval(values))


def test_ratio_weighs_each_unit_of_the_denominator_alike() -> None:
    # 3 nats over 1 token and 3 over 9: 0.6 a token, not the mean of 3 and 1/3.
    assert ratio_figure(np.array([3.0, 3.0]), np.array([1.0, 9.0])).value == pytest.approx(0.6)


def test_ratio_over_equal_denominators_is_a_mean() -> None:
    values = np.random.default_rng(6).normal(size=40)
    assert tuple(ratio_figure(4 * values, np.full(40, 4.0))) == pytest.approx(tuple(mean_figure(values)))


def test_ratio_interval_is_that_of_the_delta_method() -> None:
    random = np.random.default_rng(7)
    tokens = random.integers(5, 30, 800) * 1.0
    nats = tokens * random.normal(2.0, 0.5, 800)
    found = ratio_figure(nats, tokens)
    error = np.std(nats - found.value * tokens) / tokens.mean() / np.sqrt(800)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)
