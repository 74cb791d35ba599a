"""Names -> order: which stage feeds which, and where every input of every stage lies.

A name is, in this order, `base`, a stage of this pipeline, a stage of a run (`RUN/stage`, `latest/stage`), a local
folder, a hub id. Whatever else it is, is an error with the nearest name.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from alignpipe.artifact import POLICY_KINDS
from alignpipe.config import (
    BASE,
    JUDGES,
    LATEST,
    REFERENCE_FREE,
    TINY,
    TOY,
    UNPAIRED,
    Config,
    DataConfig,
    DPOConfig,
    EvalConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    StageConfig,
    StageMonitorConfig,
    is_composed,
    reward_models,
)
from alignpipe.data.counterfactuals import read_templates
from alignpipe.data.hub import is_hub_id
from alignpipe.data.records import RecordType
from alignpipe.data.reward_bench import read_reward_bench
from alignpipe.data.sources import DataSource, find_mixture, find_source, holds_world, readable_types
from alignpipe.errors import CheckpointError, ConfigError, DataError, did_you_mean
from alignpipe.pipeline.functions import find_function
from alignpipe.pipeline.hub import model_folder, resolve_revision
from alignpipe.pipeline.references import (
    DataRef,
    ModelRef,
    find_run_stage,
    folder_reference,
    is_scalar,
    newest_stages,
)
from alignpipe.pipeline.store import Store, run_stages
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


def build_graph(config: Config, store: Store, *, bare: bool = False) -> Graph:
    """Resolve every name of a configuration.

    Args:
        config: of the run.
        store: where finished stages lie.
        bare: model folders may hold no weights, which is enough to plan.

    Raises:
        ConfigError: a name means nothing, comes later in the order, or is of the wrong kind.
        CheckpointError: a folder holds no model, or one of the wrong kind.
        DataError: a data set is missing or holds no rows of the type that the stage reads.
    """
    return _Resolver(config, store, bare).graph()


class _Resolver:
    """Resolves the names of one configuration."""

    def __init__(self, config: Config, store: Store, bare: bool) -> None:
        self.config = config
        self.bare = bare
        self.store = store
        self.stages, self.order = stages_of(config)
        self.alone = config.stage is not None
        self.nodes: dict[str, Node] = {}
        self.outside: dict[str, Node] = {}
        # Stages outside of the order whose own inputs are being resolved.
        self.open: list[str] = []

    def graph(self) -> Graph:
        for name in self.order:
            self.nodes[name] = self._node(name, in_order=True)
        return Graph({**self.outside, **self.nodes})

    def _node(self, name: str, *, in_order: bool) -> Node:
        config = _with_whole_paths(self.stages[name])
        node = Node(name, config, in_order=in_order)
        for role in roles(config):
            label = getattr(config, role)
            if label is not None:
                node.models[role] = self._model(name, role, label)
        if isinstance(config, EvalConfig) and not config.policies:
            raise ConfigError(f"{self._key(name, 'policies')}: is empty; name at least one policy")
        if config.kind in LISTS:
            several, role = LISTS[config.kind]
            for index, label in enumerate(getattr(config, several)):
                node.models[f"{role}_{index}"] = self._model(name, several, label)
        self._add_reward(node)
        node.data["data"] = self._data(name, "data", config.data, wanted(config))
        self._add_second_data(node)
        self._add_benchmark(node)
        self._add_text(node)
        self._add_templates(node)
        self._check_judge(node)
        self._add_monitor(node)
        return node

    def _key(self, stage: str, key: str) -> str:
        return f"stage.{key}" if self.alone else f"stages.{stage}.{key}"

    def _model(self, stage: str, role: str, label: str, at: str | None = None) -> ModelRef:
        """The weights of a role; `at` is the key that names them, where that is not the role."""
        key = self._key(stage, at or role)
        if label == MISSING:
            raise ConfigError(f"{key}: is not given; {self._offer(role)}")
        if label == BASE:
            ref = self._base()
        elif label in self.stages and not (self.alone and label == stage):
            ref = self._own_stage(stage, key, label)
        elif (found := find_run_stage(self.store, label)) is not None:
            kind, stage_key = found
            ref = ModelRef(label, str(self.store.stage(kind, stage_key)), kind=kind, key=stage_key)
        elif (Path(label).is_dir()) or label.startswith((".", "/", "~")):
            ref = folder_reference(label, bare=self.bare)
        elif is_hub_id(label):
            ref = ModelRef(label, label, resolve_revision(label, None))
        else:
            known = [
                *(JUDGES if role == JUDGE else (BASE,)),
                *self.stages,
                *(f"{LATEST}/{name}" for name in newest_stages(self.store)),
            ]
            raise ConfigError(
                f"{key}: {label!r} is no stage, run, folder or hub id. {did_you_mean(label, known)}"
            )
        return self._of_kind(ref, role, key)

    def _base(self) -> ModelRef:
        path = self.config.model.path
        if path == TINY:
            return ModelRef(BASE, TINY)
        if Path(path).is_dir() or not is_hub_id(path):
            ref = folder_reference(path, bare=self.bare)
            return ModelRef(BASE, ref.path, kind=ref.kind, key=ref.key)
        return ModelRef(BASE, path, resolve_revision(path, self.config.model.revision))

    def _own_stage(self, stage: str, key: str, label: str) -> ModelRef:
        if label in self.order:
            if stage in self.order and self.order.index(label) >= self.order.index(stage):
                raise ConfigError(
                    f"{key}: {label} does not run before {stage}; the order is {', '.join(self.order)}"
                )
        elif label not in self.outside:
            if label in self.open:
                raise ConfigError(
                    f"{key}: a circle, {' -> '.join([*self.open, label])}; nothing could run first"
                )
            self.open.append(label)
            self.outside[label] = self._node(label, in_order=False)
            self.open.pop()
        return ModelRef(label, kind=self.stages[label].kind, stage=label)

    def _of_kind(self, ref: ModelRef, role: str, key: str) -> ModelRef:
        if role in ROWS:
            return _of_rows(ref, role, key)
        scores = is_scorer(role)
        wanted = ("rm",) if scores else POLICY_KINDS
        if ref.kind is not None and ref.kind not in wanted:
            raised = ConfigError if ref.stage is not None else CheckpointError
            need = "a reward model (rm)" if scores else f"a policy ({', '.join(POLICY_KINDS)})"
            raise raised(f"{key}: {ref.name} is made by a stage of kind {ref.kind}; needed is {need}")
        if ref.kind is None and ref.stage is None and ref.path != TINY:
            scalar = is_scalar(model_folder(ref.path, ref.revision))
            if scalar != scores:
                held = (
                    "a classifier with a scalar head" if scalar else "a language model without a scalar head"
                )
                wanted_model = "reward model" if scores else "policy"
                raise CheckpointError(f"{key}: {ref.name} holds {held}, which is no {wanted_model}")
        return ref

    def _offer(self, role: str) -> str:
        wanted = "rm" if is_scorer(role) else "sft"
        for run in self.store.runs():
            for stage in run_stages(run):
                if stage["kind"] == wanted and self.store.find(stage["kind"], stage["key"]) is not None:
                    return f"the newest that fits is {run.name}/{stage['name']}"
        return f"train one first: alignpipe run stage={wanted}"

    def _data(self, stage: str, role: str, config: DataConfig, wanted: tuple[RecordType, ...]) -> DataRef:
        key, name = self._key(stage, f"{role}.path"), config.path
        if name in self.stages and not (self.alone and name == stage):
            if self.stages[name].kind != "collect":
                raise ConfigError(
                    f"{key}: {name} is a stage of kind {self.stages[name].kind}; only collect makes data"
                )
            self._own_stage(stage, key, name)
            return DataRef(name, config, None, "train", name)
        if (found := find_run_stage(self.store, name)) is not None:
            kind, stage_key = found
            if kind != "collect":
                raise ConfigError(f"{key}: {name} is a stage of kind {kind}; only collect makes data")
            source = DataSource("collect", str(self.store.stage(kind, stage_key)), config)
            return DataRef(name, config, source, "train")
        source = find_mixture(config) if config.mixture else find_source(name, config)
        types = readable_types(source)
        if not any(want in types for want in wanted):
            raise DataError(
                f"{key}: {source.path} holds {' and '.join(sorted(types)) or 'no type of rows in common'}; "
                f"stage {stage} needs {' or '.join(wanted)}; "
                f"give it other data, or name its columns with data.columns"
            )
        return DataRef(source.path if config.mixture else name, config, source, self._share(stage, source))

    def _share(self, stage: str, source: DataSource) -> str:
        """The part of a data set that a stage may see.

        A file that only one share of the run reads is used whole, but for the evaluation share; the embedded world
        is endless and always split.
        """
        own = SHARE.get(self.stages[stage].kind, "eval")
        if own == "eval" or holds_world(source):
            return own
        return "train" if len(self._shares_reading(self.stages[stage].data)) <= 1 else own

    def _shares_reading(self, data: DataConfig) -> set[str]:
        """Shares of the stages that read one of the same sets."""
        names = _set_names(data)
        kinds = {self.stages[name].kind for name in self.order if names & _set_names(self.stages[name].data)}
        return {SHARE[kind] for kind in kinds if kind in SHARE}

    def _add_second_data(self, node: Node) -> None:
        """The second data set of a stage, where the root data has one of its kind and the stage has a use for it."""
        config = node.config
        if config.kind not in SECOND_DATA or (isinstance(config, PPOConfig) and config.ptx_coef == 0):
            return
        role = SECOND_DATA[config.kind]
        data: DataConfig = getattr(config, role)
        if data.path in self.stages:
            return
        source = find_mixture(data) if data.mixture else find_source(data.path, data)
        types = readable_types(source)
        # Only PPO-ptx learns from raw text as well (arXiv:2203.02155, section 3.5).
        if "demonstrations" in types or (role == "ptx_data" and "text" in types):
            split = holds_world(source) or len(self._shares_reading(data) | {"sft"}) > 1
            node.data[role] = DataRef(source.path, data, source, "sft" if split else "train")
        elif isinstance(config, PPOConfig):
            key = self._key(node.name, "ptx_data.path")
            raise ConfigError(
                f"{key}: {data.path} has neither demonstrations nor text; name data that has, or set "
                f"{self._key(node.name, 'ptx_coef')}=0"
            )
        elif isinstance(config, RSConfig) and config.replay > 0:
            key = self._key(node.name, "replay")
            raise ConfigError(f"{key}: {data.path} has no demonstrations to replay; set {key}=0")

    def _add_reward(self, node: Node) -> None:
        """What a reward is made of beside `reward_model`."""
        config = node.config
        if not isinstance(config, RSConfig | PPOConfig | EvalConfig):
            return
        for role, label in reward_models(config).items():
            if role not in node.models:
                at = f"reward.models.{label}" if label in config.reward.models else "reward.gate.model"
                node.models[role] = self._model(node.name, role, label, at)
        if config.reward.function is not None:
            key = self._key(node.name, "reward.function")
            node.functions["reward"] = find_function(key, config.reward.function)

    def _add_benchmark(self, node: Node) -> None:
        """A stage rm is scored on a benchmark's file where one is named; it is read whole here, before any step."""
        config = node.config
        if not isinstance(config, RMConfig):
            return
        if config.margin == "column" and node.data["data"].stage is not None:
            raise ConfigError(
                f"{self._key(node.name, 'margin')}: collect ranks and gives no column of margins; take rank or gold"
            )
        if config.benchmark is not None:
            source = find_source(config.benchmark, config.data)
            if source.kind != "file" or Path(source.path).is_dir():
                key = self._key(node.name, "benchmark")
                raise ConfigError(
                    f"{key}: {config.benchmark} is no file; download it, and give the .jsonl or .parquet"
                )
            read_reward_bench(Path(source.path))
            node.data[BENCHMARK] = DataRef(config.benchmark, config.data, source, "all")

    def _add_text(self, node: Node) -> None:
        """An eval measures perplexity on held-out demonstrations or documents, where there are any."""
        config = node.config
        if not isinstance(config, EvalConfig) or config.text_rows == 0:
            return
        text = config.text_data
        if text.path in self.stages or find_run_stage(self.store, text.path) is not None:
            # What a policy said itself is no text to hold it against.
            return
        source = find_source(text.path, text)
        if set(WANTED["sft"]) & readable_types(source):
            node.data[TEXT_DATA] = DataRef(text.path, text, source, "eval")
        elif text.path != self.config.data.path:
            key = self._key(node.name, f"{TEXT_DATA}.path")
            raise DataError(
                f"{key}: {text.path} holds neither demonstrations nor texts to measure perplexity on"
            )

    def _add_templates(self, node: Node) -> None:
        """A file of templates is read whole before anything runs."""
        config = node.config
        if not isinstance(config, EvalConfig) or config.prejudice.templates is None:
            return
        name = config.prejudice.templates
        source = find_source(name, config.data)
        if source.kind != "file":
            key = self._key(node.name, "prejudice.templates")
            raise DataError(
                f"{key}: {name} is no file; give a .jsonl file of rows with a prompt that holds {{group}}"
            )
        read_templates(Path(source.path), config.prejudice.groups)
        node.data[TEMPLATES] = DataRef(name, config.data, source, "all")

    def _check_judge(self, node: Node) -> None:
        """The gold judge knows the embedded world alone."""
        judge = getattr(node.config, "judge", None)
        source = node.data["data"].source
        if judge == TOY and (source is None or source.kind != TOY):
            key = self._key(node.name, "judge")
            mend = (
                "give ranked or paired data to rm instead of a collect stage"
                if node.kind == "collect"
                else f"set {key}=auto"
            )
            raise ConfigError(f"{key}: the gold judge needs data=toy, not {node.data['data'].name}; {mend}")

    def _add_monitor(self, node: Node) -> None:
        """A judge by name is one more model of the stage; what is trained on cannot be its own judge."""
        config: StageMonitorConfig | None = getattr(node.config, "monitor", None)
        if config is None or config.action == "none":
            return
        source, key = node.data["data"].source, self._key(node.name, "monitor.judge")
        # A collect stage samples responses to prompts of the embedded world.
        toy = source is None or source.kind in (TOY, "collect")
        if config.judge not in JUDGES:
            judge = node.models[JUDGE] = self._model(node.name, JUDGE, config.judge, "monitor.judge")
            trained_on = {(ref.stage, ref.path) for role, ref in node.models.items() if is_reward(role)}
            if (judge.stage, judge.path) in trained_on:
                raise ConfigError(
                    f"{key}: {config.judge} is what {node.name} is trained on, and rises with it; "
                    f"name a reward model that learnt from other labels"
                )
        elif config.judge == TOY and not toy:
            raise ConfigError(
                f"{key}: the gold judge needs data=toy, not {node.data['data'].name}; name a reward model instead"
            )
        elif config.action == "restore" and not toy:
            raise ConfigError(
                f"{key}: {config.judge} is nobody here, and restore goes back to what a judge liked best; "
                f"name a reward model that learnt from other labels, or set monitor.action=stop"
            )


def _with_whole_paths(config: StageConfig) -> StageConfig:
    """A stage's configuration with the paths of its mixtures absolute: its processes may stand elsewhere."""
    found: dict[str, Any] = {
        role: find_mixture(data).config
        for role in ("data", *SECOND_DATA.values())
        if (data := getattr(config, role, None)) is not None and data.mixture
    }
    return replace(config, **found)


def _set_names(data: DataConfig) -> set[str]:
    """The data sets that a section names."""
    return set(data.mixture) or {data.path}


def _of_rows(ref: ModelRef, role: str, key: str) -> ModelRef:
    """Refuse what is not made by the kind of stage whose rows a role reads."""
    if ref.kind == ROWS[role]:
        return ref
    raised = ConfigError if ref.stage is not None or ref.name == BASE else CheckpointError
    made = "no stage" if ref.kind is None else f"a stage of kind {ref.kind}"
    raise raised(f"{key}: {ref.name} is made by {made}; needed is one of kind {ROWS[role]}")
