"""The typed schema of every group in conf/; checks.py holds what a type cannot check.

YAML -> Hydra -> these dataclasses. Every default stands in conf/, so a field here has a type, a check and
`MISSING`; the only defaults are those that say where a value is inherited from. Nothing in a configuration
names code to run: a stage is chosen by its `kind`.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Protocol

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING

BASE = "base"
TOY = "toy"
# Words of a judge; every other one names a reward model.
JUDGES = ("auto", TOY, "none")
TINY = "tiny"
# Strategies under which no process holds all weights.
SHARDED = ("fsdp2", "zero2", "zero3")
LATEST = "latest"
# In rounds: the newest policy before a stage.
NEWEST = "newest"
FORMATS = (
    "auto",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "preference",
    "ranked",
    "unpaired",
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
# Loss of dpo -> the keys that it reads, as losses/dpo.py takes them.
PREFERENCE_LOSSES: dict[str, tuple[str, ...]] = {
    "sigmoid": ("beta",),
    "conservative": ("beta", "label_smoothing"),
    "robust": ("beta", "label_smoothing"),
    "hinge": ("beta",),
    "ipo": ("beta",),
    "sigmoid_norm": ("beta",),
    "apo_zero": ("beta",),
    "simpo": ("beta", "gamma_beta_ratio"),
    "orpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}
# Those that compare the policy with nothing but itself.
REFERENCE_FREE = ("simpo", "orpo")
# Those that learn from single responses, each good or bad, rather than from pairs.
UNPAIRED = ("kto",)
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


def plain(*, in_key: bool = True, names: bool = False) -> Any:
    """A field without a check of its own; `names` says that it names stages and is in the key nevertheless."""
    return field(default=MISSING, metadata={"in_key": in_key, "names": names})


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
    label: str | None = plain()
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
    trust_remote_code: str | None = plain(in_key=False)
    chat_template: str = plain()
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    attn_implementation: str = choice("sdpa", "eager", "flash_attention_2", in_key=False)
    compile: bool = plain(in_key=False)
    kernels: str = choice("none", "liger", in_key=False)
    max_length: int = number(minimum=8)
    max_prompt_length: int = number(minimum=1)
    max_response_length: int = number(minimum=1)
    generation_batch_size: int = number(minimum=1, in_key=False)
    adapter: AdapterSizeConfig = field(default_factory=AdapterSizeConfig)
    # Per kind of stage: values that conf/stage/*.yaml read by interpolation.
    training: dict[str, Any] = plain()


@dataclass
class EngineConfig:
    """What samples the responses of a policy that stands still: the stage itself, or a server of the user's."""

    engine: str = choice("local", "openai")
    url: str | None = plain(in_key=False)
    served_model: str | None = plain(in_key=False)
    # Seconds.
    timeout: float = number(above=0, in_key=False)


@dataclass
class RolloutConfig(EngineConfig):
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
    """A chain of stages, by name, in the order they run; `compose/rounds.py` repeats those of `round`.

    A pipeline without rounds says nothing of them, so the defaults of these keys stand here.
    """

    name: str = plain()
    order: list[str] = plain()
    round: list[str] = field(default_factory=list)
    rounds: int = field(default=1, metadata={"min": 1, "max": 100})
    start: str = BASE
    from_round: dict[str, int] = field(default_factory=dict)
    # Round -> stage -> keys; the round is a number in YAML and a text on the command line.
    round_overrides: dict[Any, Any] = field(default_factory=dict)


@dataclass
class GateConfig:
    """A reward model that is heard alone where it thinks ill of a response (arXiv:2307.09288, 3.2.3)."""

    model: str | None = plain(names=True)
    below: float = number(above=0, maximum=0.999999)


@dataclass
class RewardConfig:
    """What a reward is made of, beside the one `reward_model`."""

    # In a key by its content, see pipeline/functions.py.
    function: str | None = plain(in_key=False)
    function_weight: float = number()
    # Name -> weight; by name in a key too, since figures bear the names.
    models: dict[str, float] = plain(names=True)
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
    judge: str = plain(names=True)
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


def _root_engine() -> Any:
    """The engine of one stage: the root's, but for what the stage says."""
    return inherited(EngineConfig, "rollout")


@dataclass
class FixedPolicyConfig(SamplingConfig):
    """A stage that samples from policies whose weights stay as they are until all is sampled."""

    rollout: EngineConfig = field(default_factory=_root_engine)


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
    # No result depends on it, only whether there is one.
    max_left_out: int = number(minimum=0, in_key=False)


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
    """Direct preference optimization and its kin."""

    policy: str = plain(in_key=False)
    # Read by every loss but those of REFERENCE_FREE.
    reference: str | None = plain(in_key=False)
    loss: str = choice(*PREFERENCE_LOSSES)
    # Each of these is null where the loss does not read it.
    beta: float | None = number(above=0)
    label_smoothing: float | None = number(minimum=0, maximum=0.49)
    gamma_beta_ratio: float | None = number(minimum=0)
    desirable_weight: float | None = number(above=0)
    undesirable_weight: float | None = number(above=0)
    # Loss -> what conf/stage/dpo.yaml gives the five keys above.
    usual: dict[str, Any] = plain(in_key=False)
    sft_coef: float = number(minimum=0)
    pairs: str = choice("all", "best_worst")
    num_samples: int = number(minimum=0)
    monitor: StageMonitorConfig = field(default_factory=_root_monitor)


@dataclass
class RSConfig(TrainingConfig, FixedPolicyConfig):
    """Rejection sampling: sample, keep the best, fine-tune on it."""

    policy: str = plain(in_key=False)
    reward_model: str | None = plain(in_key=False)
    reward: RewardConfig = field(default_factory=RewardConfig)
    demonstrations: DataConfig = field(default_factory=_root_data)
    num_prompts: int | None = number(minimum=1)
    pool: list[str] = plain(in_key=False)
    num_samples: int = number(minimum=2)
    select: str = choice("best", "top_k", "threshold", "rso")
    top_k: int = number(minimum=1)
    threshold: float = number()
    rso_beta: float = number(above=0)
    num_accepted: int = number(minimum=1)
    min_response_length: int = number(minimum=0)
    min_reward: float | None = number()
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
class CollectConfig(FixedPolicyConfig):
    """Sample several responses a prompt and have them ranked."""

    policy: str = plain(in_key=False)
    previous: str | None = plain(in_key=False)
    num_prompts: int | None = number(minimum=1)
    num_samples: int = number(minimum=2, maximum=9)
    judge: str = choice(TOY)


@dataclass
class PrejudiceConfig:
    """Questions in which the name of a group is swapped."""

    templates: str | None = plain(in_key=False)
    groups: list[str] = plain()


@dataclass
class EvalConfig(FixedPolicyConfig):
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


def num_selected(config: RSConfig) -> int:
    """Responses of a prompt that rejection sampling learns, as far as that is known before it samples."""
    # Half of them reach the median.
    known = {"top_k": config.top_k, "threshold": -(-config.num_samples // 2), "rso": config.num_accepted}
    return known.get(config.select, 1)


def num_ppo_steps(config: PPOConfig) -> int:
    """Optimizer updates of the policy in a whole PPO stage."""
    return config.num_rollouts * config.updates_per_rollout


def _itself(store: ConfigStore, _memo: dict[int, Any]) -> ConfigStore:
    return store


@cache
def register() -> None:
    """Put the schema where conf/*.yaml find it, in a group of its own so that it is no option of theirs.

    Hydra keeps it for as long as the process lives, and making its nodes takes a sixth of a composition.
    """
    store = ConfigStore.instance()
    # Hydra copies the whole store at every look at a group, and each node again as it is loaded; that one is enough.
    ConfigStore.__deepcopy__ = _itself  # type: ignore[attr-defined]
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


def semantic(config: Any) -> dict[str, Any]:
    """The part of a stage's configuration that decides its result, as plain values."""
    result: dict[str, Any] = {}
    for spec in fields(config):
        if spec.metadata.get("in_key", True):
            value = getattr(config, spec.name)
            result[spec.name] = semantic(value) if is_dataclass(value) else value
    return result
