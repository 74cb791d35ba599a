"""What a stage will take: memory by part, tokens, FLOPs, time.

node, rows -> shapes of its models -> memory at its peak, tokens, seconds on a named accelerator
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from alignpipe.config import (
    TINY,
    CollectConfig,
    Config,
    DPOConfig,
    EvalConfig,
    LaunchConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    SFTConfig,
    StageConfig,
)
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.pipeline.accelerators import UTILISATION, Machine
from alignpipe.pipeline.architecture import (
    Architecture,
    read_architecture,
    tiny_architecture,
)
from alignpipe.pipeline.counts import Rows
from alignpipe.pipeline.graph import Graph, Node
from alignpipe.pipeline.hub import model_folder
from alignpipe.pipeline.memory import Memory, Setting, Work, peak
from alignpipe.pipeline.moments import stage_moments
from alignpipe.pipeline.references import ModelRef

# A backward pass costs two forwards (arXiv:2204.02311, appendix B).
TRAINED = 3


@dataclass(frozen=True)
class Estimate:
    """What a stage will take.

    Attributes:
        parameters: of its policy.
        memory: of one process, at its peak.
        tokens: read in training and sampled, over all steps; None where the rows are not known.
        seconds: on the accelerator; None where that or the rows are not known.
        needs: memory at the peak under another configuration of the stage and another setting.
    """

    parameters: int
    memory: Memory
    tokens: float | None
    seconds: float | None
    needs: Callable[[StageConfig, Setting], Memory]


@dataclass(frozen=True)
class Effort:
    """What is computed: tokens, their FLOPs, and the passes over all weights that sampling makes one by one."""

    tokens: float = 0.0
    flops: float = 0.0
    passes: float = 0.0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.tokens + other.tokens, self.flops + other.flops, self.passes + other.passes)


def make_setting(config: Config, machine: Machine) -> Setting:
    """The launch with its strategy and processes decided, and the adapter."""
    return Setting(
        decided(config.launch),
        config.adapter,
        gpu=machine.gpu,
        eager=config.model.attn_implementation == "eager",
    )


def decided(launch: LaunchConfig) -> LaunchConfig:
    """`auto` made out: one process, or ddp over several. What is not given counts as one process."""
    processes = launch.num_processes or 1
    strategy = launch.strategy if processes > 1 else "single"
    return replace(
        launch,
        num_processes=processes,
        strategy="ddp" if strategy in ("auto", "single") and processes > 1 else strategy,
    )


def shapes(node: Node, graph: Graph, config: Config) -> tuple[dict[str, Architecture], list[str]]:
    """The shape of every model of a stage by role, and a sentence for each that is not known exactly."""
    found: dict[str, Architecture] = {}
    notes: list[str] = []
    for role, ref in node.models.items():
        shape, note = _shape(ref, graph, config)
        notes += [f"{ref.name}: {note}"] if note else []
        if shape is not None:
            name = "policy" if role.startswith("policy_") else role
            found[name] = max(shape, found.get(name, shape), key=lambda item: item.parameters)
    return found, notes


def _shape(ref: ModelRef, graph: Graph, config: Config) -> tuple[Architecture | None, str]:
    while ref.stage is not None:
        ref = graph.nodes[ref.stage].models["policy"]
    if ref.path == TINY:
        return tiny_architecture(config.model.architecture, Tokenizer.toy().vocab_size), ""
    return read_architecture(Path(model_folder(ref.path, ref.revision)))


def estimate(
    node: Node,
    models: dict[str, Architecture],
    rows: Rows,
    steps: int | None,
    setting: Setting,
    machine: Machine,
) -> Estimate | None:
    """What a stage will take; None where the shape of one of its models is not known."""
    if (
        any(role not in models for role in node.models if not role.startswith("policy_"))
        or "policy" not in models
    ):
        return None
    work = _work(node.config, rows)

    def needs(config: StageConfig, under: Setting) -> Memory:
        return peak(stage_moments(config, models, work, under))

    effort = None if rows.longest is None else _effort(node.config, models["policy"], rows, steps, setting)
    seconds = None if effort is None else _seconds(effort, models["policy"], setting, machine)
    return Estimate(
        models["policy"].parameters,
        needs(node.config, setting),
        None if effort is None else effort.tokens,
        seconds,
        needs,
    )


def _work(config: Any, rows: Rows) -> Work:
    """The rows as far as they are known, else the longest that the configuration allows."""
    responses = rows.responses or (getattr(config, "num_samples", 1) if config.kind == "collect" else 2)
    if rows.longest is not None:
        return Work(rows.longest, rows.shortest_prompt, responses)
    limit = (
        config.max_length
        if hasattr(config, "loss_on") or config.kind in ("rm", "dpo")
        else config.max_prompt_length
    )
    return Work(limit, 0, responses)


def _effort(
    config: Any, shape: Architecture, rows: Rows, steps: int | None, setting: Setting
) -> Effort | None:
    """Everything that a stage computes; None where the number of its rows is not known."""
    mean = rows.mean
    trained = TRAINED + setting.launch.gradient_checkpointing

    def read(tokens: float, length: float, times: float, *, head: bool = True) -> Effort:
        return Effort(
            tokens if times >= TRAINED else 0.0, times * tokens * shape.forward_flops(length, head=head)
        )

    def sampled(prompts: float, samples: int) -> Effort:
        responses = prompts * samples
        total = mean + config.max_response_length
        flops = (prompts * mean + responses * config.max_response_length) * shape.forward_flops(total)
        batches = ceil(responses / (config.generation_batch_size * setting.processes))
        return Effort(responses * config.max_response_length, flops, batches * config.max_response_length)

    match config:
        case PPOConfig():
            total = mean + config.max_response_length
            responses = config.rollout_size * config.num_samples
            tokens = responses * total
            updates = 2 * trained * config.ppo_epochs
            one = sampled(config.rollout_size, config.num_samples) + read(tokens, total, 4 + updates)
            return Effort(*(config.num_rollouts * value for value in vars(one).values()))
        case _ if rows.used is None:
            return None
        case SFTConfig() if steps:
            return read(steps * config.batch_size * mean, mean, trained)
        case RMConfig() if steps:
            return read(steps * config.batch_size * rows.responses * mean, mean, trained, head=False)
        case DPOConfig() if steps:
            scored = rows.used * 2 / max(1, rows.responses - 1)
            return read(2 * steps * config.batch_size * mean, mean, trained) + read(scored * mean, mean, 1)
        case RSConfig() if steps:
            prompts = rows.used * (1 - config.replay)
            total = mean + config.max_response_length
            learnt = read(steps * config.batch_size * total, total, trained)
            return (
                sampled(prompts, config.num_samples)
                + read(prompts * config.num_samples * total, total, 1, head=False)
                + learnt
            )
        case CollectConfig():
            return sampled(rows.used, config.num_samples)
        case EvalConfig():
            total = mean + config.max_response_length
            one = sampled(rows.used, 1) + read(rows.used * total, total, 3)
            return Effort(*(len(config.policies) * value for value in vars(one).values()))
    return None


def _seconds(effort: Effort, shape: Architecture, setting: Setting, machine: Machine) -> float | None:
    """FLOPs over what all processes get done, and for sampling the time to read the weights once a token."""
    flops = machine.peak_flops(setting.launch.precision)
    if flops is None or machine.bandwidth is None:
        return None
    reading = effort.passes * shape.parameters * setting.width / (machine.bandwidth * UTILISATION)
    return effort.flops / (setting.processes * flops * UTILISATION) + reading
