"""Rejection sampling: which responses of one prompt are learnt, by their scores.

scores (N,), able (N,), lengths (N,) -> indices of those kept, the best first

Llama 2 keeps the best (arXiv:2307.09288, section 3.2.3); RSO draws from the policy weighted by exp(score / beta)
(arXiv:2309.06657, algorithm 1).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


def top_k(scores: Floats, able: Bools, lengths: Integers, k: int) -> Integers:
    """The k best of those able, fewer where there are fewer.

    Args:
        scores: (N,), higher is better.
        able: (N,), false for what must not be kept.
        lengths: (N,) tokens; of equal scores the shorter response is the better, then the earlier.
        k: at most so many.

    Returns:
        (K,) indices, the best first.
    """
    order = np.lexsort((np.arange(len(scores)), lengths, -scores))
    return order[able[order]][:k]


def above_median(scores: Floats, able: Bools, lengths: Integers, threshold: float) -> Integers:
    """Those whose score is at least the median of those able plus `threshold`; shapes as in `top_k`."""
    if not able.any():
        return np.empty(0, dtype=np.int64)
    order = top_k(scores, able, lengths, len(scores))
    return order[scores[order] >= np.median(scores[able]) + threshold]


def rso(scores: Floats, able: Bools, beta: float, uniforms: Floats) -> Integers:
    """Accept response i with probability exp((r_i - r_max) / beta), in passes, until enough are accepted.

    arXiv:2309.06657, algorithm 1: those accepted leave, and r_max is taken anew over the rest before each pass. The
    best of the rest is always accepted, so no pass is in vain.

    Args:
        scores: (N,).
        able: (N,), as in `top_k`.
        beta: small keeps the best alone, large draws without regard to scores.
        uniforms: (A, N) in [0, 1), a row a pass; A is how many are accepted at most.

    Returns:
        Indices in the order they were accepted, A of them or all that are able.
    """
    accepted: list[int] = []
    rest = np.flatnonzero(able)
    for drawn in uniforms:
        if len(rest) == 0:
            break
        passed = drawn[rest] < np.exp((scores[rest] - scores[rest].max()) / beta)
        accepted += rest[passed].tolist()
        rest = rest[~passed]
    return np.array(accepted[: len(uniforms)], dtype=np.int64)
