"""How well the scores of a reward model agree with rankings: accuracy, margin, calibration, and what length says.

scores and ranks of K responses a prompt -> figures over all untied pairs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.examples import RankedExample

NUM_BINS = 10
# Lower bounds of the buckets of pairs; the last one is open. Of ranks: 1, 2, 3 and more places apart.
RANK_GAPS = (1.0, 2.0, 3.0)
# Gold scores are in [0, 1].
GOLD_GAPS = (0.0, 0.1, 0.25, 0.5)
# A gap of 2 is a confidence of 0.88.
SCORE_GAPS = (0.0, 0.5, 1.0, 2.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to one prompt of which one is the better; (P,) each, better minus worse.

    Attributes:
        scores: gap of the model's scores, whose sign says whether the model is right.
        wanted: gap of what is held for true, always above 0.
        lengths: gap in tokens of the response.
    """

    scores: Floats
    wanted: Floats
    lengths: Floats


def pair_report(rows: Sequence[RankedExample], scores: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Figures of raw scores over every untied pair of every prompt.

    Args:
        rows: with ranks (1 = best) and, where there is a gold judge, gold scores.
        scores: raw, one a response, in the order of the rows.

    Returns:
        `accuracy` (share of pairs ordered as the ranks say), `margin` (mean score gap, chosen minus rejected),
        `calibration_error` (ECE of sigmoid(gap) over ten equal bins, arXiv:1706.04599), `gold_accuracy` (share of
        pairs ordered as gold says; None without gold), `pairs`.
    """
    gaps = rank_pairs(rows, scores).scores
    return {
        "accuracy": share_right(gaps),
        "margin": float(gaps.mean()) if len(gaps) else None,
        "calibration_error": _calibration_error(gaps) if len(gaps) else None,
        "gold_accuracy": share_right(gold_pairs(rows, scores).scores),
        "pairs": float(len(gaps)),
    }


def bucket_report(
    rows: Sequence[RankedExample], scores: Sequence[Sequence[float]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy by how far the two responses of a pair are apart.

    A sound model is right the more often the larger the gap; one that is sure and wrong shows in `score_gap`.

    Returns:
        `rank_gap` and `score_gap` (both against the ranks) and `gold_gap` (against gold, where there is gold) ->
        bucket, such as `0.1-0.25` or `3+` -> `accuracy`, `pairs`; empty buckets are left out.
    """
    ranked, gold = rank_pairs(rows, scores), gold_pairs(rows, scores)
    return {
        "rank_gap": bucket_accuracy(ranked.scores, ranked.wanted, RANK_GAPS),
        "score_gap": bucket_accuracy(ranked.scores, np.abs(ranked.scores), SCORE_GAPS),
        "gold_gap": bucket_accuracy(gold.scores, gold.wanted, GOLD_GAPS),
    }


def length_report(
    rows: Sequence[RankedExample], scores: Sequence[Sequence[float]]
) -> dict[str, float | None]:
    """What a response's length alone says, to hold against the model.

    Returns:
        `length_pearson` and `length_spearman`, correlation of score with tokens of the response over all responses
        (None where one of both does not vary); `length_accuracy`, the share of the untied pairs whose longer
        response is the better one, equal lengths half: what a model of length alone would have for accuracy.
    """
    lengths = np.array([float(length) for row in rows for length in _lengths(row)])
    flat = np.array([score for row in scores for score in row])
    return {
        "length_pearson": pearson(lengths, flat),
        "length_spearman": pearson(_places(lengths), _places(flat)),
        "length_accuracy": share_right(rank_pairs(rows, scores).lengths),
    }


def rank_pairs(rows: Sequence[RankedExample], scores: Sequence[Sequence[float]]) -> Pairs:
    """Every pair whose ranks differ."""
    return _pairs(rows, scores, [[-rank for rank in row.ranks] for row in rows])


def gold_pairs(rows: Sequence[RankedExample], scores: Sequence[Sequence[float]]) -> Pairs:
    """Every pair whose gold scores differ; none of rows without gold."""
    return _pairs(rows, scores, [row.gold or [0.0] * len(row.ranks) for row in rows])


def bucket_accuracy(gaps: Floats, sizes: Floats, bounds: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Share of positive gaps among those of like size.

    Args:
        gaps: score of the better response minus score of the worse, (P,).
        sizes: what the pairs are sorted by, (P,).
        bounds: ascending lower bounds of the buckets; a size belongs to the last one it reaches.

    Returns:
        Bucket -> `accuracy`, `pairs`.
    """
    places = np.searchsorted(bounds, sizes, side="right") - 1
    names = [f"{low:g}-{high:g}" for low, high in pairwise(bounds)] + [f"{bounds[-1]:g}+"]
    return {
        name: {"accuracy": share_right(gaps[places == place]), "pairs": int((places == place).sum())}
        for place, name in enumerate(names)
        if (places == place).any()
    }


def pearson(first: Floats, second: Floats) -> float | None:
    """Correlation of two columns (N,); None where one of them does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def share_right(gaps: Floats) -> float | None:
    """Share of gaps above 0, (P,); None of none."""
    # Equal scores are a coin toss, not a success.
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean()) if len(gaps) else None


def _pairs(
    rows: Sequence[RankedExample], scores: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]
) -> Pairs:
    found = []
    for row, score, want in zip(rows, scores, wanted, strict=True):
        lengths = _lengths(row)
        for i, j in combinations(range(len(want)), 2):
            won, lost = (i, j) if want[i] > want[j] else (j, i)
            if want[i] != want[j]:
                gaps = (score[won] - score[lost], want[won] - want[lost], lengths[won] - lengths[lost])
                found.append(gaps)
    return Pairs(*np.array(found, dtype=np.float64).reshape(-1, 3).T)


def _lengths(row: RankedExample) -> list[int]:
    """Tokens of each response."""
    return [len(example.ids) - row.prompt_length for example in row.examples]


def _places(values: Floats) -> Floats:
    """The place of each value in ascending order, (N,); equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    places: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return places


def _calibration_error(gaps: Floats) -> float:
    """Each pair counts once, from its more likely side: confidence in [0.5, 1] against how often it is right."""
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (gaps > 0).astype(np.float64)
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return float(error)
