"""How much better a sampled token was than expected, by four estimators.

rewards (B, T), mask (B, T) -> advantages (B, T)

`gae` asks a value model (arXiv:1506.02438). The others need none: `rloo` (arXiv:2402.14740) and `grpo`
(arXiv:2402.03300) compare the responses to one prompt with each other, `reinforce_pp` (arXiv:2501.03262) compares with
the whole rollout.

Columns are actions, as in `losses/ppo.py`. The responses to one prompt are neighbours: rows 0 to K - 1 answer the
first, K to 2K - 1 the second.
"""

import torch
from torch import Tensor

from alignpipe.losses.logprobs import masked_sum, masked_whiten

# Keeps a group of nearly equal rewards from being blown up; TRL's value.
GROUP_EPS = 1e-4


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16), backwards from the last action.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1}.
    The value after the last action is 0: the episode is over there. The return is R_t = A_t + V_t.

    Args:
        rewards: (B, T).
        values: (B, T), V_t read before action t.
        mask: (B, T) bool.
        gamma: discount.
        gae_lambda: 0 = one-step, 1 = the whole return minus the value.

    Returns:
        (B, T), not whitened, 0 outside of the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values).masked_fill(~mask, 0.0)
    return _discounted(deltas, mask, gamma * gae_lambda)


def rloo(rewards: Tensor, mask: Tensor, num_samples: int) -> Tensor:
    """REINFORCE with the other responses as baseline (arXiv:2402.14740, section 3.2): A_i = R_i - mean_{j != i} R_j.

    R_i is the sum of a response's rewards, and every token of it has the same advantage. The baseline does not depend
    on response i, so the gradient stays unbiased.

    Args:
        rewards: (B, T).
        mask: (B, T) bool.
        num_samples: K responses a prompt, at least 2; B is a multiple of it.

    Returns:
        (B, T), 0 outside of the mask.
    """
    groups = _by_prompt(rewards, mask, num_samples)
    others = (groups.sum(1, keepdim=True) - groups) / (num_samples - 1)
    return _to_tokens(groups - others, mask)


def grpo(rewards: Tensor, mask: Tensor, num_samples: int, *, divide_by_std: bool = True) -> Tensor:
    """Rewards normalized within a prompt (arXiv:2402.03300, section 4.1.2): A_i = (R_i - mean R) / (std R + 1e-4).

    Without the deviation it is Dr. GRPO's (arXiv:2503.20783, section 3.2), which does not weigh prompts whose responses
    are all nearly alike as much as the others; that is (K - 1) / K of `rloo`.

    Args:
        rewards: (B, T).
        mask: (B, T) bool.
        num_samples: K responses a prompt, at least 2; B is a multiple of it.
        divide_by_std: by the sample deviation (K - 1) of the prompt's responses.

    Returns:
        (B, T), the same at every token of a response, 0 outside of the mask.
    """
    groups = _by_prompt(rewards, mask, num_samples)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + GROUP_EPS)
    return _to_tokens(advantages, mask)


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """REINFORCE++ (arXiv:2501.03262, section 3): the rewards still to come, normalized over the whole rollout.

    A_t = (G_t - mean G) / std G, with G_t = r_t + gamma * G_{t+1}.

    Args:
        rewards: (B, T), the KL to the reference in them.
        mask: (B, T) bool.
        gamma: discount.

    Returns:
        (B, T), 0 outside of the mask.
    """
    return masked_whiten(_discounted(rewards.masked_fill(~mask, 0.0), mask, gamma), mask)


def _discounted(terms: Tensor, mask: Tensor, discount: float) -> Tensor:
    """S_t = x_t + discount * S_{t+1} under the mask, (B, T)."""
    total = torch.zeros_like(terms[:, 0])
    sums = []
    for term, alive in zip(terms.flip(1).unbind(1), mask.flip(1).unbind(1), strict=True):
        total = (term + discount * total) * alive
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def _by_prompt(rewards: Tensor, mask: Tensor, num_samples: int) -> Tensor:
    """The summed rewards of each response, (prompts, K)."""
    return masked_sum(rewards, mask, 1).view(-1, num_samples)


def _to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """(prompts, K) -> (B, T)."""
    return advantages.reshape(-1, 1).expand(mask.shape).masked_fill(~mask, 0.0)
