"""Intervals by bootstrap (Efron 1979): over the prompts, and paired where two policies answered the same ones.

Of a rate by Wilson's formula (1927), which stays inside [0, 1] and is no point where nothing happened.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
# Of the standard normal, for 95 %.
Z95 = 1.959964


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,)."""
    return paired_interval(values, np.zeros_like(values), seed)


def paired_interval(
    after: NDArray[np.float64], before: NDArray[np.float64], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of mean(after - before), both (N,) over the same prompts.

    Prompts are drawn with replacement, each with its own difference, so what the two share cancels.
    """
    differences = after - before
    draws = np.random.default_rng(seed).integers(0, len(differences), (NUM_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(count: float, total: int) -> tuple[float, float]:
    """95 % interval of a rate of which `count` of `total` (at least 1) were seen."""
    rate, spread = count / total, Z95**2 / total
    middle = rate + spread / 2
    half = sqrt(rate * (1 - rate) * spread + spread**2 / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
