"""Reward model over-optimisation: how gold rises and falls with the distance from the first policy (arXiv:2210.10760).

points (KL, score) -> R(d) = d (a - b ln d) or d (a - b d), with d = sqrt(KL) -> where it peaks
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What multiplies -b, by the way the policy was optimized: reinforcement learning or best-of-n.
BENDS = {"rl": lambda d: d * np.log(d), "best_of_n": lambda d: d * d}


@dataclass(frozen=True)
class Curve:
    """A fitted curve of score gained over distance.

    Attributes:
        form: `rl`, R(d) = d (a - b ln d), or `best_of_n`, R(d) = d (a - b d).
        a: slope at the start.
        b: how soon it bends down; not above 0 where no peak is in sight.
        error: root of the mean squared residual, in units of the score.
    """

    form: str
    a: float
    b: float
    error: float

    def gain(self, kl: float) -> float:
        """Score gained at a KL (nats) from the first policy."""
        d = math.sqrt(kl)
        return 0.0 if d == 0 else float(d * self.a - BENDS[self.form](np.float64(d)) * self.b)

    @property
    def peak_kl(self) -> float | None:
        """KL at which the score is highest; None where the curve does not bend down.

        `rl`: dR/dd = a - b ln d - b = 0, d = exp(a / b - 1). `best_of_n`: d = a / (2 b), for a above 0.
        """
        if self.b <= 0:
            return None
        if self.form == "rl":
            exponent = 2 * (self.a / self.b - 1)
            # Further than any number: it bends, but nowhere that matters.
            return math.exp(exponent) if exponent < 700 else None
        return (self.a / (2 * self.b)) ** 2 if self.a > 0 else 0.0

    @property
    def peak_gain(self) -> float | None:
        """Score gained at the peak; None without one."""
        return None if self.peak_kl is None else self.gain(self.peak_kl)


@dataclass(frozen=True)
class Overoptimization:
    """Curves of both scores over the same points.

    Attributes:
        gold: what is wanted.
        proxy: what was optimized.
    """

    gold: Curve
    proxy: Curve


def fit_overoptimization(
    kl: Sequence[float], gold: Sequence[float], proxy: Sequence[float], form: str = "rl"
) -> Overoptimization:
    """Both curves of a run, over (KL, gold, proxy) points.

    Args:
        kl: KL from the first policy in nats, one a point.
        gold: score gained over the first policy's by the held-out judge.
        proxy: the same by the reward model that is optimized.
        form: `rl` or `best_of_n`.

    Raises:
        ValueError: as in `fit_curve`.
    """
    return Overoptimization(fit_curve(kl, gold, form), fit_curve(kl, proxy, form))


def fit_curve(kl: Sequence[float], gains: Sequence[float], form: str = "rl") -> Curve:
    """Least squares for a and b, which the curve is linear in.

    Args:
        kl: in nats; points at 0 and below (sampled KL can be) say nothing about the curve and are left out.
        gains: score minus that of the first policy, since R(0) = 0.
        form: `rl` or `best_of_n`.

    Raises:
        ValueError: fewer than two different distances above 0, or no such form.
    """
    if form not in BENDS:
        raise ValueError(f"there is no form {form!r} of an over-optimisation curve, only {', '.join(BENDS)}")
    distance, gained = np.asarray(kl, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    above = distance > 0
    d, wanted = np.sqrt(distance[above]), gained[above]
    if len(np.unique(d)) < 2:
        raise ValueError("an over-optimisation curve needs two different distances above 0")
    columns: NDArray[np.float64] = np.stack([d, -BENDS[form](d)], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, wanted)
    error = float(np.sqrt(np.mean((columns @ np.array([a, b]) - wanted) ** 2)))
    return Curve(form, float(a), float(b), error)


def equivalent_best_of_n(kl: float) -> float | None:
    """The n whose best-of-n stands as far from the first policy as a KL says: ln n - (n - 1) / n = KL.

    With u = ln n this is u - 1 + exp(-u) = KL, convex in u, so Newton's method from above goes straight down to it.

    Args:
        kl: in nats; 1 for 0 and below.

    Returns:
        n, a fraction as a rule; None where it is beyond any number (KL of some 700).
    """
    if kl <= 0:
        return 1.0
    # Above the root, since u - 1 + exp(-u) > u - 1 and >= u^2 / (2 + u).
    u = kl + 1 + math.sqrt(kl)
    for _ in range(100):
        step = (u - 1 + math.exp(-u) - kl) / -math.expm1(-u)
        u -= step
        if abs(step) <= 1e-14 * u:
            break
    return math.exp(u) if u < 700 else None
