"""Proximal policy optimization (arXiv:1707.06347) on language models (arXiv:1909.08593, arXiv:2203.02155).

logprobs, reference_logprobs, scores -> rewards (-> `advantages.py`) -> policy and value losses per token

Every (B, T) here is indexed by *action*: column t is the token that was chosen, its value is the one read at
the hidden state before it. The mask of a row is one unbroken stretch of true, and ends at the EOS action or
at the last token that was sampled.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from alignpipe.losses.logprobs import masked_mean

# exp(20) is far outside of any clip range, and far inside of what float32 holds.
MAX_LOG_RATIO = 20.0


def shape_rewards(kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, and the score on top at the last action.

    Args:
        kl: (B, T), an estimate of the KL to the reference at each token that the policy sampled.
        scores: (B,), of the reward model, already shifted, scaled and clipped.
        mask: (B, T) bool, true at response tokens, EOS among them.
        kl_coef: price of a nat.

    Returns:
        (B, T), 0 outside of the mask; a row without a response gets no score.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    later = mask.flip(1).cumsum(1).flip(1)
    return rewards + scores[:, None] * (mask & (later == 1))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """L_t = max(-A_t * rho_t, -A_t * clip(rho_t, 1 - eps, 1 + eps)), rho_t = pi(y_t) / pi_old(y_t): eq. 7.

    With `dual_clip` = c a token of negative advantage loses at most -c * A_t, however likely it has become: there
    L_t = min(L_t, -c * A_t) (arXiv:1912.09729, equation 5).

    Args:
        logprobs: (B, T), of the policy under training.
        old_logprobs: (B, T), of the policy that sampled, computed as `logprobs` are.
        advantages: (B, T), whitened over the rollout.
        mask: (B, T) bool.
        clip_range: eps.
        dual_clip: c, above 1; None leaves the loss of a bad token without a bound.

    Returns:
        losses (B, T), 0 outside of the mask, and the ratio (B, T) without gradient, 1 outside of the mask.
        A token is clipped where `(ratio - 1).abs() > clip_range`.
    """
    difference = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
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


def kl_loss(kl: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """L_t = rho_t * kl_t, rho_t without gradient: the KL to the reference as a loss of its own (arXiv:2510.01555).

    The gradient at tokens of the policy itself (rho = 1) is, on average, for k2 that of KL(pi || ref), which is also
    what k1 in the reward gives; for k3 that of KL(ref || pi); for k1 zero, since d log pi averages to nothing. Later
    updates of a rollout look at tokens of an older policy, which rho weighs back.

    Args:
        kl: (B, T), from `kl_k2` or `kl_k3`, with gradient.
        ratio: (B, T), from `policy_loss`.
        mask: (B, T) bool.

    Returns:
        (B, T), 0 outside of the mask.
    """
    return (ratio * kl).masked_fill(~mask, 0.0)


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


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask)
