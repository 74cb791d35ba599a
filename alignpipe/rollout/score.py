"""Scores, values and logprobs of given sequences, without gradients, in batches of like length.

model, examples -> one number an example, or one a token
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.data.collate import TokenBatch, collate
from alignpipe.data.encoding import Example
from alignpipe.errors import CheckpointError
from alignpipe.models.forward import batch_logprobs
from alignpipe.models.loading import evaluating
from alignpipe.models.scalar_head import sequence_scores, token_scores
from alignpipe.models.sharding import in_step


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Shift and scale that give rewards mean 0 and deviation 1 on demonstrations.

    The weights of a reward model give raw scores, as plain transformers reads them; these two numbers stand
    beside them in `alignpipe.json`.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> "Normalizer":
        """Read them from a reward model's figures; raw scores stay raw where there are none.

        Raises:
            CheckpointError: the deviation is no positive number.
        """
        mean, std = metrics.get("reward_mean"), metrics.get("reward_std")
        if mean is None and std is None:
            return cls()
        if not isinstance(mean, int | float) or not isinstance(std, int | float) or not std > 0:
            raise CheckpointError(
                f"alignpipe.json: reward_mean must be a number and reward_std one above 0, not {mean!r} and "
                f"{std!r}; train the reward model again"
            )
        return cls(float(mean), float(std))

    @classmethod
    def fit(cls, scores: Tensor) -> "Normalizer":
        """Measure them on raw scores (N,), of demonstrations; equal scores are only shifted."""
        std = float(scores.double().std(unbiased=False))
        return cls(float(scores.double().mean()), std if std > 0 else 1.0)

    def as_metrics(self) -> dict[str, float]:
        """Give what `from_metrics` reads."""
        return {"reward_mean": self.mean, "reward_std": self.std}

    def __call__(self, scores: Tensor) -> Tensor:
        """Shift and scale raw scores of any shape."""
        return (scores - self.mean) / self.std

    def raw(self, scores: Tensor) -> Tensor:
        """Raw scores of shifted and scaled ones."""
        return scores * self.std + self.mean


def response_scores(
    reward_model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    normalizer: Normalizer | None = None,
) -> Tensor:
    """The reward of each sequence, read at its last token.

    Args:
        reward_model: a scalar model.
        examples: N sequences, prompt and response.
        pad_id: fills batches.
        batch_size: sequences in one forward.
        normalizer: applied to the raw scores when given.

    Returns:
        (N,) float32 on the CPU.
    """

    def scores(batch: TokenBatch) -> Tensor:
        return sequence_scores(reward_model, batch)[:, None]

    raw = _in_batches(scores, reward_model, examples, 1, pad_id, batch_size).squeeze(1)
    return raw if normalizer is None else normalizer(raw)


def response_values(
    value_model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64
) -> Tensor:
    """The value before each response token: read at the token that stands before it.

    Args:
        value_model: a scalar model.
        examples: N sequences; T is the length of the longest.
        pad_id: fills batches.
        batch_size: sequences in one forward.

    Returns:
        (N, T - 1) float32 on the CPU, laid out as `collate(examples).loss_mask[:, 1:]`, 0 where that is
        false.
    """

    def values(batch: TokenBatch) -> Tensor:
        return token_scores(value_model, batch.input_ids)[:, :-1].masked_fill(~batch.loss_mask[:, 1:], 0.0)

    return _in_batches(values, value_model, examples, _width(examples) - 1, pad_id, batch_size)


def response_logprobs(
    policy: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """Logprobs of the response tokens under a policy.

    Args:
        policy: a causal language model.
        examples: N sequences; T is the length of the longest.
        pad_id: fills batches.
        batch_size: sequences in one forward.
        temperature: of the distribution whose logprobs are wanted.

    Returns:
        (N, T - 1) float32 on the CPU, laid out as `collate(examples).loss_mask[:, 1:]`, 0 where that is
        false.
    """

    def logprobs(batch: TokenBatch) -> Tensor:
        return batch_logprobs(policy, batch, temperature)

    return _in_batches(logprobs, policy, examples, _width(examples) - 1, pad_id, batch_size)


def sequence_logprobs(
    policy: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """Logprob of each whole response: the sum of `response_logprobs`, (N,) float32 on the CPU."""
    return response_logprobs(policy, examples, pad_id, batch_size, temperature).sum(1)


def _in_batches(
    compute: Callable[[TokenBatch], Tensor],
    model: PreTrainedModel,
    examples: Sequence[Example],
    width: int,
    pad_id: int,
    batch_size: int,
) -> Tensor:
    """Rows of `compute` (b, w) for every example, in the given order, (N, width), 0 beyond w.

    Every process computes its own part; the parts are added up, each row being zero on all but one of them.
    """
    result = torch.zeros(len(examples), width)
    # Longest first, so that memory fails early.
    mine = processes.deal([len(example.ids) for example in examples])
    with torch.no_grad(), evaluating(model), in_step(model):
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            batch = collate([examples[index] for index in indices], pad_id).to(model.device)
            found = compute(batch).cpu()
            result[indices, : found.shape[1]] = found
    return processes.sum_tensor(result)


def _width(examples: Sequence[Example]) -> int:
    return max((len(example.ids) for example in examples), default=1)
