"""Reward model from rankings (InstructGPT, arXiv:2203.02155, eq. 1; Llama 2, arXiv:2307.09288, section 3.2).

K ranked responses a prompt -> a score at each last token -> loss over the untied pairs -> reward model
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from alignpipe.config import RMConfig
from alignpipe.data.collate import collate
from alignpipe.data.encoding import Encoded, RankedExample, encode_demonstrations, encode_rankings
from alignpipe.data.records import Demonstration, Ranking
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.ranking import pair_report
from alignpipe.losses.rm import kwise_losses, pair_accuracy
from alignpipe.models.scalar_head import sequence_scores
from alignpipe.rollout.score import Normalizer, response_scores
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses

MAX_DEMONSTRATIONS = 1000


def run(config: RMConfig, context: Context) -> dict[str, Any]:
    """Train a scalar head and its backbone, starting from `policy`, to agree with the rankings."""
    tokenizer = context.tokenizer("policy")
    model = context.load_scalar_model("policy", tokenizer, seed=config.seed)
    encoded = _encode(config, tokenizer, context)
    rows = encoded.examples
    held_out: list[RankedExample] = []
    # All of them may be too long; that matters for the rows trained on alone.
    with suppress(DataError):
        held_out = _encode(config, tokenizer, context, "eval", config.eval_rows).examples

    def loss_fn(micro: Sequence[RankedExample]) -> StepOutput:
        batch = collate([example for row in micro for example in row.examples], tokenizer.pad_id).to(
            context.device
        )
        scores = sequence_scores(model, batch)  # (N,), all responses of all prompts of the micro-batch
        ranks = torch.tensor([rank for row in micro for rank in row.ranks], device=context.device)
        sizes = torch.tensor([len(row.examples) for row in micro], device=context.device)
        groups = torch.repeat_interleave(torch.arange(len(micro), device=context.device), sizes)
        correct, total = pair_accuracy(scores.detach(), ranks, groups, len(micro))
        return StepOutput(
            losses=kwise_losses(scores, ranks, groups, len(micro)),  # (G,)
            metrics={"rm/accuracy": (float(correct.sum()), float(total.sum()))},
        )

    def evaluate() -> dict[str, float]:
        return mean_losses(model, held_out, loss_fn, config.micro_batch_size, context)

    after = fit(model, rows, loss_fn, config, context, evaluate)
    normalizer = _demonstration_scores(model, tokenizer, config, context)
    context.save_checkpoint(model, tokenizer, "reward")
    report = pair_report(held_out, _scores_by_prompt(model, tokenizer, held_out, config, context))
    return {
        "rows": len(rows),
        **encoded.figures,
        "eval_loss": after.get("loss"),
        **normalizer.as_metrics(),
        **report,
    }


def _encode(
    config: RMConfig,
    tokenizer: Tokenizer,
    context: Context,
    share: str | None = None,
    limit: int | None = None,
) -> Encoded[RankedExample]:
    """Rankings of a share, at most `limit` of them."""
    records = context.records("data", config.data, Ranking, share)[:limit]
    return encode_rankings(records, tokenizer, config.max_length, config.data.on_overflow)


def _scores_by_prompt(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Sequence[RankedExample],
    config: RMConfig,
    context: Context,
) -> list[list[float]]:
    """Raw scores of every response, grouped as the rows are."""
    flat = [example for row in rows for example in row.examples]
    with context.autocast():
        scores = iter(response_scores(model, flat, tokenizer.pad_id, config.micro_batch_size).tolist())
    return [[next(scores) for _ in row.examples] for row in rows]


def _demonstration_scores(
    model: PreTrainedModel, tokenizer: Tokenizer, config: RMConfig, context: Context
) -> Normalizer:
    """Mean and deviation of raw scores on demonstrations, so that 0 is what a demonstration is worth.

    Where there are no demonstrations, the best response of each ranking stands for one.
    """
    role, data = ("demonstrations", config.demonstrations)
    if role not in context.task.data:
        role, data = "data", config.data
    records = context.records(role, data, Demonstration)[:MAX_DEMONSTRATIONS]
    examples = encode_demonstrations(records, tokenizer, config.max_length, "drop", "response").examples
    with context.autocast():
        scores = response_scores(model, examples, tokenizer.pad_id, config.micro_batch_size)
    return Normalizer.fit(scores)
