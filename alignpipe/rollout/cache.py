"""A key-value cache that is written in place: prompts computed once, spread over their samples, rows dropped.

cache of P prompts, a row index per slot -> cache of N slots with room for every new token
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values in buffers of the final length.

    The layer that it stands in for appends by copying everything there is, at every token.

    Args:
        layer: holds the prompts, (P, heads, T, d).
        rows: (N,) long, the prompt of each slot.
        room: tokens that will be added at most.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None and layer.values is not None
        self.length = layer.keys.shape[-2]
        self.keys = _with_room(layer.keys, rows, room)
        self.values = _with_room(layer.values, rows, room)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the old ones and return all of them, as views."""
        assert self.keys is not None and self.values is not None
        added = key_states.shape[-2]
        # narrow, not a slice: beyond the end a slice is empty, and a token vanishes in it without a word.
        self.keys.narrow(2, self.length, added).copy_(key_states)
        self.values.narrow(2, self.length, added).copy_(value_states)
        self.length += added
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def get_seq_length(self) -> int:
        """Tokens held, padding among them."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some slots; only those that change their place are moved."""
        assert self.keys is not None and self.values is not None
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        for buffer in (self.keys, self.values):
            buffer[moved, :, : self.length] = buffer[indices[moved], :, : self.length]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def spread(cache: Cache, rows: Tensor, room: int) -> bool:
    """Turn the cache of some prompts into that of their samples, in place.

    Args:
        cache: of P prompts, as a model's forward returned it.
        rows: (N,) long, the prompt of each slot.
        room: tokens that will be added at most.

    Returns:
        Whether every layer attends to all of its past, so that one mask serves them all.
    """
    plain = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    if len(plain) == len(cache.layers):
        cache.layers = [RoomyLayer(layer, rows, room) for layer in plain]
        return True
    # Sliding windows, linear attention: transformers' own layers know how.
    cache.batch_select_indices(rows)
    return False


def _with_room(states: Tensor, rows: Tensor, room: int) -> Tensor:
    _, heads, length, width = states.shape
    # Zeros, not empty: a NaN in unwritten memory would come through a mask as 0 * NaN.
    buffer = states.new_zeros(len(rows), heads, length + room, width)
    buffer[:, :, :length] = states[rows]
    return buffer
