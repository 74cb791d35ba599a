"""What one rollout of reinforcement learning leaves to learn from: sampled, laid out in tensors, cut into minibatches.

policy, prompts -> responses; responses and what was computed on them -> minibatches -> micro-batches
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import PPOConfig
from alignpipe.data.collate import TokenBatch
from alignpipe.data.examples import Example
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.rollout.generate import Sample, sample


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """One response of an experience, as a row of a minibatch."""

    index: int
    num_tokens: int
    num_items: int


@dataclass(frozen=True)
class Experience:
    """One rollout: row `i` of every tensor is response `i`, column `t` the action that chose token `t + 1`.

    Attributes:
        batch: prompts with responses, (B, T).
        mask: actions of the response, up to and including its stop token, (B, T - 1).
        logprobs: of the policy that sampled, (B, T - 1).
        reference_logprobs: of the frozen reference, (B, T - 1).
        advantages: (B, T - 1).
        values: before each action, (B, T - 1); None without a value model.
        returns: (B, T - 1); None without a value model.
    """

    batch: TokenBatch
    mask: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None

    def rows(self) -> list[ResponseRow]:
        """Every response, in order."""
        lengths, counts = self.batch.lengths.tolist(), self.mask.sum(1).tolist()
        return [ResponseRow(i, length, int(counts[i])) for i, length in enumerate(lengths)]

    def part(self, rows: Sequence[ResponseRow]) -> "Experience":
        """Some responses, no wider than the longest of them."""
        batch = self.batch.part([row.index for row in rows])
        width = batch.input_ids.shape[1]
        index = torch.tensor([row.index for row in rows], device=batch.input_ids.device)

        def cut(tensor: Any) -> Any:
            return None if tensor is None else tensor[index, : width - 1]

        return Experience(batch, *(cut(getattr(self, spec.name)) for spec in fields(self)[1:]))


def sample_responses(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[int],
    step: int,
    config: PPOConfig,
) -> tuple[list[Example], list[bool]]:
    """Answer the prompts of one rollout.

    Args:
        policy: that samples.
        tokenizer: of the policy.
        prompts: token ids of the whole data set.
        chosen: places of this rollout's prompts in it.
        step: number of the rollout.
        config: samples a prompt, temperature, lengths, seed.

    Returns:
        Prompts with responses, those to one prompt side by side, and which of them ended by themselves.
    """

    def draw(places: list[int]) -> list[list[Sample]]:
        indices = [chosen[place] for place in places]
        return sample(policy, tokenizer, prompts, indices, config, num_samples=config.num_samples, step=step)

    sampled = processes.spread([len(prompts[index]) for index in chosen], draw)
    flat = [(index, drawn) for index, row in zip(chosen, sampled, strict=True) for drawn in row]
    examples = [Example.of(prompts[index], drawn.ids) for index, drawn in flat]
    return examples, [drawn.finished for _, drawn in flat]


def response_texts(examples: Sequence[Example], tokenizer: Tokenizer) -> list[str]:
    """The responses as a person reads them."""
    return [
        tokenizer.decode([token for token, learnt in zip(example.ids, example.mask, strict=True) if learnt])
        for example in examples
    ]


def minibatches(rows: Sequence[ResponseRow], rollout: int, config: PPOConfig) -> Iterator[list[ResponseRow]]:
    """The minibatches of a rollout: in each epoch every response once, in an order of its own."""
    for epoch in range(config.ppo_epochs):
        shuffled = list(rows)
        random.Random(f"{config.seed}/{rollout}/{epoch}").shuffle(shuffled)
        for start in range(0, len(shuffled), config.batch_size):
            yield shuffled[start : start + config.batch_size]
