"""Losses of a reward model: pairs of each prompt, with a margin or without, and whole orders.

Pairs: Bradley-Terry over K responses (InstructGPT, arXiv:2203.02155, eq. 1), margins (Llama 2, arXiv:2307.09288,
eq. 2). Orders: Plackett-Luce.

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


def kwise_losses(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    num_groups: int | None = None,
    *,
    worths: Tensor | None = None,
    label_smoothing: float = 0.0,
    ties: str = "drop",
) -> Tensor:
    """`kwise_loss` of many prompts at once, with any number of responses each; K = 2 is the pairwise loss.

    Args:
        scores: (N,), raw rewards of all responses.
        ranks: (N,), within each prompt.
        groups: (N,) long, the prompt of each response, 0 to G - 1.
        num_groups: G; the largest group and one more when not given.
        worths: (N,); the margin m of a pair is worth_w - worth_l, at least 0. None is no margin.
        label_smoothing: chance that an untied pair is labelled the wrong way round.
        ties: `drop` leaves tied pairs out; `half` takes either order for equally likely, without a margin.

    Returns:
        (G,), the mean over the prompt's pairs; 0 for a prompt without one.
    """
    size = _size(groups, num_groups)
    winners, losers = ranked_pairs(ranks, groups)
    gaps = scores[winners] - scores[losers]
    margins = torch.zeros_like(gaps) if worths is None else (worths[winners] - worths[losers]).clamp(min=0)
    losses, of_pair = pair_losses(gaps, margins, 1 - label_smoothing), groups[winners]
    if ties == "half":
        first, second = tied_pairs(ranks, groups)
        gaps = scores[first] - scores[second]
        losses = torch.cat([losses, pair_losses(gaps, torch.zeros_like(gaps), 0.5)])
        of_pair = torch.cat([of_pair, groups[first]])
    return _means(losses, of_pair, size)


def pair_losses(gaps: Tensor, margins: Tensor, probability: float) -> Tensor:
    """L = -p log sigmoid(r_w - r_l - m) - (1 - p) log sigmoid(r_l - r_w - m).

    With p = 1 it is Llama 2's equation 2; p < 1 is the expected loss where the label is wrong with probability
    1 - p, whichever response it then names having the margin to keep (conservative, as cDPO's).

    Args:
        gaps: r_w - r_l, (P,).
        margins: m, (P,).
        probability: p, that the winner is the better one.

    Returns:
        (P,).
    """
    losses = -F.logsigmoid(gaps - margins)
    if probability == 1:
        return losses
    return probability * losses - (1 - probability) * F.logsigmoid(-gaps - margins)


def plackett_luce_losses(
    scores: Tensor, ranks: Tensor, groups: Tensor, num_groups: int | None = None
) -> Tensor:
    """L = -sum_k [s_(k) - logsumexp_{j >= k} s_(j)]: minus the log-likelihood of the whole order.

    Best first, each response is chosen from those not yet placed (Luce 1959; Plackett 1975). The order inside a
    tied group is not learnt: a tied response competes with itself and the worse ones alone. K = 2 is the pairwise
    loss.

    Args:
        scores: (N,), raw rewards.
        ranks: (N,), 1 = best.
        groups: (N,) long, the prompt of each response.
        num_groups: G; the largest group and one more when not given.

    Returns:
        (G,), 0 for a prompt whose ranks are all tied.
    """
    beats = (groups[:, None] == groups[None, :]) & (ranks[:, None] < ranks[None, :])
    rivals = beats | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    chosen = torch.where(rivals, scores[None, :], -torch.inf).logsumexp(1) - scores  # (N,)
    return scores.new_zeros(_size(groups, num_groups)).index_add(0, groups, chosen)


def centering_losses(scores: Tensor, ranks: Tensor, groups: Tensor, num_groups: int | None = None) -> Tensor:
    """(r_w + r_l)^2, mean over the untied pairs of each prompt: pulls scores towards 0 (arXiv:2312.09244, 2).

    Args:
        scores: (N,), raw rewards.
        ranks: (N,), within each prompt.
        groups: (N,) long, the prompt of each response.
        num_groups: G; the largest group and one more when not given.

    Returns:
        (G,), 0 for a prompt without an untied pair.
    """
    winners, losers = ranked_pairs(ranks, groups)
    return _means((scores[winners] + scores[losers]).square(), groups[winners], _size(groups, num_groups))


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


def tied_pairs(ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of both responses of every tied pair within a prompt, each pair once; both (P,), long."""
    tied = (groups[:, None] == groups[None, :]) & (ranks[:, None] == ranks[None, :])
    first, second = tied.triu(diagonal=1).nonzero(as_tuple=True)
    return first, second


def _means(values: Tensor, of_pair: Tensor, size: int) -> Tensor:
    """Mean of values (P,) over the pairs of each prompt, (G,); 0 where there is none."""
    totals = values.new_zeros(size).index_add(0, of_pair, values)
    return totals / of_pair.bincount(minlength=size).clamp(min=1)


def _size(groups: Tensor, num_groups: int | None) -> int:
    return int(groups.max()) + 1 if num_groups is None else num_groups
