"""Proximal policy optimization (arXiv:1707.06347) on language models (arXiv:1909.08593, arXiv:2203.02155).

logprobs, reference_logprobs, scores -> rewards -> advantages, returns -> policy and value losses per token

Every (B, T) here is indexed by *action*: column t is the token that was chosen, its value is the one read at
the hidden state before it. The mask of a row is one unbroken stretch of true, and ends at the EOS action or
at the last token that was sampled.
"""

import torch
from torch import Tensor

from alignpipe.losses.logprobs import masked_mean

# exp(20) is far outside of any clip range, and far inside of what float32 holds.
MAX_LOG_RATIO = 20.0


def shape_rewards(
    logprobs: Tensor, reference_logprobs: Tensor, scores: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t = -kl_coef * (log pi(y_t) - log ref(y_t)), and the score on top at the last action.

    Args:
        logprobs: (B, T), of the policy that sampled.
        reference_logprobs: (B, T), of the frozen reference.
        scores: (B,), of the reward model, already shifted, scaled and clipped.
        mask: (B, T) bool, true at response tokens, EOS among them.
        kl_coef: price of a nat.

    Returns:
        (B, T), 0 outside of the mask; a row without a response gets no score.
    """
    rewards = (-kl_coef * kl_k1(logprobs, reference_logprobs)).masked_fill(~mask, 0.0)
    later = mask.flip(1).cumsum(1).flip(1)
    return rewards + scores[:, None] * (mask & (later == 1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16), backwards from the last action.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1};  R_t = A_t + V_t.
    The value after the last action is 0: the episode is over there.

    Args:
        rewards: (B, T).
        values: (B, T), V_t read before action t.
        mask: (B, T) bool.
        gamma: discount.
        gae_lambda: 0 = one-step, 1 = the whole return minus the value.

    Returns:
        advantages (B, T), not whitened, and returns (B, T); both 0 outside of the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values).masked_fill(~mask, 0.0)
    advantage = torch.zeros_like(deltas[:, 0])
    advantages = []
    for delta, alive in zip(deltas.flip(1).unbind(1), mask.flip(1).unbind(1), strict=True):
        advantage = (delta + gamma * gae_lambda * advantage) * alive
        advantages.append(advantage)
    result = torch.stack(advantages[::-1], dim=1)
    return result, result + values


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """L_t = max(-A_t * rho_t, -A_t * clip(rho_t, 1 - eps, 1 + eps)), rho_t = pi(y_t) / pi_old(y_t): eq. 7.

    Args:
        logprobs: (B, T), of the policy under training.
        old_logprobs: (B, T), of the policy that sampled, computed as `logprobs` are.
        advantages: (B, T), whitened over the rollout.
        mask: (B, T) bool.
        clip_range: eps.

    Returns:
        losses (B, T), 0 outside of the mask, and the ratio (B, T) without gradient, 1 outside of the mask.
        A token is clipped where `(ratio - 1).abs() > clip_range`.
    """
    difference = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    return losses.masked_fill(~mask, 0.0), ratio.detach()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip_range: float
) -> Tensor:
    """L_t = 1/2 max((V_t - R_t)^2, (clip(V_t, V_old - eps, V_old + eps) - R_t)^2).

    Args:
        values: (B, T), of the value model under training.
        old_values: (B, T), of the value model at the time of the rollout.
        returns: (B, T), from `gae`.
        mask: (B, T) bool.
        value_clip_range: eps, in units of the return.

    Returns:
        (B, T), 0 outside of the mask.
    """
    clipped = torch.minimum(
        torch.maximum(values, old_values - value_clip_range), old_values + value_clip_range
    )
    losses = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return losses.masked_fill(~mask, 0.0)


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float, num_samples: int, kl_horizon: float) -> float:
    """Proportional controller of arXiv:1909.08593, section 2.2, with the gain as a horizon.

    e = clip(kl / target - 1, -0.2, 0.2);  coefficient <- coefficient * (1 + e * n / horizon).

    Args:
        kl_coef: coefficient now.
        kl: measured, nats a response.
        target_kl: wanted, nats a response.
        num_samples: responses since the last change.
        kl_horizon: responses in which a full error (0.2) changes the coefficient by a fifth.
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / kl_horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) under the mask: 1 = perfect, 0 = no better than a constant.

    Args:
        values: (B, T).
        returns: (B, T).
        mask: (B, T) bool.

    Returns:
        A scalar; nan or -inf when the returns do not vary.
    """
    return 1 - _variance(returns - values, mask) / _variance(returns, mask)


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`d = log pi - log ref` at tokens sampled from pi: unbiased for KL(pi || ref), can be negative."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`d^2 / 2`: biased, never negative."""
    return 0.5 * (logprobs - reference_logprobs).square()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`exp(-d) - 1 + d`: unbiased and never negative, for KL(pi || ref) at tokens sampled from pi."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask)
