"""The last block, at the tokens that a loss or a score is read from alone.

Other tokens are keys and values there and no more: nothing of what they attend to, or of what its feed-forward makes
of it, reaches a result or a gradient. The last is half of all blocks in a model of two, a thirtieth in one of thirty.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpipe.data.packing import Branch
from alignpipe.models.attention import asking, can_pack, packed
from alignpipe.models.loading import evaluating
from alignpipe.models.sharding import is_sharded

# What transformers calls the parts of a block that make of each token something for it alone: what it attends to, what
# is made of that, the feed-forward. Its query costs no more than choosing for whom.
ATTENTION = "self_attn"
PARTS = (ATTENTION, "self_attn.o_proj", "mlp")
# Models that were tried, see `last_block`.
_TRIED: WeakKeyDictionary[PreTrainedModel, list[str]] = WeakKeyDictionary()


def last_block(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those parts of the last block on which nothing but the state of their own token depends, by name.

    Tried once a model, on three tokens. None as well where the model cannot pack, where the block is computed again in
    the backward pass, as hooks are gone by then, and where weights are cut over processes, which need not come to the
    trial at the same time.
    """
    if is_sharded(model) or not can_pack(model):
        return {}
    stacks = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    block = stacks[-1][-1] if stacks else None
    if block is None or (model.training and getattr(block, "gradient_checkpointing", False)):
        return {}
    modules = dict(block.named_modules())
    if model not in _TRIED:
        _TRIED[model] = [name for name in PARTS if name in modules and _is_own(model, name, modules[name])]
    return {name: modules[name] for name in _TRIED[model]}


@contextmanager
def only_at(parts: Mapping[str, nn.Module], places: Tensor) -> Iterator[None]:
    """Inside the block, and inside `packed`, parts of a model's last one work at some places of the row.

    What they give elsewhere is 0.

    Args:
        parts: as `last_block` gives them.
        places: (M,) long, ascending, none of them twice.
    """
    with ExitStack() as stack:
        for name, part in parts.items() if len(places) else ():
            stack.enter_context(asking(part, places) if name == ATTENTION else _working_at(part, places))
        yield


@contextmanager
def _working_at(part: nn.Module, places: Tensor) -> Iterator[None]:
    """Inside the block, the module works at some places of one row, (1, N, d), and gives 0 elsewhere."""
    lengths: list[int] = []

    def choose(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        lengths.append(inputs[0].shape[1])
        return inputs[0].index_select(1, places)

    def put_back(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        return found.new_zeros(1, lengths.pop(), found.shape[2]).index_copy(1, places, found)

    hooks = part.register_forward_pre_hook(choose), part.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _is_own(model: PreTrainedModel, name: str, part: nn.Module) -> bool:
    """Whether a token gets the same where the part works for it alone."""
    # Embeddings, not ids, whose own may be 0 or have noise added to them.
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    tokens = torch.linspace(-1, 1, 3 * width, device=model.device).view(1, 3, width)
    row, place = (Branch(0, 3, 0, 0),), torch.tensor([1], device=model.device)
    with (
        evaluating(model),
        torch.autocast(model.device.type, enabled=False),
        packed(row, model.device),
    ):
        whole = model.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
        with only_at({name: part}, place):
            chosen = model.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
    return torch.allclose(chosen[0, 1], whole[0, 1], atol=1e-5, rtol=1e-4)
