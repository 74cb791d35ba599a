"""Which responses are kept: by hand, against the acceptance formula, and the KL law of the best of n."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from alignpipe.losses.best_of_n import best_of_n_kl
from alignpipe.losses.rejection import Bools, Integers, above_median, rso, top_k
from alignpipe.rollout.sampling import uniforms

SCORES = np.array([0.5, 2.0, 2.0, -1.0, 2.0, 3.0])
LENGTHS = np.array([4, 9, 5, 1, 5, 7])
ABLE = np.array([True, True, True, True, True, False])


def _all(scores: np.ndarray) -> tuple[Bools, Integers]:
    return np.ones(len(scores), dtype=bool), np.ones(len(scores), dtype=np.int64)


def test_top_k_takes_the_best_that_are_able_and_of_a_tie_the_shorter_then_the_earlier() -> None:
    assert top_k(SCORES, ABLE, LENGTHS, 1).tolist() == [2]
    assert top_k(SCORES, ABLE, LENGTHS, 4).tolist() == [2, 4, 1, 0]
    assert top_k(SCORES, ABLE, LENGTHS, 99).tolist() == [2, 4, 1, 0, 3]
    assert top_k(SCORES, np.zeros(6, dtype=bool), LENGTHS, 3).tolist() == []


def test_threshold_is_above_the_median_of_those_able() -> None:
    # Able are 0.5, 2, 2, -1, 2: their median is 2; with the sixth it would be 2 as well, without three of them not.
    assert above_median(SCORES, ABLE, LENGTHS, 0.0).tolist() == [2, 4, 1]
    assert above_median(SCORES, ABLE, LENGTHS, 0.1).tolist() == []
    assert above_median(SCORES, ABLE, LENGTHS, -1.5).tolist() == [2, 4, 1, 0]
    few = np.array([True, False, False, True, False, False])
    assert above_median(SCORES, few, LENGTHS, 0.0).tolist() == [0]
    assert above_median(SCORES, np.zeros(6, dtype=bool), LENGTHS, 0.0).tolist() == []


def test_choice_does_not_depend_on_the_order_of_responses() -> None:
    rng = np.random.default_rng(0)
    scores, lengths = rng.normal(size=12), rng.integers(1, 9, 12)
    able, drawn = rng.random(12) < 0.7, rng.random((3, 12))
    order = rng.permutation(12)
    moved = (scores[order], able[order], lengths[order])
    assert order[top_k(*moved, 4)].tolist() == top_k(scores, able, lengths, 4).tolist()
    assert order[above_median(*moved, 0.2)].tolist() == above_median(scores, able, lengths, 0.2).tolist()
    # Each response keeps its own numbers, so what a whole pass accepts stays the same.
    kept = order[rso(scores[order], able[order], 1.0, drawn[:, order])]
    assert len(kept) == 3
    first = {k for k in np.flatnonzero(able) if drawn[0][k] < np.exp(scores[k] - scores[able].max())}
    assert set(kept) <= first or first <= set(kept)


def test_rso_by_hand_over_two_passes() -> None:
    scores, able = np.array([0.0, 1.0, 2.0, 9.0]), np.array([True, True, True, False])
    # Pass 1: chances e^-2 = 0.14, e^-1 = 0.37, 1; pass 2, of the first two: e^-1 and 1.
    drawn = np.array([[0.2, 0.4, 0.9, 0.0], [0.3, 0.9, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9]])
    assert rso(scores, able, 1.0, drawn).tolist() == [2, 0, 1]
    assert rso(scores, able, 1.0, drawn[:2]).tolist() == [2, 0]
    # Twice as warm, the second response passes at once: e^-0.5 = 0.61.
    assert rso(scores, able, 2.0, drawn).tolist() == [0, 1, 2]
    assert rso(scores, np.zeros(4, dtype=bool), 1.0, drawn).tolist() == []


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_rso_accepts_as_often_as_its_formula_says(beta: float) -> None:
    # One response beside the best: it is accepted in the first pass with probability exp((r - r_max) / beta), and
    # stands first, before the best, just then.
    gaps, trials = [0.1, 0.5, 1.5], 4000
    for number, gap in enumerate(gaps):
        scores = np.array([1.0 - gap, 1.0])
        able, _ = _all(scores)
        drawn = uniforms(
            number, 1, np.arange(trials)[:, None, None], np.arange(2)[None, None], np.arange(1)[None, :, None]
        ).numpy()
        first = [rso(scores, able, beta, row)[0] == 0 for row in drawn]
        chance = math.exp(-gap / beta)
        assert np.mean(first) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / trials))


def test_rso_with_a_small_beta_keeps_the_best_in_order() -> None:
    able, lengths = _all(SCORES)
    drawn = np.random.default_rng(1).random((3, 4))
    scores = SCORES[[0, 1, 3, 5]]
    assert rso(scores, able[:4], 1e-6, drawn).tolist() == top_k(scores, able[:4], lengths[:4], 3).tolist()


def _chosen(probabilities: list[float], scores: list[float], n: int) -> dict[int, float]:
    """Exact distribution of the best of n draws, over all sequences of draws."""
    found: Counter[int] = Counter()
    for draws in itertools.product(range(len(scores)), repeat=n):
        drawn = np.array([scores[item] for item in draws])
        best = draws[top_k(drawn, *_all(drawn), 1)[0]]
        found[best] += math.prod(probabilities[item] for item in draws)
    return found


def _kl(chosen: dict[int, float], probabilities: list[float]) -> float:
    return sum(p * math.log(p / probabilities[item]) for item, p in chosen.items() if p > 0)


def test_best_of_n_of_few_texts_stays_below_the_law_and_ties_lower_it() -> None:
    probabilities = [0.1, 0.2, 0.3, 0.25, 0.15]
    law = best_of_n_kl(4)
    for n in (2, 3, 4):
        apart = _kl(_chosen(probabilities, [0.0, 1.0, 2.0, 3.0, 4.0], n), probabilities)
        tied = _kl(_chosen(probabilities, [0.0, 1.0, 1.0, 3.0, 3.0], n), probabilities)
        assert 0 < tied < apart < law[n - 1].item()
    # Where all is tied, the best is any.
    assert _kl(_chosen(probabilities, [1.0] * 5, 3), probabilities) == pytest.approx(0.0, abs=1e-12)


def test_best_of_n_of_continuous_scores_follows_the_law_within_its_interval() -> None:
    rng, trials = np.random.default_rng(2), 4000
    for n in (2, 4, 16):
        # Uniform scores: the density of the best is n u^(n - 1), that of the policy is 1.
        drawn = rng.random((trials, n))
        able, lengths = _all(drawn[0])
        best = np.array([row[top_k(row, able, lengths, 1)[0]] for row in drawn])
        ratios = math.log(n) + (n - 1) * np.log(best)
        error = ratios.std() / math.sqrt(trials)
        assert ratios.mean() == pytest.approx(best_of_n_kl(n)[n - 1].item(), abs=3.5 * error)
        assert error < 0.03
