"""The last block's feed-forward, at the tokens that a loss or a score is read from alone.

Other tokens are keys and values there and no more: nothing of what its feed-forward makes of them reaches a result or
a gradient. The last is half of all feed-forwards in a model of two blocks, a thirtieth in one of thirty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpipe.models.loading import evaluating
from alignpipe.models.sharding import is_sharded

# What the feed-forward of a block is called by transformers.
FEED_FORWARD = "mlp"
# Models that were tried, see `last_feed_forward`.
_OWN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def last_feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """The feed-forward of the last block, where nothing but the state of its own token depends on it.

    Tried once a model, on three tokens. None as well where the block is computed again in the backward pass, as hooks
    are gone by then, and where weights are cut over processes, which need not come to the trial at the same time.
    """
    if is_sharded(model):
        return None
    stacks = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    block = stacks[-1][-1] if stacks else None
    found = getattr(block, FEED_FORWARD, None)
    if not isinstance(found, nn.Module) or (
        model.training and getattr(block, "gradient_checkpointing", False)
    ):
        return None
    if model not in _OWN:
        _OWN[model] = _is_own(model, found)
    return found if _OWN[model] else None


@contextmanager
def only_at(feed_forward: nn.Module | None, places: Tensor) -> Iterator[None]:
    """Inside the block, the module works at some places of one row, (1, N, d), and gives 0 elsewhere.

    Args:
        feed_forward: None changes nothing.
        places: (M,) long, none of them twice.
    """
    if feed_forward is None:
        yield
        return
    lengths: list[int] = []

    def choose(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        lengths.append(inputs[0].shape[1])
        return inputs[0].index_select(1, places)

    def put_back(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        return found.new_zeros(1, lengths.pop(), found.shape[2]).index_copy(1, places, found)

    hooks = feed_forward.register_forward_pre_hook(choose), feed_forward.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _is_own(model: PreTrainedModel, feed_forward: nn.Module) -> bool:
    # Embeddings, not ids, whose own may be 0 or have noise added to them.
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    tokens = torch.linspace(-1, 1, 3 * width, device=model.device).view(1, 3, width)
    place = torch.tensor([1], device=model.device)
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        whole = model.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
        with only_at(feed_forward, place):
            chosen = model.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
    return torch.allclose(chosen[0, 1], whole[0, 1], atol=1e-5, rtol=1e-4)
