"""Rejection sampling fine-tuning (Llama 2, arXiv:2307.09288, section 3.2.3).

prompts -> n responses each -> the best by reward, with demonstrations replayed -> cross-entropy -> policy
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from alignpipe.config import RSConfig
from alignpipe.data.collate import collate
from alignpipe.data.encoding import Example, encode_demonstrations, encode_prompts
from alignpipe.data.records import Demonstration, Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import AlignpipeError, DataError
from alignpipe.evaluation.monitor import load_monitor
from alignpipe.evaluation.responses import Response, respond
from alignpipe.evaluation.rewards import Scored, load_reward
from alignpipe.losses.best_of_n import best_of_n
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses

NUM_LOGGED = 8


def run(config: RSConfig, context: Context) -> dict[str, Any]:
    """Fine-tune `policy` on the best of its own responses."""
    tokenizer = context.tokenizer("policy")
    reward = load_reward(config, context, tokenizer, config.micro_batch_size)
    policy = context.load_policy("policy", tokenizer)
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, config.data.on_overflow)
    prompts = encoded.examples[: config.num_prompts]

    policy.train(False)
    responses = respond(policy, tokenizer, prompts, config.num_samples, config, context)
    texts = [prompt_text(records[index]) for index in encoded.kept[: len(prompts)]]
    asked = [text for text in texts for _ in range(config.num_samples)]
    flat = [r.example(prompt) for prompt, row in zip(prompts, responses, strict=True) for r in row]
    scored = reward(asked, [response.text for row in responses for response in row], flat)
    rewards = scored.rewards.reshape(len(prompts), config.num_samples)  # (P, N)
    chosen = [
        _best(prompt, row, score) for prompt, row, score in zip(prompts, responses, rewards, strict=True)
    ]
    best = [
        row[k].example(prompt)
        for prompt, row, k in zip(prompts, responses, chosen, strict=True)
        if k is not None
    ]
    if not best:
        raise AlignpipeError(
            f"{context.task.name}: no response ended by itself within {config.max_response_length} tokens; "
            f"raise max_response_length or train the policy longer"
        )
    _log(context, scored, rewards, texts, responses, chosen)

    replayed = _replayed(config, tokenizer, context, len(best))
    held_out = _encode(config, tokenizer, _demonstrations(config, context, "eval")[: config.eval_rows])

    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        batch = collate(micro, tokenizer.pad_id).to(context.device)
        return StepOutput(losses=sft_loss(batch_logprobs(policy, batch), batch.loss_mask[:, 1:]))

    def evaluate() -> dict[str, float]:
        return mean_losses(policy, held_out, loss_fn, config.micro_batch_size, context)

    def start() -> PreTrainedModel:
        return context.load_policy("policy", tokenizer, frozen=True)

    monitor = load_monitor(config, context, tokenizer, policy, start, reward.rewards)
    after = fit(policy, best + replayed, loss_fn, config, context, evaluate, monitor)
    context.save_checkpoint(policy, tokenizer, "policy")
    return {
        "rows": len(best) + len(replayed),
        **encoded.figures,
        "eval_loss": after.get("loss"),
        "reward_mean": float(rewards.mean()),
        "reward_best": float(rewards.max(axis=1).mean()),
        "best_of_n": _curve(rewards),
        "without_eos": sum(k is None for k in chosen),
        **scored.figures,
        **monitor.summary(),
    }


def _best(prompt: Sequence[int], responses: Sequence[Response], scores: np.ndarray) -> int | None:
    """Highest score among responses that ended and do not repeat the prompt; the shorter of a tie."""
    able = [
        k for k, r in enumerate(responses) if r.finished and len(r.ids) > 1 and not _copies(prompt, r.ids)
    ]
    return max(able, key=lambda k: (scores[k], -len(responses[k].ids)), default=None)


def _copies(prompt: Sequence[int], response: Sequence[int]) -> bool:
    """Whether the response, but for its stop token, stands in the prompt word for word at full length."""
    body = list(response[:-1])
    return len(body) >= len(prompt) // 2 and any(
        list(prompt[start : start + len(body)]) == body for start in range(len(prompt) - len(body) + 1)
    )


def _replayed(config: RSConfig, tokenizer: Tokenizer, context: Context, num_best: int) -> list[Example]:
    """Demonstrations that make up the share `replay` of the rows."""
    if config.replay == 0:
        return []
    records = _demonstrations(config, context)
    wanted = min(round(num_best * config.replay / (1 - config.replay)), len(records))
    drawn = random.Random(config.seed).sample(range(len(records)), wanted)
    rows = _encode(config, tokenizer, [records[index] for index in drawn])
    # Where some of those drawn are too long, others take their place.
    others = iter(sorted(set(range(len(records))) - set(drawn)))
    while len(rows) < wanted and (index := next(others, None)) is not None:
        rows += _encode(config, tokenizer, [records[index]])
    return rows


def _demonstrations(config: RSConfig, context: Context, share: str | None = None) -> list[Demonstration]:
    if "demonstrations" not in context.task.data:
        return []
    return context.records("demonstrations", config.demonstrations, Demonstration, share)


def _encode(config: RSConfig, tokenizer: Tokenizer, records: Sequence[Demonstration]) -> list[Example]:
    """Demonstrations that fit; none where all of them are too long."""
    with suppress(DataError):
        return encode_demonstrations(records, tokenizer, config.max_length, "drop", "response").examples
    return []


def _curve(rewards: np.ndarray) -> list[float]:
    """Expected reward of best-of-n for n = 1 to N, unbiased, over the prompts."""
    curve: list[float] = best_of_n(torch.from_numpy(rewards)).mean(0).tolist()
    return curve


def _log(
    context: Context,
    scored: Scored,
    rewards: np.ndarray,
    prompts: Sequence[str],
    responses: Sequence[Sequence[Response]],
    chosen: Sequence[int | None],
) -> None:
    curve = {f"rs/best_of_{n}": value for n, value in enumerate(_curve(rewards), start=1)}
    best = float(rewards.max(axis=1).mean())
    context.metrics.log(
        0, {"rs/reward_mean": float(rewards.mean()), "rs/reward_best": best, **curve, **scored.figures}
    )
    context.metrics.samples(
        0,
        [
            {
                "prompt": prompt,
                "response": row[k].text,
                "reward": float(score[k]),
                "reward_mean": float(score.mean()),
            }
            for prompt, row, score, k in zip(prompts[:NUM_LOGGED], responses, rewards, chosen, strict=False)
            if k is not None
        ],
    )
