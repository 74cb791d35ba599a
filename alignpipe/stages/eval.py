"""Score several policies on the same held-out prompts, by more than their reward; docs/evaluation.md has each figure.

policies, evaluation prompts -> sampled responses -> figures a policy with intervals, gains between neighbours

One policy is in memory at a time, and what it gets does not depend on which others stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.artifact import write_json
from alignpipe.config import EvalConfig, has_reward
from alignpipe.data.counterfactuals import Template, answered
from alignpipe.data.encoding import encode_demonstrations
from alignpipe.data.examples import Example
from alignpipe.data.records import Demonstration, Message
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.figures import (
    Figures,
    column_figures,
    gains,
    perplexity,
    variety_figures,
    win_figures,
    written,
)
from alignpipe.evaluation.prejudice import group_gaps
from alignpipe.evaluation.questions import Asked, Questions, gather
from alignpipe.evaluation.response_measures import Columns, response_columns
from alignpipe.evaluation.responses import Response, respond
from alignpipe.evaluation.rewards import TERM, Reward, load_reward
from alignpipe.rollout.score import sequence_logprobs
from alignpipe.training.context import Context

SCORES = "scores.json"
# What a gap between groups is measured in -> its column; the terms of a composed reward have their own names.
GAPS = {"gold": "gold.overall", "reward": "reward", "refusal": "refusal"}


@dataclass
class Measured:
    """What one policy said, and what needed the policy itself to be told.

    Attributes:
        responses: to the held-out prompts.
        columns: one value a response.
        logprobs: (N * K,) float32, of its responses.
        perplexity: on the held-out text, by name.
        prejudice: gaps between groups; None without loaded questions.
    """

    responses: list[list[Response]]
    columns: Columns
    logprobs: NDArray[np.float32]
    perplexity: Figures
    prejudice: dict[str, Any] | None


def run(config: EvalConfig, context: Context) -> dict[str, Any]:
    """Write `scores.json`: a list of policies in the order of the configuration."""
    tokenizer = context.tokenizer("policy_0")
    roles, opponent = _contestants(config, context)
    for role in [*roles, *(["reference"] if config.reference is not None else [])]:
        context.check_same_tokens(role, tokenizer)
    asked = gather(config, context, tokenizer)
    size = config.generation_batch_size
    reward = load_reward(config, context, tokenizer, size) if has_reward(config) else None

    measured = {role: _measure(role, config, context, tokenizer, asked, reward) for role in roles}
    _add_kl(config, context, tokenizer, asked.held_out, list(measured.values()))

    policies = list(measured.values())[: len(config.policies)]
    scores = {
        "num_prompts": len(asked.held_out.texts),
        "policies": [
            written(
                column_figures(found.columns)
                | variety_figures(found.responses, tokenizer.vocab_size)
                | found.perplexity
                | (win_figures(found.columns, measured[opponent].columns) if opponent is not None else {}),
                found.prejudice,
            )
            for found in policies
        ],
        "gains": gains([found.columns for found in policies]),
        "reward_model": {"prejudice": _reward_gaps(config, tokenizer, asked.templates, reward)},
    }
    processes.from_main(lambda: write_json(context.result / SCORES, scores))
    for name, found in zip(config.policies, policies, strict=True):
        shown = zip(asked.held_out.texts[:4], found.responses[:4], strict=True)
        context.metrics.samples(
            0, [{"policy": name, "prompt": text, "response": row[0].text} for text, row in shown]
        )
    return {"num_prompts": scores["num_prompts"]}


def _contestants(config: EvalConfig, context: Context) -> tuple[list[str], str | None]:
    """Roles that answer, and the one whose answers the others' are held against; it joins if it is none of them."""
    roles = [f"policy_{index}" for index in range(len(config.policies))]
    if config.win_rate_against is None:
        return roles, None
    weights = {role: (model.path, model.revision, model.key) for role, model in context.task.models.items()}
    opponent = "win_rate_against"
    same = [role for role in roles if weights[role] == weights[opponent]]
    return (roles, same[0]) if same else ([*roles, opponent], opponent)


def _measure(
    role: str,
    config: EvalConfig,
    context: Context,
    tokenizer: Tokenizer,
    asked: Asked,
    reward: Reward | None,
) -> Measured:
    """Everything for which a policy must be in memory; it is gone before the next one comes."""
    context.check_stop()
    policy = context.load_policy(role, tokenizer, frozen=True)
    prompts, samples = asked.held_out.prompts, config.num_samples
    responses = respond(policy, tokenizer, prompts, samples, config, context, role)
    columns = response_columns(asked.held_out, responses, reward)
    logprobs = np.zeros(0, dtype=np.float32)
    if config.reference is not None:
        logprobs = _logprobs(policy, asked.held_out, responses, config, context, tokenizer)
    figures = _perplexity(policy, asked.text, config, context, tokenizer)
    if not asked.wordings:
        return Measured(responses, columns, logprobs, figures, None)
    replies = respond(policy, tokenizer, asked.loaded.prompts, samples, config, context, f"{role}_swapped")
    about = response_columns(asked.loaded, replies, reward)
    judges = GAPS | {column: column for column in about if column.startswith(TERM)}
    measures = {name: about[column].mean(axis=1) for name, column in judges.items() if column in about}
    return Measured(responses, columns, logprobs, figures, group_gaps(asked.wordings, measures))


def _logprobs(
    model: PreTrainedModel,
    questions: Questions,
    responses: Sequence[Sequence[Response]],
    config: EvalConfig,
    context: Context,
    tokenizer: Tokenizer,
) -> NDArray[np.float32]:
    """(N * K,) log-probs of whole responses, at the temperature they were sampled at."""
    examples = questions.examples(responses)
    with context.autocast():
        found: NDArray[np.float32] = sequence_logprobs(
            model, examples, tokenizer.pad_id, config.generation_batch_size, config.temperature
        ).numpy()
    return found


def _perplexity(
    policy: PreTrainedModel,
    text: Sequence[Example],
    config: EvalConfig,
    context: Context,
    tokenizer: Tokenizer,
) -> Figures:
    if not text:
        return {}
    # No more tokens in a forward than there are in one over responses.
    room = config.generation_batch_size * (config.max_prompt_length + config.max_response_length)
    with context.autocast():
        found = sequence_logprobs(policy, text, tokenizer.pad_id, max(1, room // config.max_length))
    tokens = np.array([example.num_items for example in text], dtype=np.float64)
    return {"perplexity": perplexity(found.double().numpy(), tokens)}


def _add_kl(
    config: EvalConfig,
    context: Context,
    tokenizer: Tokenizer,
    questions: Questions,
    measured: Sequence[Measured],
) -> None:
    """KL(policy || reference) by its unbiased estimate: the log-ratio of each sampled response, in nats."""
    if config.reference is None:
        return
    reference = context.load_policy("reference", tokenizer, frozen=True)
    for found in measured:
        context.check_stop()
        other = _logprobs(reference, questions, found.responses, config, context, tokenizer)
        shape = found.columns["length"].shape
        found.columns["kl"] = (found.logprobs - other).astype(np.float64).reshape(shape)


def _reward_gaps(
    config: EvalConfig, tokenizer: Tokenizer, templates: Sequence[Template], reward: Reward | None
) -> dict[str, Any] | None:
    """Gaps in reward between groups on the same responses, the name swapped in prompt and response."""
    wordings = answered(templates)
    if reward is None or not wordings:
        return None
    rows = [
        Demonstration((Message("user", wording.prompt), Message("assistant", wording.response or "")))
        for wording in wordings
    ]
    examples = encode_demonstrations(rows, tokenizer, config.max_length, "error").examples
    prompts, responses = [row.prompt for row in wordings], [row.response or "" for row in wordings]
    scored = reward(prompts, responses, examples)
    return group_gaps(wordings, {"reward": scored.rewards, **scored.columns})
