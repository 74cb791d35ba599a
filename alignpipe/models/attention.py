"""Attention inside each stretch of one long row, and to the prompt that a stretch shares (data/packing.py).

Registered with transformers as an attention of its own name, so that every architecture whose layers ask there has
it. Where no branches are set it is what it stands for. Responses as a tree on their prompt: arXiv:2410.20305.

queries, keys, values (1, heads, N, d), branches -> (1, N, heads, d)
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeVar

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
# Rows of so few tokens are padded for attention, alone of all layers.
SHORT = 96

T = TypeVar("T")


def places(branches: Sequence[Branch], width: int) -> Tensor:
    """Where each token of each branch, what it shares first, stands in the row: (branches, width) long, on the CPU.

    Behind the end of a branch stands some place of the row.
    """
    found = torch.arange(width).repeat(len(branches), 1)
    for number, branch in enumerate(branches):
        found[number] += branch.start - branch.shared
        found[number, : branch.shared] = found[branch.root, : branch.shared]
    return found.clamp(max=branches[-1].end - 1)


class PackedMask:
    """What every layer of one forward is given in place of a mask.

    Args:
        branches: of the row, in order.
        device: of the queries.
    """

    def __init__(self, branches: Sequence[Branch], device: torch.device) -> None:
        self.branches = branches
        self.device = device
        # A layer, and with how many tokens each branch begins at which nothing is wanted of its attention.
        self.asking: tuple[Any, tuple[int, ...]] | None = None
        self.sizes = [branch.end - branch.start for branch in branches]
        # One after another would be a call for a few tokens each.
        self.is_short = (
            max(branch.shared + size for branch, size in zip(branches, self.sizes, strict=True)) <= SHORT
        )
        self._made: dict[Hashable, Any] = {}

    def unasked(self, places: Tensor) -> tuple[int, ...]:
        """With how many tokens each branch begins that are at none of some ascending places."""
        starts = torch.tensor([branch.start for branch in self.branches])
        ends = starts + torch.tensor(self.sizes)
        asked = torch.cat([places.cpu(), ends[-1:]])
        first = asked[torch.searchsorted(asked, starts)]
        return tuple((torch.minimum(first, ends) - starts).tolist())

    def cut(self, states: Tensor) -> tuple[Tensor, ...]:
        """The branches of queries, keys or values (1, heads, N, d)."""
        return torch.split(states, self.sizes, 2)

    def seen(self, states: Tensor) -> list[Tensor]:
        """Those of all that each branch sees, itself last: (1, heads, shared + own, d)."""
        found: list[Tensor] = []
        # One for all that share it: the gradient of each would be as large as what it is of.
        heads: dict[tuple[int, int], Tensor] = {}
        for branch, own in zip(self.branches, self.cut(states), strict=True):
            if branch.shared:
                address = branch.root, branch.shared
                if address not in heads:
                    heads[address] = found[branch.root][:, :, : branch.shared]
                own = torch.cat([heads[address], own], 2)
            found.append(own)
        return found

    def once(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """What a function gives for this mask; made by the first layer that asks."""
        address = (make, *arguments)
        if address not in self._made:
            self._made[address] = make(self, *arguments)
        found: T = self._made[address]
        return found


class _Padded(NamedTuple):
    """Branches as a batch padded to the longest of them.

    Attributes:
        queries: (B, Tq) long, places of the row.
        keys: (B, Tk) long, places of the row, those of the shared prompt first.
        bias: (B, 1, Tq, Tk), see `_bias`; None where queries see what stands before them.
        back: (M,) long, where each token that is asked for stands among the B * Tq queries.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    back: Tensor


class _Way(NamedTuple):
    """How a layer attends.

    Attributes:
        unasked: with how many tokens each branch begins at which nothing is wanted.
        scale: of the products; None for that of torch.
        window: of how many tokens, itself among them, a token sees the nearest; None for all.
    """

    unasked: tuple[int, ...]
    scale: float | None
    window: int | None


def _padded(mask: PackedMask, unasked: tuple[int, ...], window: int | None, dtype: torch.dtype) -> _Padded:
    first = torch.tensor(unasked)[:, None]
    sizes = torch.tensor(mask.sizes)[:, None] - first
    before = torch.tensor([branch.shared for branch in mask.branches])[:, None] + first
    queries, keys = torch.arange(int(sizes.max())), torch.arange(int((sizes + before).max()))
    starts = torch.tensor([branch.start for branch in mask.branches])[:, None] + first
    bias = None
    if before.any() or (window is not None and len(keys) > window):
        bias = _bias((before + queries)[:, :, None] - keys, window, dtype)[:, None].to(mask.device)
    found = (
        (starts + queries).clamp(max=mask.branches[-1].end - 1),
        places(mask.branches, len(keys)),
        (queries < sizes).flatten().nonzero().squeeze(1),
    )
    at, seen, back = (tensor.to(mask.device) for tensor in found)
    return _Padded(at, seen, bias, back)


def _bias(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key so many tokens before it, -inf where it does not."""
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _branch_bias(mask: PackedMask, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """The bias of one branch, whose queries are the last of its keys."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return _bias(distance, window, dtype).to(mask.device)


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


def _asked(mask: PackedMask, unasked: tuple[int, ...]) -> Tensor:
    """Places of the tokens that are asked for, (M,) long."""
    rows = zip(mask.branches, unasked, strict=True)
    return torch.cat([torch.arange(branch.start + first, branch.end) for branch, first in rows]).to(
        mask.device
    )


@contextmanager
def packed(branches: Sequence[Branch], device: torch.device) -> Iterator[None]:
    """Inside the block, a forward of a model that can pack reads one row of these branches."""
    token = _MASK.set(PackedMask(branches, device))
    try:
        yield
    finally:
        _MASK.reset(token)


@contextmanager
def asking(layer: Any, places: Tensor) -> Iterator[None]:
    """Inside the block, and inside `packed`, one layer's attention is wanted at some places of the row alone.

    Args:
        layer: the module that asks for it.
        places: (M,) long, ascending; it may be 0 elsewhere.
    """
    mask = _MASK.get()
    if mask is not None:
        mask.asking = layer, mask.unasked(places)
    try:
        yield
    finally:
        if mask is not None:
            mask.asking = None


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
    unasked = (0,) * len(mask.branches)
    if mask.asking is not None and module is mask.asking[0]:
        unasked = mask.asking[1]
    attend = _attend_padded if mask.is_short else _attend_one_by_one
    found = attend(query, key, value, mask, _Way(unasked, scaling, sliding_window))
    if not any(unasked):
        return found
    places = mask.once(_asked, unasked)
    return found.new_zeros(1, query.shape[2], *found.shape[2:]).index_copy(1, places, found)


def _attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, way: _Way) -> Tensor:
    """Branch by branch: nothing is computed for padding.

    Where at least half of what a branch sees asks, all of it does: torch skips half of a causal square, and holds no
    mask.
    """
    attend, window = partial(scaled_dot_product_attention, scale=way.scale), way.window
    asking = [size - first for size, first in zip(mask.sizes, way.unasked, strict=True)]
    counts = [branch.shared + size for branch, size in zip(mask.branches, mask.sizes, strict=True)]
    whole = [
        2 * own >= count and (window is None or count <= window)
        for own, count in zip(asking, counts, strict=True)
    ]
    repeats = any(every and branch.shared for every, branch in zip(whole, mask.branches, strict=True))
    queries = mask.seen(query) if repeats else mask.cut(query)
    found = []
    rows = zip(queries, mask.seen(key), mask.seen(value), asking, counts, whole, strict=True)
    for asked, keys, values, own, count, every in rows:
        if own == 0:
            continue
        if every:
            answer = attend(asked, keys, values, is_causal=True)
        else:
            bias = mask.once(_branch_bias, own, count, window, query.dtype)
            answer = attend(asked[:, :, -own:], keys, values, attn_mask=bias)
        found.append(answer[:, :, -own:].transpose(1, 2))
    return torch.cat(found, 1)


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, way: _Way) -> Tensor:
    """All branches in one call."""
    padded = mask.once(_padded, way.unasked, way.window, query.dtype)

    def rows(states: Tensor, at: Tensor) -> Tensor:
        """(1, heads, N, d) -> (B, heads, T, d)."""
        # Not by an index, whose gradient adds up what several branches share in any order.
        chosen = states[0].transpose(0, 1).index_select(0, at.flatten())
        return chosen.view(*at.shape, *chosen.shape[1:]).transpose(1, 2)

    found = scaled_dot_product_attention(
        rows(query, padded.queries),
        rows(key, padded.keys),
        rows(value, padded.keys),
        attn_mask=padded.bias,
        is_causal=padded.bias is None,
        scale=way.scale,
    )
    return found.transpose(1, 2).flatten(0, 1).index_select(0, padded.back)[None]


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
