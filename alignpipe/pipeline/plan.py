"""What a run would do, told without torch: stages, reuse or run and why, rows, steps, batch, disk, memory, warnings.

Config -> graph, keys, rows and lengths -> Plan; everything that can be wrong is found here, before step one
"""

import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from alignpipe.artifact import Manifest
from alignpipe.config import TINY, Config, DPOConfig, SFTConfig
from alignpipe.data.sources import detect_format
from alignpipe.data.template import find_template
from alignpipe.disk import existing, format_bytes
from alignpipe.errors import CheckpointError, ConfigError, MachineError
from alignpipe.pipeline.accelerators import Machine, find_machine
from alignpipe.pipeline.activations import Setting
from alignpipe.pipeline.adapters import check_adapters
from alignpipe.pipeline.advice import smallest_change
from alignpipe.pipeline.build import build_graph
from alignpipe.pipeline.counts import Rows, count_rows, judged_twice
from alignpipe.pipeline.estimate import estimate, make_setting, shapes
from alignpipe.pipeline.graph import Graph, Node
from alignpipe.pipeline.hub import model_folder
from alignpipe.pipeline.keys import add_keys
from alignpipe.pipeline.launch import check_devices, num_processes
from alignpipe.pipeline.lengths import fit_lengths
from alignpipe.pipeline.plan_row import PlanRow, make_row
from alignpipe.pipeline.store import Store

# AdamW keeps two moments beside the weights; two states are kept at a time.
STATE_COPIES = 3 * 2


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
        machine: that a process has to itself.
        setting: that memory is estimated under.
        reused: finished artifacts, by stage.
    """

    run: str
    rows: list[PlanRow]
    warnings: list[str]
    disk_needed: int
    disk_free: int
    graph: Graph
    chat_template: str
    machine: Machine
    setting: Setting
    reused: dict[str, Manifest] = field(default_factory=dict)


def make_plan(config: Config, *, bare: bool = False) -> Plan:
    """Plan a run and check everything that can be checked before it.

    Args:
        config: of the run.
        bare: model folders may hold a `config.json` and no more; what that leaves open is said.

    Raises:
        AlignpipeError: of the class that fits what is wrong.
    """
    store = Store(Path(config.output_dir).absolute())
    _check_machine(config, bare)
    graph = build_graph(config, store, bare=bare)
    adapter_warnings = check_adapters(config, graph)
    config, warnings = fit_lengths(config)
    if warnings:
        graph = build_graph(config, store, bare=bare)
    warnings += adapter_warnings
    chat_template = fallback_template(config, graph)
    add_keys(graph, config, store, chat_template)
    reused = reusable(graph, store)
    machine = find_machine(config.launch)
    setting = make_setting(config, machine)
    readable = not bare or has_tokenizer(config)
    if not readable:
        warnings.append(
            f"{config.model.path}: no tokenizer.json in it, so rows and tokens are unknown; "
            f"memory is for the longest rows that the configuration allows"
        )
    rows, counts = [], {}
    for node in graph.order:
        counted = counts[node.name] = (
            count_rows(node, graph, config, chat_template) if readable and node.name not in reused else Rows()
        )
        warnings += counted.warnings + _warnings(node, graph)
        models, notes = shapes(node, graph, config)
        warnings += [note for note in notes if note not in warnings]
        row = make_row(node, counted, reused, store, models, num_processes(config.launch))
        if node.name not in reused:
            row.estimate = estimate(node, models, counted, row.steps, setting, machine)
        warnings += _misfit(node, row, config, setting, machine)
        rows.append(row)
    warnings += judged_twice(graph, counts) + _unread(graph)
    trained = [row for row in rows if row.steps is not None and row.state != "reuse"]
    needed = sum(row.disk for row in rows if row.state != "reuse")
    needed += STATE_COPIES * max((row.disk for row in trained), default=0)
    free = shutil.disk_usage(existing(store.root)).free
    if needed > free and not bare:
        raise MachineError(
            f"{store.root.resolve()}: needs about {format_bytes(needed)}, has {format_bytes(free)} free; "
            f"choose another output_dir"
        )
    if needed > free:
        warnings.append(
            f"{store.root.resolve()}: needs about {format_bytes(needed)}, has {format_bytes(free)} free"
        )
    name = run_name(config, graph)
    return Plan(name, rows, warnings, needed, free, graph, chat_template, machine, setting, reused)


def has_tokenizer(config: Config) -> bool:
    """Whether rows can be turned into tokens here."""
    if config.model.path == TINY:
        return True
    return (model_folder(config.model.path, config.model.revision) / "tokenizer.json").is_file()


def _misfit(node: Node, row: PlanRow, config: Config, setting: Setting, machine: Machine) -> list[str]:
    """A sentence about a stage that does not fit, with the smallest change after which it would."""
    found = row.estimate
    if found is None or found.memory.total <= machine.memory:
        return []
    prefix = "stage." if config.stage is not None else f"stages.{node.name}."
    advice = smallest_change(found.needs, node.config, setting, prefix, machine.memory)
    mend = (
        "no change that the plan knows makes it fit"
        if advice is None
        else f"the smallest change that would: {' '.join(advice.words)} ({format_bytes(advice.memory.total)})"
    )
    return [
        f"{node.name}: does not fit, {format_bytes(found.memory.total)} of the {format_bytes(machine.memory)} "
        f"that a process has on {machine.name}; {mend}"
    ]


def _check_machine(config: Config, bare: bool) -> None:
    """What can be asked of the machine before any name is resolved; a bare plan may be for another one."""
    if Path(config.output_dir).is_file():
        raise ConfigError(f"output_dir: {config.output_dir} is a file; name a folder")
    if not bare:
        check_devices(config.launch)
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


def _warnings(node: Node, graph: Graph) -> list[str]:
    if isinstance(node.config, DPOConfig):
        return _dpo_warnings(node, node.config, graph)
    if isinstance(node.config, SFTConfig) and node.config.max_response_length >= node.config.max_length:
        return [f"{node.name}: max_response_length leaves no room for a prompt within max_length"]
    return []


def _unread(graph: Graph) -> list[str]:
    """A sentence for each stage before the last whose work is lost on the others."""
    read = {parent for node in graph for parent in node.parents}
    unread = [node.name for node in graph.order[:-1] if node.name not in read and node.kind != "eval"]
    return [f"{name}: no later stage reads what it makes" for name in unread]


def _dpo_warnings(node: Node, config: DPOConfig, graph: Graph) -> list[str]:
    found = []
    # ORPO takes the place of supervised fine-tuning: its loss holds it.
    if config.loss != "orpo" and not graph.lineage(node.name) & {"sft", "rs", "ppo"}:
        found.append(
            f"{node.name}: no sft stands behind its policy; DPO from an untuned model moves little and forgets much"
        )
    if "reference" not in node.models and config.reference not in (None, config.policy):
        found.append(
            f"{node.name}: loss={config.loss} has no reference, so reference={config.reference} is not opened"
        )
    return found
