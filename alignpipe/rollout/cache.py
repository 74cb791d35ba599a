"""A key-value cache of groups: samples of one prompt that begin together, the prompt held and read once for them all.

keys and values of a prompt -> a group; a token of each sample -> the group's end; queries -> attention to the group

A group's columns are its prompt, then the first tokens of all its samples, then the second ones, and so on. So its
samples attend in one product, to the columns that are written and no more, each under a mask that hides the others
(arXiv:2402.05099 reads a shared prompt in a pass of its own). A group of one sample is a plain slot.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Numbers that a CPU reads of keys while it makes one more call: groups attend in one as long as their padding is less.
CALL = {"cpu": 2**15}
# The name by which transformers knows `attend`.
GROUPED = "grouped"

# Keys (heads, T, d) and values (heads, T, d) of one layer.
States = tuple[Tensor, Tensor]


class GroupCache(Cache):
    """Keys and values of samples under way, for a model all of whose layers attend to all of their past.

    Args:
        num_groups: under way at most.
        size: samples of a group at most; sample `g * size + i` is the one at place `i` of group `g`.
        longest_prompt: tokens.
        max_new_tokens: of a sample.
        device: where it lives.

    Attributes:
        keys: of each layer, (num_groups, heads, columns, d); `values` likewise.
        visible: what each sample attends to, (num_groups, size, columns) bool.
        rows: of these tensors, for each group, (num_groups,); -1 where the group is free.
        prompts: tokens of each group's prompt, (num_groups,).
        lengths: tokens of each group's samples, (num_groups,).
    """

    def __init__(
        self, *, num_groups: int, size: int, longest_prompt: int, max_new_tokens: int, device: torch.device
    ) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.size, self.device = size, device
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        columns = longest_prompt + size * max_new_tokens
        self.visible = torch.zeros(num_groups, size, columns, dtype=torch.bool, device=device)
        self.rows = np.full(num_groups, -1)
        self.prompts, self.lengths = np.zeros((2, num_groups), dtype=np.int64)

    def enter(self, group: int, states: Sequence[States]) -> None:
        """Begin the samples of a prompt in a free group; states are what each layer has of the prompt."""
        row, length = self._free_rows()[0], states[0][0].shape[1]
        for layer, pair in enumerate(states):
            for buffer, source in zip(self._buffers(layer, *pair), pair, strict=True):
                buffer[row, :, :length] = source
        self.visible[row] = torch.arange(self.visible.shape[2], device=self.device) < length
        self.rows[group], self.prompts[group], self.lengths[group] = row, length, 0

    def leave(self, groups: Sequence[int]) -> None:
        """Free groups."""
        self.rows[list(groups)] = -1

    def open(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Make room for one more token of each sample.

        Returns:
            The samples in the order in which their tokens are to come, as places in what was given, and the position
            of each of these tokens: both (N,) long.
        """
        self._close_gaps()
        groups, places = np.divmod(np.asarray(samples), self.size)
        order = np.argsort(self.rows[groups], kind="stable")
        groups, places = groups[order], places[order]
        rows, prompts, lengths = self.rows[groups], self.prompts[groups], self.lengths[groups]
        columns = prompts + self.size * lengths + places
        self.lengths[np.unique(groups)] += 1
        row, place, column, position, given = (
            torch.from_numpy(table).to(self.device)
            for table in (rows, places, columns, prompts + lengths, order)
        )
        self.visible[row, place, column] = True
        self.target = row, column
        # Samples that have ended ask nothing.
        self.queries = None if len(samples) == self._count() * self.size else row * self.size + place
        self.parts = self._parts()
        self.masks: list[Tensor] = []
        return given, position

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Write the new token of each sample, (N, heads, 1, d)."""
        row, column = self.target
        keys, values = self._buffers(layer_idx, key_states, value_states)
        # Under autocast transformers' own cache holds a prompt's values in the dtype of its keys.
        keys[row, :, column] = key_states.squeeze(2).to(keys.dtype)
        values[row, :, column] = value_states.squeeze(2).to(values.dtype)
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of each sample's newest token, (N, heads, 1, d), to its prompt and itself: (N, 1, heads, d)."""
        keys, values = self.keys[layer], self.values[layer]
        count, (_, heads, _, width) = self.parts[-1][0].stop, query.shape
        asked = query.squeeze(2)
        if self.queries is not None:
            asked = query.new_zeros(count * self.size, heads, width).index_copy_(0, self.queries, asked)
        # Query heads of one key head stand side by side as samples do.
        grouped = asked.view(count, self.size, keys.shape[1], -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if not self.masks:
            repeats = heads // keys.shape[1]
            self.masks = [
                _bias(self.visible[part, None, :, :end], query.dtype).repeat(1, 1, repeats, 1)
                for part, end in self.parts
            ]
        found = torch.cat(
            [
                scaled_dot_product_attention(
                    grouped[part], keys[part, :, :end], values[part, :, :end], attn_mask=mask, scale=scaling
                )
                for (part, end), mask in zip(self.parts, self.masks, strict=True)
            ]
        )
        by_sample = found.view(count, keys.shape[1], -1, self.size, values.shape[-1]).permute(0, 3, 1, 2, 4)
        answered = by_sample.reshape(count * self.size, 1, heads, -1)
        return answered if self.queries is None else answered[self.queries]

    def _count(self) -> int:
        return int(np.count_nonzero(self.rows >= 0))

    def _free_rows(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(len(self.rows)), self.rows)

    def _buffers(self, layer: int, keys: Tensor, values: Tensor) -> States:
        """Keys and values of a layer, made like those given, (..., heads, T, d), when first asked for."""
        if layer == len(self.keys):
            count, _, columns = self.visible.shape
            for buffers, like in ((self.keys, keys), (self.values, values)):
                # Zeros, not empty: a NaN in unwritten memory would come through a mask as 0 * NaN.
                buffers.append(like.new_zeros(count, like.shape[-3], columns, like.shape[-1]))
        return self.keys[layer], self.values[layer]

    def _close_gaps(self) -> None:
        """Move groups into free rows before them: what is read ends with the last one."""
        count = self._count()
        behind = np.flatnonzero(self.rows >= count)
        if not len(behind):
            return
        sources, targets = self.rows[behind], self._free_rows()[: len(behind)]
        for buffer in (*self.keys, *self.values, self.visible):
            for source, target in zip(sources, targets, strict=True):
                buffer[target] = buffer[source]
        self.rows[behind] = targets

    def _parts(self) -> list[tuple[slice, int]]:
        """Rows that attend in one call, and the columns that the longest of them has."""
        used = np.flatnonzero(self.rows >= 0)
        ends = np.zeros(len(used), dtype=np.int64)
        ends[self.rows[used]] = self.prompts[used] + self.size * self.lengths[used]
        _, heads, _, width = self.keys[0].shape
        allowed = CALL.get(self.device.type, np.inf) // (heads * width)
        parts, start, longest, total = [], 0, 0, 0
        for row, end in enumerate(ends.tolist()):
            wider = max(longest, end)
            if wider * (row + 1 - start) - total - end > allowed:
                parts.append((slice(start, row), longest))
                start, wider, total = row, end, 0
            longest, total = wider, total + end
        return [*parts, (slice(start, len(ends)), longest)]


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a sample looks, -inf elsewhere: made once a step, where a bool mask would be turned into it each call."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: Any = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: over a group cache if there is one, else causal over whole prompts."""
    if isinstance(cache, GroupCache):
        return cache.attend(module.layer_idx, query, scaling), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return found


AttentionInterface.register(GROUPED, attend)
