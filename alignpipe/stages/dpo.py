"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and its kin; see losses/dpo.py.

preferences -> log-probs of policy and frozen reference -> a loss of the configuration's choice -> policy checkpoint
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignpipe import processes
from alignpipe.config import PREFERENCE_LOSSES, UNPAIRED, DPOConfig, num_steps
from alignpipe.data.collate import TokenBatch, collate
from alignpipe.data.comparisons import Comparison, Scored, compare, examples_of, label, mismatch, ranked_pairs
from alignpipe.data.encoding import Encoded, encode_rankings, encode_unpaired
from alignpipe.data.examples import Example, RankedExample
from alignpipe.data.records import Ranking, Unpaired
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.monitor import load_monitor
from alignpipe.evaluation.samples import log_samples
from alignpipe.losses.dpo import LOSSES, Responses, kl_baseline, nll
from alignpipe.models.forward import batch_logprobs
from alignpipe.rollout.score import sequence_logprobs
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses

# Nats a token that the chosen responses may lose against the reference before it is said.
FALL = 1.0


def run(config: DPOConfig, context: Context) -> dict[str, Any]:
    """Train `policy` on preferences, held near `reference` where the loss has one."""
    tokenizer = context.tokenizer("policy")
    rows, overflow = _rows(config, tokenizer, context, "train")
    held_out: list[Comparison] = []
    # All of them may be too long; that matters for the rows trained on alone.
    with suppress(DataError):
        held_out = _rows(config, tokenizer, context, "eval", config.eval_rows)[0][: config.eval_rows]
    policy = context.load_policy("policy", tokenizer)
    loss = partial(
        LOSSES[config.loss], **{key: getattr(config, key) for key in PREFERENCE_LOSSES[config.loss]}
    )

    def loss_fn(micro: Sequence[Comparison]) -> StepOutput:
        sides = [row.chosen for row in micro if row.chosen], [row.rejected for row in micro if row.rejected]
        batch = collate([one.example for side in sides for one in side], tokenizer.pad_id).to(context.device)
        chosen, rejected = _responses(batch_logprobs(policy, batch).sum(1), batch, sides)
        found = loss(chosen, rejected)
        # A loss over single responses gives those of the good ones first.
        order = sorted(range(len(micro)), key=lambda row: micro[row].chosen is None)
        return StepOutput(
            rows=order,
            losses=found.losses + config.sft_coef * nll(chosen, found.losses),
            metrics={
                "rewards/accuracies": (float((found.margins > 0).sum()), len(found.margins)),
                "rewards/margins": (float(found.margins.sum()), len(found.margins)),
                "rewards/chosen": (float(found.chosen_rewards.sum()), len(sides[0])),
                "rewards/rejected": (float(found.rejected_rewards.sum()), len(sides[1])),
                "logps/chosen": (float(chosen.logprobs.detach().sum()), len(sides[0])),
                "logps/rejected": (float(rejected.logprobs.detach().sum()), len(sides[1])),
                # Nats a token above the reference; above 0 where there is none.
                "logps/chosen_ratio": (float(chosen.mean_ratios.detach().sum()), len(sides[0])),
            },
        )

    def prepare(step: Sequence[Comparison]) -> Sequence[Comparison]:
        """Rows of a whole step with KTO's baseline, which no micro-batch could know; others as they are."""
        others = [row.mismatched for row in step if row.mismatched is not None]
        if not others:
            return step
        with context.autocast():
            examples = [one.example for one in others]
            found = sequence_logprobs(policy, examples, tokenizer.pad_id, config.micro_batch_size)
        baseline = kl_baseline(found, torch.tensor([one.reference for one in others]))
        return [row.rescored(lambda one: replace(one, baseline=baseline)) for row in step]

    def evaluate() -> dict[str, float]:
        return mean_losses(policy, prepare(held_out), loss_fn, config.micro_batch_size, context)

    # Without a reference, the policy as it was stands for it.
    start = "reference" if "reference" in context.task.models else "policy"
    monitor = load_monitor(
        config, context, tokenizer, policy, lambda: context.load_policy(start, tokenizer, frozen=True)
    )
    after = fit(policy, rows, loss_fn, config, context, evaluate, prepare=prepare, watcher=monitor)
    if start == "reference" and after.get("logps/chosen_ratio", 0.0) < -FALL:
        context.progress.say(
            f"warning: {context.task.name}: chosen responses lost {-after['logps/chosen_ratio']:.1f} nats a token "
            f"against the reference; a little is usual, this much is not: raise beta, lower learning_rate, or set "
            f"sft_coef"
        )
    context.save_checkpoint(policy, tokenizer, "policy")
    sampled = log_samples(policy, tokenizer, config, context, num_steps(config, len(rows)))
    return {
        "rows": len(rows),
        **overflow,
        **sampled,
        "eval_loss": after.get("loss"),
        "eval_accuracy": after.get("rewards/accuracies"),
        **monitor.summary(),
    }


def _responses(logprobs: Tensor, batch: TokenBatch, sides: Sequence[Sequence[Scored]]) -> Iterator[Responses]:
    """The batch cut into its sides, each with the numbers it is held against."""
    end = 0
    for side in sides:
        start, end = end, end + len(side)
        yield Responses(
            logprobs[start:end],
            torch.tensor([one.reference for one in side], device=logprobs.device),
            batch.loss_mask[start:end, 1:].sum(1),
            torch.tensor([one.baseline for one in side], device=logprobs.device),
        )


def _rows(
    config: DPOConfig, tokenizer: Tokenizer, context: Context, part: str, limit: int | None = None
) -> tuple[list[Comparison], dict[str, int | None]]:
    """What at most `limit` records give, scored by the reference, and how many pairs or labels were lost on the way.

    Lost are those too long, and those whose sides are equal once they are cut.
    """
    found, asked = _encode(config, tokenizer, context, "eval" if part == "eval" else None, limit)
    # Examples are told apart by identity below, so each is read once.
    encoded = list(found.examples)
    if config.loss in UNPAIRED:
        rows = mismatch(label(encoded, config.pairs), config.seed, config.max_length)
    else:
        rows = compare(encoded, config.pairs)
    kept = sum(max(1, len(ranked_pairs(row.ranks, config.pairs))) for row in encoded)
    if rows and "reference" in context.task.models:
        used = {id(example) for example in examples_of(rows)}
        flat = [example for row in encoded for example in row.examples if id(example) in used]
        flat += [row.mismatched.example for row in rows if row.mismatched is not None]
        scores = _reference_logprobs(flat, part, tokenizer, config, context)
        known = {id(example): value for example, value in zip(flat, scores, strict=True)}
        rows = [row.rescored(lambda one: replace(one, reference=known[id(one.example)])) for row in rows]
    return rows, {**found.figures, "dropped": asked - kept}


def _encode(
    config: DPOConfig, tokenizer: Tokenizer, context: Context, share: str | None, limit: int | None
) -> tuple[Encoded[RankedExample], int]:
    """Encoded records, and how many pairs or labels there were before."""
    settings = (tokenizer, config.max_length, config.data.on_overflow)
    if config.loss in UNPAIRED and "rankings" not in context.record_types("data", config.data):
        labels = context.records("data", config.data, Unpaired, share)[:limit]
        return encode_unpaired(labels, *settings), len(labels)
    records = context.records("data", config.data, Ranking, share)[:limit]
    asked = sum(len(ranked_pairs(record.ranks, config.pairs)) for record in records)
    return encode_rankings(records, *settings), asked


def _reference_logprobs(
    examples: Sequence[Example], part: str, tokenizer: Tokenizer, config: DPOConfig, context: Context
) -> list[float]:
    """Log-probs under the reference, computed once: a stage that goes on after an interruption reads them back."""
    journal = context.journal("reference")
    for record in processes.from_main(journal.read):
        if record["part"] == part:
            found: list[float] = record["logprobs"]
            return found
    context.check_same_tokens("reference", tokenizer)
    reference = context.load_policy("reference", tokenizer, frozen=True)
    # As many sequences as a forward in training has.
    size = config.micro_batch_size * (1 if config.loss in UNPAIRED else 2)
    with context.autocast():
        scored = sequence_logprobs(reference, examples, tokenizer.pad_id, size).tolist()
    processes.from_main(lambda: journal.append([{"part": part, "logprobs": scored}]))
    return scored
