"""Checks of a configuration that a type cannot make: bounds of one key, and relations between keys of one section.

Config -> `key: what is wrong`, one line each
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from alignpipe.config import (
    PREFERENCE_LOSSES,
    REFERENCE_FREE,
    SCRIPTS,
    SHARDED,
    Config,
    DataConfig,
    DPOConfig,
    EvalConfig,
    FixedPolicyConfig,
    GuidelineConfig,
    LaunchConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    SelectionConfig,
    SFTConfig,
    SharesConfig,
    StageConfig,
    has_reward,
    reward_weights,
)
from alignpipe.errors import ConfigError, did_you_mean, several


def check(config: Config) -> None:
    """Raise one error with every problem found.

    Raises:
        ConfigError: some value is out of its bounds; at most 20 are named.
    """
    found = list(problems(config))
    if found:
        raise ConfigError(several(found))


def problems(config: Any, path: str = "") -> Iterator[str]:
    """Every value out of its bounds, as `key: what is wrong`."""
    is_bounded = True
    for spec in fields(config):
        value = getattr(config, spec.name)
        key = f"{path}.{spec.name}" if path else spec.name
        if is_dataclass(value):
            yield from problems(value, key)
        elif isinstance(value, dict) and value and all(is_dataclass(item) for item in value.values()):
            for name, item in value.items():
                yield from problems(item, f"{key}.{name}")
        elif (complaint := _complaint(value, dict(spec.metadata))) is not None:
            is_bounded = False
            yield f"{key}: {complaint}"
    # They take each value to be one that is allowed, and divide by some.
    if is_bounded:
        yield from _relations(config, path)


def _complaint(value: Any, rule: dict[str, Any]) -> str | None:
    if value is None:
        return None
    if "options" in rule and value not in rule["options"]:
        return f"there is no {value!r} here. {did_you_mean(str(value), rule['options'])}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if rule.get("above") is not None and value <= rule["above"]:
        return f"must be more than {rule['above']}, got {value}"
    if rule.get("min") is not None and value < rule["min"]:
        return f"must be at least {rule['min']}, got {value}"
    if rule.get("max") is not None and value > rule["max"]:
        return f"must be at most {rule['max']}, got {value}"
    return None


def _relations(config: Any, path: str) -> Iterator[str]:
    """Checks between the keys of one section."""
    for kind, relations in RELATIONS:
        if isinstance(config, kind):
            yield from relations(config, f"{path}." if path else "")


def _engine_relations(config: Config, _at: str) -> Iterator[str]:
    stages = {f"stages.{name}": stage for name, stage in config.stages.items()}
    if config.stage is not None:
        stages["stage"] = config.stage
    if config.rollout.engine != "local":
        yield from _trained_while_sampled(config.rollout.engine, stages)
    served = [
        line
        for at, stage in stages.items()
        if isinstance(stage, FixedPolicyConfig) and stage.rollout.engine != "local"
        for line in _served(stage, at)
    ]
    yield from dict.fromkeys(served)


def _compile_relations(config: Config, _at: str) -> Iterator[str]:
    if not config.model.compile:
        return
    if config.adapter.kind != "none":
        yield f"model.compile: not with adapter={config.adapter.kind}, whose roles share their blocks; leave one out"
    if config.launch.strategy in SHARDED:
        yield f"model.compile: not with launch={config.launch.strategy}, whose blocks gather weights; leave one out"


def _trust_relations(config: ModelConfig, at: str) -> Iterator[str]:
    trusted = config.trust_remote_code
    if trusted is not None and trusted != config.path:
        yield (
            f"{at}trust_remote_code: {trusted} is not the model that is opened; trust {at}path={config.path} by that "
            f"name if you have read its code, or leave it out"
        )


def _trained_while_sampled(engine: str, stages: dict[str, StageConfig]) -> Iterator[str]:
    asking = [f"{at}.rollout.engine={engine}" for at, stage in stages.items() if _can_be_served(stage)]
    for at in (at for at, stage in stages.items() if isinstance(stage, PPOConfig)):
        other = f" and say {' '.join(asking)}" if asking else ""
        yield (
            f"rollout.engine: {engine} answers with weights that stand still, and {at} trains its policy after every "
            f"rollout; leave rollout.engine=local{other}"
        )


def _can_be_served(stage: StageConfig) -> bool:
    return isinstance(stage, FixedPolicyConfig) and not (
        isinstance(stage, EvalConfig) and len(_contestants(stage)) > 1
    )


def _contestants(stage: EvalConfig) -> set[str]:
    return {*stage.policies, *([stage.win_rate_against] if stage.win_rate_against is not None else [])}


def _served(stage: FixedPolicyConfig, at: str) -> Iterator[str]:
    url = stage.rollout.url
    if url is None:
        yield "rollout.url: rollout.engine=openai asks a server; say where it is: rollout.url=http://HOST:PORT/v1"
    elif not _is_plain_url(url):
        yield (
            "rollout.url: must be http://HOST:PORT/v1 or https://..., with no user, password, ? or # in it; "
            "a key goes into the environment as ALIGNPIPE_ROLLOUT_API_KEY"
        )
    if isinstance(stage, EvalConfig) and not _can_be_served(stage):
        names = ", ".join(sorted(_contestants(stage)))
        yield (
            f"{at}.rollout.engine: a server answers for one policy, {at} asks {names}; set {at}.rollout.engine=local, "
            f"or name one policy in {at}.policies"
        )


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return has_host and parts.scheme in ("http", "https") and not set("@?#") & set(url)


def _shares_relations(config: SharesConfig, at: str) -> Iterator[str]:
    total = config.sft + config.preference + config.rl + config.eval
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        yield f"{at.removesuffix('.')}: the four fractions must add up to 1, they make {total:g}"


def _guideline_relations(config: GuidelineConfig, at: str) -> Iterator[str]:
    if config.helpful + config.truthful + config.harmless <= 0:
        yield f"{at.removesuffix('.')}: at least one weight must be above 0"


def _mixture_relations(config: DataConfig, at: str) -> Iterator[str]:
    for name, weight in config.mixture.items():
        if not (math.isfinite(weight) and weight > 0):
            yield f"{at}mixture.{name}: the weight must be a number above 0, got {weight}; leave it out instead"


def _batch_relations(config: OptimizerConfig, at: str) -> Iterator[str]:
    if config.batch_size % min(config.micro_batch_size, config.batch_size):
        near = _nearest_multiples(config.batch_size, config.micro_batch_size)
        yield (
            f"{at}batch_size: {config.batch_size} is no multiple of micro_batch_size "
            f"{config.micro_batch_size}; nearest: {near}"
        )


def _monitor_relations(config: MonitorConfig, at: str) -> Iterator[str]:
    if config.action == "restore" and config.judge == "none":
        yield f"{at}action: restore goes back to what a judge liked best; give {at}judge, or take stop"


def _rm_relations(config: RMConfig, at: str) -> Iterator[str]:
    if config.loss == "plackett_luce":
        # A pair's margin, label and tie mean nothing to the likelihood of a whole order.
        for key, plain_value in (("margin", "none"), ("label_smoothing", 0), ("ties", "drop")):
            if getattr(config, key) != plain_value:
                yield f"{at}{key}: is of pairs; loss=plackett_luce has none, so set {key}={plain_value} or loss=kwise"


def _ppo_relations(config: PPOConfig, at: str) -> Iterator[str]:
    if config.rollout_size * config.num_samples % config.batch_size:
        yield (
            f"{at}rollout_size: {config.rollout_size} prompts x {config.num_samples} samples "
            f"must be a multiple of batch_size {config.batch_size}"
        )
    if config.advantage in ("rloo", "grpo") and config.num_samples < 2:
        yield (
            f"{at}num_samples: {config.advantage} compares the responses to one prompt, so it needs at least 2, "
            f"got {config.num_samples}"
        )
    if config.kl_in == "loss" and config.kl_estimator == "k1":
        yield (
            f"{at}kl_estimator: the gradient of k1 as a loss is zero on average; take k2 (that of k1 in the reward) or "
            f"k3, or {at}kl_in=reward"
        )
    if config.value_pretrain_rollouts > 0 and not config.has_value_model:
        yield f"{at}value_pretrain_rollouts: advantage={config.advantage} has no value model; set it to 0"
    if config.value_pretrain_rollouts >= config.num_rollouts:
        yield (
            f"{at}value_pretrain_rollouts: {config.value_pretrain_rollouts} of num_rollouts {config.num_rollouts} "
            f"leave none for the policy; lower it"
        )


def _sft_relations(config: SFTConfig, at: str) -> Iterator[str]:
    wants = {"select_epoch": config.select_epoch, "selection.method": config.selection.method}
    for key, word in wants.items():
        if word == "reward" and config.reward_model is None:
            yield (
                f"{at}reward_model: {key}=reward needs one; name it: {at}reward_model=latest/rm (the newest one), "
                f"RUN/rm or a folder"
            )
    if config.select_epoch != "last" and config.eval_rows == 0:
        yield f"{at}eval_rows: select_epoch={config.select_epoch} looks at held-out rows; give it some"


def _selection_relations(config: SelectionConfig, at: str) -> Iterator[str]:
    for script in config.scripts:
        if script not in SCRIPTS:
            yield f"{at}scripts: there is no script {script!r} here. {did_you_mean(script, SCRIPTS)}"
    if config.keep < 1 and not config.ranks:
        yield f"{at}keep: {config.keep:g} of the rows, chosen by what? Set {at}method or {at}diversity"
    if (config.min_tokens or 0) > (config.max_tokens or math.inf):
        yield f"{at}min_tokens: {config.min_tokens} is more than max_tokens {config.max_tokens}"


def _rs_relations(config: RSConfig, at: str) -> Iterator[str]:
    wanted = {"top_k": "top_k", "rso": "num_accepted"}.get(config.select)
    if wanted is not None and not config.pool and getattr(config, wanted) > config.num_samples:
        yield (
            f"{at}{wanted}: {getattr(config, wanted)} responses a prompt are to be kept, num_samples is only "
            f"{config.num_samples}; lower the one or raise the other"
        )
    if config.min_response_length >= config.max_response_length:
        yield (
            f"{at}min_response_length: {config.min_response_length} must be less than max_response_length "
            f"{config.max_response_length}"
        )


def _loss_relations(config: DPOConfig, at: str) -> Iterator[str]:
    if config.loss not in PREFERENCE_LOSSES:
        return
    reads = PREFERENCE_LOSSES[config.loss]
    for key in dict.fromkeys(key for keys in PREFERENCE_LOSSES.values() for key in keys):
        given = getattr(config, key) is not None
        if given and key not in reads:
            readers = " or ".join(f"loss={loss}" for loss, keys in PREFERENCE_LOSSES.items() if key in keys)
            yield f"{at}{key}: loss={config.loss} does not read it; leave it out, or take {readers}"
        if not given and key in reads:
            yield f"{at}{key}: loss={config.loss} needs it; give a number, or leave the key out for the usual one"
    if config.reference is None and config.loss not in REFERENCE_FREE:
        free = " or ".join(f"loss={loss}" for loss in REFERENCE_FREE)
        yield f"{at}reference: loss={config.loss} needs one; name a policy, or take {free}"


def _reward_relations(config: RSConfig | PPOConfig | EvalConfig, at: str) -> Iterator[str]:
    reward, weights = config.reward, reward_weights(config)
    for name, weight in reward.models.items():
        if not math.isfinite(weight):
            yield f"{at}reward.models.{name}: must be a finite number, got {weight}"
    if not has_reward(config) and (not isinstance(config, EvalConfig) or reward.gate.model is not None):
        yield (
            f"{at}reward_model: is null and nothing stands in its place; name a reward model, "
            f"or {at}reward.function=FILE.py:NAME"
        )
    elif isinstance(config, PPOConfig) and config.reward_model is None and config.has_value_model:
        yield (
            f"{at}reward_model: is null, but the value model of advantage=gae starts from it; take {at}advantage=rloo "
            f"(or grpo, reinforce_pp), or name one, with {at}reward.models.NAME=0 where it shall not count"
        )
    # Of one reward model the heads are the members that mean_minus_std hears.
    members = 1 if reward.ensemble == "mean_minus_std" else 2
    if reward.ensemble != "sum" and (len(weights) < members or min(weights.values()) <= 0):
        yield (
            f"{at}reward.ensemble: {reward.ensemble} needs two reward models or more, each with a weight above 0, "
            f"got {weights or 'none'}; name them in {at}reward.models"
        )


def _launch_relations(config: LaunchConfig, at: str) -> Iterator[str]:
    processes = config.num_processes
    if config.strategy == "single" and (config.num_machines > 1 or (processes or 1) > 1):
        yield f"{at}num_processes: launch=single is one process; take launch=ddp or launch=fsdp2 for {processes}"
    if processes is not None and processes % config.num_machines:
        near = _nearest_multiples(processes, config.num_machines)
        yield (
            f"{at}num_processes: {processes} over all machines is no multiple of num_machines "
            f"{config.num_machines}; nearest: {near}"
        )
    if config.num_machines > 1 and processes is None:
        yield f"{at}num_processes: say how many, over all {config.num_machines} machines"
    if config.num_machines > 1 and config.rendezvous is None:
        yield f"{at}rendezvous: {config.num_machines} machines need HOST:PORT of the first one"
    if config.machine_rank >= config.num_machines:
        yield (
            f"{at}machine_rank: {config.machine_rank} must be below num_machines {config.num_machines}; the first is 0"
        )
    if config.optimizer_offload and config.strategy in SHARDED:
        yield (
            f"{at}optimizer_offload: {config.strategy} cuts the moments over the processes already; "
            f"leave one of the two out"
        )
    if config.device == "mps" and (processes or 1) > 1:
        yield f"{at}num_processes: mps is one device, got {processes}"


def _nearest_multiples(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else str(above)


# Every section of a type is held against its function.
RELATIONS: tuple[tuple[type, Callable[[Any, str], Iterator[str]]], ...] = (
    (Config, _engine_relations),
    (Config, _compile_relations),
    (ModelConfig, _trust_relations),
    (SharesConfig, _shares_relations),
    (GuidelineConfig, _guideline_relations),
    (DataConfig, _mixture_relations),
    (LaunchConfig, _launch_relations),
    (MonitorConfig, _monitor_relations),
    (OptimizerConfig, _batch_relations),
    (SelectionConfig, _selection_relations),
    (SFTConfig, _sft_relations),
    (RMConfig, _rm_relations),
    (RSConfig, _reward_relations),
    (PPOConfig, _reward_relations),
    (EvalConfig, _reward_relations),
    (RSConfig, _rs_relations),
    (DPOConfig, _loss_relations),
    (PPOConfig, _ppo_relations),
)
