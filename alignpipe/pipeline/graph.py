"""The stages of a run as a graph: which stage feeds which, and what each kind reads.

`build.py` makes one from a configuration; `names.py` knows what its names stand for.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from alignpipe.config import (
    REFERENCE_FREE,
    UNPAIRED,
    Config,
    DPOConfig,
    EvalConfig,
    PPOConfig,
    RSConfig,
    StageConfig,
    is_composed,
)
from alignpipe.data.records import RecordType
from alignpipe.errors import ConfigError, did_you_mean
from alignpipe.pipeline.references import DataRef, ModelRef
from alignpipe.task import FunctionInput

# What a kind reads, what share of the prompts it sees, and what type of record it wants first.
ROLES: dict[str, tuple[str, ...]] = {
    "sft": ("policy", "reward_model", "selection_model"),
    "collect": ("policy", "previous"),
    "rm": ("policy",),
    "rs": ("policy", "reward_model"),
    "ppo": ("policy", "reference", "reward_model"),
    "dpo": ("policy", "reference"),
    "eval": ("reference", "reward_model", "win_rate_against"),
}
# Key that lists several inputs, by kind -> their role.
LISTS = {"eval": ("policies", "policy"), "rs": ("pool", "pool")}
# Roles of which a stage reads rows, not weights, and the kind that makes them.
ROWS = {"previous": "collect", "pool": "rs"}
SHARE = {
    "sft": "sft",
    "collect": "preference",
    "rm": "preference",
    "dpo": "preference",
    "rs": "rl",
    "ppo": "rl",
}
WANTED: dict[str, tuple[RecordType, ...]] = {
    "sft": ("demonstrations", "text"),
    "collect": ("prompts",),
    "rm": ("rankings",),
    "rs": ("prompts",),
    "ppo": ("prompts",),
    "dpo": ("rankings",),
    "eval": ("prompts",),
}
# A second data set, read beside the first: what rm is centred on, what rs replays, what PPO-ptx goes on learning.
SECOND_DATA = {"rm": "demonstrations", "rs": "demonstrations", "ppo": "ptx_data"}
BENCHMARK = "benchmark"
# The reward model that watches a training which another one steers; its key stands under `monitor`.
JUDGE = "judge"
TEXT_DATA = "text_data"
TEMPLATES = "templates"


def roles(config: StageConfig) -> tuple[str, ...]:
    """The models that a stage reads; a loss without a reference opens none."""
    if isinstance(config, DPOConfig) and config.loss in REFERENCE_FREE:
        return ("policy",)
    return ROLES[config.kind]


def wanted(config: StageConfig) -> tuple[RecordType, ...]:
    """The types of record that a stage reads, the one it wants first before the others."""
    if isinstance(config, DPOConfig) and config.loss in UNPAIRED:
        return (*WANTED[config.kind], "unpaired")
    return WANTED[config.kind]


def is_reward(role: str) -> bool:
    """Whether a role is a reward model's that a stage is trained on: `reward_model`, `reward_0`, ..."""
    return role.startswith("reward_")


def is_scorer(role: str) -> bool:
    """Whether a role is a reward model's: one that is trained on, or the one that watches."""
    return is_reward(role) or role == JUDGE


@dataclass
class Node:
    """One stage of a run, with its inputs.

    Attributes:
        name: in the run.
        config: of the stage.
        models: by role; those of a list are `policy_0`, `policy_1`, ...
        data: by role.
        functions: of the user's own, by role.
        in_order: False for a stage that is only read from the store.
        key: hash of everything that decides the result; filled in by `keys`.
        inputs: what the key is made of.
    """

    name: str
    config: StageConfig
    models: dict[str, ModelRef] = field(default_factory=dict)
    data: dict[str, DataRef] = field(default_factory=dict)
    functions: dict[str, FunctionInput] = field(default_factory=dict)
    in_order: bool = True
    key: str = ""
    inputs: dict[str, object] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return self.config.kind

    @property
    def opened(self) -> dict[str, ModelRef]:
        """Those of its models whose weights the stage opens."""
        return {role: ref for role, ref in self.models.items() if role.partition("_")[0] not in ROWS}

    @property
    def rewarded(self) -> bool:
        """Whether it has a reward that is anything but the score of one reward model."""
        return isinstance(self.config, RSConfig | PPOConfig | EvalConfig) and is_composed(self.config.reward)

    @property
    def parents(self) -> list[str]:
        """Stages of this run that the stage reads, each once."""
        models = [ref.stage for ref in self.models.values()]
        data = [ref.stage for ref in self.data.values()]
        return list(dict.fromkeys(name for name in (*models, *data) if name is not None))


@dataclass
class Graph:
    """The stages of a run in the order they run; those only read from the store stand first."""

    nodes: dict[str, Node]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    @property
    def digest(self) -> str:
        """One hash over the keys of the stages that run, in their order."""
        return hashlib.sha256("".join(node.key for node in self.order).encode()).hexdigest()

    @property
    def order(self) -> list[Node]:
        """The stages that run."""
        return [node for node in self if node.in_order]

    def lineage(self, name: str) -> set[str]:
        """Kinds of all stages of this run that stand behind the policy of a stage."""
        kinds: set[str] = set()
        node: Node | None = self.nodes[name]
        while node is not None:
            ref = node.models.get("policy")
            if ref is None or ref.kind is None:
                break
            kinds.add(ref.kind)
            node = self.nodes.get(ref.stage) if ref.stage else None
        return kinds


def stages_of(config: Config) -> tuple[dict[str, StageConfig], list[str]]:
    """The stages by name and the order they run in; a stage alone is named after its kind.

    Raises:
        ConfigError: the order is empty, repeats a name or holds an unknown one.
    """
    if config.stage is not None:
        return {config.stage.kind: config.stage}, [config.stage.kind]
    if config.pipeline is None:
        raise ConfigError(
            "nothing to run: give stage=KIND or pipeline=NAME (see alignpipe ls, alignpipe run --help)"
        )
    order = config.pipeline.order
    if not order:
        raise ConfigError(
            f"pipeline.order: is empty; the stages of this pipeline are {', '.join(config.stages)}"
        )
    for name in order:
        if name not in config.stages:
            raise ConfigError(
                f"pipeline.order: there is no stage {name!r}. {did_you_mean(name, config.stages)}"
            )
        if order.count(name) > 1:
            raise ConfigError(
                f"pipeline.order: {name} stands in it twice; add a second stage of its kind by another name"
            )
    return dict(config.stages), order
