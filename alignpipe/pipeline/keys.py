"""The key of a stage: sha256 over everything that decides its result.

configuration, content of data and weights, keys of parents, precision, template, code version -> 16 hex digits

Where it runs, how it logs, how often it saves and how many rows one forward holds are not in it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from alignpipe.artifact import Manifest, read_manifest
from alignpipe.config import TINY, TOY, Config, OptimizerConfig, semantic
from alignpipe.data.sources import MIXTURE, content_hash, holds_world
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import AlignpipeError, DataError
from alignpipe.pipeline.adapters import stage_adapter
from alignpipe.pipeline.graph import JUDGE, SECOND_DATA, TEXT_DATA, Graph, Node
from alignpipe.pipeline.references import DataRef, ModelRef
from alignpipe.pipeline.store import FileHashes, Store

# Raised by hand when a change of the code changes what a kind of stage makes from the same inputs.
VERSIONS = {"sft": 1, "collect": 1, "rm": 1, "rs": 2, "ppo": 1, "dpo": 1, "eval": 2}
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")
KEY_LENGTH = 16
# More differences than this explain nothing.
MAX_CHANGES = 4
# What only people who rank can change; other stages on the embedded world do not read it.
RANKERS = ("collect", "rm", "dpo")


def add_keys(graph: Graph, config: Config, store: Store, chat_template: str) -> None:
    """Fill in key and inputs of every node, parents first.

    Args:
        graph: whose nodes get their keys.
        config: of the run.
        store: keeps the hashes of files that were read.
        chat_template: Jinja source for a model without a template of its own.
    """
    hashes = _hashes(store)
    for node in graph:
        node.inputs = _inputs(node, graph, config, hashes, chat_template)
        node.key = _digest(node.inputs)
    hashes.save()


def check_unchanged(node: Node, graph: Graph, config: Config, store: Store, chat_template: str) -> None:
    """Make sure that a stage will read from the disk what its key was made of, which may be hours ago.

    Raises:
        DataError: a file has changed since.
    """
    now = _leaves(_inputs(node, graph, config, _hashes(store), chat_template))
    changed = [name for name, value in _leaves(node.inputs).items() if now.get(name) != value]
    if changed:
        kind, role = (*changed[0].split("."), "")[:2]
        refs = node.data if kind == "data" else node.models
        raise DataError(
            f"{refs[role].name if role in refs else changed[0]}: has changed on the disk since this run was planned; "
            f"run the same command again"
        )


def _hashes(store: Store) -> FileHashes:
    return FileHashes(store.root / "work" / "hashes.json")


def _inputs(
    node: Node, graph: Graph, config: Config, hashes: FileHashes, chat_template: str
) -> dict[str, object]:
    settings = semantic(node.config)
    data = {
        # A file of templates has no settings of its own.
        role: _data_inputs(ref, settings.pop(role, {}), node, graph, hashes)
        for role, ref in node.data.items()
    }
    for role in (*SECOND_DATA.values(), TEXT_DATA):
        settings.pop(role, None)
    _reduce_monitor(settings, node)
    if settings.get("rollout") == {"engine": "local"}:
        settings.pop("rollout")
    reward = settings.pop("reward", None)
    if node.rewarded:
        settings["reward"] = _reward_inputs(reward, node)
    functions = {role: f"{found.key[:KEY_LENGTH]} {found.name}" for role, found in node.functions.items()}
    adapter, trusted = stage_adapter(config, node), config.model.trust_remote_code
    return {
        "kind": node.kind,
        "version": VERSIONS[node.kind],
        "settings": settings,
        "models": {role: _model_key(ref, graph, config, hashes) for role, ref in node.models.items()},
        "data": data,
        **({"functions": functions} if functions else {}),
        "precision": config.launch.precision,
        "adapter": semantic(adapter) if adapter.kind != "none" else "none",
        **_rounding(config, node),
        **({"trust_remote_code": trusted} if trusted is not None else {}),
        "chat_template": hashlib.sha256(chat_template.encode()).hexdigest()[:KEY_LENGTH],
    }


def content_of(node: Node, role: str) -> str:
    """Hash of what a data set of a stage holds; the key of the stage that makes it."""
    data: Any = node.inputs["data"]
    return str(data[role]["content"])


def _rounding(config: Config, node: Node) -> dict[str, Any]:
    """What computes the same in another order of sums; nothing where it is left out."""
    compiled = config.model.compile and isinstance(node.config, OptimizerConfig)
    kernels = config.model.kernels
    return {**({"compile": True} if compiled else {}), **({"kernels": kernels} if kernels != "none" else {})}


def _reward_inputs(reward: dict[str, Any], node: Node) -> dict[str, Any]:
    """What of a reward takes part; weights and thresholds of what is not there are in no key."""
    takes_part = {
        "models": bool(reward["models"]),
        "function_weight": "reward" in node.functions,
        "ensemble": reward["ensemble"] != "sum",
        "uncertainty_penalty": reward["ensemble"] == "mean_minus_std",
        "gate": reward["gate"]["model"] is not None,
    }
    return {name: reward[name] for name, used in takes_part.items() if used}


def _reduce_monitor(settings: dict[str, Any], node: Node) -> None:
    """A monitor that never looks decides nothing; a judge by name stands among the models."""
    if settings.get("monitor", {}).get("action") == "none":
        settings.pop("monitor")
    elif JUDGE in node.models:
        settings["monitor"].pop("judge")


def _model_key(ref: ModelRef, graph: Graph, config: Config, hashes: FileHashes) -> str:
    if ref.stage is not None:
        return graph.nodes[ref.stage].key
    if ref.key:
        return ref.key
    if ref.path == TINY:
        return _digest(
            {"tiny": semantic(config.model.architecture), "tokenizer": Tokenizer.toy().fingerprint}
        )
    if ref.revision is not None:
        return f"{ref.path}@{ref.revision}"
    folder = Path(ref.path)
    return _digest(
        {path.name: hashes(path) for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))}
    )


def _data_inputs(
    ref: DataRef, settings: dict[str, Any], node: Node, graph: Graph, hashes: FileHashes
) -> dict[str, Any]:
    content = graph.nodes[str(ref.stage)].key if ref.source is None else content_hash(ref.source, hashes)
    if ref.source is None or ref.source.kind != TOY:
        settings.pop("world", None)
    if ref.source is None or ref.source.kind != MIXTURE:
        settings.pop("mixture_stopping", None)
    if node.kind not in RANKERS or ref.source is None or not holds_world(ref.source):
        settings.pop("labelers", None)
    return {"content": content, "share": ref.share, "settings": settings}


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_LENGTH]


def why_not_reused(node: Node, store: Store) -> str:
    """What differs from the stage of the same kind that is most like this one.

    Returns:
        Such as `settings.kl_coef 0.05 -> 0.1`; where nothing is alike, that.
    """
    mine = _leaves(node.inputs)
    best: list[str] | None = None
    for manifest in _manifests(node.kind, store):
        theirs = _leaves(manifest.inputs)
        changes = [
            f"{name} {_short(theirs.get(name))} -> {_short(mine.get(name))}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        if changes and (best is None or len(changes) < len(best)):
            best = changes
    if best is None:
        return "the first of its kind here"
    return "; ".join(best) if len(best) <= MAX_CHANGES else "nothing like it in the store"


def _manifests(kind: str, store: Store) -> list[Manifest]:
    found = []
    for folder in sorted((store.root / "stages").glob(f"{kind}-*")):
        try:
            manifest = read_manifest(folder)
        except AlignpipeError:
            continue
        if manifest is not None:
            found.append(manifest)
    return found


def _leaves(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, object] = {}
    for name, item in value.items():
        leaves |= _leaves(item, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:8]}..."
