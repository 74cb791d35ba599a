"""Intervals by bootstrap (Efron 1979): over the prompts, and paired where two policies answered the same ones."""

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,)."""
    return paired_interval(values, np.zeros_like(values), seed)


def paired_interval(
    after: NDArray[np.float64], before: NDArray[np.float64], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of mean(after - before), both (N,) over the same prompts.

    Prompts are drawn with replacement, each with its own difference, so what the two share cancels.
    """
    low, high = np.percentile(_resampled_means(after - before, seed), [2.5, 97.5])
    return float(low), float(high)


def lower_bound(values: NDArray[np.float64], confidence: float, seed: int = 0) -> float:
    """What the mean of `values` (N,) is above with this confidence: the one-sided percentile bound."""
    return float(np.quantile(_resampled_means(values, seed), 1 - confidence))


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    draws = np.random.default_rng(seed).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    means: NDArray[np.float64] = values[draws].mean(axis=1)
    return means
