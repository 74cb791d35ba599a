"""Intervals by bootstrap (Efron 1979): over the prompts, and paired where two policies answered the same ones.

Of a rate by Wilson's formula (1927), which stays inside [0, 1] and is no point where nothing happened.
"""

from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
# Of the standard normal, for 95 %.
Z95 = 1.959964


class Figure(NamedTuple):
    """A measured value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


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
    return interval(differences[resamples(len(differences), seed)].mean(axis=1))


def mean_figure(values: NDArray[np.float64]) -> Figure:
    """The mean of `values` (N,), one a prompt, with its interval."""
    return Figure(float(values.mean()), *mean_interval(values))


def ratio_figure(numerators: NDArray[np.float64], denominators: NDArray[np.float64], seed: int = 0) -> Figure:
    """sum(numerators) / sum(denominators), both (N,), with the interval over draws of whole prompts.

    So a rate per token weighs each token alike, and a prompt comes into a draw with all of its tokens.
    """
    draws = resamples(len(numerators), seed)
    ratios = numerators[draws].sum(axis=1) / denominators[draws].sum(axis=1)
    return Figure(float(numerators.sum() / denominators.sum()), *interval(ratios))


@lru_cache(maxsize=4)
def resamples(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices (`NUM_RESAMPLES`, count) of prompts drawn with replacement."""
    draws = np.random.default_rng(seed).integers(0, count, (NUM_RESAMPLES, count))
    # Callers share one array.
    draws.setflags(write=False)
    return draws


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of a statistic over draws (R,)."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(count: float, total: int) -> tuple[float, float]:
    """95 % interval of a rate of which `count` of `total` (at least 1) were seen."""
    rate, spread = count / total, Z95**2 / total
    middle = rate + spread / 2
    half = sqrt(rate * (1 - rate) * spread + spread**2 / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def lower_bound(values: NDArray[np.float64], confidence: float, seed: int = 0) -> float:
    """What the mean of `values` (N,) is above with this confidence: the one-sided percentile bound."""
    return float(np.quantile(values[resamples(len(values), seed)].mean(axis=1), 1 - confidence))
