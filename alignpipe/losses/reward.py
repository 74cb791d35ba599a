"""Several scores of a response -> its one reward.

Sums and ensembles of reward models (arXiv:2310.02743; arXiv:2312.09244), and the gate between helpfulness and safety of
Llama 2 (arXiv:2307.09288, section 3.2.3). Every response is on its own: none changes the reward of another.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def weighted_sum(scores: Tensor, weights: Tensor, penalty: float = 0.0) -> Tensor:
    """sum_m w_m r_m.

    Args:
        scores: of M reward models, (M, N).
        weights: (M,).
        penalty: takes no part.

    Returns:
        (N,)
    """
    return (weights[:, None] * scores).sum(0)


def weighted_mean(scores: Tensor, weights: Tensor, penalty: float = 0.0) -> Tensor:
    """sum_m w_m r_m / sum_m w_m; shapes as in `weighted_sum`."""
    return weighted_sum(scores, weights / weights.sum())


def mean_minus_std(scores: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """The mean less penalty * std over the models: where they disagree, it is in doubt (arXiv:2312.09244).

    The deviation is that of the M models themselves, divided by M, not M - 1: they are all there are. Shapes as in
    `weighted_sum`; weights above 0.
    """
    mean = weighted_mean(scores, weights)
    variance = weighted_mean((scores - mean) ** 2, weights)
    return mean - penalty * variance.sqrt()


def gated(rewards: Tensor, gate_scores: Tensor, gate_raw: Tensor, below: float) -> tuple[Tensor, Tensor]:
    """Llama 2's R_c: the gate's own score alone where sigmoid(raw) < below, else the reward.

    There the threshold is 0.15 on the sigmoid of the safety model's score, which a pairwise loss makes a log-odds.

    Args:
        rewards: (N,).
        gate_scores: normalized scores of the gate's reward model, (N,).
        gate_raw: its scores before normalization, (N,).
        below: threshold between 0 and 1.

    Returns:
        Rewards (N,), and for which of them the gate is shut, (N,) bool.
    """
    shut = torch.sigmoid(gate_raw) < below
    return torch.where(shut, gate_scores, rewards), shut


ENSEMBLES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "sum": weighted_sum,
    "mean": weighted_mean,
    "mean_minus_std": mean_minus_std,
}
