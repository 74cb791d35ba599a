"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

preference pairs -> log-probs of policy and frozen reference -> logistic loss -> policy checkpoint
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.config import DPOConfig, num_steps
from alignpipe.data.collate import collate
from alignpipe.data.encoding import Example, RankedExample, encode_rankings
from alignpipe.data.records import Ranking
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.monitor import load_monitor
from alignpipe.evaluation.samples import log_samples
from alignpipe.losses.dpo import dpo_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.rollout.score import sequence_logprobs
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected response to one prompt, with their log-probs under the reference."""

    chosen: Example
    rejected: Example
    reference_chosen: float
    reference_rejected: float
    num_items: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of both sides."""
        return len(self.chosen.ids) + len(self.rejected.ids)


def run(config: DPOConfig, context: Context) -> dict[str, Any]:
    """Train `policy` on the untied pairs of the rankings, held near `reference`."""
    tokenizer = context.tokenizer("policy")
    context.check_same_tokens("reference", tokenizer)
    pairs, overflow = _pairs(config, tokenizer, context)
    held_out: list[Pair] = []
    # All of them may be too long; that matters for the rows trained on alone.
    with suppress(DataError):
        held_out = _pairs(config, tokenizer, context, "eval", config.eval_rows)[0][: config.eval_rows]
    policy = context.load_policy("policy", tokenizer)

    def logprobs(examples: Sequence[Example]) -> Tensor:
        batch = collate(examples, tokenizer.pad_id).to(context.device)
        return batch_logprobs(policy, batch).sum(1)

    def loss_fn(micro: Sequence[Pair]) -> StepOutput:
        both = logprobs([pair.chosen for pair in micro] + [pair.rejected for pair in micro])
        chosen, rejected = both.chunk(2)  # (B,), (B,)
        reference_chosen, reference_rejected = (
            torch.tensor(column, device=context.device) for column in _reference_columns(micro)
        )
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, reference_chosen, reference_rejected, beta=config.beta
        )
        margins = chosen_rewards - rejected_rewards
        return StepOutput(
            losses=losses,  # (B,)
            metrics={
                "rewards/accuracies": (float((margins > 0).sum()), len(micro)),
                "rewards/margins": (float(margins.sum()), len(micro)),
                "rewards/chosen": (float(chosen_rewards.sum()), len(micro)),
                "rewards/rejected": (float(rejected_rewards.sum()), len(micro)),
            },
        )

    def evaluate() -> dict[str, float]:
        return mean_losses(policy, held_out, loss_fn, config.micro_batch_size, context)

    def reference() -> PreTrainedModel:
        return context.load_policy("reference", tokenizer, frozen=True)

    monitor = load_monitor(config, context, tokenizer, policy, reference)
    after = fit(policy, pairs, loss_fn, config, context, evaluate, monitor)
    context.save_checkpoint(policy, tokenizer, "policy")
    log_samples(policy, tokenizer, config, context, num_steps(config, len(pairs)))
    return {
        "rows": len(pairs),
        **overflow,
        "eval_loss": after.get("loss"),
        "eval_accuracy": after.get("rewards/accuracies"),
        **monitor.summary(),
    }


def _pairs(
    config: DPOConfig,
    tokenizer: Tokenizer,
    context: Context,
    share: str | None = None,
    limit: int | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Every untied pair of at most `limit` rankings, each response scored by the reference once; rows over length."""
    records = context.records("data", config.data, Ranking, share)[:limit]
    encoded = encode_rankings(records, tokenizer, config.max_length, config.data.on_overflow)
    rows = encoded.examples
    if not rows:
        return [], encoded.figures
    reference = context.load_policy("reference", tokenizer, frozen=True)
    flat = [example for row in rows for example in row.examples]
    with context.autocast():
        scored = iter(sequence_logprobs(reference, flat, tokenizer.pad_id, config.micro_batch_size).tolist())
    pairs = [pair for row in rows for pair in _untied(row, [next(scored) for _ in row.examples])]
    return pairs, encoded.figures


def _untied(row: RankedExample, reference: Sequence[float]) -> list[Pair]:
    pairs = []
    for i, j in combinations(range(len(row.examples)), 2):
        if row.ranks[i] != row.ranks[j]:
            won, lost = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
            pairs.append(Pair(row.examples[won], row.examples[lost], reference[won], reference[lost]))
    return pairs


def _reference_columns(micro: Sequence[Pair]) -> tuple[list[float], list[float]]:
    return [pair.reference_chosen for pair in micro], [pair.reference_rejected for pair in micro]
