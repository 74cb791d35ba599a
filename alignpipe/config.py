"""The typed schema of every group in conf/, and the checks a type cannot make.

YAML -> Hydra -> these dataclasses. Every default stands in conf/, so a field here has a type, a check and
`MISSING`; the only defaults are those that say where a value is inherited from. Nothing in a configuration
names code to run: a stage is chosen by its `kind`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING

from alignpipe.errors import ConfigError, did_you_mean

BASE = "base"
TOY = "toy"
# Words of a judge; every other one names a reward model.
JUDGES = ("auto", TOY, "none")
TINY = "tiny"
# Strategies under which no process holds all weights.
SHARDED = ("fsdp2", "zero2", "zero3")
LATEST = "latest"
FORMATS = (
    "auto",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "preference",
    "ranked",
    "prompts",
    "text",
)
SHARES = ("sft", "preference", "rl", "eval")
# As the first word of a letter's name in Unicode.
SCRIPTS = (
    "latin",
    "greek",
    "cyrillic",
    "arabic",
    "hebrew",
    "devanagari",
    "bengali",
    "tamil",
    "thai",
    "hangul",
    "hiragana",
    "katakana",
    "cjk",
)
# Their figures stand in pipeline/accelerators.py.
ACCELERATORS = ("a100", "h100", "h200", "l40s", "rtx4090", "mi300x")


def number(
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    in_key: bool = True,
) -> Any:
    """A numeric field with its bounds; `in_key=False` when the value cannot change a stage's result."""
    return field(default=MISSING, metadata={"above": above, "min": minimum, "max": maximum, "in_key": in_key})


def choice(*options: str, in_key: bool = True) -> Any:
    """A text field that takes one of a few words."""
    return field(default=MISSING, metadata={"options": options, "in_key": in_key})


def plain(*, in_key: bool = True) -> Any:
    """A field without a check of its own."""
    return field(default=MISSING, metadata={"in_key": in_key})


@dataclass
class ColumnsConfig:
    """Which column of the user's file holds which field; null means the usual names are tried."""

    prompt: str | None = plain()
    response: str | None = plain()
    chosen: str | None = plain()
    rejected: str | None = plain()
    responses: str | None = plain()
    ranks: str | None = plain()
    margin: str | None = plain()
    messages: str | None = plain()
    instruction: str | None = plain()
    input: str | None = plain()
    text: str | None = plain()
    system: str | None = plain()


@dataclass
class SharesConfig:
    """Fractions into which prompts are split, once, by a hash of their text."""

    sft: float = number(minimum=0, maximum=1)
    preference: float = number(minimum=0, maximum=1)
    rl: float = number(minimum=0, maximum=1)
    eval: float = number(above=0, maximum=0.5)


@dataclass
class GuidelineConfig:
    """What the labelers are told to weigh."""

    helpful: float = number(minimum=0)
    truthful: float = number(minimum=0)
    harmless: float = number(minimum=0)


@dataclass
class BiasConfig:
    """What the labelers reward without being told to, in units of the gold score."""

    length: float = number()
    flattery: float = number()
    # Loss of a response that refuses or admits not to know.
    confidence: float = number()
    # Standard deviation between labelers of their own weights on the guideline.
    subjectivity: float = number(minimum=0)


@dataclass
class LabelersConfig:
    """The simulated people who rank responses on the embedded world."""

    num_labelers: int = number(minimum=1, maximum=100)
    noise: float = number(minimum=0)
    tie_margin: float = number(minimum=0)
    guideline: GuidelineConfig = field(default_factory=GuidelineConfig)
    bias: BiasConfig = field(default_factory=BiasConfig)


@dataclass
class WorldConfig:
    """Size and make-up of the embedded world."""

    seed: int = number(minimum=0, maximum=2**32 - 1)
    num_prompts: int = number(minimum=200)
    num_demonstrations: int = number(minimum=1)
    # Share of demonstrations that are good answers.
    quality: float = number(minimum=0, maximum=1)
    # Weight of each kind of prompt.
    mix: dict[str, float] = plain()


@dataclass
class DataConfig:
    """A data set, and how its rows become records."""

    path: str = plain(in_key=False)
    format: str = choice(*FORMATS)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    split: str = plain()
    revision: str | None = plain(in_key=False)
    max_rows: int | None = number(minimum=1)
    max_bad: float = number(minimum=0, maximum=1)
    on_overflow: str = choice("drop", "cut", "error")
    # Path -> weight; in the key by what the paths hold.
    mixture: dict[str, float] = plain(in_key=False)
    mixture_stopping: str = choice("first_exhausted", "all_exhausted")
    shares: SharesConfig = field(default_factory=SharesConfig)
    labelers: LabelersConfig = field(default_factory=LabelersConfig)
    world: WorldConfig = field(default_factory=WorldConfig)


def inherited(schema: Any, root: str) -> Any:
    """An instance of `schema` in which each leaf is an interpolation of the same leaf below `root`."""
    leaves = {}
    for spec in fields(schema):
        nested = spec.default_factory() if callable(spec.default_factory) else None
        at = f"{root}.{spec.name}"
        leaves[spec.name] = inherited(type(nested), at) if is_dataclass(nested) else II(at)
    return schema(**leaves)


def _root_data() -> Any:
    """The data of one stage: the root's, but for what the stage says."""
    return inherited(DataConfig, "data")


@dataclass
class ArchitectureConfig:
    """Shape of a Llama (arXiv:2302.13971) that is built from nothing; read when `model.path` is `tiny`."""

    hidden_size: int = number(minimum=8)
    intermediate_size: int = number(minimum=8)
    num_layers: int = number(minimum=1)
    num_heads: int = number(minimum=1)
    seed: int = number(minimum=0, maximum=2**32 - 1)


@dataclass
class AdapterSizeConfig:
    """What of an adapter depends on the size of the model under it; `adapter` reads it by interpolation."""

    rank: int = number(minimum=1)
    alpha: float = number(above=0)
    learning_rate_scale: float = number(above=0)


@dataclass
class ModelConfig:
    """A base model and what depends on its size."""

    path: str = plain(in_key=False)
    revision: str | None = plain(in_key=False)
    chat_template: str = plain()
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    attn_implementation: str = choice("sdpa", "eager", "flash_attention_2", in_key=False)
    max_length: int = number(minimum=8)
    max_prompt_length: int = number(minimum=1)
    max_response_length: int = number(minimum=1)
    adapter: AdapterSizeConfig = field(default_factory=AdapterSizeConfig)
    # Per kind of stage: values that conf/stage/*.yaml read by interpolation.
    training: dict[str, Any] = plain()


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    temperature: float = number(above=0)
    batch_size: int = number(minimum=1, in_key=False)


@dataclass
class LaunchConfig:
    """What the run runs on, and how a stage is spread over processes; only `precision` decides a result."""

    strategy: str = choice("auto", "single", "ddp", "fsdp2", "zero2", "zero3", in_key=False)
    device: str = choice("auto", "cpu", "cuda", "mps", in_key=False)
    precision: str = choice("fp32", "bf16", "fp16")
    # Over all machines, as accelerate counts them.
    num_processes: int | None = number(minimum=1, in_key=False)
    num_machines: int = number(minimum=1, in_key=False)
    machine_rank: int = number(minimum=0, in_key=False)
    rendezvous: str | None = plain(in_key=False)
    # Seconds.
    timeout: float = number(above=0, in_key=False)
    generation_gather: str = choice("layer", "rollout", in_key=False)
    gradient_checkpointing: bool = plain(in_key=False)
    activation_offload: bool = plain(in_key=False)
    optimizer_offload: bool = plain(in_key=False)
    accelerator: str | None = choice(*ACCELERATORS, in_key=False)


@dataclass
class AdapterConfig:
    """Low-rank adapters in place of whole weights (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314)."""

    kind: str = choice("none", "lora", "qlora")
    rank: int = number(minimum=1)
    alpha: float = number(above=0)
    learning_rate_scale: float = number(above=0)
    target_modules: list[str] = plain()
    handover: str = choice("keep", "merge")


@dataclass
class RunConfig:
    """The run's own name."""

    name: str | None = plain()


@dataclass
class SweepConfig:
    """The sweep's own name."""

    name: str | None = plain()


@dataclass
class PipelineConfig:
    """A chain of stages, by name, in the order they run."""

    name: str = plain()
    order: list[str] = plain()


@dataclass
class GateConfig:
    """A reward model that is heard alone where it thinks ill of a response (arXiv:2307.09288, 3.2.3)."""

    model: str | None = plain()
    below: float = number(above=0, maximum=0.999999)


@dataclass
class RewardConfig:
    """What a reward is made of, beside the one `reward_model`."""

    # In a key by its content, see pipeline/functions.py.
    function: str | None = plain(in_key=False)
    function_weight: float = number()
    # Name -> weight; by name in a key too, since figures bear the names.
    models: dict[str, float] = plain()
    ensemble: str = choice("sum", "mean", "mean_minus_std")
    uncertainty_penalty: float = number(minimum=0)
    gate: GateConfig = field(default_factory=GateConfig)


class Rewarded(Protocol):
    """Any section that says what a reward is."""

    reward_model: str | None
    reward: RewardConfig


def reward_models(config: Rewarded, prefix: str = "") -> dict[str, str]:
    """Role -> name of every reward model that a section names, each once; `reward_model` keeps its role."""
    named = [*config.reward.models, *([config.reward.gate.model] if config.reward.gate.model else [])]
    others = [name for name in dict.fromkeys(named) if name != config.reward_model]
    first = {} if config.reward_model is None else {f"{prefix}reward_model": config.reward_model}
    return first | {f"{prefix}reward_{index}": name for index, name in enumerate(others)}


def reward_weights(config: Rewarded) -> dict[str, float]:
    """Name -> weight of the reward models that are summed; `reward_model` counts 1 unless `models` says otherwise."""
    alone = {} if config.reward_model is None else {config.reward_model: 1.0}
    return alone | config.reward.models


def is_composed(reward: RewardConfig) -> bool:
    """Whether a reward is anything but the score of `reward_model`."""
    return reward.function is not None or bool(reward.models) or reward.gate.model is not None


def has_reward(config: Rewarded) -> bool:
    """Whether there is anything to reward responses by."""
    return config.reward.function is not None or bool(reward_weights(config))


@dataclass
class StageConfig:
    """What every stage has."""

    kind: str = plain()
    seed: int = number(minimum=0, maximum=2**32 - 1)
    data: DataConfig = field(default_factory=_root_data)


@dataclass
class MonitorConfig:
    """What a held-out judge watches for while a policy is trained, and what then happens."""

    action: str = choice("none", "warn", "stop", "restore")
    judge: str = plain()
    num_prompts: int = number(minimum=8)
    num_samples: int = number(minimum=1)
    max_fall: float | None = number(minimum=0)
    confidence: float = number(minimum=0.5, maximum=0.9999)
    max_length_ratio: float | None = number(above=1)
    min_entropy_ratio: float | None = number(above=0, maximum=1)
    max_repetition: float | None = number(above=0, maximum=1)
    max_kl: float | None = number(above=0)


@dataclass
class StageMonitorConfig(MonitorConfig):
    """The same in one stage, with how often it looks: in rollouts of ppo, in steps of the others."""

    every: int = number(minimum=1)


def _root_monitor() -> Any:
    """The monitor of one stage: the root's, but for what the stage says."""
    return StageMonitorConfig(**{spec.name: II(f"monitor.{spec.name}") for spec in fields(MonitorConfig)})


@dataclass
class SamplingConfig(StageConfig):
    """A stage that samples responses to prompts."""

    max_prompt_length: int = number(minimum=1)
    max_response_length: int = number(minimum=1)
    temperature: float = number(above=0)
    generation_batch_size: int = number(minimum=1, in_key=False)


@dataclass
class OptimizerConfig(StageConfig):
    """AdamW (arXiv:1711.05101) with warm-up, and how often a stage looks up from training."""

    learning_rate: float = number(above=0)
    lr_schedule: str = choice("cosine", "linear", "constant")
    warmup_ratio: float = number(minimum=0, maximum=1)
    min_lr_ratio: float = number(minimum=0, maximum=1)
    weight_decay: float = number(minimum=0)
    adam_beta1: float = number(minimum=0, maximum=0.99999)
    adam_beta2: float = number(minimum=0, maximum=0.99999)
    adam_epsilon: float = number(above=0)
    max_grad_norm: float = number(above=0)
    batch_size: int = number(minimum=1)
    micro_batch_size: int = number(minimum=1, in_key=False)
    save_steps: int = number(minimum=1, in_key=False)
    log_steps: int = number(minimum=1, in_key=False)


@dataclass
class TrainingConfig(OptimizerConfig):
    """Training over a fixed set of rows, with held-out rows to look at."""

    epochs: float = number(above=0)
    max_steps: int | None = number(minimum=1)
    max_length: int = number(minimum=2)
    eval_steps: int | None = number(minimum=1)
    eval_rows: int = number(minimum=0)


@dataclass
class SelectionConfig:
    """Which demonstrations are worth training on."""

    drop_duplicates: bool = plain()
    # Jaccard similarity from which a row is a near duplicate.
    near_duplicates: float | None = number(above=0, maximum=1)
    min_tokens: int | None = number(minimum=1)
    max_tokens: int | None = number(minimum=1)
    scripts: list[str] = plain()
    min_script_share: float = number(minimum=0, maximum=1)
    method: str = choice("none", "random", "perplexity", "ifd", "reward")
    diversity: str = choice("none", "kcenter")
    keep: float = number(above=0, maximum=1)

    @property
    def ranks(self) -> bool:
        """Whether rows are held against each other, rather than each against bounds."""
        return self.method != "none" or self.diversity != "none"

    @property
    def is_on(self) -> bool:
        """Whether any row could be left out."""
        bounds = (self.near_duplicates, self.min_tokens, self.max_tokens)
        refuses = self.drop_duplicates or bool(self.scripts) or any(bound is not None for bound in bounds)
        return refuses or self.ranks


@dataclass
class SFTConfig(TrainingConfig, SamplingConfig):
    """Supervised fine-tuning."""

    policy: str = plain(in_key=False)
    reward_model: str | None = plain(in_key=False)
    selection_model: str | None = plain(in_key=False)
    loss_on: str = choice("response", "last", "all")
    neftune_alpha: float = number(minimum=0)
    select_epoch: str = choice("last", "loss", "reward")
    num_samples: int = number(minimum=0)
    selection: SelectionConfig = field(default_factory=SelectionConfig)


@dataclass
class RMConfig(TrainingConfig):
    """Reward model."""

    policy: str = plain(in_key=False)
    demonstrations: DataConfig = field(default_factory=_root_data)
    # Its content is in the key, not where it lies.
    benchmark: str | None = plain(in_key=False)
    loss: str = choice("kwise", "plackett_luce")
    margin: str = choice("none", "column", "rank", "gold")
    margin_degrees: str = choice("small", "large")
    margin_scale: float = number(above=0)
    label_smoothing: float = number(minimum=0, maximum=0.49)
    ties: str = choice("drop", "half")
    centering: float = number(minimum=0)
    num_heads: int = number(minimum=1, maximum=64)
    stress_rows: int = number(minimum=0)


@dataclass
class DPOConfig(TrainingConfig, SamplingConfig):
    """Direct preference optimization."""

    policy: str = plain(in_key=False)
    reference: str = plain(in_key=False)
    beta: float = number(above=0)
    num_samples: int = number(minimum=0)
    monitor: StageMonitorConfig = field(default_factory=_root_monitor)


@dataclass
class RSConfig(TrainingConfig, SamplingConfig):
    """Rejection sampling: sample, keep the best, fine-tune on it."""

    policy: str = plain(in_key=False)
    reward_model: str | None = plain(in_key=False)
    reward: RewardConfig = field(default_factory=RewardConfig)
    demonstrations: DataConfig = field(default_factory=_root_data)
    num_prompts: int | None = number(minimum=1)
    num_samples: int = number(minimum=2)
    replay: float = number(minimum=0, maximum=0.9)
    monitor: StageMonitorConfig = field(default_factory=_root_monitor)


@dataclass
class PPOConfig(OptimizerConfig, SamplingConfig):
    """Proximal policy optimization."""

    policy: str = plain(in_key=False)
    reference: str = plain(in_key=False)
    reward_model: str | None = plain(in_key=False)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ptx_data: DataConfig = field(default_factory=_root_data)
    advantage: str = choice("gae", "rloo", "grpo", "reinforce_pp")
    grpo_std: bool = plain()
    num_rollouts: int = number(minimum=1)
    rollout_size: int = number(minimum=2)
    num_samples: int = number(minimum=1)
    ppo_epochs: int = number(minimum=1)
    value_learning_rate: float = number(above=0)
    value_pretrain_rollouts: int = number(minimum=0)
    kl_coef: float = number(minimum=0)
    kl_estimator: str = choice("k1", "k2", "k3")
    kl_in: str = choice("reward", "loss")
    kl_controller: str = choice("fixed", "adaptive")
    target_kl: float = number(above=0)
    kl_horizon: float = number(above=0)
    kl_budget: float | None = number(above=0)
    on_kl_budget: str = choice("stop", "warn")
    max_update_kl: float | None = number(above=0)
    gamma: float = number(minimum=0, maximum=1)
    gae_lambda: float = number(minimum=0, maximum=1)
    clip_range: float = number(above=0)
    dual_clip: float | None = number(above=1)
    value_clip_range: float = number(above=0)
    reward_scaling: str = choice("none", "running")
    score_clip: float = number(above=0)
    missing_eos_penalty: float = number(minimum=0)
    whiten_rewards: bool = plain()
    entropy_coef: float = number(minimum=0)
    ptx_coef: float = number(minimum=0)
    ptx_batch_size: int = number(minimum=1)
    ema_decay: float | None = number(minimum=0, maximum=0.99999)
    monitor: StageMonitorConfig = field(default_factory=_root_monitor)

    @property
    def has_value_model(self) -> bool:
        """Whether advantages come from a value model; the other estimators compare responses."""
        return self.advantage == "gae"

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates over the responses of one rollout, where none is left out."""
        return self.ppo_epochs * self.rollout_size * self.num_samples // self.batch_size


@dataclass
class CollectConfig(SamplingConfig):
    """Sample several responses a prompt and have them ranked."""

    policy: str = plain(in_key=False)
    num_prompts: int | None = number(minimum=1)
    num_samples: int = number(minimum=2, maximum=9)
    judge: str = choice(TOY)


@dataclass
class PrejudiceConfig:
    """Questions in which the name of a group is swapped."""

    templates: str | None = plain(in_key=False)
    groups: list[str] = plain()


@dataclass
class EvalConfig(SamplingConfig):
    """Score several policies on the same held-out prompts."""

    policies: list[str] = plain(in_key=False)
    reference: str | None = plain(in_key=False)
    reward_model: str | None = plain(in_key=False)
    reward: RewardConfig = field(default_factory=RewardConfig)
    win_rate_against: str | None = plain(in_key=False)
    judge: str = choice(*JUDGES)
    num_prompts: int = number(minimum=1)
    num_samples: int = number(minimum=1)
    # What perplexity is measured on.
    text_data: DataConfig = field(default_factory=_root_data)
    text_rows: int = number(minimum=0)
    max_length: int = number(minimum=2)
    prejudice: PrejudiceConfig = field(default_factory=PrejudiceConfig)


KINDS: dict[str, type[StageConfig]] = {
    "sft": SFTConfig,
    "collect": CollectConfig,
    "rm": RMConfig,
    "rs": RSConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
    "eval": EvalConfig,
}


@dataclass
class Config:
    """The whole configuration of a run."""

    seed: int = number(minimum=0, maximum=2**32 - 1)
    output_dir: str = plain()
    trackers: list[str] = plain()
    run: RunConfig = field(default_factory=RunConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    objective: str | None = plain()
    objective_direction: str = choice("auto", "maximize", "minimize")
    objective_allow_proxy: bool = plain()
    # Read by gates.py: stage -> figure -> bound.
    gates: dict[str, Any] = plain()
    gate_action: str = choice("stop", "warn")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    stage: StageConfig | None = None
    stages: dict[str, StageConfig] = field(default_factory=dict)
    pipeline: PipelineConfig | None = None


def num_steps(config: TrainingConfig, num_rows: int) -> int:
    """Optimizer updates that a configuration asks for over some rows."""
    steps = max(1, math.ceil(num_rows * config.epochs / config.batch_size))
    return steps if config.max_steps is None else min(steps, config.max_steps)


def num_ppo_steps(config: PPOConfig) -> int:
    """Optimizer updates of the policy in a whole PPO stage."""
    return config.num_rollouts * config.updates_per_rollout


def register() -> None:
    """Put the schema where conf/*.yaml find it, in a group of its own so that it is no option of theirs."""
    store = ConfigStore.instance()
    groups: dict[str, type] = {
        "config": Config,
        "model": ModelConfig,
        "data": DataConfig,
        "rollout": RolloutConfig,
        "launch": LaunchConfig,
        "adapter": AdapterConfig,
        "reward": RewardConfig,
        "monitor": MonitorConfig,
        "pipeline": PipelineConfig,
    }
    for name, node in {**groups, **KINDS}.items():
        store.store(group="schema", name=name, node=node)


def problems(config: Any, path: str = "") -> Iterator[str]:
    """Every value out of its bounds, as `key: what is wrong`."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        key = f"{path}.{spec.name}" if path else spec.name
        if is_dataclass(value):
            yield from problems(value, key)
        elif isinstance(value, dict) and value and all(is_dataclass(item) for item in value.values()):
            for name, item in value.items():
                yield from problems(item, f"{key}.{name}")
        elif (complaint := _complaint(value, dict(spec.metadata))) is not None:
            yield f"{key}: {complaint}"
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
    """Checks between two keys of one section."""
    at = f"{path}." if path else ""
    if isinstance(config, SharesConfig):
        total = config.sft + config.preference + config.rl + config.eval
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            yield f"{path}: the four fractions must add up to 1, they make {total:g}"
    if isinstance(config, GuidelineConfig) and config.helpful + config.truthful + config.harmless <= 0:
        yield f"{path}: at least one weight must be above 0"
    if isinstance(config, OptimizerConfig) and config.batch_size % min(
        config.micro_batch_size, config.batch_size
    ):
        near = _nearest_multiples(config.batch_size, config.micro_batch_size)
        yield (
            f"{at}batch_size: {config.batch_size} is no multiple of micro_batch_size "
            f"{config.micro_batch_size}; nearest: {near}"
        )
    if isinstance(config, MonitorConfig) and config.action == "restore" and config.judge == "none":
        yield f"{at}action: restore goes back to what a judge liked best; give {at}judge, or take stop"
    yield from _row_relations(config, at)
    if isinstance(config, LaunchConfig):
        yield from _launch_relations(config, at)
    if isinstance(config, RSConfig | PPOConfig | EvalConfig):
        yield from _reward_relations(config, at)
    if isinstance(config, RMConfig):
        yield from _rm_relations(config, at)
    if isinstance(config, PPOConfig):
        yield from _ppo_relations(config, at)


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
    if config.ema_decay is not None and config.monitor.action == "restore":
        yield (
            f"{at}ema_decay: monitor.action=restore hands on weights that a judge saw, not an average; "
            f"set {at}ema_decay=null or take monitor.action=stop"
        )
    if config.value_pretrain_rollouts >= config.num_rollouts:
        yield (
            f"{at}value_pretrain_rollouts: {config.value_pretrain_rollouts} of num_rollouts {config.num_rollouts} "
            f"leave none for the policy; lower it"
        )


def _row_relations(config: Any, at: str) -> Iterator[str]:
    """Checks of what is trained on."""
    if isinstance(config, DataConfig):
        for name, weight in config.mixture.items():
            if not (math.isfinite(weight) and weight > 0):
                yield f"{at}mixture.{name}: the weight must be a number above 0, got {weight}; leave it out instead"
    if isinstance(config, SFTConfig):
        yield from _sft_relations(config, at)
    if isinstance(config, SelectionConfig):
        yield from _selection_relations(config, at)


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


def _reward_relations(config: "RSConfig | PPOConfig | EvalConfig", at: str) -> Iterator[str]:
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


def semantic(config: Any) -> dict[str, Any]:
    """The part of a stage's configuration that decides its result, as plain values."""
    result: dict[str, Any] = {}
    for spec in fields(config):
        if spec.metadata.get("in_key", True):
            value = getattr(config, spec.name)
            result[spec.name] = semantic(value) if is_dataclass(value) else value
    return result


def check(config: Config) -> None:
    """Raise one error with every problem found.

    Raises:
        ConfigError: some value is out of its bounds; at most 20 are named.
    """
    found = list(problems(config))
    if found:
        raise ConfigError("; ".join(found[:20]))
