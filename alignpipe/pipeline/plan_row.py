"""One stage of a plan: reuse or run and why, what feeds it, rows, steps, batch, disk.

Node, rows, shapes -> PlanRow
"""

from dataclasses import dataclass
from pathlib import Path

from alignpipe.artifact import Manifest
from alignpipe.config import (
    EvalConfig,
    OptimizerConfig,
    PPOConfig,
    RSConfig,
    StageConfig,
    TrainingConfig,
    is_composed,
    num_ppo_steps,
    num_steps,
    reward_weights,
)
from alignpipe.errors import ConfigError
from alignpipe.pipeline.architecture import Architecture
from alignpipe.pipeline.counts import Rows
from alignpipe.pipeline.estimate import Estimate
from alignpipe.pipeline.graph import LISTS, Node, is_reward
from alignpipe.pipeline.keys import why_not_reused
from alignpipe.pipeline.store import Store

BYTES_PER_WEIGHT = 4


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
        estimate: memory, tokens and time; None for a stage that is reused or of unknown shape.
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
    estimate: Estimate | None = None


def make_row(
    node: Node,
    counted: Rows,
    reused: dict[str, Manifest],
    store: Store,
    models: dict[str, Architecture],
    processes: int,
) -> PlanRow:
    """The row of a stage, its memory and time left open.

    Args:
        node: the stage, with its key.
        counted: its rows.
        reused: finished artifacts, by stage.
        store: where states lie.
        models: shapes of what it opens, by role.
        processes: that share a step.

    Raises:
        ConfigError: a step has fewer rows than there are processes.
    """
    manifest = reused.get(node.name)
    if manifest is not None:
        state, why = "reuse", "finished with the same inputs"
        disk = sum(entry.size for entry in manifest.files.values())
    else:
        states = store.states(node.kind, node.key)
        state = "resume" if states else "run"
        why = f"stopped at {states[-1]}" if states else why_not_reused(node, store)
        disk = _checkpoint_bytes(node, models)
    return PlanRow(
        name=node.name,
        kind=node.kind,
        key=node.key,
        reads=_reads(node),
        rows=counted.used,
        steps=_steps(node, counted),
        batch=_batch(node, processes),
        disk=disk,
        state=state,
        why=why,
    )


def _reads(node: Node) -> str:
    """What feeds a stage, such as `policy=sft reward_model=rm data=toy`."""
    several, listed = LISTS.get(node.kind, ("", " "))
    lists = [ref.name for role, ref in node.models.items() if role.startswith(f"{listed}_")]
    alone = [role for role in node.models if not role.startswith(f"{listed}_")]
    if node.rewarded:
        alone = [role for role in alone if not is_reward(role)]
    reads = [f"{role}={node.models[role].name}" for role in alone] + _reward_words(node.config)
    reads += [f"{several}={','.join(lists)}"] if lists else []
    reads += [
        f"{role}={'+'.join(Path(name).name for name in ref.name.split(' + '))}"
        for role, ref in node.data.items()
    ]
    return " ".join(reads)


def _reward_words(config: StageConfig) -> list[str]:
    """What a reward is made of, such as `reward=1*helpful+0.5*safety gate=safety<0.15`; nothing for one model alone."""
    if not isinstance(config, RSConfig | PPOConfig | EvalConfig) or not is_composed(config.reward):
        return []
    reward = config.reward
    models = "+".join(f"{weight:g}*{name}" for name, weight in reward_weights(config).items())
    terms = [models if reward.ensemble == "sum" else f"{reward.ensemble}({models})"] if models else []
    terms += [f"{reward.function_weight:g}*{Path(reward.function).name}"] if reward.function else []
    gate = [f"gate={reward.gate.model}<{reward.gate.below:g}"] if reward.gate.model else []
    return [f"reward={'+'.join(terms)}", *gate]


def _steps(node: Node, counted: Rows) -> int | None:
    if isinstance(node.config, PPOConfig):
        return num_ppo_steps(node.config)
    if isinstance(node.config, TrainingConfig) and counted.used:
        return num_steps(node.config, counted.used)
    return None


def _batch(node: Node, processes: int) -> str:
    """The rows of a step: of one forward, times forwards, times processes where there are several.

    Raises:
        ConfigError: fewer rows than processes.
    """
    if not isinstance(node.config, OptimizerConfig):
        return ""
    size = node.config.batch_size
    if size < processes:
        raise ConfigError(
            f"{node.name}: batch_size {size} is less than launch.num_processes {processes}, so some would have nothing "
            f"to do; raise it to {processes} or start fewer processes"
        )
    own = -(-size // processes)
    micro = min(node.config.micro_batch_size, own)
    return f"{size} = {micro} x {-(-own // micro)}" + (f" x {processes}" if processes > 1 else "")


def _checkpoint_bytes(node: Node, models: dict[str, Architecture]) -> int:
    """Size of the weights that a stage leaves behind, as float32; 0 where the shape is not known."""
    if not isinstance(node.config, OptimizerConfig) or "policy" not in models:
        return 0
    shape = models["policy"]
    return BYTES_PER_WEIGHT * (shape.scalar_parameters if node.kind == "rm" else shape.parameters)
