"""Decoders: prompts enter slots, one token a slot goes in, the logits of the next one come out.

prompts, slots -> keys and values; tokens (N,) of the first N slots -> logits (N, V)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from alignpipe.models.attention import PACKED
from alignpipe.rollout.cache import PAGED, PagedCache

# Tokens of prompts, padding among them, in one forward: enough to keep a machine busy, few enough for its caches.
PREFILL_TOKENS = 2048


class Decoder(Protocol):
    """A model with the sequences that it goes on with.

    The last token of a prompt is not computed with the rest: it is what a slot's first step is given.

    Attributes:
        joins: sequences may enter while others are under way.
    """

    joins: bool

    def enter(self, slots: Sequence[int], prompts: Sequence[int]) -> None:
        """Begin sequences in free slots, by the numbers of their prompts; these never go down."""

    def leave(self, slots: Sequence[int]) -> None:
        """End sequences."""

    def move(self, sources: Sequence[int], targets: Sequence[int], live: int) -> None:
        """Let free slots take over the sequences of others, so that the first `live` ones are taken."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each of the first N sequences, (N,) -> logits of the next, (N, V)."""


@contextmanager
def decoding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    num_slots: int,
    max_new_tokens: int,
    pad_id: int,
) -> Iterator[Decoder]:
    """The decoder that a model can have.

    Args:
        model: in evaluation mode, without gradients.
        prompts: token ids, longest first.
        num_samples: of each prompt.
        num_slots: sequences under way at most.
        max_new_tokens: of a sequence.
        pad_id: fills up prompts.
    """
    if not _is_plain(model):
        yield BatchDecoder(model, prompts, pad_id)
        return
    cache = PagedCache(
        num_slots=num_slots,
        num_samples=num_samples,
        longest_prompt=max(map(len, prompts), default=0),
        max_new_tokens=max_new_tokens,
        device=model.device,
    )
    theirs = model.config._attn_implementation
    model.set_attn_implementation(PAGED)
    try:
        yield SlotDecoder(model, prompts, pad_id, cache)
    finally:
        model.set_attn_implementation(theirs)


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether all of a model's layers attend to all of their past, by a function that transformers looks up."""
    return (
        model.config._attn_implementation in {*PACKED, *PACKED.values()}
        and model._supports_attention_backend
        and not model._is_stateful
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


class SlotDecoder:
    """Sequences enter and leave one by one; prompts are computed a few ahead.

    Args:
        model: whose attention is that of `cache`.
        prompts: token ids, longest first.
        pad_id: fills up prompts, on the right, where a causal model does not look.
        cache: holds what is under way.
    """

    joins = True

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, cache: PagedCache
    ) -> None:
        self.model, self.prompts, self.pad_id, self.cache = model, prompts, pad_id, cache
        self.ready = range(0)
        self.computed: Any = None

    def enter(self, slots: Sequence[int], prompts: Sequence[int]) -> None:
        """Begin sequences in free slots."""
        for prompt, pairs in groupby(zip(slots, prompts, strict=True), key=lambda pair: pair[1]):
            if prompt not in self.ready:
                self._compute(prompt)
            row, length = prompt - self.ready.start, len(self.prompts[prompt]) - 1
            states = [(x.keys[row, :, :length], x.values[row, :, :length]) for x in self.computed]
            self.cache.enter([slot for slot, _ in pairs], prompt, states)

    def _compute(self, first: int) -> None:
        width = max(1, len(self.prompts[first]) - 1)
        last = min(len(self.prompts), first + max(1, PREFILL_TOKENS // width))
        heads = [list(prompt[:-1]) for prompt in self.prompts[first:last]]
        ids = torch.tensor([head + [self.pad_id] * (width - len(head)) for head in heads])
        self.computed = None
        output = self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        self.ready, self.computed = range(first, last), output.past_key_values.layers

    def leave(self, slots: Sequence[int]) -> None:
        """End sequences."""
        self.cache.leave(slots)

    def move(self, sources: Sequence[int], targets: Sequence[int], live: int) -> None:
        """Let free slots take over the sequences of others."""
        self.cache.move(sources, targets)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence, (N,) -> logits of the next, (N, V)."""
        positions = self.cache.open(len(tokens))
        output = self.model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            paged=self.cache,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class BatchDecoder:
    """Whole batches with transformers' own cache, for sliding windows, linear attention and the like.

    Prompts are padded on the left, so that all sequences of a batch write to the same column.

    Args:
        model: any causal language model.
        prompts: token ids.
        pad_id: fills up prompts; masked.
    """

    joins = False

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.model, self.prompts, self.pad_id = model, prompts, pad_id
        self.cache: Cache | None = None

    def enter(self, slots: Sequence[int], prompts: Sequence[int]) -> None:
        """Begin a batch, in the first slots."""
        different = sorted(set(prompts))
        heads = [list(self.prompts[prompt][:-1]) for prompt in different]
        width = max(map(len, heads))
        mask = torch.tensor([[0] * (width - len(head)) + [1] * len(head) for head in heads])
        ids = torch.tensor([[self.pad_id] * (width - len(head)) + head for head in heads])
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        self.mask = mask[rows].to(self.model.device)
        self.cache = None
        if width:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            self.cache = self._forward(ids, mask, positions).past_key_values
            self.cache.batch_select_indices(rows.to(self.model.device))

    def leave(self, slots: Sequence[int]) -> None:
        """Nothing is freed before `move`."""

    def move(self, sources: Sequence[int], targets: Sequence[int], live: int) -> None:
        """Keep the first rows, some of them from behind."""
        rows = torch.arange(live)
        rows[list(targets)] = torch.tensor(sources, dtype=torch.long)
        rows = rows.to(self.model.device)
        self.mask = self.mask[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence, (N,) -> logits of the next, (N, V)."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], 1)
        output = self._forward(tokens[:, None], self.mask, self.mask.sum(1, keepdim=True) - 1)
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Any:
        device = self.model.device
        return self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
