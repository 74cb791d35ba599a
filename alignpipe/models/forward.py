"""One forward of a model, from a batch to what is read off it: rows lie side by side, without padding.

model, TokenBatch -> logprobs (B, T - 1), entropies (B, T - 1), or hidden states (B, T, d)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.data.collate import TokenBatch
from alignpipe.data.packing import lay_out
from alignpipe.losses.logprobs import entropy, target_logprobs
from alignpipe.models.attention import can_pack, packed


@dataclass(frozen=True)
class _Inputs:
    """What a model reads of a batch.

    Attributes:
        arguments: of its forward.
        places: (B, T) long, where each token of the batch stands in what it reads, its rows one after another; some
            place where the batch is padded.
    """

    arguments: dict[str, Any]
    places: Tensor


@contextmanager
def _reading(model: PreTrainedModel, batch: TokenBatch) -> Iterator[_Inputs]:
    """Inside the block, a forward of the model with these inputs reads the batch."""
    if can_pack(model):
        branches, (take, places) = lay_out(batch.spans), _places(batch)
        ids = batch.input_ids.flatten()[take]
        positions = take % batch.input_ids.shape[1]
        with packed(branches, ids.device):
            yield _Inputs(
                {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}, places
            )
    else:
        # Needs no attention mask: padding is on the right, where a causal model does not look.
        ids = batch.input_ids
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        yield _Inputs({"input_ids": ids, "use_cache": False}, places)


def _places(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Which tokens of the flattened batch the packed row is made of (N,), and where each token stands in it (B, T)."""
    rows, width = batch.input_ids.shape
    taken, places = [], torch.zeros(rows, width, dtype=torch.long)
    for row, (span, branch) in enumerate(zip(batch.spans, lay_out(batch.spans), strict=True)):
        taken.append(torch.arange(row * width + branch.shared, row * width + span.length))
        places[row, : branch.shared] = torch.arange(branch.root, branch.root + branch.shared)
        places[row, branch.shared : span.length] = torch.arange(branch.start, branch.end)
    device = batch.input_ids.device
    return torch.cat(taken).to(device), places.to(device)


def batch_logprobs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Logprobs of the tokens under the loss mask; the language model head works only where one is predicted.

    Args:
        model: a causal language model, in any mode; keeps the graph unless gradients are off.
        batch: B sequences.
        temperature: of the distribution whose logprobs are wanted.

    Returns:
        (B, T - 1) float32, column t - 1 for the token at t, as `batch.loss_mask[:, 1:]` is; 0 where that is
        false.
    """
    logits, targets = _predictions(model, batch)
    return _spread(target_logprobs(logits, targets, temperature), batch)


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
    logits, targets = _predictions(model, batch)
    logprobs = target_logprobs(logits, targets, temperature)
    return _spread(logprobs, batch), _spread(entropy(logits, temperature), batch)


def _predictions(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits (M, V) and targets (M,) of the M tokens that are learnt, row by row."""
    mask = batch.loss_mask[:, 1:]
    with _reading(model, batch) as inputs:
        # transformers applies the head, and what the architecture does after it, at these places alone.
        if can_pack(model):
            places = inputs.places[:, :-1][mask]
            logits: Tensor = model(**inputs.arguments, logits_to_keep=places).logits[0]
        else:
            columns = mask.any(0).nonzero().squeeze(1)
            logits = model(**inputs.arguments, logits_to_keep=columns).logits[mask[:, columns]]
    return logits, batch.input_ids[:, 1:][mask]


def _spread(found: Tensor, batch: TokenBatch) -> Tensor:
    """(M,) -> (B, T - 1)."""
    mask = batch.loss_mask[:, 1:]
    return found.new_zeros(mask.shape).masked_scatter(mask, found)


def body_states(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The last hidden states of a model's body.

    Returns:
        States of all tokens that were read (N, d), and which of them each token of the batch has, (B, T) long;
        behind a row's end it has some.
    """
    with _reading(model, batch) as inputs:
        hidden: Tensor = model.base_model(**inputs.arguments).last_hidden_state
    return hidden.flatten(0, 1), inputs.places


def mean_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The mean of the last hidden states over the real tokens of each sequence, (B, d) float32."""
    # Through the whole model, not its body: sharded weights are gathered at its door.
    with _reading(model, batch) as inputs:
        output = model(**inputs.arguments, logits_to_keep=1, output_hidden_states=True)
    hidden = output.hidden_states[-1].flatten(0, 1)[inputs.places].float()
    real = torch.arange(hidden.shape[1], device=hidden.device) < batch.lengths[:, None]
    mean: Tensor = (hidden * real[:, :, None]).sum(1) / batch.lengths[:, None]
    return mean
