"""A key-value cache in pages: sequences of all lengths without padding, and a prompt held once for all its samples.

keys and values of a prompt -> pages; a token of each slot -> its last page; queries -> attention to a slot's pages

Pages are those of arXiv:2309.06180; a prompt is read by the queries of its samples together (arXiv:2402.05099).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Tokens of a page: what is left of a sequence's last one is read in vain, and each page costs a small matrix product.
PAGE, SHARED_PAGE = 32, 64
# Pages are moved to the front when more than this share of those that are read is free.
FREE = 0.25
# The name by which transformers knows `attend`.
PAGED = "paged_slots"

# Keys (heads, T, d) and values (heads, T, d) of one layer.
States = tuple[Tensor, Tensor]


class Pages:
    """Blocks of keys and values of every layer, each read by some slots.

    Args:
        count: of pages, to begin with.
        size: tokens of one.
        num_readers: slots that read a page at most.
        num_slots: slots there are; this number itself stands for nobody.

    Attributes:
        keys: of each layer, (count, heads, d, size).
        values: of each layer, (count, heads, size, d).
        filled: tokens held, (count,); 0 where a page is free.
        readers: slots, (count, num_readers).
        places: of a page in its sequence, (count,).
        prompts: the prompt that is held, (count,); -1 in pages of a response.
    """

    def __init__(self, count: int, size: int, num_readers: int, num_slots: int) -> None:
        self.size, self.nobody = size, num_slots
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.filled, self.places = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.prompts, self.readers = np.full(count, -1), np.full((count, num_readers), num_slots)

    def take(self, count: int) -> NDArray[np.int64]:
        """The first free pages; more are made where there are too few."""
        missing = count - int(np.count_nonzero(self.filled == 0))
        if missing > 0:
            self.filled, self.places, self.prompts = (
                np.pad(table, (0, missing)) for table in (self.filled, self.places, self.prompts)
            )
            self.readers = np.pad(self.readers, ((0, missing), (0, 0)), constant_values=self.nobody)
            for buffers in (self.keys, self.values):
                buffers[:] = [pad(buffer, (0, 0, 0, 0, 0, 0, 0, missing)) for buffer in buffers]
        return np.flatnonzero(self.filled == 0)[:count]

    def holding(self, prompt: int) -> NDArray[np.int64]:
        """The pages of a prompt; none when nobody reads it."""
        return np.flatnonzero((self.prompts == prompt) & (self.filled > 0))

    def write(self, prompt: int, states: Sequence[States]) -> NDArray[np.int64]:
        """Put a prompt of one token or more, what each layer has of it, into free pages."""
        length = states[0][0].shape[1]
        order = np.arange(-(-length // self.size))
        pages = self.take(len(order))
        self.filled[pages] = np.minimum(length - order * self.size, self.size)
        self.places[pages], self.prompts[pages], self.readers[pages] = order, prompt, self.nobody
        end = (0, 0, 0, len(order) * self.size - length)
        for layer, pair in enumerate(states):
            buffers = self.buffers(layer, *pair)
            keys, values = (pad(x, end).unfold(1, self.size, self.size).transpose(0, 1) for x in pair)
            buffers[0][pages], buffers[1][pages] = keys, values.transpose(2, 3)
        return pages

    def buffers(self, layer: int, keys: Tensor, values: Tensor) -> States:
        """All keys and values of a layer, made like (..., heads, T, d) when first asked for."""
        if layer == len(self.keys):
            count, heads, size = len(self.filled), keys.shape[-3], self.size
            # Zeros, not empty: a NaN in unwritten memory would come through a mask as 0 * NaN.
            self.keys.append(keys.new_zeros(count, heads, keys.shape[-1], size))
            self.values.append(values.new_zeros(count, heads, size, values.shape[-1]))
        return self.keys[layer], self.values[layer]

    def leave(self, slots: Sequence[int]) -> None:
        """Free what nobody else reads."""
        self.readers[np.isin(self.readers, slots)] = self.nobody
        self.filled[(self.readers == self.nobody).all(1)] = 0

    def gather(self) -> NDArray[np.int64]:
        """Move pages to the front when too many there are free; the new number of every page."""
        numbers, used = np.arange(len(self.filled)), np.flatnonzero(self.filled)
        if len(used) < (1 - FREE) * (used.max(initial=-1) + 1):
            sources = used[used >= len(used)]
            targets = self.take(len(sources))
            for table in (self.filled, self.places, self.prompts, self.readers):
                table[targets] = table[sources]
            for buffer in (*self.keys, *self.values):
                buffer[targets] = buffer[sources]
            self.filled[sources], self.readers[sources] = 0, self.nobody
            numbers[sources] = targets
        return numbers

    def open(self, live: int, device: torch.device) -> None:
        """Lay out what one forward of the first slots reads."""
        self.count = int(np.flatnonzero(self.filled).max(initial=-1)) + 1
        readers, places = np.minimum(self.readers[: self.count], live), self.places[: self.count, None]
        unwritten = np.arange(self.size) >= self.filled[: self.count, None]
        bias = np.where(unwritten, -np.inf, 0.0).astype(np.float32)
        self.bias = torch.from_numpy(bias[:, None, None]).to(device)
        self.rows = torch.from_numpy(readers).to(device)
        self.columns = torch.from_numpy(places).to(device).expand_as(self.rows)
        self.width = (int(places.max(initial=-1)) + 1) * self.size

    def score(self, layer: int, queries: Tensor, scores: Tensor) -> None:
        """Write products of queries (N + 1, heads, g, d) and keys to (N + 1, heads, g, width), row N being nobody's."""
        asked = queries[self.rows].transpose(1, 2).flatten(2, 3)
        found = self.bias + asked @ self.keys[layer][: self.count]
        self._paged(scores)[self.rows, :, :, self.columns] = self._by_reader(found).to(scores.dtype)

    def add(self, layer: int, weights: Tensor, sums: Tensor) -> None:
        """Add values under weights (N + 1, heads, g, width) to the sums of their slots, (N + 1, heads, g, d)."""
        values = self.values[layer][: self.count]
        asked = self._paged(weights)[self.rows, :, :, self.columns].transpose(1, 2).flatten(2, 3)
        found = self._by_reader(asked.to(values.dtype) @ values)
        sums.index_add_(0, self.rows.flatten(), found.flatten(0, 1).to(sums.dtype))

    def _paged(self, grid: Tensor) -> Tensor:
        return grid.view(*grid.shape[:-1], -1, self.size)

    def _by_reader(self, found: Tensor) -> Tensor:
        """(pages, heads, readers * g, x) -> (pages, readers, heads, g, x)."""
        count, heads, _, width = found.shape
        return found.view(count, heads, self.rows.shape[1], -1, width).transpose(1, 2)


class PagedCache(Cache):
    """Keys and values of sequences under way, for a model all of whose layers attend to all of their past.

    Args:
        num_slots: sequences at most.
        num_samples: of a prompt.
        longest_prompt: tokens.
        max_new_tokens: of a sequence, after its prompt.
        device: where it lives.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_samples: int,
        longest_prompt: int,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.device = device
        if num_samples == 1:
            # A response goes on in the page where its prompt ends.
            self.own = Pages(num_slots * -(-(longest_prompt + max_new_tokens) // PAGE), PAGE, 1, num_slots)
            self.shared, self.pools = self.own, [self.own]
        else:
            # More where the last samples of many prompts are under way.
            prompts = -(-num_slots // num_samples) * -(-longest_prompt // SHARED_PAGE)
            self.own = Pages(num_slots * -(-max_new_tokens // PAGE), PAGE, 1, num_slots)
            self.shared = Pages(prompts, SHARED_PAGE, min(num_samples, num_slots), num_slots)
            self.pools = [self.shared, self.own]
        # Of each slot: tokens, pages of its own, and the one that is written to.
        self.lengths, self.counts = np.zeros(num_slots, dtype=np.int64), np.zeros(num_slots, dtype=np.int64)
        self.pages = np.full(num_slots, -1)

    def enter(self, slots: Sequence[int], prompt: int, states: Sequence[States]) -> None:
        """Begin samples of a prompt.

        Args:
            slots: of the samples, free until now.
            prompt: a number of its own.
            states: what each layer has of it.
        """
        pages, length = self.shared.holding(prompt), states[0][0].shape[1]
        if length and not len(pages):
            pages = self.shared.write(prompt, states)
        if len(pages):
            free = np.flatnonzero(self.shared.readers[pages[0]] == self.shared.nobody)[: len(slots)]
            self.shared.readers[np.ix_(pages, free)] = slots
        goes_on = len(pages) > 0 and self.shared is self.own
        self.lengths[slots] = length
        self.counts[slots] = len(pages) if goes_on else 0
        self.pages[slots] = pages[-1] if goes_on else -1

    def leave(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for pool in self.pools:
            pool.leave(slots)
        if self.shared is not self.own:
            self.shared.gather()
        self.pages = self.own.gather()[self.pages]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let free slots take over what others hold."""
        numbers = np.arange(self.own.nobody + 1)
        numbers[sources] = targets
        for pool in self.pools:
            pool.readers = numbers[pool.readers]
        for table in (self.lengths, self.counts, self.pages):
            table[targets] = table[sources]

    def open(self, live: int) -> Tensor:
        """Make room for one more token in each of the first slots; its position, (live,) long."""
        positions = self.lengths[:live].copy()
        full = np.flatnonzero((self.pages[:live] < 0) | (self.own.filled[self.pages[:live]] == PAGE))
        new = self.own.take(len(full))
        self.own.readers[new, 0], self.own.places[new], self.own.prompts[new] = full, self.counts[full], -1
        self.pages[full] = new
        self.counts[full] += 1
        page = self.pages[:live].copy()
        self.target = [torch.from_numpy(x).to(self.device) for x in (page, self.own.filled[page])]
        self.own.filled[page] += 1
        self.lengths[:live] += 1
        for pool in self.pools:
            pool.open(live, self.device)
        self.read = [pool for pool in self.pools if pool.count]
        return torch.from_numpy(positions).to(self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Write the new token of each slot, (live, heads, 1, d)."""
        keys, values = self.own.buffers(layer_idx, key_states, value_states)
        page, place = self.target
        # Under autocast transformers' own cache holds a prompt's values in the dtype of its keys.
        keys[page, :, :, place] = key_states.squeeze(2).to(keys.dtype)
        values[page, :, place] = value_states.squeeze(2).to(values.dtype)
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Attention of each slot's newest token, (live, heads, 1, d), to all of its slot: (live, 1, heads, d)."""
        live, heads, _, _ = query.shape
        # One row more, for pages with fewer readers than there may be.
        queries = pad(query.squeeze(2) * scaling, (0, 0, 0, 0, 0, 1))
        queries = queries.view(live + 1, self.own.keys[layer].shape[1], -1, query.shape[-1])
        shape, widths = queries.shape[:3], [pool.width for pool in self.read]
        scores = torch.full((*shape, sum(widths)), float("-inf"), device=query.device)
        for pool, part in zip(self.read, torch.split(scores, widths, -1), strict=True):
            pool.score(layer, queries, part)
        sums = torch.zeros(*shape, self.own.values[layer].shape[-1], device=query.device)
        for pool, part in zip(self.read, torch.split(scores.softmax(-1), widths, -1), strict=True):
            pool.add(layer, part, sums)
        return sums[:live].to(query.dtype).reshape(live, 1, heads, -1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedCache | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: over a paged cache if there is one, else causal over whole prompts."""
    if paged is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return paged.attend(module.layer_idx, query, scaling), None


AttentionInterface.register(PAGED, attend)
