"""Configuration -> graph: every stage with all that it reads, found and fit for it before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from alignpipe.config import (
    JUDGES,
    TOY,
    Config,
    DataConfig,
    EvalConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    StageConfig,
    StageMonitorConfig,
    reward_models,
)
from alignpipe.data.counterfactuals import read_templates
from alignpipe.data.reward_bench import read_reward_bench
from alignpipe.data.sources import find_mixture, find_source, holds_world, readable_types
from alignpipe.errors import ConfigError, DataError
from alignpipe.pipeline.functions import find_function
from alignpipe.pipeline.graph import (
    BENCHMARK,
    JUDGE,
    LISTS,
    SECOND_DATA,
    TEMPLATES,
    TEXT_DATA,
    WANTED,
    Graph,
    Node,
    is_reward,
    roles,
    wanted,
)
from alignpipe.pipeline.names import Names
from alignpipe.pipeline.references import DataRef, find_run_stage
from alignpipe.pipeline.store import Store


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
    outside: dict[str, Node] = {}
    # Stages outside of the order whose own inputs are being resolved.
    under_way: list[str] = []

    def add_outside(key: str, label: str) -> None:
        if label in outside:
            return
        if label in under_way:
            raise ConfigError(f"{key}: a circle, {' -> '.join([*under_way, label])}; nothing could run first")
        under_way.append(label)
        outside[label] = _node(label, names, in_order=False)
        under_way.pop()

    names = Names(config, store, bare, add_outside)
    nodes = {name: _node(name, names, in_order=True) for name in names.order}
    return Graph({**outside, **nodes})


def _node(name: str, names: Names, *, in_order: bool) -> Node:
    config = _with_whole_paths(names.stages[name])
    node = Node(name, config, in_order=in_order)
    _add_models(node, names)
    _add_reward(node, names)
    node.data["data"] = names.data(name, config.data, wanted(config))
    _add_second_data(node, names)
    _check_margin(node, names)
    _add_benchmark(node, names)
    _add_text(node, names)
    _add_templates(node, names)
    _check_judge(node, names)
    _add_monitor(node, names)
    return node


def _add_models(node: Node, names: Names) -> None:
    """The models that the kind of a stage reads, and those of its list."""
    config = node.config
    for role in roles(config):
        label = getattr(config, role)
        if label is not None:
            node.models[role] = names.model(node.name, role, label)
    if isinstance(config, EvalConfig) and not config.policies:
        raise ConfigError(f"{names.key(node.name, 'policies')}: is empty; name at least one policy")
    if config.kind in LISTS:
        several, role = LISTS[config.kind]
        for index, label in enumerate(getattr(config, several)):
            node.models[f"{role}_{index}"] = names.model(node.name, several, label)


def _add_reward(node: Node, names: Names) -> None:
    """What a reward is made of beside `reward_model`."""
    config = node.config
    if not isinstance(config, RSConfig | PPOConfig | EvalConfig):
        return
    for role, label in reward_models(config).items():
        if role not in node.models:
            at = f"reward.models.{label}" if label in config.reward.models else "reward.gate.model"
            node.models[role] = names.model(node.name, role, label, at)
    if config.reward.function is not None:
        key = names.key(node.name, "reward.function")
        node.functions["reward"] = find_function(key, config.reward.function)


def _add_second_data(node: Node, names: Names) -> None:
    """The second data set of a stage, where the root data has one of its kind and the stage has a use for it."""
    config = node.config
    if config.kind not in SECOND_DATA or (isinstance(config, PPOConfig) and config.ptx_coef == 0):
        return
    role = SECOND_DATA[config.kind]
    data: DataConfig = getattr(config, role)
    if data.path in names.stages:
        return
    source = find_mixture(data) if data.mixture else find_source(data.path, data)
    types = readable_types(source)
    # Only PPO-ptx learns from raw text as well (arXiv:2203.02155, section 3.5).
    if "demonstrations" in types or (role == "ptx_data" and "text" in types):
        split = holds_world(source) or len(names.shares_reading(data) | {"sft"}) > 1
        node.data[role] = DataRef(source.path, data, source, "sft" if split else "train")
    elif isinstance(config, PPOConfig):
        key = names.key(node.name, "ptx_data.path")
        raise ConfigError(
            f"{key}: {data.path} has neither demonstrations nor text; name data that has, or set "
            f"{names.key(node.name, 'ptx_coef')}=0"
        )
    elif isinstance(config, RSConfig) and config.replay > 0:
        key = names.key(node.name, "replay")
        raise ConfigError(f"{key}: {data.path} has no demonstrations to replay; set {key}=0")


def _check_margin(node: Node, names: Names) -> None:
    """Margins stand in a file, if anywhere."""
    config = node.config
    if isinstance(config, RMConfig) and config.margin == "column" and node.data["data"].stage is not None:
        raise ConfigError(
            f"{names.key(node.name, 'margin')}: collect ranks and gives no column of margins; take rank or gold"
        )


def _add_benchmark(node: Node, names: Names) -> None:
    """A stage rm is scored on a benchmark's file where one is named; it is read whole here, before any step."""
    config = node.config
    if isinstance(config, RMConfig) and config.benchmark is not None:
        source = find_source(config.benchmark, config.data)
        if source.kind != "file" or Path(source.path).is_dir():
            key = names.key(node.name, "benchmark")
            raise ConfigError(
                f"{key}: {config.benchmark} is no file; download it, and give the .jsonl or .parquet"
            )
        read_reward_bench(Path(source.path))
        node.data[BENCHMARK] = DataRef(config.benchmark, config.data, source, "all")


def _add_text(node: Node, names: Names) -> None:
    """An eval measures perplexity on held-out demonstrations or documents, where there are any."""
    config = node.config
    if not isinstance(config, EvalConfig) or config.text_rows == 0:
        return
    text = config.text_data
    if text.path in names.stages or find_run_stage(names.store, text.path) is not None:
        # What a policy said itself is no text to hold it against.
        return
    source = find_source(text.path, text)
    if set(WANTED["sft"]) & readable_types(source):
        node.data[TEXT_DATA] = DataRef(text.path, text, source, "eval")
    elif text.path != names.config.data.path:
        key = names.key(node.name, f"{TEXT_DATA}.path")
        raise DataError(f"{key}: {text.path} holds neither demonstrations nor texts to measure perplexity on")


def _add_templates(node: Node, names: Names) -> None:
    """A file of templates is read whole before anything runs."""
    config = node.config
    if not isinstance(config, EvalConfig) or config.prejudice.templates is None:
        return
    name = config.prejudice.templates
    source = find_source(name, config.data)
    if source.kind != "file":
        key = names.key(node.name, "prejudice.templates")
        raise DataError(
            f"{key}: {name} is no file; give a .jsonl file of rows with a prompt that holds {{group}}"
        )
    read_templates(Path(source.path), config.prejudice.groups)
    node.data[TEMPLATES] = DataRef(name, config.data, source, "all")


def _check_judge(node: Node, names: Names) -> None:
    """The gold judge knows the embedded world alone."""
    judge = getattr(node.config, "judge", None)
    source = node.data["data"].source
    if judge == TOY and (source is None or source.kind != TOY):
        key = names.key(node.name, "judge")
        mend = (
            "give ranked or paired data to rm instead of a collect stage"
            if node.kind == "collect"
            else f"set {key}=auto"
        )
        raise ConfigError(f"{key}: the gold judge needs data=toy, not {node.data['data'].name}; {mend}")


def _add_monitor(node: Node, names: Names) -> None:
    """A judge by name is one more model of the stage; what is trained on cannot be its own judge."""
    config: StageMonitorConfig | None = getattr(node.config, "monitor", None)
    if config is None or config.action == "none":
        return
    source, key = node.data["data"].source, names.key(node.name, "monitor.judge")
    # A collect stage samples responses to prompts of the embedded world.
    toy = source is None or source.kind in (TOY, "collect")
    if config.judge not in JUDGES:
        judge = node.models[JUDGE] = names.model(node.name, JUDGE, config.judge, "monitor.judge")
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
