"""Direct preference optimization (arXiv:2305.18290, equation 7).

sequence_logprobs of chosen and rejected under policy and reference -> losses and implicit rewards
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class DPOLoss(NamedTuple):
    """Per pair: the loss, and the rewards beta * log(policy / reference) of both sides, without gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> DPOLoss:
    """L = -log sigmoid(beta * [log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)]): equation 7.

    A policy that equals its reference has loss ln 2 on every pair.

    Args:
        policy_chosen: (B,), log-probabilities summed over the response and its end of turn.
        policy_rejected: (B,).
        reference_chosen: (B,).
        reference_rejected: (B,).
        beta: weight of the reference; larger stays closer.

    Returns:
        Losses and rewards, (B,) each.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return DPOLoss(-F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())
