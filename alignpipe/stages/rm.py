"""Reward model from rankings (InstructGPT, arXiv:2203.02155, eq. 1; Llama 2, arXiv:2307.09288, section 3.2).

K ranked responses a prompt -> a score at each last token -> loss of the ranking -> reward model, and what it is worth
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.artifact import write_json
from alignpipe.config import RMConfig, num_steps
from alignpipe.data.bootstrap import bootstrap_weights
from alignpipe.data.collate import collate
from alignpipe.data.encoding import Encoded, encode_demonstrations, encode_rankings
from alignpipe.data.examples import Example, RankedExample
from alignpipe.data.margins import worths
from alignpipe.data.records import Demonstration, Ranking
from alignpipe.data.reward_bench import read_reward_bench
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.ranking import bucket_report, length_report, pair_report
from alignpipe.evaluation.reward_bench import score_reward_bench
from alignpipe.evaluation.stress import best_answers, broken_examples, stress_report
from alignpipe.losses.rm import centering_losses, kwise_losses, pair_accuracy, plackett_luce_losses
from alignpipe.models.scalar_head import sequence_head_scores
from alignpipe.rollout.score import Normalizer, head_scores
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses

MAX_DEMONSTRATIONS = 1000
STRESS = "stress.json"
REWARD_BENCH = "rewardbench.json"


def run(config: RMConfig, context: Context) -> dict[str, Any]:
    """Train scalar heads and their backbone, starting from `policy`, to agree with the rankings."""
    tokenizer = context.tokenizer("policy")
    model = context.load_scalar_model(
        "policy", tokenizer, seed=config.seed, num_heads=config.num_heads, all_heads=True
    )
    encoded = _encode(config, tokenizer, context)
    rows = encoded.examples
    held_out: Sequence[RankedExample] = []
    # All of them may be too long; that matters for the rows trained on alone.
    with suppress(DataError):
        held_out = _encode(config, tokenizer, context, "eval", config.eval_rows).examples

    def loss_fn(micro: Sequence[RankedExample], bootstrap: bool = config.num_heads > 1) -> StepOutput:
        batch = collate([example for row in micro for example in row.examples], tokenizer.pad_id).to(
            context.device
        )
        scores = sequence_head_scores(model, batch)  # (N, H), all responses of all prompts of the micro-batch
        ranks = torch.tensor([rank for row in micro for rank in row.ranks], device=context.device)
        sizes = torch.tensor([len(row.examples) for row in micro], device=context.device)
        groups = torch.repeat_interleave(torch.arange(len(micro), device=context.device), sizes)
        losses = ranking_losses(config, scores, micro, ranks, groups)  # (G, H)
        # A best response of infinite score has a loss of 0; 0 times infinity is told as any other NaN.
        losses = losses + 0 * torch.zeros_like(losses).index_add(0, groups, scores.detach().to(losses))
        if bootstrap:
            losses = losses * _bootstrap(config, micro).to(losses)
        correct, total = pair_accuracy(scores.detach().mean(1), ranks, groups, len(micro))
        return StepOutput(
            losses=losses.mean(1),  # (G,)
            metrics={"rm/accuracy": (float(correct.sum()), float(total.sum()))},
        )

    def evaluate() -> dict[str, float]:
        plain = partial(loss_fn, bootstrap=False)
        return mean_losses(model, held_out, plain, config.micro_batch_size, context)

    after = fit(model, rows, loss_fn, config, context, evaluate)
    normalizer = _demonstration_scores(model, tokenizer, config, context)
    context.save_checkpoint(model, tokenizer, "reward")
    report = _judge_heads(model, tokenizer, held_out, normalizer, config, context)
    stress = _stress(model, tokenizer, config, context)
    context.metrics.log(
        num_steps(config, len(rows)), {f"stress/{name}": found["rate"] for name, found in stress.items()}
    )
    return {
        "rows": len(rows),
        **encoded.figures,
        "eval_loss": after.get("loss"),
        **normalizer.as_metrics(),
        **report,
        "stress": stress,
        "rewardbench": _reward_bench(model, tokenizer, config, context),
    }


def ranking_losses(
    config: RMConfig, scores: Tensor, rows: Sequence[RankedExample], ranks: Tensor, groups: Tensor
) -> Tensor:
    """The configured loss of each prompt under each head.

    Args:
        config: `loss`, and what of it can be set.
        scores: (N, H), raw.
        rows: G rankings.
        ranks: (N,), of their responses.
        groups: (N,), the ranking of each response.

    Returns:
        (G, H).
    """
    margins = None
    if config.margin != "none":
        margins = torch.tensor([worth for row in rows for worth in worths(row, config)]).to(scores)
    pairwise = partial(kwise_losses, worths=margins, label_smoothing=config.label_smoothing, ties=config.ties)
    words: dict[str, Callable[..., Tensor]] = {"kwise": pairwise, "plackett_luce": plackett_luce_losses}
    losses = [words[config.loss](head, ranks, groups, len(rows)) for head in scores.unbind(1)]
    if config.centering:
        centres = [centering_losses(head, ranks, groups, len(rows)) for head in scores.unbind(1)]
        losses = [loss + config.centering * centre for loss, centre in zip(losses, centres, strict=True)]
    return torch.stack(losses, dim=1)


def _bootstrap(config: RMConfig, rows: Sequence[RankedExample]) -> Tensor:
    """How often each head drew each prompt, (G, H)."""
    prompts = [row.examples[0].ids[: row.prompt_length] for row in rows]
    return torch.tensor([bootstrap_weights(prompt, config.seed, config.num_heads) for prompt in prompts])


def _encode(
    config: RMConfig,
    tokenizer: Tokenizer,
    context: Context,
    share: str | None = None,
    limit: int | None = None,
) -> Encoded[RankedExample]:
    """Rankings of a share, at most `limit` of them."""
    records = context.records("data", config.data, Ranking, share)[:limit]
    keep_tied = config.ties == "half"
    return encode_rankings(
        records, tokenizer, config.max_length, config.data.on_overflow, keep_tied=keep_tied
    )


def _scores(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    config: RMConfig,
    context: Context,
    examples: Sequence[Example],
) -> Tensor:
    """Raw scores of each head, (N, H)."""
    with context.autocast():
        return head_scores(model, examples, tokenizer.pad_id, config.micro_batch_size)


def _judge_heads(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Sequence[RankedExample],
    normalizer: Normalizer,
    config: RMConfig,
    context: Context,
) -> dict[str, Any]:
    """Figures of the mean score on held-out rankings; of several heads, by how many deviations they differ."""
    flat = [example for row in rows for example in row.examples]
    heads = _scores(model, tokenizer, config, context, flat)
    means = iter(heads.mean(1).tolist())
    scores = [[next(means) for _ in row.examples] for row in rows]
    report = {
        **pair_report(rows, scores),
        **length_report(rows, scores),
        "buckets": bucket_report(rows, scores),
    }
    if config.num_heads > 1 and flat:
        report["disagreement"] = float(normalizer.of_heads(heads).std(1, unbiased=False).mean())
    return report


def _stress(
    model: PreTrainedModel, tokenizer: Tokenizer, config: RMConfig, context: Context
) -> dict[str, dict[str, Any]]:
    """Held-out best responses broken in known ways, and how often the model prefers the broken one."""
    answers = best_answers(context.records("data", config.data, Ranking, "eval")[: config.stress_rows])
    if not answers:
        return {}
    broken = broken_examples(answers, tokenizer, config.max_length)
    report = stress_report(
        broken, lambda examples: _scores(model, tokenizer, config, context, examples).mean(1)
    )
    processes.from_main(lambda: write_json(context.result / STRESS, report))
    return report


def _reward_bench(
    model: PreTrainedModel, tokenizer: Tokenizer, config: RMConfig, context: Context
) -> dict[str, Any] | None:
    """Figures on the benchmark's file; None where there is none."""
    if "benchmark" not in context.task.data:
        return None
    report = score_reward_bench(
        read_reward_bench(Path(context.task.data["benchmark"].path)),
        tokenizer,
        config.max_length,
        lambda examples: _scores(model, tokenizer, config, context, examples).mean(1),
    )
    processes.from_main(lambda: write_json(context.result / REWARD_BENCH, report))
    return {"score": report["score"], **report["sections"]}


def _demonstration_scores(
    model: PreTrainedModel, tokenizer: Tokenizer, config: RMConfig, context: Context
) -> Normalizer:
    """Mean and deviation of raw scores on demonstrations, so that 0 is what a demonstration is worth.

    Where there are no demonstrations, the best response of each ranking stands for one.
    """
    records: Sequence[Demonstration] = []
    if "demonstrations" in context.task.data:
        records = context.records("demonstrations", config.demonstrations, Demonstration)
    # A small file may have none in their share.
    records = (records or context.records("data", config.data, Demonstration))[:MAX_DEMONSTRATIONS]
    examples = encode_demonstrations(records, tokenizer, config.max_length, "drop", "response").examples
    return Normalizer.fit(_scores(model, tokenizer, config, context, examples))
