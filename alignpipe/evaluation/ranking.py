"""How well the scores of a reward model agree with rankings: accuracy, margin, calibration.

scores and ranks of K responses a prompt -> figures over all untied pairs
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.encoding import RankedExample

NUM_BINS = 10


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
    gaps = _gaps([[-rank for rank in row.ranks] for row in rows], scores)
    gold_rows = [(row.gold, s) for row, s in zip(rows, scores, strict=True) if row.gold is not None]
    gold_gaps = _gaps([list(gold) for gold, _ in gold_rows], [s for _, s in gold_rows])
    return {
        "accuracy": _share_right(gaps),
        "margin": float(gaps.mean()) if len(gaps) else None,
        "calibration_error": _calibration_error(gaps) if len(gaps) else None,
        "gold_accuracy": _share_right(gold_gaps),
        "pairs": float(len(gaps)),
    }


def _gaps(wanted: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Score of the better response minus score of the worse, for every pair that is not tied."""
    gaps = [
        (row[i] - row[j]) * (1 if want[i] > want[j] else -1)
        for want, row in zip(wanted, scores, strict=True)
        for i, j in combinations(range(len(row)), 2)
        if want[i] != want[j]
    ]
    return np.asarray(gaps, dtype=np.float64)


def _share_right(gaps: NDArray[np.float64]) -> float | None:
    # Equal scores are a coin toss, not a success.
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean()) if len(gaps) else None


def _calibration_error(gaps: NDArray[np.float64]) -> float:
    """Each pair counts once, from its more likely side: confidence in [0.5, 1] against how often it is right."""
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (gaps > 0).astype(np.float64)
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return float(error)
