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
from alignpipe.data.examples import Example
from alignpipe.errors import CheckpointError, NumericalError, listed
from alignpipe.models.forward import batch_logprobs, mean_hidden
from alignpipe.models.loading import evaluating
from alignpipe.models.scalar_head import next_token_scores, score_head, sequence_head_scores
from alignpipe.models.sharding import in_step


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Shift and scale that give rewards mean 0 and deviation 1 on demonstrations.

    The weights of a reward model give raw scores, as plain transformers reads them; these numbers stand beside
    them in `alignpipe.json`.

    Attributes:
        mean: of the scores, themselves means over the heads.
        std: of the scores.
        head_means: of each head, where there are several: rankings say nothing of a head's own level.
    """

    mean: float = 0.0
    std: float = 1.0
    head_means: tuple[float, ...] = ()

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
        heads = metrics.get("reward_head_means", ())
        return cls(float(mean), float(std), tuple(float(head) for head in heads))

    @classmethod
    def fit(cls, scores: Tensor) -> "Normalizer":
        """Measure them on raw scores of demonstrations, (N,) or of heads (N, H); equal scores are only shifted."""
        heads = scores.double().mean(0).tolist() if scores.dim() == 2 and scores.shape[1] > 1 else ()
        means = (scores.mean(1) if scores.dim() == 2 else scores).double()
        std = float(means.std(unbiased=False))
        return cls(float(means.mean()), std if std > 0 else 1.0, tuple(heads))

    def as_metrics(self) -> dict[str, Any]:
        """Give what `from_metrics` reads."""
        heads = {"reward_head_means": list(self.head_means)} if self.head_means else {}
        return {"reward_mean": self.mean, "reward_std": self.std, **heads}

    def __call__(self, scores: Tensor) -> Tensor:
        """Shift and scale raw scores of any shape."""
        return (scores - self.mean) / self.std

    def raw(self, scores: Tensor) -> Tensor:
        """Raw scores of shifted and scaled ones."""
        return scores * self.std + self.mean

    def of_heads(self, scores: Tensor) -> Tensor:
        """Shift each head's raw scores (N, H) by its own mean and scale all alike; their mean is that of `__call__`."""
        return (scores - torch.tensor(self.head_means or self.mean, dtype=scores.dtype)) / self.std


def collapse(scores: Tensor, uncertainty_penalty: float = 0.0) -> Tensor:
    """One score from several: mean - c * std over the members of an ensemble (arXiv:2310.02743, 2401.16635).

    Args:
        scores: (N, M), normalised, of M heads or models.
        uncertainty_penalty: c; 0 is the mean.

    Returns:
        (N,); the deviation is that of the members at hand, so 0 for one of them.
    """
    if uncertainty_penalty == 0:
        return scores.mean(1)
    return scores.mean(1) - uncertainty_penalty * scores.std(1, unbiased=False)


def response_scores(
    reward_model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    normalizer: Normalizer | None = None,
) -> Tensor:
    """The reward of each sequence, read at its last token; the mean over the heads.

    Args:
        reward_model: a scalar model.
        examples: N sequences, prompt and response.
        pad_id: fills batches.
        batch_size: sequences in one forward.
        normalizer: applied to the raw scores when given.

    Returns:
        (N,) float32 on the CPU.
    """
    raw = head_scores(reward_model, examples, pad_id, batch_size).mean(1)
    return raw if normalizer is None else normalizer(raw)


def head_scores(
    reward_model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64
) -> Tensor:
    """The raw score that each head gives each sequence, (N, H) float32 on the CPU; arguments as above."""

    def scores(batch: TokenBatch) -> Tensor:
        return sequence_head_scores(reward_model, batch)

    width = score_head(reward_model).out_features
    return _in_batches("scores", scores, reward_model, examples, width, pad_id, batch_size)


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
        return next_token_scores(value_model, batch)

    return _in_batches("values", values, value_model, examples, _width(examples) - 1, pad_id, batch_size)


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

    return _in_batches("log-probs", logprobs, policy, examples, _width(examples) - 1, pad_id, batch_size)


def sequence_logprobs(
    policy: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """Logprob of each whole response: the sum of `response_logprobs`, (N,) float32 on the CPU."""
    return response_logprobs(policy, examples, pad_id, batch_size, temperature).sum(1)


def sequence_embeddings(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64
) -> Tensor:
    """The mean of each whole sequence's last hidden states under a language model, (N, d) float32 on the CPU."""

    def means(batch: TokenBatch) -> Tensor:
        return mean_hidden(model, batch)

    return _in_batches("embeddings", means, model, examples, model.config.hidden_size, pad_id, batch_size)


def _in_batches(
    what: str,
    compute: Callable[[TokenBatch], Tensor],
    model: PreTrainedModel,
    examples: Sequence[Example],
    width: int,
    pad_id: int,
    batch_size: int,
) -> Tensor:
    """Rows of `compute` (b, w) for every example, in the given order, (N, width), 0 beyond w.

    Every process computes its own part; the parts are added up, each row being zero on all but one of them.

    Raises:
        NumericalError: one of them is not finite.
    """
    result = torch.zeros(len(examples), width)
    # Longest first, so that memory fails early; responses to one prompt together, so that it is read once.
    prompts = [tuple(example.prompt) for example in examples]
    mine = processes.deal([len(example.ids) for example in examples])
    first = {prompts[index]: place for place, index in reversed(list(enumerate(mine)))}
    mine.sort(key=lambda index: first[prompts[index]])
    with torch.no_grad(), evaluating(model), in_step(model):
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            batch = collate([examples[index] for index in indices], pad_id).to(model.device)
            found = compute(batch).cpu()
            result[indices, : found.shape[1]] = found
    return finite(what, processes.sum_tensor(result))


def finite(what: str, result: Tensor) -> Tensor:
    """The same tensor, one row a response.

    Raises:
        NumericalError: a number in it is not finite; with the rows.
    """
    rows = (~result.isfinite()).any(1).nonzero().flatten().tolist()
    if rows:
        error = NumericalError(f"{what} of responses {listed(rows)} of {len(result)}: not finite")
        error.rows = tuple(rows)
        raise error
    return result


def _width(examples: Sequence[Example]) -> int:
    return max((len(example.ids) for example in examples), default=1)
