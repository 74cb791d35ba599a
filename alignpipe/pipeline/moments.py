"""The moments of each stage at which its memory can be at its highest: what it holds then, and what it computes.

config of a stage, shapes of its models, lengths of its rows, launch -> moments -> the peak
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from alignpipe.config import (
    UNPAIRED,
    CollectConfig,
    DPOConfig,
    EvalConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    SFTConfig,
)
from alignpipe.pipeline.activations import WIDE, Batch, Role, Setting
from alignpipe.pipeline.architecture import Architecture
from alignpipe.pipeline.memory import (
    Memory,
    Work,
    check_moment,
    heaviest_rows,
    held_memory,
    micro_rows,
    sampling_moments,
    scoring_moment,
    training_batches,
    training_moments,
)


def stage_moments(config: Any, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    """The moments of a stage at which its memory can be at its highest.

    Args:
        config: of the stage.
        models: shapes by role (`policy`, `reference`, `reward_model`); those of eval are `policy` too.
        work: its rows.
        setting: launch and adapter.
    """
    return MOMENTS[config.kind](config, models, work, setting)


def _rewards(models: dict[str, Architecture]) -> list[Role]:
    """The frozen reward models of a stage: `reward_model`, `reward_0`, ..."""
    return [Role(shape, num_heads=1) for role, shape in models.items() if role.startswith("reward_")]


def _sft(config: SFTConfig, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    """A reward model that chooses the epoch stays through training; those that select rows are gone before it."""
    policy = Role(models["policy"])
    batches = training_batches(config, work, setting)
    reward = [Role(models["reward_model"], num_heads=1)] if "reward_model" in models else []
    asked = [Role(models["selection_model"])] if "selection_model" in models else []
    held = held_memory(setting, trained=[policy], frozen=reward if config.select_epoch == "reward" else [])
    alone = replace(held, optimizer=0.0)
    judges = (
        [*(reward if config.selection.method == "reward" else []), *asked] if config.selection.ranks else []
    )
    selecting = replace(held_memory(setting, trained=[policy], frozen=judges), optimizer=0.0)
    looking = config.eval_rows if config.select_epoch == "reward" else 0
    return [
        *([scoring_moment(selecting, judges[-1], batches[0], setting)] if judges else []),
        *(
            sampling_moments(held, policy, config, config.max_prompt_length, looking, 1, setting)
            if looking
            else []
        ),
        *training_moments(held, policy, batches, setting),
        *sampling_moments(alone, policy, config, config.max_prompt_length, config.num_samples, 1, setting),
        check_moment(alone, policy, setting),
    ]


def _rm(config: RMConfig, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    model = Role(models["policy"], config.num_heads)
    held = held_memory(setting, trained=[model])
    batches = training_batches(config, work, setting, work.responses)
    return [
        *training_moments(held, model, batches, setting),
        check_moment(replace(held, optimizer=0.0), model, setting),
    ]


def _dpo(config: DPOConfig, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    """The reference is gone before the policy is opened: its log-probs are computed once and kept.

    A monitor opens it again.
    """
    policy = Role(models["policy"])
    references = [Role(models[role]) for role in models if role == "reference"]
    batches = training_batches(config, work, setting, 1 if config.loss in UNPAIRED else 2)
    watching = _watching(config, models, references[0] if references else policy)
    held = held_memory(setting, trained=[policy], frozen=watching)
    alone = replace(held_memory(setting, trained=[policy]), optimizer=0.0)
    return [
        *(
            scoring_moment(held_memory(setting, frozen=[model]), model, batches[0], setting)
            for model in references
        ),
        *training_moments(held, policy, batches, setting),
        *_looks(config, held, policy, setting),
        *sampling_moments(alone, policy, config, config.max_prompt_length, config.num_samples, 1, setting),
        check_moment(alone, policy, setting),
    ]


def _rs(config: RSConfig, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    """The reward models stay in memory while their choices are learnt."""
    policy, rewards = Role(models["policy"]), _rewards(models)
    before = replace(held_memory(setting, trained=[policy]), optimizer=0.0)
    held = held_memory(setting, trained=[policy], frozen=[*rewards, *_watching(config, models, policy)])
    batches = _response_batches(config, work, setting)
    if config.replay:
        # At the worst every token of a demonstration is learnt.
        batches = [replace(batch, learnt=batch.length) for batch in batches]
    longest = min(work.longest, config.max_prompt_length) + config.max_response_length
    scored = Batch(config.micro_batch_size, longest)
    return [
        *sampling_moments(
            before, policy, config, work.longest, config.num_prompts, config.num_samples, setting
        ),
        *(scoring_moment(replace(held, optimizer=0.0), reward, scored, setting) for reward in rewards),
        *training_moments(held, policy, batches, setting),
        *_looks(config, held, policy, setting),
        check_moment(replace(held, optimizer=0.0), policy, setting),
    ]


def _ppo(config: PPOConfig, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    """Four models and two optimizers at once, three and one without a value model; one learns at a time."""
    policy, reference = Role(models["policy"]), Role(models["reference"])
    trained = [policy]
    frozen = [reference, *_rewards(models), *_watching(config, models, reference)[1:]]
    # It starts as the reward model.
    value = Role(models.get("reward_model", models["policy"]), num_heads=1)
    if config.has_value_model:
        trained.append(value)
    held = held_memory(setting, trained=trained, frozen=frozen)
    prompt = min(work.longest, config.max_prompt_length)
    length = prompt + config.max_response_length
    # Every process holds the whole rollout, so that all whiten it alike.
    responses = config.rollout_size * config.num_samples
    # ids, mask; log-probs, values, advantages, returns, and rewards and both log-probs while they are made.
    held = held.plus("", other=responses * length * (8 + 1 + 7 * WIDE))
    if config.ema_decay is not None:
        held = held.plus("", weights=WIDE * policy.own(setting) * setting.share)
    batches = _response_batches(config, work, setting)
    moments = [
        *sampling_moments(held, policy, config, prompt, config.rollout_size, config.num_samples, setting),
        *_looks(config, held, policy, setting),
        scoring_moment(held, policy, batches[0], setting),
        *_policy_update(held, policy, batches, config, setting),
        check_moment(held, policy, setting),
    ]
    if config.has_value_model:
        moments.append(scoring_moment(held, value, batches[0], setting))
        moments += training_moments(held, value, batches, setting)
    return moments


def _response_batches(config: RSConfig | PPOConfig, work: Work, setting: Setting) -> list[Batch]:
    """The heaviest forwards over responses of the greatest length."""
    rows, response = micro_rows(config, setting), config.max_response_length
    return [
        Batch(rows, min(row.tokens, config.max_prompt_length) + response, response, adds=adds)
        for adds, row in heaviest_rows(config, work, setting).items()
    ]


def _policy_update(
    held: Memory, policy: Role, batches: Sequence[Batch], config: PPOConfig, setting: Setting
) -> list[Memory]:
    """An update of the policy, with the rows of PPO-ptx and the gradient of the entropy where they are asked for."""
    if config.ptx_coef > 0:
        # Its rows come in passes of their own, with gradients there already; at the worst every token is learnt.
        batches = [replace(batch, learnt=batch.length, adds=True) for batch in batches]
    learner = replace(policy, entropy=config.entropy_coef > 0)
    return training_moments(held, learner, batches, setting)


def _watching(
    config: PPOConfig | DPOConfig | RSConfig, models: dict[str, Architecture], reference: Role
) -> list[Role]:
    """What a monitor holds: the model that KL is taken against, and a judge that is a reward model."""
    if config.monitor.action == "none":
        return []
    return [reference, *([Role(models["judge"], num_heads=1)] if "judge" in models else [])]


def _looks(
    config: PPOConfig | DPOConfig | RSConfig, held: Memory, policy: Role, setting: Setting
) -> list[Memory]:
    """A monitor samples while the moments of AdamW wait."""
    monitor = config.monitor
    prompts = 0 if monitor.action == "none" else monitor.num_prompts
    longest = config.max_prompt_length
    return sampling_moments(held, policy, config, longest, prompts, monitor.num_samples, setting)


def _collect(
    config: CollectConfig, models: dict[str, Architecture], work: Work, setting: Setting
) -> list[Memory]:
    policy = Role(models["policy"])
    held = replace(held_memory(setting, trained=[policy]), optimizer=0.0)
    return sampling_moments(
        held, policy, config, work.longest, config.num_prompts, config.num_samples, setting
    )


def _eval(config: EvalConfig, models: dict[str, Architecture], work: Work, setting: Setting) -> list[Memory]:
    """One policy at a time beside the reward model, then the reference in its place."""
    policy = Role(models["policy"])
    rewards = _rewards(models)
    held = replace(held_memory(setting, trained=[policy], frozen=rewards), optimizer=0.0)
    length = min(work.longest, config.max_prompt_length) + config.max_response_length
    batch = Batch(config.generation_batch_size, length, config.max_response_length)
    moments = sampling_moments(
        held, policy, config, work.longest, config.num_prompts, config.num_samples, setting
    )
    moments += [scoring_moment(held, role, batch, setting) for role in rewards]
    if "reference" in models:
        reference = Role(models["reference"])
        beside = held_memory(setting, frozen=[*rewards, reference])
        moments.append(scoring_moment(held, policy, batch, setting))
        moments.append(scoring_moment(beside, reference, batch, setting))
    if config.text_rows:
        # As many tokens as a batch of the longest responses has, all of them learnt where the text is documents.
        longest = config.max_length
        room = config.generation_batch_size * (config.max_prompt_length + config.max_response_length)
        rows = min(config.text_rows, max(1, room // longest))
        moments.append(scoring_moment(held, policy, Batch(rows, longest, longest), setting))
    return moments


MOMENTS: dict[str, Callable[..., list[Memory]]] = {
    "sft": _sft,
    "rm": _rm,
    "dpo": _dpo,
    "rs": _rs,
    "ppo": _ppo,
    "collect": _collect,
    "eval": _eval,
}
