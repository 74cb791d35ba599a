"""Decoders: prompts enter groups of samples, a token of each sample goes in, the logits of its next one come out.

prompts, groups -> keys and values; tokens (N,) of N samples -> logits (N, V)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from alignpipe.data.grouping import PREFILL_TOKENS
from alignpipe.models.attention import PACKED
from alignpipe.rollout.cache import GROUPED, GroupCache, States


class Decoder(Protocol):
    """A model, and the samples that it goes on with.

    The last token of a prompt is not computed with the rest: it is what the first step of a sample is given.

    Attributes:
        joins: groups may enter while others are under way.
    """

    joins: bool

    def enter(self, groups: Sequence[int], prompts: Sequence[int]) -> None:
        """Begin samples in free groups, by the numbers of their prompts, which never go down."""

    def leave(self, groups: Sequence[int]) -> None:
        """Free groups whose samples have all ended."""

    def step(self, tokens: Tensor, samples: Sequence[int]) -> Tensor:
        """Append a token to each of the samples that have not ended, ascending: (N,) -> logits of the next, (N, V)."""


@contextmanager
def decoding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_groups: int,
    group_size: int,
    max_new_tokens: int,
    pad_id: int,
) -> Iterator[Decoder]:
    """The decoder that a model can have.

    Args:
        model: in evaluation mode, without gradients.
        prompts: token ids, longest first.
        num_groups: under way at most.
        group_size: samples of a prompt in one group; sample `g * group_size + i` is the one at place `i` of group `g`.
        max_new_tokens: of a sample.
        pad_id: fills up prompts.
    """
    if not _is_plain(model):
        yield BatchDecoder(model, prompts, group_size, pad_id)
        return
    cache = GroupCache(
        num_groups=num_groups,
        size=group_size,
        longest_prompt=max(map(len, prompts), default=0),
        max_new_tokens=max_new_tokens,
        device=model.device,
    )
    theirs = model.config._attn_implementation
    model.set_attn_implementation(GROUPED)
    try:
        yield GroupDecoder(model, prompts, cache, pad_id)
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


class GroupDecoder:
    """Groups enter and leave one by one; prompts are computed a few ahead, each once.

    Args:
        model: whose attention is that of `cache`.
        prompts: token ids, longest first.
        cache: holds what is under way.
        pad_id: fills up prompts, on the right, where a causal model does not look.
    """

    joins = True

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: GroupCache, pad_id: int
    ) -> None:
        self.model, self.prompts, self.cache, self.pad_id = model, prompts, cache, pad_id
        self.ready = range(0)
        self.computed: Sequence[Any] = ()

    def enter(self, groups: Sequence[int], prompts: Sequence[int]) -> None:
        """Begin samples in free groups."""
        for group, prompt in zip(groups, prompts, strict=True):
            if prompt not in self.ready:
                self._compute(prompt)
            self.cache.enter(group, self._states(prompt))

    def leave(self, groups: Sequence[int]) -> None:
        """Free groups."""
        self.cache.leave(groups)

    def step(self, tokens: Tensor, samples: Sequence[int]) -> Tensor:
        """Append a token to each sample, (N,) -> logits of the next, (N, V)."""
        order, positions = self.cache.open(samples)
        output = self.model(
            input_ids=tokens[order, None],
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            cache=self.cache,
        )
        logits: Tensor = output.logits[:, -1]
        return torch.empty_like(logits).index_copy_(0, order, logits)

    def _compute(self, first: int) -> None:
        width = max(1, len(self.prompts[first]) - 1)
        self.ready = range(first, min(len(self.prompts), first + max(1, PREFILL_TOKENS // width)))
        heads = [list(self.prompts[prompt][:-1]) for prompt in self.ready]
        ids = torch.tensor([head + [self.pad_id] * (width - len(head)) for head in heads])
        self.computed = ()
        output = self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        self.computed = output.past_key_values.layers

    def _states(self, prompt: int) -> list[States]:
        row, length = prompt - self.ready.start, len(self.prompts[prompt]) - 1
        return [(layer.keys[row, :, :length], layer.values[row, :, :length]) for layer in self.computed]


class BatchDecoder:
    """Whole batches with transformers' own cache, for sliding windows, linear attention and the like.

    Prompts are padded on the left, so that all samples of a batch write to the same column.

    Args:
        model: any causal language model.
        prompts: token ids.
        group_size: samples of a group.
        pad_id: fills up prompts; masked.
    """

    joins = False

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], group_size: int, pad_id: int
    ) -> None:
        self.model, self.prompts, self.group_size, self.pad_id = model, prompts, group_size, pad_id
        self.cache: Cache | None = None
        self.samples: list[int] = []

    def enter(self, groups: Sequence[int], prompts: Sequence[int]) -> None:
        """Begin a batch; nothing else is under way."""
        heads = [list(self.prompts[prompt][:-1]) for prompt in prompts]
        width = max(map(len, heads))
        ids = torch.tensor([[self.pad_id] * (width - len(head)) + head for head in heads])
        mask = torch.tensor([[0] * (width - len(head)) + [1] * len(head) for head in heads])
        self.mask, self.cache = mask.to(self.model.device), None
        if width:
            self._forward(ids.to(self.model.device), (self.mask.cumsum(1) - 1).clamp(min=0))
        self._select([row for row in range(len(groups)) for _ in range(self.group_size)])
        self.samples = [
            group * self.group_size + place for group in groups for place in range(self.group_size)
        ]

    def leave(self, groups: Sequence[int]) -> None:
        """Nothing is freed before the next step."""

    def step(self, tokens: Tensor, samples: Sequence[int]) -> Tensor:
        """Append a token to each sample, (N,) -> logits of the next, (N, V)."""
        if self.samples != list(samples):
            self._select([self.samples.index(sample) for sample in samples])
            self.samples = list(samples)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], 1)
        return self._forward(tokens[:, None], self.mask.sum(1, keepdim=True) - 1)

    def _select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.model.device)
        self.mask = self.mask[index]
        if self.cache is not None:
            self.cache.batch_select_indices(index)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits
