"""Attention inside each stretch of one long row, and to the prompt that a stretch shares (data/packing.py).

Registered with transformers as an attention of its own name, so that every architecture whose layers ask there has
it. Where no branches are set it is what it stands for. Responses as a tree on their prompt: arXiv:2410.20305.

queries, keys, values (1, heads, N, d), branches -> (1, N, heads, d)
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignpipe.data.packing import Branch

# Of transformers -> of ours.
PACKED = {"sdpa": "packed_sdpa", "flash_attention_2": "packed_flash_attention_2"}
# Layers whose tokens see nothing but tokens before them, all or the nearest.
LAYERS = {"full_attention", "sliding_attention"}


class PackedMask:
    """What every layer of one forward is given in place of a mask.

    Args:
        branches: of the row, in order.
        device: of the queries.
    """

    def __init__(self, branches: Sequence[Branch], device: torch.device) -> None:
        self.branches = branches
        self.device = device
        self.sizes = [branch.end - branch.start for branch in branches]
        self._biases: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

    def cut(self, states: Tensor) -> tuple[Tensor, ...]:
        """The branches of queries, keys or values (1, heads, N, d)."""
        return torch.split(states, self.sizes, 2)

    def seen(self, states: Tensor) -> list[Tensor]:
        """Keys or values that each branch sees, (1, heads, shared + own, d)."""
        parts = self.cut(states)
        return [
            torch.cat([parts[branch.root][:, :, : branch.shared], own], 2) if branch.shared else own
            for branch, own in zip(self.branches, parts, strict=True)
        ]

    def bias(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where one of the last `queries` tokens of `keys` sees a key, -inf elsewhere; made once for all layers."""
        address = (queries, keys, window, dtype)
        if address not in self._biases:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            bias = torch.zeros(queries, keys, dtype=dtype).masked_fill_(~seen, float("-inf"))
            self._biases[address] = bias.to(self.device)
        return self._biases[address]


_MASK: ContextVar[PackedMask | None] = ContextVar("packed_mask", default=None)


def allow_packing(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model the attention that packs, where its layers can have it."""
    config = model.config.get_text_config()
    parameters = inspect.signature(model.base_model.forward).parameters
    if (
        config._attn_implementation in PACKED
        and model._supports_attention_backend
        and not model._is_stateful
        and set(getattr(config, "layer_types", None) or LAYERS) <= LAYERS
        and "position_ids" in parameters
    ):
        model.set_attn_implementation(PACKED[config._attn_implementation])
    return model


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a forward of a model may be one of `packed` rows."""
    return model.config.get_text_config()._attn_implementation in PACKED.values()


@contextmanager
def packed(branches: Sequence[Branch], device: torch.device) -> Iterator[None]:
    """Inside the block, a forward of a model that can pack reads one row of these branches."""
    token = _MASK.set(PackedMask(branches, device))
    try:
        yield
    finally:
        _MASK.reset(token)


def _mask(*args: Any, of: str, **kwargs: Any) -> Any:
    """The mask of a forward: ours inside `packed`, transformers' own outside."""
    theirs: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[of]
    return _MASK.get() or theirs(*args, **kwargs)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, of: str, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    theirs: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[of]
    if not isinstance(attention_mask, PackedMask):
        return theirs(module, query, key, value, attention_mask, **kwargs)
    if of == "sdpa":
        return _sdpa(module, query, key, value, attention_mask, **kwargs), None
    return _flash(theirs, module, query, key, value, attention_mask, **kwargs)


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    attend = partial(scaled_dot_product_attention, scale=scaling)
    found = []
    rows = zip(mask.branches, mask.cut(query), mask.seen(key), mask.seen(value), strict=True)
    for branch, own, keys, values in rows:
        count = keys.shape[2]
        if branch.shared or (sliding_window is not None and count > sliding_window):
            bias = mask.bias(own.shape[2], count, sliding_window, query.dtype)
            found.append(attend(own, keys, values, attn_mask=bias))
        else:
            found.append(attend(own, keys, values, is_causal=True))
    return torch.cat([part.transpose(1, 2) for part in found], 1)


def _flash(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One call for all branches; the kernel lines up the last query with the last key."""
    keys = [branch.end - branch.start + branch.shared for branch in mask.branches]
    if any(branch.shared for branch in mask.branches):
        key, value = torch.cat(mask.seen(key), 2), torch.cat(mask.seen(value), 2)
    bounds = {
        "cu_seq_lens_q": _bounds(mask.sizes, query.device),
        "cu_seq_lens_k": _bounds(keys, query.device),
        "max_length_q": max(mask.sizes),
        "max_length_k": max(keys),
    }
    return attend(module, query, key, value, None, **{**kwargs, **bounds})


def _bounds(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)


for _theirs, _ours in PACKED.items():
    AttentionInterface.register(_ours, partial(_attend, of=_theirs))
    AttentionMaskInterface.register(_ours, partial(_mask, of=_theirs))
