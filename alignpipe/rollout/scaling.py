"""Scores shifted and scaled by what the same stage has seen so far.

scores of a rollout -> mean and deviation over all rollouts up to this one -> scores of mean 0 and deviation 1
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class RunningMoments:
    """Mean and deviation of all numbers so far, merged batch by batch (Chan, Golub and LeVeque, 1979).

    Attributes:
        count: numbers seen.
        mean: of them.
        squares: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Take a batch in."""
        count, mean = len(values), float(values.mean())
        total, shift = self.count + count, mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def state(self) -> list[float]:
        """What a saved state keeps of them."""
        return [self.count, self.mean, self.squares]

    @property
    def std(self) -> float:
        """Deviation over all of them; 1 where they do not vary."""
        return float(np.sqrt(self.squares / self.count)) if self.squares > 0 else 1.0

    def scaled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take a batch in, and give it shifted and scaled."""
        self.add(values)
        return (values - self.mean) / self.std
