"""What a run would do, told without torch: stages, reuse or run and why, rows, steps, batch, disk, warnings.

Config -> graph, keys, rows and lengths -> Plan; everything that can be wrong is found here, before step one
"""

import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.artifact import Manifest
from alignpipe.config import (
    TINY,
    Config,
    OptimizerConfig,
    PPOConfig,
    SFTConfig,
    TrainingConfig,
    num_ppo_steps,
    num_steps,
)
from alignpipe.data.sources import detect_format
from alignpipe.data.template import find_template
from alignpipe.errors import CheckpointError, MachineError
from alignpipe.pipeline.adapters import check_adapters
from alignpipe.pipeline.counts import Rows, count_rows
from alignpipe.pipeline.graph import Graph, Node, build_graph
from alignpipe.pipeline.hub import model_folder
from alignpipe.pipeline.keys import add_keys, why_not_reused
from alignpipe.pipeline.lengths import fit_lengths
from alignpipe.pipeline.store import Store

BYTES_PER_WEIGHT = 4
# AdamW keeps two moments beside the weights; two states are kept at a time.
STATE_COPIES = 3 * 2


@dataclass
class PlanRow:
    """One stage of a plan.

    Attributes:
        name: of the stage.
        kind: of the stage.
        key: of the stage.
        reads: what feeds it, in words.
        rows: it trains on or samples from; None where that is known only later.
        steps: optimizer updates; None for a stage that does not train.
        batch: the batch arithmetic, in words.
        disk: bytes that stay.
        state: reuse, resume or run.
        why: of the state.
    """

    name: str
    kind: str
    key: str
    reads: str
    rows: int | None
    steps: int | None
    batch: str
    disk: int
    state: str
    why: str


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        run: its name.
        rows: a stage each.
        warnings: one sentence each.
        disk_needed: bytes at the worst moment.
        disk_free: bytes.
        graph: with keys.
        chat_template: Jinja source for a model that has none.
    """

    run: str
    rows: list[PlanRow]
    warnings: list[str]
    disk_needed: int
    disk_free: int
    graph: Graph
    chat_template: str
    reused: dict[str, Manifest] = field(default_factory=dict)


def make_plan(config: Config) -> Plan:
    """Plan a run and check everything that can be checked before it.

    Raises:
        AlignpipeError: of the class that fits what is wrong.
    """
    _check_trackers(config)
    store = Store(Path(config.output_dir).absolute())
    graph = build_graph(config, store)
    adapter_warnings = check_adapters(config, graph)
    config, warnings = fit_lengths(config)
    if warnings:
        graph = build_graph(config, store)
    warnings += adapter_warnings
    chat_template = fallback_template(config, graph)
    add_keys(graph, config, store, chat_template)
    reused = reusable(graph, store)
    rows = []
    weights = weight_bytes(config)
    for node in graph.order:
        counted = count_rows(node, graph, config, chat_template) if node.name not in reused else Rows()
        warnings += counted.warnings + _warnings(node, graph)
        rows.append(_row(node, counted, reused, store, weights))
    needed = sum(row.disk for row in rows if row.state != "reuse")
    needed += STATE_COPIES * weights * any(row.steps and row.state != "reuse" for row in rows)
    free = shutil.disk_usage(_existing(store.root)).free
    if needed > free:
        raise MachineError(
            f"{store.root.resolve()}: needs about {_bytes(needed)}, has {_bytes(free)} free; choose another output_dir"
        )
    return Plan(run_name(config, graph), rows, warnings, needed, free, graph, chat_template, reused)


def _check_trackers(config: Config) -> None:
    for name in config.trackers:
        if find_spec(name) is None:
            raise MachineError(
                f"trackers: {name} is not installed; pip install 'alignpipe[trackers]', or leave it out"
            )


def reusable(graph: Graph, store: Store) -> dict[str, Manifest]:
    """Finished artifacts that fit their parents as those are now, by stage name.

    Raises:
        CheckpointError: a stage outside the order is not finished.
    """
    found: dict[str, Manifest] = {}
    for node in graph:
        manifest = store.find(node.kind, node.key)
        if manifest is not None and all(
            parent in found and found[parent].digest in {known.digest for known in manifest.parents.values()}
            for parent in node.parents
        ):
            found[node.name] = manifest
        elif not node.in_order:
            raise CheckpointError(
                f"stage {node.name} is read but not in pipeline.order, and the store has no finished one with these "
                f"settings; add {node.name} to pipeline.order"
            )
    return found


def run_name(config: Config, graph: Graph) -> str:
    """The run's folder name: the user's, or the pipeline's with eight digits over the keys."""
    if config.run.name is not None:
        return config.run.name
    start = (
        config.pipeline.name if config.pipeline is not None and config.stage is None else graph.order[0].kind
    )
    return f"{start}-{graph.digest[:8]}"


def fallback_template(config: Config, graph: Graph) -> str:
    """Jinja source for a base model without a chat template: Alpaca's for Alpaca rows, else the plain one."""
    name = config.model.chat_template
    if name == "auto":
        sources = [ref.source for node in graph for ref in node.data.values() if ref.source is not None]
        name = "alpaca" if any(detect_format(source) == "alpaca" for source in sources) else "plain"
    return find_template(name)


def weight_bytes(config: Config) -> int:
    """Size of the base model's weights as float32, estimated without opening them."""
    if config.model.path == TINY:
        shape = config.model.architecture
        block = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
        return BYTES_PER_WEIGHT * (shape.num_layers * block + 1024 * shape.hidden_size)
    folder = model_folder(config.model.path, config.model.revision)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _row(node: Node, counted: Rows, reused: dict[str, Manifest], store: Store, weights: int) -> PlanRow:
    manifest = reused.get(node.name)
    if manifest is not None:
        state, why = "reuse", "finished with the same inputs"
    elif states := store.states(node.kind, node.key):
        state, why = "resume", f"stopped at {states[-1]}"
    else:
        state, why = "run", why_not_reused(node, store)
    disk = sum(entry.size for entry in manifest.files.values()) if manifest else weights * trains(node)
    reads = [f"{role}={ref.name}" for role, ref in node.models.items() if not role.startswith("policy_")]
    policies = [ref.name for role, ref in node.models.items() if role.startswith("policy_")]
    reads += [f"policies={','.join(policies)}"] if policies else []
    reads += [f"{role}={Path(ref.name).name}" for role, ref in node.data.items()]
    steps = _steps(node, counted)
    return PlanRow(
        node.name, node.kind, node.key, " ".join(reads), counted.used, steps, _batch(node), disk, state, why
    )


def trains(node: Node) -> bool:
    """Whether a stage leaves weights behind."""
    return isinstance(node.config, OptimizerConfig)


def _steps(node: Node, counted: Rows) -> int | None:
    if isinstance(node.config, PPOConfig):
        return num_ppo_steps(node.config)
    if isinstance(node.config, TrainingConfig) and counted.used:
        return num_steps(node.config, counted.used)
    return None


def _batch(node: Node) -> str:
    if not isinstance(node.config, OptimizerConfig):
        return ""
    micro = min(node.config.micro_batch_size, node.config.batch_size)
    return f"{node.config.batch_size} = {micro} x {node.config.batch_size // micro}"


def _warnings(node: Node, graph: Graph) -> list[str]:
    if node.kind == "dpo" and not graph.lineage(node.name) & {"sft", "rs", "ppo"}:
        return [
            f"{node.name}: no sft stands behind its policy; DPO from an untuned model moves little and forgets much"
        ]
    if isinstance(node.config, SFTConfig) and node.config.max_response_length >= node.config.max_length:
        return [f"{node.name}: max_response_length leaves no room for a prompt within max_length"]
    return []


def print_plan(plan: Plan, console: Console) -> None:
    """Show a plan as a table, with what feeds each stage and its warnings below."""
    needs = f"needs {_bytes(plan.disk_needed)}, {_bytes(plan.disk_free)} free"
    console.print(Text(f"run {plan.run}   {needs}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "rows", "steps", "batch = micro x accum", "disk", "key"):
        table.add_column(
            title, justify="right" if title in ("rows", "steps", "disk") else "left", no_wrap=True
        )
    for row in plan.rows:
        rows = "" if row.rows is None else f"{row.rows:,}"
        steps = "" if row.steps is None else f"{row.steps:,}"
        cells = (row.name, row.state, rows, steps, row.batch, _bytes(row.disk), row.key[:8])
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for row in plan.rows:
        console.print(Text(f"{row.name}: {row.reads}  ({row.why})"), soft_wrap=True)
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}"), soft_wrap=True)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
