"""Alarms by hand: what raises each of them, what does not, and how seldom noise alone does."""

from dataclasses import replace

import numpy as np
import pytest

from alignpipe.compose.composition import compose
from alignpipe.config import MonitorConfig
from alignpipe.evaluation.alarms import History, Look, raised

CALM = Look(at=0, scores=[], proxy=0.0, kl=0.0, entropy=0.5, length=20.0, repetition=0.1)


@pytest.fixture(scope="module")
def config() -> MonitorConfig:
    return compose(["monitor=warn"]).config.monitor


def _scores(mean: float, spread: float = 0.4, number: int = 100) -> list[float]:
    """Half of the prompts above the mean and half below, in both halves of the prompts."""
    return [mean + spread * (1 if index // 2 % 2 else -1) for index in range(number)]


def _alarms(config: MonitorConfig, start: Look, *looks: Look) -> set[str]:
    """What the last of some looks raises."""
    history = History.of(start)
    for look in looks[:-1]:
        history = history.joined_by(look)
    return set(raised(looks[-1], history, config))


def test_policy_that_stays_as_it_is_raises_nothing(config: MonitorConfig) -> None:
    start = replace(CALM, scores=_scores(0.5))
    assert _alarms(config, start, replace(start, at=1)) == set()


def test_fall_of_the_judge_beside_a_risen_proxy_is_overoptimization(config: MonitorConfig) -> None:
    start = replace(CALM, scores=_scores(0.5))
    # Deviation at the start 0.4, so that the limit is a fall of 0.02 from the best look, not from the start.
    best = replace(CALM, at=1, scores=_scores(0.6), proxy=1.0)
    small, large = (replace(CALM, at=2, scores=_scores(mean), proxy=1.5) for mean in (0.585, 0.575))
    assert _alarms(config, start, best, small) == set()
    assert _alarms(config, start, best, large) == {"overoptimization"}
    assert _alarms(replace(config, max_fall=None), start, best, large) == set()
    assert _alarms(replace(config, max_fall=0.07), start, best, large) == set()


def test_fall_of_judge_and_proxy_together_is_no_overoptimization(config: MonitorConfig) -> None:
    start, best = replace(CALM, scores=_scores(0.5)), replace(CALM, at=1, scores=_scores(0.6), proxy=1.0)
    assert _alarms(config, start, best, replace(CALM, at=2, scores=_scores(0.3), proxy=0.9)) == set()


def test_fall_that_few_prompts_make_is_not_sure_enough(config: MonitorConfig) -> None:
    start = replace(CALM, scores=_scores(0.5))
    # Two prompts fall by 2: a mean fall of 0.04 with a standard error of 0.028.
    few = [score - 2.0 * (index in (10, 51)) for index, score in enumerate(start.scores)]
    look = replace(CALM, at=1, scores=few, proxy=1.0)
    assert np.mean(start.scores) - np.mean(few) == pytest.approx(0.04)
    assert _alarms(replace(config, confidence=0.95), start, look) == set()
    assert _alarms(replace(config, confidence=0.8), start, look) == {"overoptimization"}


def test_best_look_is_chosen_on_one_half_of_the_prompts_and_compared_on_the_other() -> None:
    looks = [
        replace(CALM, at=at, scores=scores)
        for at, scores in enumerate([[0.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.7, 0.1], [0.3, 0.5, 0.1, 0.3]])
    ]
    history = History.of(looks[0]).joined_by(looks[1]).joined_by(looks[2])
    # The even prompts like look 1 best (0.8), the odd ones look 2 (0.4); over all it is look 1 (0.45 to 0.3).
    assert (history.best_even.at, history.best_odd.at, history.best.at) == (1, 2, 1)
    now = replace(CALM, at=3, scores=[0.0, 0.0, 0.0, 0.0])
    # Even prompts against look 2, odd ones against look 1.
    assert history.falls(now) == pytest.approx([0.3, 0.1, 0.1, 0.1])


def test_noise_alone_is_no_fall(config: MonitorConfig) -> None:
    random = np.random.default_rng(0)
    falls, naive = [], []
    for _ in range(200):
        tastes = random.normal(0.5, 0.3, 100)
        looks = [
            replace(CALM, at=at, scores=(tastes + random.normal(0, 0.3, 100)).tolist()) for at in range(13)
        ]
        history = History.of(looks[0])
        for look in looks[1:-1]:
            history = history.joined_by(look)
        falls.append(np.mean(history.falls(looks[-1])))
        naive.append(np.mean(history.best.scores) - np.mean(looks[-1].scores))
    # The highest of twelve means lies 1.6 standard errors of 0.03 above the truth, on its own prompts.
    assert np.mean(naive) > 0.04
    assert abs(np.mean(falls)) < 3 * np.std(falls) / np.sqrt(200)


@pytest.mark.parametrize(("length", "expected"), [(59.0, set()), (61.0, {"length"}), (6.0, {"length"})])
def test_length_far_from_the_starts_is_an_alarm(
    config: MonitorConfig, length: float, expected: set[str]
) -> None:
    look = replace(CALM, at=1, length=length)
    assert _alarms(replace(config, max_length_ratio=3.0), CALM, look) == expected
    assert _alarms(replace(config, max_length_ratio=None), CALM, look) == set()


@pytest.mark.parametrize(
    ("change", "limit", "name"),
    [
        ({"entropy": 0.049}, {"min_entropy_ratio": 0.1}, "entropy"),
        ({"repetition": 0.21}, {"max_repetition": 0.2}, "repetition"),
        ({"kl": 5.01}, {"max_kl": 5.0}, "kl"),
    ],
)
def test_each_limit_raises_its_own_alarm(
    config: MonitorConfig, change: dict[str, float], limit: dict[str, float], name: str
) -> None:
    look = replace(CALM, at=1, **change)
    assert _alarms(replace(config, **limit), CALM, look) == {name}
    assert _alarms(replace(config, **dict.fromkeys(limit)), CALM, look) == set()
    within = {key: value * (1.05 if key == "entropy" else 0.95) for key, value in change.items()}
    assert _alarms(replace(config, **limit), CALM, replace(CALM, at=1, **within)) == set()


def test_alarm_says_its_figures(config: MonitorConfig) -> None:
    start = replace(CALM, scores=_scores(0.5))
    found = raised(replace(CALM, at=3, scores=_scores(0.3), proxy=2.0), History.of(start), config)
    assert found["overoptimization"] == (
        "held-out score 0.300, down 0.200 (at least 0.200) from its best at 0, while the proxy went from "
        "0.000 to 2.000"
    )
