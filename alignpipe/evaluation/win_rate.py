"""How often one policy's response is preferred to another's, as it is and at equal length (arXiv:2404.04475).

scores and lengths of both on the same prompts -> win rate, length-controlled win rate, 95 % intervals
"""

import numpy as np
from numpy.typing import NDArray

from alignpipe.evaluation.statistics import Figure, interval, mean_figure, resamples

# Weight of the penalty on the length coefficient: as one response that says it is 0.
RIDGE = 1.0
NEWTON_STEPS = 100
TOLERANCE = 1e-10
# Draws whose regressions are solved at once; bounds memory.
DRAWS_AT_ONCE = 100


def preferences(scores: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where a response has the higher score, 1/2 where both have the same, else 0.

    Args:
        scores: (N, K), of K responses to each of N prompts.
        against: (N, L), of the other policy's.

    Returns:
        (N, K * L): every response against every one of the other policy's to the same prompt.
    """
    gaps = differences(scores, against)
    return np.where(gaps == 0, 0.5, gaps > 0)


def differences(values: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K * L) of (N, K) and (N, L): every value minus every one of the other policy's, of the same prompt."""
    return (values[:, :, None] - against[:, None, :]).reshape(len(values), -1)


def win_rate(won: NDArray[np.float64]) -> Figure:
    """Mean of the preferences (N, M), its interval over the prompts."""
    return mean_figure(won.mean(axis=1))


def length_controlled_win_rate(
    won: NDArray[np.float64], longer: NDArray[np.float64], ridge: float = RIDGE
) -> Figure:
    """The win rate to expect if both answered at the same length, in the manner of AlpacaEval 2 LC.

    P(win) = sigmoid(theta + phi * tanh(d / std(d))), with d the difference in length; reported is sigmoid(theta).

    What differs from the published regression (arXiv:2404.04475): it has a third term, how hard the
    instruction is for the model, that only results of many models can tell, and averages over it; here there are two
    policies and no such term. It counts characters and takes judges that answer by a probability; here are tokens,
    and a comparison of scores. Its penalty is chosen by cross-validation and scaled by how far the model can cut its
    answers short; here it is `ridge` / 2 * phi^2, and theta has none.

    Args:
        won: (N, M), preferences, 0 to 1.
        longer: (N, M), length of the response minus that of the other.
        ridge: weight of the penalty on phi.
    """
    if won.min() == won.max() and won.flat[0] in (0.0, 1.0):
        # All won or all lost: theta has no finite estimate, and every draw is the same.
        return Figure(float(won.flat[0]), float(won.flat[0]), float(won.flat[0]))
    spread = longer.std()
    covariate = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)
    # Lengths are whole numbers, so few pairs differ: each is taken once, with its count (N, U) in every prompt.
    kinds, kind = np.unique(np.stack([won.ravel(), covariate.ravel()]), axis=1, return_inverse=True)
    counts = np.zeros((len(won), kinds.shape[1]))
    np.add.at(counts, (np.repeat(np.arange(len(won)), won.shape[1]), kind.ravel()), 1.0)
    found = fit_logistic(kinds[0], kinds[1], counts.sum(axis=0, keepdims=True), ridge)
    draws = resamples(len(won))
    rates = []
    for start in range(0, len(draws), DRAWS_AT_ONCE):
        some = draws[start : start + DRAWS_AT_ONCE]
        drawn = np.stack([np.bincount(draw, minlength=len(won)) for draw in some])
        rates.append(_sigmoid(fit_logistic(kinds[0], kinds[1], drawn @ counts, ridge)[:, 0]))
    return Figure(float(_sigmoid(found[0, 0])), *interval(np.concatenate(rates)))


def fit_logistic(
    outcome: NDArray[np.float64], x: NDArray[np.float64], weights: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Logistic regressions on one covariate, by Newton's method (IRLS), one a row of weights.

    Each minimizes sum_i w_i * cross_entropy(y_i, sigmoid(theta + phi x_i)) + ridge / 2 * phi^2. Newton's steps are
    halved where they would overshoot, so that it ends wherever there is a minimum.

    Args:
        outcome: y (M,), 0 to 1.
        x: (M,).
        weights: (R, M).
        ridge: of phi; above 0 it is finite even where length decides everything.

    Returns:
        (R, 2): theta and phi. Where all of a row's outcomes are 1, or all 0, theta is plus or minus infinity.
    """
    won, total = weights @ outcome, weights.sum(axis=1)
    certain = (won == 0) | (won == total)
    # Any outcome serves where the answer is known: an even one keeps the arithmetic finite.
    y = np.where(certain[:, None], 0.5, outcome[None, :])
    found = np.zeros((len(weights), 2))

    def loss(at: NDArray[np.float64]) -> NDArray[np.float64]:
        logits = at[:, :1] + at[:, 1:] * x
        entropy = np.logaddexp(0.0, logits) - y * logits
        result: NDArray[np.float64] = (weights * entropy).sum(axis=1) + ridge / 2 * at[:, 1] ** 2
        return result

    value = loss(found)
    for _ in range(NEWTON_STEPS):
        chance = _sigmoid(found[:, :1] + found[:, 1:] * x)
        residual, curvature = weights * (y - chance), weights * chance * (1 - chance)
        slope = np.stack([residual.sum(axis=1), residual @ x - ridge * found[:, 1]], axis=1)
        a, b, c = curvature.sum(axis=1), curvature @ x, curvature @ (x * x) + ridge
        # Without a spread of x and without a penalty phi is idle: it stays where it is.
        determinant = a * c - b * b
        idle = determinant <= 1e-12 * a * np.maximum(c, 1.0)
        safe = np.where(idle, 1.0, determinant)
        theta = np.where(idle, slope[:, 0] / a, (c * slope[:, 0] - b * slope[:, 1]) / safe)
        phi = np.where(idle, 0.0, (a * slope[:, 1] - b * slope[:, 0]) / safe)
        step = np.stack([theta, phi], axis=1)
        for _ in range(30):
            new = loss(found + step)
            worse = new > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
        found, value = found + step, new
        if np.abs(step).max() < TOLERANCE:
            break
    found[certain, 0] = np.where(won[certain] == 0, -np.inf, np.inf)
    return found


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * x))
    return result
