"""Proximal policy optimization from human feedback (arXiv:1707.06347; InstructGPT, arXiv:2203.02155, eq. 2).

A rollout, in the paper's order:
1. sample responses from the policy;
2. score them with the reward model, or what else stands under `reward`;
3. shape rewards: the score on the last action, minus the KL to the frozen reference on every action;
4. advantages by GAE from the value model, whitened over the whole rollout;
5. some epochs of clipped policy and value updates over minibatches.

prompts -> policy checkpoint
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import PPOConfig
from alignpipe.data.collate import TokenBatch, collate
from alignpipe.data.encoding import Example, encode_prompts
from alignpipe.data.order import batches
from alignpipe.data.records import Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.gold import gold_scores
from alignpipe.evaluation.monitor import load_monitor
from alignpipe.evaluation.rewards import Reward, Scored, load_reward
from alignpipe.losses.logprobs import masked_sum, masked_whiten
from alignpipe.losses.ppo import (
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_k3,
    policy_loss,
    shape_rewards,
    value_loss,
)
from alignpipe.models.forward import batch_logprobs
from alignpipe.models.scalar_head import token_scores
from alignpipe.rollout.generate import Sample as Sampled
from alignpipe.rollout.generate import generate
from alignpipe.rollout.score import response_logprobs, response_values
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, optimizer_step
from alignpipe.training.metrics import Averages
from alignpipe.training.optim import make_optimizer, schedule, set_learning_rate

NUM_LOGGED = 2


@dataclass(frozen=True)
class Models:
    """The four models of PPO and the two optimizers; the value model starts as the reward model."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    value: PreTrainedModel
    reward: Reward
    policy_optimizer: AdamW
    value_optimizer: AdamW


@dataclass(frozen=True)
class Experience:
    """One rollout: row `i` of every tensor is response `i`, column `t` the action that chose token `t + 1`.

    Attributes:
        batch: prompts with responses, (B, T).
        mask: actions of the response, up to and including its stop token, (B, T - 1).
        logprobs: of the sampling policy, (B, T - 1).
        values: before each action, (B, T - 1).
        advantages: whitened, (B, T - 1).
        returns: (B, T - 1).
    """

    batch: TokenBatch
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Sample:
    """One response of an experience, as a row of a minibatch."""

    index: int
    num_tokens: int
    num_items: int


def run(config: PPOConfig, context: Context) -> dict[str, Any]:
    """Train `policy` to raise the reward model's score while it stays near `reference`."""
    tokenizer = context.tokenizer("policy")
    models = _load(config, tokenizer, context)
    monitor = load_monitor(
        config, context, tokenizer, models.policy, lambda: models.reference, models.reward.rewards
    )
    modules = {"policy": models.policy, "value": models.value, **monitor.modules}
    optimizers = {"policy": models.policy_optimizer, "value": models.value_optimizer}
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, config.data.on_overflow)
    texts = [prompt_text(records[index]) for index in encoded.kept]

    state = context.resume(modules, optimizers)
    first, kl_coef = int(state.get("rollout", 0)), float(state.get("kl_coef", config.kl_coef))
    order = batches(
        config.seed, len(encoded.examples), config.rollout_size, start=first * config.rollout_size
    )
    updates = config.ppo_epochs * config.rollout_size * config.num_samples // config.batch_size
    figures: dict[str, float] = {}
    monitor.begin(state, config.num_rollouts)
    context.progress.begin("rollouts", config.num_rollouts, first)
    for rollout in range(first, config.num_rollouts):
        chosen = next(order)
        examples, finished = _sample(
            config, context, models.policy, tokenizer, rollout, chosen, encoded.examples
        )
        asked, answers = _as_text([texts[index] for index in chosen], examples, tokenizer)
        scored = models.reward(asked, answers, examples)
        scores = _scores(config, scored, finished)
        experience, figures = _experience(config, context, models, tokenizer, examples, scores, kl_coef)
        figures |= _update(config, context, models, experience, rollout) | {
            "objective/finished": sum(finished) / len(finished),
            "objective/kl_coef": kl_coef,
            **scored.figures,
            **_gold(context, asked, answers),
        }
        step, done = (rollout + 1) * updates, rollout + 1
        if config.kl_controller == "adaptive":
            kl_coef = adapt_kl_coef(
                kl_coef, figures["objective/kl"], config.target_kl, len(examples), config.kl_horizon
            )
        if done % config.log_steps == 0 or done == config.num_rollouts:
            figures = context.metrics.log(step, figures, tokens=sum(len(example.ids) for example in examples))
            context.metrics.samples(step, _rows(asked, answers, scores)[:NUM_LOGGED])
        context.progress.update(done, figures)
        if monitor.ends(done, step):
            break
        stopping = context.stopping()
        if stopping or done % config.save_steps == 0:
            context.save(step, modules, optimizers, {"rollout": done, "kl_coef": kl_coef, **monitor.values()})
        if stopping:
            context.stop.end()
    context.save_checkpoint(models.policy, tokenizer, "policy")
    return {
        "reward": figures.get("objective/score"),
        "kl": figures.get("objective/kl"),
        "kl_coef": kl_coef,
        **monitor.summary(),
    }


def _load(config: PPOConfig, tokenizer: Tokenizer, context: Context) -> Models:
    context.check_same_tokens("reference", tokenizer)
    policy = context.load_policy("policy", tokenizer)
    value = context.load_scalar_model("reward_model", tokenizer)
    return Models(
        policy=policy,
        reference=context.load_policy("reference", tokenizer, frozen=True),
        value=value,
        reward=load_reward(config, context, tokenizer, config.micro_batch_size),
        policy_optimizer=make_optimizer(policy, config),
        value_optimizer=make_optimizer(value, config, config.value_learning_rate),
    )


def _sample(
    config: PPOConfig,
    context: Context,
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    rollout: int,
    chosen: Sequence[int],
    prompts: Sequence[Sequence[int]],
) -> tuple[list[Example], list[bool]]:
    """Prompts with fresh responses, and which of them ended by themselves."""
    policy.train(False)

    def sample(places: list[int]) -> list[list[Sampled]]:
        with context.autocast():
            return generate(
                policy,
                [list(prompts[chosen[place]]) for place in places],
                num_samples=config.num_samples,
                max_new_tokens=config.max_response_length,
                stop_ids=tokenizer.stop_ids,
                pad_id=tokenizer.pad_id,
                temperature=config.temperature,
                seed=config.seed,
                step=rollout,
                prompt_ids=[chosen[place] for place in places],
                batch_size=config.generation_batch_size,
            ).samples

    sampled = processes.spread([len(prompts[index]) for index in chosen], sample)
    flat = [(index, sample) for index, row in zip(chosen, sampled, strict=True) for sample in row]
    examples = [
        Example([*prompts[index], *sample.ids], [False] * len(prompts[index]) + [True] * len(sample.ids))
        for index, sample in flat
    ]
    return examples, [sample.finished for _, sample in flat]


def _scores(config: PPOConfig, scored: Scored, finished: Sequence[bool]) -> Tensor:
    """Normalised, clipped rewards (B,), less for a response that was cut off."""
    scores = torch.from_numpy(scored.rewards).float().clamp(-config.score_clip, config.score_clip)
    return scores - config.missing_eos_penalty * (~torch.tensor(finished)).float()


@torch.no_grad()
def _experience(
    config: PPOConfig,
    context: Context,
    models: Models,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    scores: Tensor,
    kl_coef: float,
) -> tuple[Experience, dict[str, float]]:
    """Log-probs, values, shaped rewards and advantages of a rollout, with its figures."""
    batch = collate(examples, tokenizer.pad_id).to(context.device)
    mask = batch.loss_mask[:, 1:]  # (B, T - 1)
    pad, size, temperature = tokenizer.pad_id, config.micro_batch_size, config.temperature
    with context.autocast():
        # Computed as the update computes them, so that the first ratio is 1; sampling rounds otherwise.
        logprobs = response_logprobs(models.policy, examples, pad, size, temperature).to(context.device)
        reference = response_logprobs(models.reference, examples, pad, size, temperature).to(context.device)
        raw_values = response_values(models.value, examples, pad, size).to(context.device)
    values = models.reward.normalizer(raw_values) * mask
    rewards = shape_rewards(logprobs, reference, scores.to(context.device), mask, kl_coef)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    figures = {
        "objective/score": float(scores.mean()),
        "objective/kl": float((logprobs - reference).sum(1).mean()),  # nats a response
        "objective/entropy": float(-logprobs.sum() / mask.sum()),  # nats a token, by its unbiased estimate
        "objective/length": float(mask.sum(1).float().mean()),
        "ppo/explained_variance": float(explained_variance(values, returns, mask)),
    }
    return Experience(batch, mask, logprobs, values, masked_whiten(advantages, mask), returns), figures


def _update(
    config: PPOConfig, context: Context, models: Models, experience: Experience, rollout: int
) -> dict[str, float]:
    """Epochs of minibatches over one rollout, policy and value model each with its own optimizer."""
    lengths = experience.batch.lengths.tolist()
    samples = [Sample(i, lengths[i], int(count)) for i, count in enumerate(experience.mask.sum(1).tolist())]
    share = schedule(rollout, config.num_rollouts, config)
    set_learning_rate(models.policy_optimizer, config.learning_rate * share)
    set_learning_rate(models.value_optimizer, config.value_learning_rate * share)

    def policy_fn(micro: Sequence[Sample]) -> StepOutput:
        rows, batch = _part(experience, micro)
        mask = batch.loss_mask[:, 1:]  # (b, t - 1)
        width = mask.shape[1]
        logprobs = batch_logprobs(models.policy, batch, config.temperature)  # (b, t - 1)
        old = experience.logprobs[rows, :width]
        losses, ratio = policy_loss(
            logprobs, old, experience.advantages[rows, :width], mask, config.clip_range
        )
        count = float(mask.sum())
        clipped = ((ratio - 1).abs() > config.clip_range) & mask
        approx_kl = masked_sum(kl_k3(old, logprobs), mask)
        return StepOutput(
            losses=losses,
            metrics={
                "ppo/ratio": (float(masked_sum(ratio.detach(), mask)), count),
                "ppo/clip_fraction": (float(clipped.sum()), count),
                "ppo/approx_kl": (float(approx_kl.detach()), count),
            },
        )

    def value_fn(micro: Sequence[Sample]) -> StepOutput:
        rows, batch = _part(experience, micro)
        mask = batch.loss_mask[:, 1:]  # (b, t - 1)
        width = mask.shape[1]
        values = models.reward.normalizer(token_scores(models.value, batch.input_ids))[:, :-1]  # (b, t - 1)
        old, returns = experience.values[rows, :width], experience.returns[rows, :width]
        return StepOutput(losses=value_loss(values, old, returns, mask, config.value_clip_range))

    averages = Averages()
    first: dict[str, float] = {}
    models.policy.train()
    models.value.train()
    for minibatch in _minibatches(config, samples, rollout):
        policy_figures = optimizer_step(
            models.policy, models.policy_optimizer, minibatch, policy_fn, config, context
        )
        value_figures = optimizer_step(
            models.value, models.value_optimizer, minibatch, value_fn, config, context
        )
        for name, (total, count) in policy_figures.items():
            averages.add(
                name.replace("grad_norm", "ppo/policy_grad_norm").replace("loss", "ppo/policy_loss"),
                total,
                count,
            )
        averages.add("ppo/value_loss", *value_figures["loss"])
        first = first or {
            f"{name}_first": total / count for name, (total, count) in policy_figures.items() if "/" in name
        }
    return averages.means() | first


def _minibatches(config: PPOConfig, samples: Sequence[Sample], rollout: int) -> Iterator[list[Sample]]:
    for epoch in range(config.ppo_epochs):
        shuffled = list(samples)
        random.Random(f"{config.seed}/{rollout}/{epoch}").shuffle(shuffled)
        for start in range(0, len(shuffled), config.batch_size):
            yield shuffled[start : start + config.batch_size]


def _part(experience: Experience, micro: Sequence[Sample]) -> tuple[Tensor, TokenBatch]:
    """Row numbers (b,) of a micro-batch and its tokens (b, t), no wider than its longest row."""
    whole = experience.batch
    width = max(sample.num_tokens for sample in micro)
    rows = torch.tensor([sample.index for sample in micro], device=whole.input_ids.device)
    ids, mask = whole.input_ids[rows, :width], whole.loss_mask[rows, :width]
    return rows, TokenBatch(ids, whole.lengths[rows], mask)


def _gold(context: Context, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """What the embedded world's judge thinks of the responses; for people alone, training never sees it."""
    if context.task.data["data"].kind != "toy":
        return {}
    return {"objective/gold": float(gold_scores(prompts, responses)["overall"].mean())}


def _as_text(
    prompts: Sequence[str], examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[list[str], list[str]]:
    """The prompt of each response, and what it says."""
    samples = len(examples) // len(prompts)
    learnt = [[token for token, own in zip(row.ids, row.mask, strict=True) if own] for row in examples]
    return [text for text in prompts for _ in range(samples)], [tokenizer.decode(ids) for ids in learnt]


def _rows(prompts: Sequence[str], responses: Sequence[str], scores: Tensor) -> list[dict[str, Any]]:
    columns = zip(prompts, responses, scores.tolist(), strict=True)
    return [{"prompt": prompt, "response": response, "reward": score} for prompt, response, score in columns]
