"""Best-of-n: what the best of n samples scores, for every n, from N samples a prompt (arXiv:2210.10760).

scores (P, N) -> curve (P, N); N -> KL to the sampling policy (N,)
"""

import math
from functools import cache

import torch
from torch import Tensor


def best_of_n(scores: Tensor, gold: Tensor | None = None) -> Tensor:
    """E_n = sum_{i=n..N} C(i-1, n-1) / C(N, n) * g_(i): the mean over all subsets of n samples.

    Args:
        scores: (P, N), by which the best is chosen.
        gold: (P, N), what is reported of the chosen one; the scores themselves when not given.

    Returns:
        (P, N) float64; column n - 1 is the expectation of best-of-n, unbiased over samples that are drawn
        independently. Of equal scores the later sample counts as the better.
    """
    order = scores.argsort(dim=1, stable=True)
    ordered = (scores if gold is None else gold).gather(1, order).double()
    return ordered @ _weights(scores.shape[1]).to(ordered.device).T


def best_of_n_able(scores: Tensor, able: Tensor) -> Tensor:
    """Mean score of the response that best-of-n chooses where it can choose, for n = 1 to N.

    Responses that must not be chosen take part in the draw and never win. The mean is over all prompts and subsets of
    n samples that hold one that may be chosen: (sum of their best) / (number of them).

    Args:
        scores: (P, N).
        able: (P, N) bool; at least one is true.

    Returns:
        (N,) float64: the first is the mean of all that are able, the last the mean of each prompt's best.
    """
    ordered = scores.double().masked_fill(~able, -math.inf)
    best = best_of_n(ordered, scores.double() * able)
    return best.sum(0) / best_of_n(ordered, able.double()).sum(0)


def best_of_n_kl(num_samples: int) -> Tensor:
    """KL(best-of-n || policy) <= ln n - (n - 1) / n for n = 1 to `num_samples`, (N,) float64, nats.

    An equality for continuous distributions, an upper bound for texts (arXiv:2401.01879).
    """
    n = torch.arange(1, num_samples + 1, dtype=torch.float64)
    return n.log() - (n - 1) / n


@cache
def _weights(size: int) -> Tensor:
    """(N, N): row n - 1, column i - 1 is the chance that the i-th smallest of N is the best of n of them."""
    rows = [
        [math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)] for n in range(1, size + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64)
