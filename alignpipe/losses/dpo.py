"""Losses over preferences: DPO (arXiv:2305.18290) and its kin, chosen by a word.

responses of a batch: sequence_logprobs, those under the reference, lengths -> losses and implicit rewards

Every loss of `LOSSES` has the signature `(chosen, rejected, *, beta, ...) -> PreferenceLoss`. In those over pairs row i
of both sides answers the same prompt; in `kto` the sides are of any size, one of them may be empty.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2)


class Responses(NamedTuple):
    """N responses, good ones or bad ones.

    Attributes:
        logprobs: (N,), under the policy, summed over the response and its end of turn.
        reference: (N,), the same under the reference; 0 where a loss has none.
        lengths: (N,), tokens summed over.
        baseline: (N,), the log-ratio at which a response counts as neither good nor bad; read by `kto` alone.
    """

    logprobs: Tensor
    reference: Tensor
    lengths: Tensor
    baseline: Tensor

    @property
    def ratios(self) -> Tensor:
        """(N,), log pi(y|x) - log ref(y|x)."""
        return self.logprobs - self.reference

    @property
    def mean_ratios(self) -> Tensor:
        """(N,), the same a token."""
        return self.ratios / self.lengths


class PreferenceLoss(NamedTuple):
    """What a loss finds.

    Attributes:
        losses: (B,) a pair; in `kto` one a response, chosen before rejected.
        margins: as `losses`, without gradient; above 0 where the implicit rewards agree with the label.
        chosen_rewards: one a chosen response, without gradient.
        rejected_rewards: one a rejected response, without gradient.
    """

    losses: Tensor
    margins: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sigmoid(chosen: Responses, rejected: Responses, *, beta: float) -> PreferenceLoss:
    """DPO, arXiv:2305.18290, equation 7: L = -log sigmoid[r_w - r_l], r = beta * log-ratio.

    A policy that equals its reference has loss ln 2 on every pair. The larger beta, the nearer it stays.
    """
    wins, loses = beta * chosen.ratios, beta * rejected.ratios
    return _of_pairs(-F.logsigmoid(wins - loses), wins, loses)


def conservative(
    chosen: Responses, rejected: Responses, *, beta: float, label_smoothing: float
) -> PreferenceLoss:
    """Mitchell 2023, cDPO: L = -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = r_w - r_l as in DPO.

    The cross-entropy of a label that is wrong in a share e of the pairs; least at sigmoid(m) = 1 - e.
    """
    wins, loses = beta * chosen.ratios, beta * rejected.ratios
    margins = wins - loses
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return _of_pairs(losses, wins, loses)


def robust(chosen: Responses, rejected: Responses, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """rDPO, arXiv:2403.00409, equation 12: L = [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2e).

    Over labels of which a share e was flipped it has the expectation of DPO's loss over the true ones.
    """
    wins, loses = beta * chosen.ratios, beta * rejected.ratios
    margins = wins - loses
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)
    return _of_pairs(losses / (1 - 2 * label_smoothing), wins, loses)


def hinge(chosen: Responses, rejected: Responses, *, beta: float) -> PreferenceLoss:
    """SLiC, arXiv:2305.10425, on DPO's rewards as in arXiv:2309.06657: L = max(0, 1 - (r_w - r_l))."""
    wins, loses = beta * chosen.ratios, beta * rejected.ratios
    return _of_pairs(torch.relu(1 - (wins - loses)), wins, loses)


def ipo(chosen: Responses, rejected: Responses, *, beta: float) -> PreferenceLoss:
    """IPO, arXiv:2310.12036, equation 17: L = (h - 1 / (2 beta))^2, h the difference of log-ratios a token.

    The paper's numbers are of means over tokens, not of sums, as its authors said to those who asked.
    """
    wins, loses = chosen.mean_ratios, rejected.mean_ratios
    return _of_pairs((wins - loses - 1 / (2 * beta)).square(), beta * wins, beta * loses)


def sigmoid_norm(chosen: Responses, rejected: Responses, *, beta: float) -> PreferenceLoss:
    """Tulu 3, arXiv:2411.15124, equation 6: L = -log sigmoid(r_w - r_l), r = beta * log-ratio a token."""
    wins, loses = beta * chosen.mean_ratios, beta * rejected.mean_ratios
    return _of_pairs(-F.logsigmoid(wins - loses), wins, loses)


def apo_zero(chosen: Responses, rejected: Responses, *, beta: float) -> PreferenceLoss:
    """APO-zero, arXiv:2408.06266, equation 7: L = 1 - sigmoid(r_w) + sigmoid(r_l), r as in DPO."""
    wins, loses = beta * chosen.ratios, beta * rejected.ratios
    return _of_pairs(1 - torch.sigmoid(wins) + torch.sigmoid(loses), wins, loses)


def simpo(chosen: Responses, rejected: Responses, *, beta: float, gamma_beta_ratio: float) -> PreferenceLoss:
    """SimPO, arXiv:2405.14734, equation 6: L = -log sigmoid(r_w - r_l - gamma), r = beta * log pi(y|x) a token.

    Args:
        chosen: with reference 0.
        rejected: with reference 0.
        beta: scale of the reward.
        gamma_beta_ratio: the margin in nats a token, gamma / beta.
    """
    wins, loses = beta * chosen.mean_ratios, beta * rejected.mean_ratios
    return _of_pairs(-F.logsigmoid(wins - loses - gamma_beta_ratio * beta), wins, loses)


def orpo(chosen: Responses, rejected: Responses, *, beta: float) -> PreferenceLoss:
    """ORPO, arXiv:2403.07691, equations 6 and 7: L = -p_w - beta * log sigmoid(o_w - o_l), o = p - log(1 - exp p).

    Args:
        chosen: with reference 0, so that p is the log-prob a token.
        rejected: with reference 0.
        beta: the paper's lambda.
    """
    wins, loses = chosen.mean_ratios, rejected.mean_ratios
    odds = wins - _log1mexp(wins) - (loses - _log1mexp(loses))
    return _of_pairs(-wins - beta * F.logsigmoid(odds), beta * wins, beta * loses)


def kto(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PreferenceLoss:
    """KTO, arXiv:2402.01306, equation 8: L = w_D (1 - sigmoid(beta (h - z))), w_U (1 - sigmoid(beta (z - h))) if bad.

    Args:
        chosen: good responses; h is their log-ratio, z the baseline: an estimate of KL(policy || reference), see
            `kl_baseline`.
        rejected: bad responses, to any prompts.
        beta: aversion to risk; larger saturates sooner.
        desirable_weight: w_D.
        undesirable_weight: w_U.
    """
    above = beta * (chosen.ratios - chosen.baseline)
    below = beta * (rejected.baseline - rejected.ratios)
    losses = [desirable_weight * (1 - torch.sigmoid(above)), undesirable_weight * (1 - torch.sigmoid(below))]
    wins, loses = beta * chosen.ratios, beta * rejected.ratios
    margins = torch.cat([above, below])
    return PreferenceLoss(torch.cat(losses), margins.detach(), wins.detach(), loses.detach())


def kl_baseline(logprobs: Tensor, reference: Tensor) -> float:
    """KTO's z = max(0, mean of log pi - log ref) over responses to other prompts: arXiv:2402.01306, section 4.1.

    Args:
        logprobs: (N,), of all mismatched responses of an optimizer step, under the policy as it stands.
        reference: (N,), under the reference.
    """
    return max(0.0, float((logprobs.double() - reference.double()).mean()))


def nll(chosen: Responses, like: Tensor) -> Tensor:
    """-log pi(y_w|x) a token (RPO, arXiv:2404.19733, equation 1), with zeros after it up to the shape of `like`."""
    return F.pad(-chosen.logprobs / chosen.lengths, (0, len(like) - len(chosen.logprobs)))


LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        conservative,
        robust,
        hinge,
        ipo,
        sigmoid_norm,
        apo_zero,
        simpo,
        orpo,
        kto,
    )
}


def _of_pairs(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PreferenceLoss:
    wins, loses = chosen_rewards.detach(), rejected_rewards.detach()
    return PreferenceLoss(losses, wins - loses, wins, loses)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp x) for x < 0, exact at both ends; a response that is certain is held a hair below 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -LN2
    # Each branch gets a harmless input where the other is taken: its gradient there would be NaN.
    return torch.where(
        near, (-torch.expm1(x.where(near, -LN2))).log(), torch.log1p(-x.where(~near, -LN2).exp())
    )
