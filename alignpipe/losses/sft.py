"""Supervised fine-tuning: the language-model loss on the tokens that are to be learnt.

logprobs (B, T), mask (B, T) -> losses (B, T)
"""

from torch import Tensor


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """L_t = -log p(x_t | x_{<t}) where the mask is true, 0 elsewhere.

    Args:
        logprobs: (B, T), of the tokens that stand there (`token_logprobs`).
        mask: (B, T) bool, true at tokens that are learnt: response and end of turn, or all.

    Returns:
        (B, T), nats; to be divided by the number of learnt tokens of the whole step.
    """
    return (-logprobs).masked_fill(~mask, 0.0)
