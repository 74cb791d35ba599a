"""Score several policies on the same held-out prompts: gold, reward, KL to the reference, length, prejudice.

policies, evaluation prompts -> one sampled response each -> figures a policy, gains between neighbours
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpipe import processes
from alignpipe.artifact import write_json
from alignpipe.config import TOY, EvalConfig, has_reward
from alignpipe.data.encoding import Example, encode_prompts
from alignpipe.data.records import Message, Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.gold import MEASURES, gold_scores
from alignpipe.evaluation.prejudice import group_gaps, swapped_prompts
from alignpipe.evaluation.responses import Response, respond
from alignpipe.evaluation.rewards import Reward, load_reward
from alignpipe.evaluation.statistics import mean_interval, paired_interval
from alignpipe.rollout.score import sequence_logprobs
from alignpipe.training.context import Context

SCORES = "scores.json"
Columns = dict[str, NDArray[np.float64]]


def run(config: EvalConfig, context: Context) -> dict[str, Any]:
    """Write `scores.json`: a list of policies in the order of the configuration."""
    tokenizer = context.tokenizer("policy_0")
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, "drop")
    prompts = encoded.examples[: config.num_prompts]
    if not prompts:
        raise DataError(
            f"{context.task.name}: no prompt in the evaluation share; add rows or raise data.shares.eval"
        )
    texts = [prompt_text(records[index]) for index in encoded.kept[: len(prompts)]]
    judged = config.judge == TOY or (config.judge == "auto" and context.task.data["data"].kind == TOY)
    swaps = swapped_prompts([prompt_text(record) for record in records]) if judged else []
    swapped = (
        encode_prompts(
            [Prompt((Message("user", swap.prompt),)) for swap in swaps],
            tokenizer,
            config.max_prompt_length,
            "error",
        ).examples
        if swaps
        else []
    )
    reward = (
        load_reward(config, context, tokenizer, config.generation_batch_size) if has_reward(config) else None
    )

    answers: list[list[Response]] = []
    columns: list[Columns] = []
    gaps: list[dict[str, float] | None] = []
    for index in range(len(config.policies)):
        context.check_same_tokens(f"policy_{index}", tokenizer)
        policy = context.load_policy(f"policy_{index}", tokenizer)
        policy.train(False)
        rows = [row[0] for row in respond(policy, tokenizer, prompts, 1, config, context, f"policy_{index}")]
        columns.append(_columns(texts, prompts, rows, reward, judged))
        gaps.append(None)
        if swaps:
            replies = [
                row[0]
                for row in respond(policy, tokenizer, swapped, 1, config, context, f"policy_{index}_swapped")
            ]
            measured = _columns([swap.prompt for swap in swaps], swapped, replies, reward, judged)
            wanted = {
                key: measured[column]
                for key, column in (("gold", "overall"), ("reward", "reward"))
                if column in measured
            }
            gaps[-1] = group_gaps(swaps, [reply.text for reply in replies], wanted)
        answers.append(rows)
    _add_kl(config, context, tokenizer, prompts, answers, columns)

    policies = [_summary(column, gap) for column, gap in zip(columns, gaps, strict=True)]
    scores = {"num_prompts": len(prompts), "policies": policies, "gains": _gains(columns)}
    processes.from_main(lambda: write_json(context.result / SCORES, scores))
    for name, rows in zip(config.policies, answers, strict=True):
        shown = zip(texts[:4], rows[:4], strict=True)
        context.metrics.samples(
            0, [{"policy": name, "prompt": text, "response": row.text} for text, row in shown]
        )
    return {"num_prompts": len(prompts)}


def _columns(
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Response],
    reward: Reward | None,
    judged: bool,
) -> Columns:
    """One value a prompt of everything that is measured of a policy."""
    answers = [row.text for row in rows]
    columns: Columns = gold_scores(texts, answers) if judged else {}
    if reward is not None:
        scored = reward(texts, _examples(prompts, rows), answers)
        columns |= {"reward": scored.rewards, **scored.columns}
    columns["length"] = np.array([len(row.ids) for row in rows], dtype=np.float64)
    columns["finished"] = np.array([row.finished for row in rows], dtype=np.float64)
    return columns


def _add_kl(
    config: EvalConfig,
    context: Context,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Response]],
    columns: Sequence[Columns],
) -> None:
    """KL(policy || reference) by its unbiased estimate: the log-ratio of each sampled response, in nats."""
    if config.reference is None:
        return
    context.check_same_tokens("reference", tokenizer)
    size = config.generation_batch_size
    reference = context.load_policy("reference", tokenizer, frozen=True)
    for index, (rows, column) in enumerate(zip(answers, columns, strict=True)):
        context.check_stop()
        policy = context.load_policy(f"policy_{index}", tokenizer, frozen=True)
        examples = _examples(prompts, rows)
        with context.autocast():
            own, other = (
                sequence_logprobs(model, examples, tokenizer.pad_id, size, config.temperature)
                for model in (policy, reference)
            )
        column["kl"] = (own - other).double().numpy()


def _examples(prompts: Sequence[Sequence[int]], rows: Sequence[Response]) -> list[Example]:
    return [row.example(prompt) for prompt, row in zip(prompts, rows, strict=True)]


def _summary(columns: Columns, gaps: dict[str, float] | None) -> dict[str, Any]:
    gold: dict[str, Any] = {measure: _mean(columns, measure) for measure in MEASURES}
    gold["ci95"] = list(mean_interval(columns["overall"])) if "overall" in columns else None
    rest = {name: _mean(columns, name) for name in ("reward", "kl", "length", "finished")}
    terms = {name: _mean(columns, name) for name in columns if name.startswith("reward/")}
    return {"gold": gold, **rest, **terms, "prejudice": gaps}


def _mean(columns: Columns, name: str) -> float | None:
    return float(columns[name].mean()) if name in columns else None


def _gains(columns: Sequence[Columns]) -> list[dict[str, Any]]:
    """Gold gained from each policy to the next, on the same prompts."""
    gains = []
    for index, (before, after) in enumerate(pairwise(columns)):
        if "overall" in before:
            interval = paired_interval(after["overall"], before["overall"])
            mean = float((after["overall"] - before["overall"]).mean())
            gains.append({"before": index, "after": index + 1, "gold": mean, "ci95": list(interval)})
    return gains
