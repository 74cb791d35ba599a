"""What a stage will take: memory by part, tokens, FLOPs, time.

node, rows -> shapes of its models -> memory at its peak, tokens, seconds on a named accelerator
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from alignpipe.config import (
    REFERENCE_FREE,
    TINY,
    UNPAIRED,
    CollectConfig,
    Config,
    DPOConfig,
    EvalConfig,
    LaunchConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    SamplingConfig,
    StageConfig,
    num_selected,
    reward_models,
)
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.pipeline.accelerators import UTILISATION, Machine
from alignpipe.pipeline.activations import Setting
from alignpipe.pipeline.architecture import (
    Architecture,
    read_architecture,
    tiny_architecture,
)
from alignpipe.pipeline.counts import Rows
from alignpipe.pipeline.graph import Graph, Node
from alignpipe.pipeline.hub import model_folder
from alignpipe.pipeline.launch import num_processes
from alignpipe.pipeline.memory import Memory, Work, peak
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

    def times(self, count: float) -> "Effort":
        """As much, so many times over."""
        return Effort(self.tokens * count, self.flops * count, self.passes * count)

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.tokens + other.tokens, self.flops + other.flops, self.passes + other.passes)


def make_setting(config: Config, machine: Machine) -> Setting:
    """The launch with its strategy and processes decided, and the adapter."""
    return Setting(
        decided(config.launch),
        config.adapter,
        gpu=machine.gpu,
        attention=config.model.attn_implementation,
    )


def decided(launch: LaunchConfig) -> LaunchConfig:
    """`auto` made out: one process, or ddp over several."""
    processes = num_processes(launch)
    several = "ddp" if launch.strategy == "auto" else launch.strategy
    return replace(launch, num_processes=processes, strategy="single" if processes == 1 else several)


def shapes(node: Node, graph: Graph, config: Config) -> tuple[dict[str, Architecture], list[str]]:
    """The shape of every model of a stage by role, and a sentence for each that is not known exactly."""
    found: dict[str, Architecture] = {}
    notes: list[str] = []
    for role, ref in node.opened.items():
        shape, note = _shape(ref, graph, config)
        notes += [note] if note else []
        if shape is not None:
            name = "policy" if role.startswith("policy_") else role
            found[name] = max(shape, found.get(name, shape), key=lambda item: item.parameters)
    return found, notes


def _shape(ref: ModelRef, graph: Graph, config: Config) -> tuple[Architecture | None, str]:
    while ref.stage is not None:
        ref = graph.nodes[ref.stage].models["policy"]
    if ref.path == TINY:
        return tiny_architecture(config.model.architecture, Tokenizer.toy().vocab_size), ""
    found, note = read_architecture(Path(model_folder(ref.path, ref.revision)))
    shape = None if found is None else replace(found, source=ref.path)
    return shape, f"{ref.name}: {note}" if note else ""


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
        any(role not in models for role in node.opened if not role.startswith("policy_"))
        or "policy" not in models
    ):
        return None
    work = _work(node.config, rows, steps)

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


def _work(config: Any, rows: Rows, steps: int | None) -> Work:
    """The rows as far as they are known, else the longest that the configuration allows."""
    responses = rows.responses or (getattr(config, "num_samples", 1) if config.kind == "collect" else 2)
    if rows.longest is not None:
        return Work(rows.longest, responses, rows.items, steps or 1)
    limit = (
        config.max_length
        if hasattr(config, "loss_on") or config.kind in ("rm", "dpo")
        else config.max_prompt_length
    )
    return Work(limit, responses)


def _effort(
    config: Any, shape: Architecture, rows: Rows, steps: int | None, setting: Setting
) -> Effort | None:
    """Everything that a stage computes; None where the number of its rows is not known."""
    if isinstance(config, PPOConfig):
        return _ppo_effort(config, shape, rows.mean, setting)
    if rows.used is None:
        return None
    if isinstance(config, CollectConfig):
        return _sampled(config, shape, rows.used, config.num_samples, rows.mean, setting)
    if isinstance(config, EvalConfig):
        total = rows.mean + config.max_response_length
        asked = _sampled(config, shape, rows.used, config.num_samples, rows.mean, setting)
        # Scored by the reward models, and by policy and reference for their KL.
        passes = len(reward_models(config)) + 2
        scored = _read(shape, rows.used * config.num_samples * total, total, passes)
        return (asked + scored).times(len(config.policies))
    return None if steps is None else _learning_effort(config, shape, rows, rows.used, steps, setting)


def _learning_effort(
    config: Any, shape: Architecture, rows: Rows, used: int, steps: int, setting: Setting
) -> Effort:
    """A stage that ends in training over fixed rows, with what it samples and scores before."""
    mean, items, passes = rows.mean, steps * config.batch_size, _passes(setting)
    if isinstance(config, RMConfig):
        tokens = items * rows.responses * _row_tokens(rows, rows.responses, setting)
        return _read(shape, tokens, mean, passes, head=False)
    if isinstance(config, DPOConfig):
        return _dpo_effort(config, shape, rows, items, used / max(1, rows.responses - 1), setting)
    if isinstance(config, RSConfig):
        prompts, total = used * (1 - config.replay) / num_selected(config), mean + config.max_response_length
        asked = _sampled(config, shape, prompts, config.num_samples, mean, setting)
        scored = prompts * config.num_samples * total * len(reward_models(config))
        return asked + _read(shape, scored, total, 1, head=False) + _read(shape, items * total, total, passes)
    return _read(shape, items * mean, mean, passes)


def _row_tokens(rows: Rows, together: int, setting: Setting) -> float:
    """Tokens that are read for each of several responses to one prompt in one forward."""
    shared = rows.mean_prompt if setting.shares(rows.mean_prompt) else 0.0
    return rows.mean - shared * (1 - 1 / together)


def _dpo_effort(
    config: DPOConfig, shape: Architecture, rows: Rows, items: int, half_responses: float, setting: Setting
) -> Effort:
    """K responses make up to K (K - 1) / 2 pairs, and a reference reads each response once.

    KTO learns from one response an item, and reads one to another prompt beside it.
    """
    mean, passes = rows.mean, _passes(setting)
    together = max(1, min(rows.responses, config.micro_batch_size))
    scored = 2 * half_responses * _row_tokens(rows, together, setting)
    if config.loss in REFERENCE_FREE:
        scored = 0.0
    if config.loss in UNPAIRED:
        return _read(shape, items * mean, mean, passes) + _read(shape, scored + items * mean, mean, 1)
    learnt = 2 * items * _row_tokens(rows, 2, setting)
    return _read(shape, learnt, mean, passes) + _read(shape, scored, mean, 1)


def _ppo_effort(config: PPOConfig, shape: Architecture, mean: float, setting: Setting) -> Effort:
    """Each response is sampled, read once by every model, and learnt in every epoch by policy and value model."""
    total = mean + config.max_response_length
    tokens = config.rollout_size * config.num_samples * total
    learners = 1 + config.has_value_model
    asked = _sampled(config, shape, config.rollout_size, config.num_samples, mean, setting)
    passes = 1 + learners + len(reward_models(config)) + learners * config.ppo_epochs * _passes(setting)
    read = _read(shape, tokens, total, passes)
    if config.ptx_coef > 0:
        rows = config.updates_per_rollout * config.ptx_batch_size
        read += _read(shape, rows * total, total, _passes(setting))
    return (asked + read).times(config.num_rollouts)


def _passes(setting: Setting) -> int:
    """Forward passes that training on a token costs: its backward pass is worth two, checkpointing repeats one."""
    return TRAINED + setting.launch.gradient_checkpointing


def _read(shape: Architecture, tokens: float, length: float, passes: float, *, head: bool = True) -> Effort:
    learnt = tokens if passes >= TRAINED else 0.0
    return Effort(learnt, passes * tokens * shape.forward_flops(length, head=head))


def _sampled(
    config: SamplingConfig, shape: Architecture, prompts: float, samples: int, mean: float, setting: Setting
) -> Effort:
    """Responses of the greatest length to prompts of a mean length."""
    tokens = prompts * samples * config.max_response_length
    flops = (prompts * mean + tokens) * shape.forward_flops(mean + config.max_response_length)
    batches = ceil(prompts * samples / (config.generation_batch_size * setting.processes))
    return Effort(tokens, flops, batches * config.max_response_length)


def _seconds(effort: Effort, shape: Architecture, setting: Setting, machine: Machine) -> float | None:
    """FLOPs over what all processes get done, and for sampling the time to read the weights once a token."""
    flops = machine.peak_flops(setting.launch.precision)
    if flops is None or machine.bandwidth is None:
        return None
    reading = effort.passes * shape.parameters * setting.width / (machine.bandwidth * UTILISATION)
    return effort.flops / (setting.processes * flops * UTILISATION) + reading
