"""The smallest change that makes a stage fit, found by estimating again.

needs(config, setting), memory there is -> words to add to the command, and what the stage then needs
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from alignpipe.config import SHARDED, OptimizerConfig, SamplingConfig, StageConfig
from alignpipe.pipeline.activations import Setting
from alignpipe.pipeline.memory import Memory

MAX_PROCESSES = 4096
Needs = Callable[[StageConfig, Setting], Memory]
Changed = tuple[StageConfig, Setting]


@dataclass(frozen=True)
class Change:
    """One thing a user can change.

    Attributes:
        key: that is set; two changes of one key exclude each other.
        word: on the command line.
        apply: makes it.
    """

    key: str
    word: str
    apply: Callable[[StageConfig, Setting], Changed]


@dataclass(frozen=True)
class Advice:
    """Words that make a stage fit, and its memory with them."""

    words: tuple[str, ...]
    memory: Memory


def smallest_change(
    needs: Needs, config: StageConfig, setting: Setting, prefix: str, available: float
) -> Advice | None:
    """Try changes in the order of what they cost a user: time, then results, then machines.

    Fewest changes first. Adapters come after all that leaves the result as it is, more processes after adapters, as
    few more as the other changes allow.

    Args:
        needs: memory of the stage under a configuration and a setting.
        config: of the stage.
        setting: as it is.
        prefix: of the stage's keys, such as `stages.sft.`.
        available: bytes of one process.

    Returns:
        None where nothing helps.
    """
    for changes in _candidates(config, setting, prefix):
        changed, under = config, setting
        for change in changes:
            changed, under = change.apply(changed, under)
        if under.launch.strategy in SHARDED and (under.adapted or under.launch.optimizer_offload):
            # What a run refuses is no advice.
            continue
        memory = needs(changed, under)
        if memory.total <= available:
            return Advice(tuple(change.word for change in changes), memory)
    return None


def _candidates(config: StageConfig, setting: Setting, prefix: str) -> Iterator[tuple[Change, ...]]:
    same = [*_launch_changes(config, setting), *_batch_changes(config, setting, prefix), *_sharding(setting)]
    yield from _sets(same)
    if not setting.adapted and isinstance(config, OptimizerConfig):
        lora = _adapter_change()
        yield (lora,)
        yield from ((*changes, lora) for changes in _sets(same))
    if setting.gpu:
        others = [change for change in same if change.key != "launch.strategy"]
        for more in _more_processes(config, setting):
            yield (more,)
            yield from ((*changes, more) for changes in _sets(others))


def _sets(changes: list[Change]) -> Iterator[tuple[Change, ...]]:
    """All sets of changes with a key once each, small ones first, in the order given."""
    for size in range(1, len({change.key for change in changes}) + 1):
        for chosen in combinations(changes, size):
            if len({change.key for change in chosen}) == size:
                yield chosen


def _launch_changes(config: StageConfig, setting: Setting) -> list[Change]:
    if not isinstance(config, OptimizerConfig):
        return []
    found = []
    if not setting.launch.gradient_checkpointing:
        found.append(_launch("gradient_checkpointing"))
    if setting.gpu and not setting.launch.optimizer_offload:
        found.append(_launch("optimizer_offload"))
    return found


def _batch_changes(config: StageConfig, setting: Setting, prefix: str) -> list[Change]:
    found: list[Change] = []
    if isinstance(config, OptimizerConfig):
        here = min(config.micro_batch_size, -(-config.batch_size // setting.processes))
        found += [
            _stage("micro_batch_size", size, prefix)
            for size in _halves(here)
            if config.batch_size % size == 0
        ]
    if isinstance(config, SamplingConfig):
        found += [
            _stage("generation_batch_size", size, prefix) for size in _halves(config.generation_batch_size)
        ]
    return found


def _sharding(setting: Setting) -> list[Change]:
    if setting.processes == 1 or setting.cut:
        return []
    return [_launch("strategy", "fsdp2")]


def _more_processes(config: StageConfig, setting: Setting) -> list[Change]:
    found = []
    processes = setting.processes * 2
    # Each needs a row of a step.
    most = min(MAX_PROCESSES, config.batch_size) if isinstance(config, OptimizerConfig) else MAX_PROCESSES
    while processes <= most:
        found.append(_processes(processes, setting))
        processes *= 2
    return found


def _launch(name: str, value: Any = True) -> Change:
    def apply(config: StageConfig, setting: Setting) -> Changed:
        return config, replace(setting, launch=replace(setting.launch, **{name: value}))

    return Change(f"launch.{name}", f"launch.{name}={str(value).lower()}", apply)


def _processes(count: int, setting: Setting) -> Change:
    strategy = setting.launch.strategy if setting.cut else "fsdp2"

    def apply(config: StageConfig, setting: Setting) -> Changed:
        return config, replace(
            setting, launch=replace(setting.launch, strategy=strategy, num_processes=count)
        )

    return Change("launch.strategy", f"launch.strategy={strategy} launch.num_processes={count}", apply)


def _stage(name: str, value: int, prefix: str) -> Change:
    def apply(config: StageConfig, setting: Setting) -> Changed:
        changed: Any = config
        return replace(changed, **{name: value}), setting

    return Change(name, f"{prefix}{name}={value}", apply)


def _adapter_change() -> Change:
    def apply(config: StageConfig, setting: Setting) -> Changed:
        return config, replace(setting, adapter=replace(setting.adapter, kind="lora"))

    return Change("adapter", "adapter=lora", apply)


def _halves(size: int) -> list[int]:
    """A half, a quarter and so on down to 1."""
    found = []
    while size > 1:
        size //= 2
        found.append(size)
    return found
