"""Reward model: the K-wise ranking loss of InstructGPT (arXiv:2203.02155, equation 1).

scores and ranks of K responses to each prompt -> one loss per prompt, pairs won, margins
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kwise_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """L = mean over the pairs with rank_w < rank_l of -log sigmoid(r_w - r_l): equation 1, ties dropped.

    All pairs of a prompt weigh as one item together, else prompts with many responses are overfitted.

    Args:
        scores: (K,), raw rewards.
        ranks: (K,), 1 = best; equal ranks make no pair.

    Returns:
        A scalar; 0 when every rank is tied.
    """
    return kwise_losses(scores, ranks, torch.zeros_like(ranks, dtype=torch.long), num_groups=1)[0]


def kwise_losses(scores: Tensor, ranks: Tensor, groups: Tensor, num_groups: int | None = None) -> Tensor:
    """`kwise_loss` of many prompts at once, with any number of responses each.

    Args:
        scores: (N,), raw rewards of all responses.
        ranks: (N,), within each prompt.
        groups: (N,) long, the prompt of each response, 0 to G - 1.
        num_groups: G; the largest group and one more when not given.

    Returns:
        (G,), 0 for a prompt whose ranks are all tied.
    """
    winners, losers = ranked_pairs(ranks, groups)
    size = _size(groups, num_groups)
    totals = scores.new_zeros(size).index_add(
        0, groups[winners], -F.logsigmoid(scores[winners] - scores[losers])
    )
    return totals / groups[winners].bincount(minlength=size).clamp(min=1)


def pair_accuracy(
    scores: Tensor, ranks: Tensor, groups: Tensor, num_groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """How many pairs of each prompt the scores order as the ranks do.

    Args:
        scores: (N,), raw rewards.
        ranks: (N,), within each prompt.
        groups: (N,) long, the prompt of each response.
        num_groups: G; the largest group and one more when not given.

    Returns:
        correct (G,) and total (G,), long; equal scores are not correct.
    """
    winners, losers = ranked_pairs(ranks, groups)
    size = _size(groups, num_groups)
    of_pair = groups[winners]
    correct = of_pair[scores[winners] > scores[losers]].bincount(minlength=size)
    return correct, of_pair.bincount(minlength=size)


def pair_margins(scores: Tensor, ranks: Tensor, groups: Tensor) -> Tensor:
    """r_w - r_l of every untied pair, (P,); its sigmoid is the probability that the model gives the order."""
    winners, losers = ranked_pairs(ranks, groups)
    return scores[winners] - scores[losers]


def ranked_pairs(ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse response of every untied pair within a prompt.

    Args:
        ranks: (N,), 1 = best.
        groups: (N,) long, the prompt of each response.

    Returns:
        winners (P,) and losers (P,), long.
    """
    beats = (groups[:, None] == groups[None, :]) & (ranks[:, None] < ranks[None, :])
    winners, losers = beats.nonzero(as_tuple=True)
    return winners, losers


def _size(groups: Tensor, num_groups: int | None) -> int:
    return int(groups.max()) + 1 if num_groups is None else num_groups
