"""Holds a composition against the typed schema: what `+key=value` brought in, and kinds.

Hydra checks the types of keys that it knows, and lets `+` add any other; here those are found.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from alignpipe.compose import explain
from alignpipe.config import KINDS
from alignpipe.errors import ConfigError, did_you_mean


def check_keys(raw: DictConfig, overrides: list[str], groups: Iterable[str]) -> None:
    """Refuse what the schema does not hold.

    Args:
        raw: a whole composition without Hydra's own part.
        overrides: the words it was made of.
        groups: names of the groups of files.

    Raises:
        ConfigError: a key that the schema lacks, or a kind that does not fit its stage.
        OmegaConfBaseException: a `+hydra.` key that Hydra lacks.
    """
    _check_added_hydra_keys(overrides)
    foreign = next(_foreign_keys(raw, ""), None)
    if foreign is not None:
        tree = _without(OmegaConf.to_container(raw), foreign)
        raise ConfigError(explain.unknown_key(foreign, dict.fromkeys(groups) | tree))
    for name in raw.stages:
        _check_stage(f"stages.{name}", raw.stages[name], raw.data)
    if raw.stage is not None:
        _check_stage("stage", raw.stage, raw.data)


def own_problems(found: Iterable[str]) -> Iterator[str]:
    """Problems without those that were only inherited: a bad `seed` is named once, not for each stage."""
    at_root: set[tuple[str, str]] = set()
    for problem in found:
        key, _, complaint = problem.partition(": ")
        same = (key.rsplit(".", 1)[-1], complaint)
        if same not in at_root:
            yield problem
        if key.split(".")[0] not in ("stage", "stages"):
            at_root.add(same)


def _foreign_keys(node: DictConfig, above: str) -> Iterator[str]:
    """Keys that a `+` brought in past the schema."""
    schema = OmegaConf.get_type(node)
    known = {spec.name for spec in fields(schema)} if is_dataclass(schema) else None
    for name in node:
        key = str(name)
        at = f"{above}{key}"
        if known is not None and key not in known:
            yield at
        elif _is_section(node, key):
            yield from _foreign_keys(node[key], f"{at}.")


def _is_section(node: DictConfig, key: str) -> bool:
    refers = OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)
    return not refers and OmegaConf.is_dict(node[key])


def _without(tree: Any, key: str) -> dict[str, Any]:
    """The key tree as it would be without one key."""
    *above, last = key.split(".")
    node = tree
    for part in above:
        node = node[part]
    del node[last]
    return dict(tree)


def _check_added_hydra_keys(overrides: list[str]) -> None:
    """Hydra itself takes any `+hydra.key`; hold such words against its own schema."""
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        if word.startswith("+") and key.startswith("hydra."):
            OmegaConf.update(OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)}), key, value)


def _check_stage(path: str, stage: DictConfig, data: DictConfig) -> None:
    kind = stage.kind
    if kind not in KINDS:
        raise ConfigError(
            f"{path}.kind: there is no kind of stage {kind!r}. {did_you_mean(str(kind), KINDS)}"
        )
    if OmegaConf.get_type(stage) is not KINDS[kind]:
        word = f"stage={kind}" if path == "stage" else f"stage@{path}={kind}"
        raise ConfigError(
            f"{path}.kind: cannot be changed to {kind} key by key; choose the whole stage with {word}"
        )
    world = stage.data.world
    if not OmegaConf.is_interpolation(world, "mix"):
        # One weight set in a stage replaces the whole inherited table; put the others back.
        world.mix = OmegaConf.merge(data.world.mix, world.mix)
