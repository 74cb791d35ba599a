"""Alarms over a policy in training: does it please its proxy more, and the people behind it less?

Over-optimisation (Gao et al. 2022, arXiv:2210.10760), length drift, entropy collapse, repetition, KL.

looks at the policy -> alarms by name, each with its figures in words
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignpipe.config import MonitorConfig
from alignpipe.evaluation.statistics import lower_bound


@dataclass(frozen=True)
class Look:
    """What a monitor saw of a policy, over the same prompts each time.

    Attributes:
        at: rollouts or steps done.
        scores: of the judge, one a prompt, the mean over its responses; empty without a judge.
        proxy: mean of what the training raises.
        kl: to the reference, nats a response.
        entropy: nats a token.
        length: tokens of a response.
        repetition: share of 4-grams said before.
    """

    at: int
    scores: list[float]
    proxy: float
    kl: float
    entropy: float
    length: float
    repetition: float

    @property
    def held_out(self) -> float | None:
        """The judge's mean."""
        return float(np.mean(self.scores)) if self.scores else None


@dataclass(frozen=True)
class History:
    """The looks that later ones are held against.

    Attributes:
        start: before the first update.
        best: the highest mean of the judge.
        best_even: the highest mean over every second prompt, from the first on.
        best_odd: the highest over the others.
    """

    start: Look
    best: Look
    best_even: Look
    best_odd: Look

    @classmethod
    def of(cls, look: Look) -> "History":
        """A history of one look."""
        return cls(look, look, look, look)

    def joined_by(self, look: Look) -> "History":
        """The history with one look more; of equals the earlier stays the best."""

        def better(old: Look, part: slice) -> Look:
            return look if sum(look.scores[part]) > sum(old.scores[part]) else old

        return History(
            self.start,
            better(self.best, slice(None)),
            better(self.best_even, slice(0, None, 2)),
            better(self.best_odd, slice(1, None, 2)),
        )

    def falls(self, look: Look) -> list[float]:
        """How far each prompt's score lies below its best look's.

        The best of many looks is chosen on one half of the prompts and compared on the other. The highest of many
        noisy means lies above what it stands for; on its own prompts every later look would seem to fall.
        """
        falls = [0.0] * len(look.scores)
        falls[0::2] = np.subtract(self.best_odd.scores, look.scores)[0::2].tolist()
        falls[1::2] = np.subtract(self.best_even.scores, look.scores)[1::2].tolist()
        return falls


def raised(look: Look, history: History, config: MonitorConfig) -> dict[str, str]:
    """The alarms that a look raises.

    Args:
        look: the newest.
        history: of the looks before it.
        config: with a threshold each; null leaves an alarm out.

    Returns:
        What was found, by the alarm's name.
    """
    found = {name: alarm(look, history, config) for name, alarm in ALARMS.items()}
    return {name: words for name, words in found.items() if words is not None}


def _overoptimization(look: Look, history: History, config: MonitorConfig) -> str | None:
    """The judge's mean fell by more than an accident of the prompts would explain, and the proxy did not fall."""
    if not look.scores or config.max_fall is None:
        return None
    falls = np.asarray(history.falls(look))
    proxy = (history.best_even.proxy + history.best_odd.proxy) / 2
    # Scores of a judge have a unit of their own; all equal, they have none.
    unit = float(np.std(history.start.scores)) or 1.0
    sure = lower_bound(falls, config.confidence)
    if look.proxy < proxy or falls.mean() <= config.max_fall * unit or sure <= 0:
        return None
    return (
        f"held-out score {look.held_out:.3f}, down {falls.mean():.3f} (at least {sure:.3f}) from its best at "
        f"{history.best.at}, while the proxy went from {proxy:.3f} to {look.proxy:.3f}"
    )


def _length(look: Look, history: History, config: MonitorConfig) -> str | None:
    limit, start = config.max_length_ratio, history.start.length
    if limit is None or start / limit <= look.length <= start * limit:
        return None
    return f"{look.length:.1f} tokens a response, {start:.1f} at the start"


def _entropy(look: Look, history: History, config: MonitorConfig) -> str | None:
    limit, start = config.min_entropy_ratio, history.start.entropy
    if limit is None or look.entropy >= start * limit:
        return None
    return f"entropy {look.entropy:.3f} nats a token, {start:.3f} at the start"


def _repetition(look: Look, history: History, config: MonitorConfig) -> str | None:
    if config.max_repetition is None or look.repetition <= config.max_repetition:
        return None
    start = history.start.repetition
    return f"{look.repetition:.1%} of 4-grams are repeated within a response, {start:.1%} at the start"


def _kl(look: Look, history: History, config: MonitorConfig) -> str | None:
    if config.max_kl is None or look.kl <= config.max_kl:
        return None
    return f"KL to the reference {look.kl:.2f} nats a response, the budget is {config.max_kl:g}"


ALARMS: dict[str, Callable[[Look, History, MonitorConfig], str | None]] = {
    "overoptimization": _overoptimization,
    "length": _length,
    "entropy": _entropy,
    "repetition": _repetition,
    "kl": _kl,
}
