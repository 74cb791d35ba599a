"""One forward of a model, from a batch to what is read off it: rows lie side by side, without padding.

model, TokenBatch -> logprobs (B, T - 1), entropies (B, T - 1), or hidden states (B, T, d)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpipe.data.collate import TokenBatch
from alignpipe.data.packing import Branch, lay_out
from alignpipe.losses.logprobs import entropy, head_logprobs, target_logprobs
from alignpipe.models.attention import can_pack, packed, places
from alignpipe.models.last_block import last_block, only_at
from alignpipe.models.loading import evaluating
from alignpipe.models.sharding import is_sharded

# Models that were tried, see `_ends_in_head`.
_PLAIN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


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
        branches = lay_out(batch.rows, shared=batch.shared)
        taken, found = _places(batch, branches)
        ids, positions = batch.input_ids.flatten()[taken], taken % batch.input_ids.shape[1]
        with packed(branches, ids.device):
            yield _Inputs(
                {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}, found
            )
    else:
        # Needs no attention mask: padding is on the right, where a causal model does not look.
        ids = batch.input_ids
        every = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        yield _Inputs({"input_ids": ids, "use_cache": False}, every)


def _places(batch: TokenBatch, branches: Sequence[Branch]) -> tuple[Tensor, Tensor]:
    """Which tokens of the flattened batch the packed row is made of (N,), and where each token stands in it (B, T)."""
    width = batch.input_ids.shape[1]
    column = torch.arange(width)
    shared = torch.tensor([branch.shared for branch in branches])[:, None]
    lengths = torch.tensor([len(row) for row in batch.rows])[:, None]
    taken = ((column >= shared) & (column < lengths)).flatten().nonzero().squeeze(1)
    device = batch.input_ids.device
    return taken.to(device), places(branches, width).to(device)


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
    mask = batch.loss_mask[:, 1:]
    targets = batch.input_ids[:, 1:][mask]
    if _ends_in_head(model):
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        hidden = body_states(model, batch, nn.functional.pad(mask, (0, 1)))
        return _spread(head_logprobs(hidden, head.weight, head.bias, targets, temperature), batch)
    return _spread(target_logprobs(_logits(model, batch), targets, temperature), batch)


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
    logits, targets = _logits(model, batch), batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]
    logprobs = target_logprobs(logits, targets, temperature)
    return _spread(logprobs, batch), _spread(entropy(logits, temperature), batch)


def _logits(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits (M, V) before each of the M tokens that are learnt, row by row."""
    mask = batch.loss_mask[:, 1:]
    with _reading(model, batch) as inputs:
        # transformers applies the head, and what the architecture does after it, at these places alone.
        if can_pack(model):
            logits: Tensor = model(**inputs.arguments, logits_to_keep=inputs.places[:, :-1][mask]).logits[0]
        else:
            columns = mask.any(0).nonzero().squeeze(1)
            logits = model(**inputs.arguments, logits_to_keep=columns).logits[mask[:, columns]]
    return logits


@torch.no_grad()
def _ends_in_head(model: PreTrainedModel) -> bool:
    """Whether logits are one plain linear layer on the body's states, which some architectures bend or scale.

    Tried once a model, on one token. Weights cut over processes are gathered at the door of the whole model alone.
    """
    if model not in _PLAIN:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        _PLAIN[model] = type(head) is nn.Linear and not is_sharded(model) and _is_plain(model, head)
    return _PLAIN[model]


def _is_plain(model: PreTrainedModel, head: nn.Linear) -> bool:
    # Embeddings, not ids, whose own may be 0 or have noise added to them.
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    inputs = {"inputs_embeds": torch.ones(1, 1, width, device=model.device), "use_cache": False}
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        states = model.base_model(**inputs).last_hidden_state
        return torch.equal(head(states), model(**inputs).logits)


def _spread(found: Tensor, batch: TokenBatch) -> Tensor:
    """(M,) -> (B, T - 1)."""
    mask = batch.loss_mask[:, 1:]
    return found.new_zeros(mask.shape).masked_scatter(mask, found)


def body_states(model: PreTrainedModel, batch: TokenBatch, at: Tensor) -> Tensor:
    """The last hidden states of a model's body at some tokens.

    Args:
        model: any with a body.
        batch: B sequences.
        at: (B, T) bool, M of them true.

    Returns:
        (M, d), row by row.
    """
    parts = last_block(model)
    with _reading(model, batch) as inputs:
        places = inputs.places[at]
        with only_at(parts, torch.unique(places)):
            hidden: Tensor = model.base_model(**inputs.arguments).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, places)


def mean_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The mean of the last hidden states over the real tokens of each sequence, (B, d) float32."""
    # Through the whole model, not its body: sharded weights are gathered at its door.
    with _reading(model, batch) as inputs:
        output = model(**inputs.arguments, logits_to_keep=1, output_hidden_states=True)
    hidden = output.hidden_states[-1].flatten(0, 1)[inputs.places].float()
    real = torch.arange(hidden.shape[1], device=hidden.device) < batch.lengths[:, None]
    mean: Tensor = (hidden * real[:, :, None]).sum(1) / batch.lengths[:, None]
    return mean
