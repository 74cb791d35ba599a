"""One forward of a language model, from a batch to the logprobs of its learnt tokens or to embeddings.

model, TokenBatch -> logprobs (B, T - 1), entropies (B, T - 1), or one vector a sequence (B, d)
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.data.collate import TokenBatch
from alignpipe.losses.logprobs import entropy, target_logprobs


def batch_logprobs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Logprobs of the tokens under the loss mask; the language model head works only where one is predicted.

    Needs no attention mask: padding is on the right, where a causal model does not look.

    Args:
        model: a causal language model, in any mode; keeps the graph unless gradients are off.
        batch: B sequences.
        temperature: of the distribution whose logprobs are wanted.

    Returns:
        (B, T - 1) float32, column t - 1 for the token at t, as `batch.loss_mask[:, 1:]` is; 0 where that is
        false.
    """
    logits, targets, positions = _predictions(model, batch)
    return _spread(target_logprobs(logits, targets, temperature), positions, batch)


def batch_logprobs_and_entropy(
    model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same, and the entropy of each distribution that a learnt token was drawn from.

    Args:
        model: as for `batch_logprobs`.
        batch: B sequences.
        temperature: of the distribution.

    Returns:
        Logprobs and entropies in nats, both (B, T - 1) float32 and 0 where no token is learnt.
    """
    logits, targets, positions = _predictions(model, batch)
    logprobs = target_logprobs(logits, targets, temperature)
    return _spread(logprobs, positions, batch), _spread(entropy(logits, temperature), positions, batch)


def _predictions(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, P, V) and targets (B, P) at the P positions at which any row learns."""
    positions = batch.loss_mask[:, 1:].any(0).nonzero().squeeze(1)
    # transformers applies the head, and what the architecture does after it, at these positions alone.
    output = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=positions)
    return output.logits, batch.input_ids[:, positions + 1], positions


def _spread(found: Tensor, positions: Tensor, batch: TokenBatch) -> Tensor:
    """(B, P) -> (B, T - 1)."""
    mask = batch.loss_mask[:, 1:]
    result = found.new_zeros(mask.shape)
    result[:, positions] = found
    return result.masked_fill(~mask, 0.0)


def mean_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The mean of the last hidden states over the real tokens of each sequence, (B, d) float32."""
    # Through the whole model, not its body: sharded weights are gathered at its door.
    output = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1, output_hidden_states=True)
    hidden = output.hidden_states[-1].float()
    real = torch.arange(hidden.shape[1], device=hidden.device) < batch.lengths[:, None]
    mean: Tensor = (hidden * real[:, :, None]).sum(1) / batch.lengths[:, None]
    return mean
