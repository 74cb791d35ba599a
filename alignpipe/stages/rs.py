"""Rejection sampling fine-tuning (Llama 2, arXiv:2307.09288, section 3.2.3).

prompts -> n responses each, with those of earlier rounds -> the best by reward, with demonstrations replayed
-> cross-entropy -> policy
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import RSConfig
from alignpipe.data.collate import collate
from alignpipe.data.encoding import encode_demonstrations, encode_prompts
from alignpipe.data.examples import Example
from alignpipe.data.records import Demonstration, Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import AlignpipeError, DataError
from alignpipe.evaluation.candidates import (
    CANDIDATES,
    REASONS,
    Candidate,
    read_candidates,
    refusals,
    write_candidates,
)
from alignpipe.evaluation.monitor import load_monitor
from alignpipe.evaluation.responses import Response, respond
from alignpipe.evaluation.rewards import Reward, load_reward
from alignpipe.losses.best_of_n import best_of_n_able
from alignpipe.losses.rejection import Bools, Floats, Integers, above_median, rso, top_k
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.rollout.sampling import uniforms
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses

NUM_LOGGED = 8
# Tokens are drawn under step 0; acceptance has numbers of its own.
ACCEPTANCE = 1

# Word -> which of a prompt's responses are learnt: scores, able, lengths, index of the prompt -> indices.
SELECT: dict[str, Callable[[RSConfig, Floats, Bools, Integers, int], Integers]] = {
    "best": lambda _, scores, able, lengths, __: top_k(scores, able, lengths, 1),
    "top_k": lambda config, scores, able, lengths, _: top_k(scores, able, lengths, config.top_k),
    "threshold": lambda config, scores, able, lengths, _: above_median(
        scores, able, lengths, config.threshold
    ),
    "rso": lambda config, scores, able, _, prompt: rso(
        scores, able, config.rso_beta, _acceptance(config, prompt, len(scores))
    ),
}


def run(config: RSConfig, context: Context) -> dict[str, Any]:
    """Fine-tune `policy` on the best of its own responses and of the pool's."""
    tokenizer = context.tokenizer("policy")
    reward = load_reward(config, context, tokenizer, config.micro_batch_size)
    policy = context.load_policy("policy", tokenizer)
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, config.data.on_overflow)
    prompts = encoded.examples[: config.num_prompts]
    texts = [prompt_text(records[index]) for index in encoded.kept[: len(prompts)]]

    policy.train(False)
    responses = respond(policy, tokenizer, prompts, config.num_samples, config, context)
    asked = [text for text in texts for _ in range(config.num_samples)]
    flat = [r.example(prompt) for prompt, row in zip(prompts, responses, strict=True) for r in row]
    scored = reward(asked, [response.text for row in responses for response in row], flat)
    rewards = scored.rewards.reshape(len(prompts), config.num_samples)  # (P, N)
    candidates = [
        [Candidate(response, float(score)) for response, score in zip(row, scores, strict=True)]
        for row, scores in zip(responses, rewards, strict=True)
    ]
    processes.from_main(lambda: write_candidates(texts, candidates, context.result / CANDIDATES))
    for origin, earlier in enumerate(_pool(config, context, tokenizer, reward, prompts, texts), start=1):
        for row, pooled in zip(candidates, earlier, strict=True):
            row += [Candidate(response, score, origin) for response, score in pooled]

    refused = [
        refusals(prompt, row, config.min_response_length, config.min_reward)
        for prompt, row in zip(prompts, candidates, strict=True)
    ]
    chosen = [
        _choose(config, row, reasons, index)
        for index, (row, reasons) in enumerate(zip(candidates, refused, strict=True))
    ]
    best = [c.response.example(prompt) for prompt, row in zip(prompts, chosen, strict=True) for c in row]
    if not best:
        raise AlignpipeError(
            f"{context.task.name}: no response can be learnt, {_told(refused)}; raise max_response_length, lower "
            f"min_reward or threshold, or train the policy longer"
        )
    figures = _figures(config, rewards, candidates, refused, chosen)
    _log(context, figures, scored.figures, texts, candidates, chosen)

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
    after = fit(policy, best + replayed, loss_fn, config, context, evaluate, watcher=monitor)
    context.save_checkpoint(policy, tokenizer, "policy")
    return {
        "rows": len(best) + len(replayed),
        **encoded.figures,
        "eval_loss": after.get("loss"),
        **figures,
        **scored.figures,
        **monitor.summary(),
    }


def _pool(
    config: RSConfig,
    context: Context,
    tokenizer: Tokenizer,
    reward: Reward,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
) -> list[list[list[tuple[Response, float]]]]:
    """What earlier rounds answered to the same prompts, rewarded as this one rewards.

    Returns:
        For each stage of the pool, for each prompt, its responses with their rewards.
    """
    found = []
    for index in range(len(config.pool)):
        context.check_same_tokens(f"pool_{index}", tokenizer)
        known = read_candidates(Path(context.task.models[f"pool_{index}"].path) / CANDIDATES)
        rows = [known.get(text, []) for text in texts]
        flat = [r.example(prompt) for prompt, row in zip(prompts, rows, strict=True) for r in row]
        asked = [text for text, row in zip(texts, rows, strict=True) for _ in row]
        said = [response.text for row in rows for response in row]
        scores = iter(reward.rewards(asked, said, flat).tolist() if flat else ())
        found.append([[(response, next(scores)) for response in row] for row in rows])
    return found


def _choose(
    config: RSConfig, candidates: Sequence[Candidate], refused: Sequence[str | None], prompt: int
) -> list[Candidate]:
    """The responses of one prompt that are learnt."""
    scores = np.array([candidate.reward for candidate in candidates])
    able = np.array([reason is None for reason in refused])
    lengths = np.array([len(candidate.response.ids) for candidate in candidates])
    return [candidates[k] for k in SELECT[config.select](config, scores, able, lengths, prompt)]


def _acceptance(config: RSConfig, prompt: int, size: int) -> Floats:
    """Uniform numbers (num_accepted, N) that depend on seed, prompt and place alone."""
    samples, passes = np.arange(size)[None], np.arange(config.num_accepted)[:, None]
    drawn: Floats = uniforms(config.seed, ACCEPTANCE, prompt, samples, passes).numpy()
    return drawn


def _replayed(config: RSConfig, tokenizer: Tokenizer, context: Context, num_best: int) -> list[Example]:
    """Demonstrations that make up the share `replay` of the rows."""
    if config.replay == 0:
        return []
    records = _demonstrations(config, context)
    wanted = min(round(num_best * config.replay / (1 - config.replay)), len(records))
    drawn = random.Random(config.seed).sample(range(len(records)), wanted)
    rows = list(_encode(config, tokenizer, [records[index] for index in drawn]))
    # Where some of those drawn are too long, others take their place.
    others = iter(sorted(set(range(len(records))) - set(drawn)))
    while len(rows) < wanted and (index := next(others, None)) is not None:
        rows += _encode(config, tokenizer, [records[index]])
    return rows


def _demonstrations(config: RSConfig, context: Context, share: str | None = None) -> Sequence[Demonstration]:
    if "demonstrations" not in context.task.data:
        return []
    return context.records("demonstrations", config.demonstrations, Demonstration, share)


def _encode(config: RSConfig, tokenizer: Tokenizer, records: Sequence[Demonstration]) -> Sequence[Example]:
    """Demonstrations that fit; none where all of them are too long."""
    with suppress(DataError):
        return encode_demonstrations(records, tokenizer, config.max_length, "drop", "response").examples
    return []


def _figures(
    config: RSConfig,
    rewards: Floats,
    candidates: Sequence[Sequence[Candidate]],
    refused: Sequence[Sequence[str | None]],
    chosen: Sequence[Sequence[Candidate]],
) -> dict[str, Any]:
    """What was chosen out of what; the curve is over the stage's own responses that may be chosen."""
    able = np.array([[reason is None for reason in row[: config.num_samples]] for row in refused])
    curve = _curve(rewards, able)
    reasons = Counter(reason for row in refused for reason in row if reason is not None)
    picked = [candidate for row in chosen for candidate in row]
    origins = Counter(candidate.origin for candidate in picked)
    names = ["new", *(f"pool_{index}" for index in range(len(config.pool)))]
    everything = [candidate for row in candidates for candidate in row]
    return {
        "reward_mean": curve[0] if curve else None,
        "reward_best": curve[-1] if curve else None,
        "reward_selected": float(np.mean([candidate.reward for candidate in picked])),
        "best_of_n": curve,
        "length_shift": _mean_length(picked) - _mean_length(everything),
        "unanswered": sum(not row for row in chosen),
        **{f"selected/{name}": origins[origin] for origin, name in enumerate(names)},
        **{f"filtered/{reason}": reasons[reason] for reason in REASONS},
    }


def _curve(rewards: Floats, able: Bools) -> list[float]:
    """Expected reward of best-of-n for n = 1 to N, over the responses (P, N) that may be chosen."""
    if not able.any():
        return []
    curve: list[float] = best_of_n_able(torch.from_numpy(rewards), torch.from_numpy(able)).tolist()
    return curve


def _mean_length(candidates: Sequence[Candidate]) -> float:
    return float(np.mean([len(candidate.response.ids) for candidate in candidates]))


def _told(refused: Sequence[Sequence[str | None]]) -> str:
    """Such as `no_eos 12, copy 3`."""
    reasons = Counter(reason for row in refused for reason in row if reason is not None)
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "none is good enough"


def _log(
    context: Context,
    figures: dict[str, Any],
    terms: dict[str, float],
    texts: Sequence[str],
    candidates: Sequence[Sequence[Candidate]],
    chosen: Sequence[Sequence[Candidate]],
) -> None:
    curve = {f"rs/best_of_{n}": value for n, value in enumerate(figures["best_of_n"], start=1)}
    plain = {f"rs/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
    context.metrics.log(0, plain | curve | terms)
    context.metrics.samples(
        0,
        [
            {
                "prompt": prompt,
                "response": kept[0].response.text,
                "reward": kept[0].reward,
                "reward_mean": float(np.mean([candidate.reward for candidate in row])),
            }
            for prompt, row, kept in zip(texts[:NUM_LOGGED], candidates, chosen, strict=False)
            if kept
        ],
    )
