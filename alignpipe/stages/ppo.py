"""Proximal policy optimization from human feedback (arXiv:1707.06347; InstructGPT, arXiv:2203.02155, eq. 2).

A rollout, in the paper's order:
1. sample responses from the policy;
2. score them with the reward model, or what else stands under `reward`;
3. shape rewards: the score on the last action, minus the KL to the frozen reference on every action;
4. advantages: by GAE from the value model, whitened over the whole rollout, or from responses alone;
5. some epochs of clipped policy and value updates over minibatches.

prompts -> policy checkpoint
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignpipe.config import PPOConfig
from alignpipe.data.collate import collate
from alignpipe.data.encoding import Encoded, encode_prompts
from alignpipe.data.examples import Example
from alignpipe.data.order import batches
from alignpipe.data.records import Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import NumericalError
from alignpipe.evaluation.gold import gold_scores
from alignpipe.evaluation.monitor import load_monitor
from alignpipe.evaluation.rewards import Reward, load_reward, read_normalizer
from alignpipe.losses.advantages import gae, grpo, reinforce_pp, rloo
from alignpipe.losses.logprobs import masked_sum, masked_whiten
from alignpipe.losses.ppo import (
    KL_ESTIMATORS,
    explained_variance,
    kl_k3,
    kl_loss,
    policy_loss,
    shape_rewards,
    value_loss,
)
from alignpipe.models.forward import batch_logprobs, batch_logprobs_and_entropy
from alignpipe.models.scalar_head import next_token_scores
from alignpipe.rollout.experience import (
    Experience,
    ResponseRow,
    minibatches,
    response_texts,
    sample_responses,
)
from alignpipe.rollout.scaling import RunningMoments
from alignpipe.rollout.score import Normalizer, finite, response_logprobs, response_values
from alignpipe.training.context import Context
from alignpipe.training.ema import WeightAverage
from alignpipe.training.kl_control import KLControl
from alignpipe.training.loop import StepOutput, optimizer_step
from alignpipe.training.metrics import Averages
from alignpipe.training.optim import make_optimizer, schedule, set_learning_rate
from alignpipe.training.ptx import PtxLoss

NUM_LOGGED = 2
# What the optimizer's figures are called here.
POLICY_FIGURES = {"loss": "ppo/policy_loss", "grad_norm": "ppo/policy_grad_norm"}

# Rewards, values (None without a value model), mask, all (B, T), and the settings -> advantages (B, T).
ADVANTAGES: dict[str, Callable[[Tensor, Any, Tensor, PPOConfig], Tensor]] = {
    "gae": lambda rewards, values, mask, c: gae(rewards, values, mask, c.gamma, c.gae_lambda),
    "rloo": lambda rewards, _, mask, c: rloo(rewards, mask, c.num_samples),
    "grpo": lambda rewards, _, mask, c: grpo(rewards, mask, c.num_samples, divide_by_std=c.grpo_std),
    "reinforce_pp": lambda rewards, _, mask, c: reinforce_pp(rewards, mask, c.gamma),
}


@dataclass(frozen=True)
class Models:
    """The models of PPO and their optimizers; the value model, where there is one, starts as the reward model."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    reward: Reward
    value: PreTrainedModel | None
    value_scale: Normalizer
    average: WeightAverage | None
    ptx: PtxLoss
    optimizers: dict[str, AdamW]

    @property
    def changing(self) -> dict[str, nn.Module]:
        """What training changes, so that a saved state holds it."""
        named = {"policy": self.policy, "value": self.value, "average": self.average}
        return {name: module for name, module in named.items() if module is not None}

    def result(self) -> PreTrainedModel:
        """The policy to hand on, with the average of its weights in their place where one was kept."""
        if self.average is not None:
            self.average.copy_to(self.policy)
        return self.policy


@dataclass(frozen=True)
class Drawn:
    """What the policy said in one rollout.

    Attributes:
        rollout: its number.
        numbers: of the prompt of each response, among those learnt from.
        examples: prompts with responses.
        finished: which of them ended by themselves.
        answers: their texts.
    """

    rollout: int
    numbers: list[int]
    examples: list[Example]
    finished: list[bool]
    answers: list[str]

    @property
    def num_tokens(self) -> int:
        """Of all prompts and responses."""
        return sum(len(example.ids) for example in self.examples)


def run(config: PPOConfig, context: Context) -> dict[str, Any]:
    """Train `policy` to raise the reward model's score while it stays near `reference`."""
    tokenizer = context.tokenizer("policy")
    models = _load(config, tokenizer, context)
    monitor = load_monitor(
        config, context, tokenizer, models.policy, lambda: models.reference, models.reward.rewards
    )
    modules = {**models.changing, **monitor.modules}
    encoded, texts = _prompts(config, tokenizer, context)
    saved = ("rollout", "kl_coef", "score_moments", *monitor.values())
    state = context.resume(modules, models.optimizers, saved)
    first, ended = int(state.get("rollout", 0)), False
    control = KLControl(config, context, state.get("kl_coef", config.kl_coef))
    moments = RunningMoments(*state.get("score_moments", ()))
    order = batches(
        config.seed, len(encoded.examples), config.rollout_size, start=first * config.rollout_size
    )
    figures: dict[str, float] = {}
    monitor.begin(state, config.num_rollouts)
    context.progress.begin("rollouts", config.num_rollouts, first)
    # The order has no end.
    for rollout, chosen in zip(range(first, config.num_rollouts), order, strict=False):
        drawn = _sample(config, context, models.policy, tokenizer, encoded.examples, chosen, rollout)
        asked = [texts[index] for index in drawn.numbers]
        context.step = rollout * config.updates_per_rollout
        try:
            figures, scores, ended = _learn(
                config, context, models, tokenizer, drawn, asked, control, moments
            )
        except NumericalError as error:
            context.leave_out(error, drawn.numbers, config.max_left_out)
            continue
        control.adapt(figures["objective/kl"], rollout)
        step, done = (rollout + 1) * config.updates_per_rollout, rollout + 1
        if done % config.log_steps == 0 or done == config.num_rollouts or ended:
            figures = context.metrics.log(step, figures, tokens=drawn.num_tokens)
            context.metrics.samples(step, _shown(asked, drawn.answers, scores))
        context.progress.update(done, figures)
        if monitor.ends(done, step) or ended:
            break
        stopping = context.stopping()
        if stopping or done % config.save_steps == 0:
            values = {"rollout": done, "kl_coef": control.coef, "score_moments": moments.state}
            context.save(step, modules, models.optimizers, values | monitor.values())
        if stopping:
            context.stop.end()
    # What the judge went back to is handed on as it was judged, not as an average.
    context.save_checkpoint(models.policy if monitor.went_back else models.result(), tokenizer, "policy")
    return {
        **encoded.figures,
        "reward": figures.get("objective/score"),
        "kl": figures.get("objective/kl"),
        "kl_coef": control.coef,
        "over_kl_budget": ended,
        **monitor.summary(),
    }


def _load(config: PPOConfig, tokenizer: Tokenizer, context: Context) -> Models:
    context.check_same_tokens("reference", tokenizer)
    policy = context.load_policy("policy", tokenizer)
    optimizers = {"policy": make_optimizer(policy, config)}
    value, value_scale = None, Normalizer()
    if config.has_value_model:
        value = context.load_scalar_model("reward_model", tokenizer)
        value_scale = read_normalizer(context.model("reward_model").folder())
        optimizers["value"] = make_optimizer(value, config, config.value_learning_rate)
    return Models(
        policy=policy,
        reference=context.load_policy("reference", tokenizer, frozen=True),
        reward=load_reward(config, context, tokenizer, config.micro_batch_size),
        value=value,
        value_scale=value_scale,
        average=None if config.ema_decay is None else WeightAverage(policy, config.ema_decay),
        ptx=PtxLoss.load(policy, tokenizer, config, context),
        optimizers=optimizers,
    )


def _prompts(
    config: PPOConfig, tokenizer: Tokenizer, context: Context
) -> tuple[Encoded[list[int]], list[str]]:
    """Token ids and text of every prompt that fits."""
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, config.data.on_overflow)
    return encoded, [prompt_text(records[index]) for index in encoded.kept]


def _sample(
    config: PPOConfig,
    context: Context,
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[int],
    rollout: int,
) -> Drawn:
    """Answer the prompts of a rollout."""
    with context.autocast():
        examples, finished = sample_responses(policy, tokenizer, prompts, chosen, rollout, config)
    numbers = [index for index in chosen for _ in range(config.num_samples)]
    return Drawn(rollout, numbers, examples, finished, response_texts(examples, tokenizer))


def _learn(
    config: PPOConfig,
    context: Context,
    models: Models,
    tokenizer: Tokenizer,
    drawn: Drawn,
    asked: Sequence[str],
    control: KLControl,
    moments: RunningMoments,
) -> tuple[dict[str, float], Tensor, bool]:
    """Score a rollout and learn from it, unless the budget of KL is spent.

    Returns:
        Its figures, the score of each response, and whether training ends here.

    Raises:
        NumericalError: a number is not finite; its rows are places in the rollout.
    """
    scored = models.reward(asked, drawn.answers, drawn.examples)
    scores = _scores(config, scored.rewards, drawn.finished, moments)
    experience, figures = _experience(
        config, context, models, tokenizer, drawn.examples, scores, control.coef
    )
    ended = control.spent(figures["objective/kl"])
    if not ended:
        figures |= _update(config, context, models, experience, drawn.rollout, control.coef)
    own = {
        "objective/finished": sum(drawn.finished) / len(drawn.finished),
        "objective/kl_coef": control.coef,
        **context.left_out_figures,
    }
    return figures | _gold(context, asked, drawn.answers) | scored.figures | own, scores, ended


def _scores(
    config: PPOConfig, rewards: NDArray[np.float64], finished: Sequence[bool], moments: RunningMoments
) -> Tensor:
    """Scaled, clipped rewards (B,), less for a response that was cut off."""
    scaled = moments.scaled(rewards) if config.reward_scaling == "running" else rewards
    scores = torch.from_numpy(scaled).float().clamp(-config.score_clip, config.score_clip)
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
    """Log-probs, shaped rewards, values and advantages of a rollout, with its figures."""
    batch = collate(examples, tokenizer.pad_id).to(context.device)
    mask = batch.loss_mask[:, 1:]  # (B, T - 1)
    pad, size, temperature = tokenizer.pad_id, config.micro_batch_size, config.temperature
    values = returns = None
    with context.autocast():
        # Computed as the update computes them, so that the first ratio is 1; sampling rounds otherwise.
        logprobs = response_logprobs(models.policy, examples, pad, size, temperature).to(context.device)
        reference = response_logprobs(models.reference, examples, pad, size, temperature).to(context.device)
        if models.value is not None:
            values = response_values(models.value, examples, pad, size).to(context.device)
            values = models.value_scale(values) * mask
    kl = KL_ESTIMATORS[config.kl_estimator](logprobs, reference)
    price = kl_coef if config.kl_in == "reward" else 0.0
    rewards = shape_rewards(kl, scores.to(context.device), mask, price)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, keep_mean=True)
    advantages = finite("advantages", ADVANTAGES[config.advantage](rewards, values, mask, config))
    figures = {
        "objective/score": float(scores.mean()),
        "objective/kl": float((logprobs - reference).sum(1).mean()),  # nats a response
        "objective/entropy": float(-logprobs.sum() / mask.sum()),  # nats a token, by its unbiased estimate
        "objective/length": float(mask.sum(1).float().mean()),
    }
    if values is not None:
        returns = advantages + values
        advantages = masked_whiten(advantages, mask)
        figures["ppo/explained_variance"] = float(explained_variance(values, returns, mask))
    return Experience(batch, mask, logprobs, reference, advantages, values, returns), figures


def _update(
    config: PPOConfig, context: Context, models: Models, experience: Experience, rollout: int, kl_coef: float
) -> dict[str, float]:
    """Epochs of minibatches over one rollout, policy and value model each with its own optimizer."""
    alone = config.value_pretrain_rollouts
    policy_share = schedule(max(0, rollout - alone), config.num_rollouts - alone, config)
    value_share = schedule(rollout, config.num_rollouts, config)
    set_learning_rate(models.optimizers["policy"], config.learning_rate * policy_share)
    policy_fn, value_fn = (
        _policy_fn(config, models, experience, kl_coef),
        _value_fn(config, models, experience),
    )
    averages = Averages()
    first: dict[str, float] = {}
    models.policy.train()
    for number, minibatch in enumerate(minibatches(experience.rows(), rollout, config)):
        context.step = rollout * config.updates_per_rollout + number
        policy_figures: dict[str, tuple[float, float]] = {}
        with _places_in_rollout(minibatch):
            if rollout >= alone:
                policy_figures = optimizer_step(
                    models.policy,
                    models.optimizers["policy"],
                    minibatch,
                    policy_fn,
                    config,
                    context,
                    more=models.ptx.terms(context.step),
                )
                if models.average is not None:
                    models.average.update(models.policy)
            if models.value is not None:
                models.value.train()
                set_learning_rate(models.optimizers["value"], config.value_learning_rate * value_share)
                value_figures = optimizer_step(
                    models.value, models.optimizers["value"], minibatch, value_fn, config, context
                )
                averages.add("ppo/value_loss", *value_figures["loss"])
        for name, (total, count) in policy_figures.items():
            averages.add(POLICY_FIGURES.get(name, name), total, count)
        means = {name: total / count for name, (total, count) in policy_figures.items() if "/" in name}
        first = first or {f"{name}_first": mean for name, mean in means.items()}
        # Summed over all processes, so they all leave at the same minibatch.
        if config.max_update_kl is not None and means.get("ppo/approx_kl", 0.0) > config.max_update_kl:
            break
    return averages.means() | first | {"ppo/updates": number + 1}


@contextmanager
def _places_in_rollout(minibatch: Sequence[ResponseRow]) -> Iterator[None]:
    """Turn the places of an error's rows in a minibatch into those in the rollout."""
    try:
        yield
    except NumericalError as error:
        error.rows = tuple(minibatch[place].index for place in error.rows or range(len(minibatch)))
        raise


def _policy_fn(
    config: PPOConfig, models: Models, experience: Experience, kl_coef: float
) -> Callable[[Sequence[ResponseRow]], StepOutput]:
    """The clipped loss of eq. 7, with KL and entropy as losses of their own where they are asked for."""

    def policy_fn(micro: Sequence[ResponseRow]) -> StepOutput:
        old = experience.part(micro)  # (b, t - 1)
        mask, count = old.mask, float(old.mask.sum())
        entropies = None
        if config.entropy_coef:
            logprobs, entropies = batch_logprobs_and_entropy(models.policy, old.batch, config.temperature)
        else:
            logprobs = batch_logprobs(models.policy, old.batch, config.temperature)
        losses, ratio = policy_loss(
            logprobs, old.logprobs, old.advantages, mask, config.clip_range, config.dual_clip
        )
        if config.kl_in == "loss":
            kl = KL_ESTIMATORS[config.kl_estimator](logprobs, old.reference_logprobs)
            losses = losses + kl_coef * kl_loss(kl, ratio, mask)
        if entropies is not None:
            losses = losses - config.entropy_coef * entropies
        clipped = ((ratio - 1).abs() > config.clip_range) & mask
        approx_kl = masked_sum(kl_k3(old.logprobs, logprobs), mask)
        return StepOutput(
            losses=losses,
            metrics={
                "ppo/ratio": (float(masked_sum(ratio, mask)), count),
                "ppo/clip_fraction": (float(clipped.sum()), count),
                "ppo/approx_kl": (float(approx_kl.detach()), count),
            },
        )

    return policy_fn


def _value_fn(
    config: PPOConfig, models: Models, experience: Experience
) -> Callable[[Sequence[ResponseRow]], StepOutput]:
    """The clipped squared error of the value model."""

    def value_fn(micro: Sequence[ResponseRow]) -> StepOutput:
        old = experience.part(micro)  # (b, t - 1)
        assert models.value is not None and old.values is not None and old.returns is not None
        values = models.value_scale(next_token_scores(models.value, old.batch))
        return StepOutput(
            losses=value_loss(values, old.values, old.returns, old.mask, config.value_clip_range)
        )

    return value_fn


def _gold(context: Context, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """What the embedded world's judge thinks of the responses; for people alone, training never sees it."""
    if context.task.data["data"].kind != "toy":
        return {}
    return {"objective/gold": float(gold_scores(prompts, responses)["overall"].mean())}


def _shown(prompts: Sequence[str], responses: Sequence[str], scores: Tensor) -> list[dict[str, Any]]:
    """A few responses for a person to read."""
    columns = zip(prompts[:NUM_LOGGED], responses, scores.tolist(), strict=False)
    return [{"prompt": prompt, "response": response, "reward": score} for prompt, response, score in columns]
