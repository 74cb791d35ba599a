"""Our side of every case: the stage as `alignpipe run` calls it, with a clock where a person sees progress."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.responses import respond
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from alignpipe.pipeline.tasks import stage_task
from alignpipe.signals import StopSignal
from alignpipe.stages import STAGES
from alignpipe.task import STOP
from alignpipe.training.context import Context
from alignpipe.training.metrics import METRICS, MetricLog
from alignpipe.training.optim import scaled
from alignpipe.training.progress import StageProgress
from benchmarks.case import MAX_LENGTH, OPTIMIZER, SEED, SIZES, Job, Measured
from benchmarks.clock import Clock
from benchmarks.workload import DEMONSTRATIONS, PAIRS, POLICY, QUESTIONS, REWARD, ids_of, num_tokens, stop_ids

# Parts of a stage whose units are the repetitions of a case.
TIMED = ("training", "rollouts")


class TimedProgress(StageProgress):
    """Marks the clock where training begins and after every step of it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("benchmark", Console(quiet=True))
        self._clock, self._timing = clock, False

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """As its base, with a mark."""
        super().begin(what, total, done)
        self._timing = what in TIMED
        if self._timing:
            self._clock.mark()

    def update(self, done: int, figures: dict[str, float] | None = None) -> None:
        """As its base, with a mark."""
        super().update(done, figures)
        if self._timing:
            self._clock.mark()


@dataclass
class TimedContext(Context):
    """Knows when each language model began to load and was there.

    Attributes:
        loads: role, seconds at the begin, seconds at the end.
    """

    loads: list[tuple[str, float, float]] = field(default_factory=list)

    def load_policy(self, role: str, tokenizer: Tokenizer, *, frozen: bool = False) -> PreTrainedModel:
        """As its base, noted."""
        began = time.perf_counter()
        model = super().load_policy(role, tokenizer, frozen=frozen)
        self.loads.append((role, began, time.perf_counter()))
        return model

    def after_load(self, role: str) -> float:
        """Seconds between the end of one load and the begin of the next."""
        place = [name for name, _, _ in self.loads].index(role)
        return self.loads[place + 1][1] - self.loads[place][2]


def sft(job: Job) -> Measured:
    """Supervised fine-tuning, an epoch a repetition."""
    clock, context = _train(job, "sft", DEMONSTRATIONS, "stage.num_samples=0")
    return _measured(job, clock, context, num_tokens(job.workload, "demonstrations"))


def rm(job: Job) -> Measured:
    """Reward model, an epoch a repetition."""
    clock, context = _train(job, "rm", PAIRS, "stage.stress_rows=0")
    return _measured(job, clock, context, num_tokens(job.workload, "pairs"))


def dpo(job: Job) -> Measured:
    """Direct preference optimization, an epoch a repetition.

    With `reference: in step` each repetition bears the stage's pass over the rows with the reference, which the
    stage makes once however many epochs follow.
    """
    clock, context = _train(job, "dpo", PAIRS, "stage.num_samples=0")
    found = _measured(job, clock, context, num_tokens(job.workload, "pairs"))
    if job.settings["reference"] == "in step":
        reference = context.after_load("reference")
        found = Measured(
            [reference + second for second in found.seconds], found.tokens, found.peak, found.losses
        )
    return found


def ppo(job: Job) -> Measured:
    """PPO, a rollout with its updates a repetition; the rollout has all prompts of the file."""
    settings = job.settings
    size, length = settings["rollout_size"], settings["response_length"]
    clock, context = run_stage(
        job,
        "ppo",
        QUESTIONS,
        f"stage.reward_model='{job.workload / REWARD}'",
        f"stage.num_rollouts={job.repetitions + 1}",
        f"stage.rollout_size={size}",
        "stage.num_samples=1",
        f"stage.ppo_epochs={settings['epochs']}",
        f"stage.batch_size={size}",
        f"stage.micro_batch_size={size}",
        f"stage.max_response_length={length}",
        f"stage.value_learning_rate={OPTIMIZER['learning_rate']}",
    )
    prompts = sum(map(len, ids_of(job.workload, "questions")))
    lengths = [line["objective/length"] for line in figures(context) if "objective/length" in line]
    tokens = [prompts + round(size * mean) for mean in lengths[1:]]
    return Measured(clock.repetitions(job.repetitions), tokens, clock.peak)


def sample(job: Job) -> Measured:
    """Responses to prompts as rs, collect and eval sample them."""
    settings, clock = job.settings, Clock(job.device)
    length = settings["response_length"]
    words = [f"stage.max_response_length={length}", "stage.temperature=1.0"]
    if "under_way" in settings:
        words.append(f"stage.generation_batch_size={settings['under_way']}")
    context = _context(job, "sft", DEMONSTRATIONS, clock, *words)
    config: Any = context.task.config
    tokenizer = context.tokenizer("policy")
    tokenizer.stop_ids = tuple(stop_ids(SIZES[job.size], settings["stop_every"]))
    policy = context.load_policy("policy", tokenizer)
    prompts = ids_of(job.workload, settings["prompts"])
    tokens = []
    clock.mark()
    for repetition in range(job.repetitions + 1):
        name = f"repetition-{repetition}"
        found = respond(policy, tokenizer, prompts, settings["num_samples"], config, context, name)
        clock.mark()
        tokens.append(sum(len(response.ids) for row in found for response in row))
    return Measured(clock.repetitions(job.repetitions), tokens[1:], clock.peak)


def _train(job: Job, kind: str, data: str, *words: str) -> tuple[Clock, TimedContext]:
    """Run a stage over fixed rows for the warm-up and the timed epochs."""
    batch = job.settings["batch_size"]
    micro_batch = job.settings.get("micro_batch_size", batch)
    return run_stage(
        job,
        kind,
        data,
        f"stage.epochs={job.repetitions + 1}",
        "stage.max_steps=null",
        f"stage.batch_size={batch}",
        f"stage.micro_batch_size={micro_batch}",
        "stage.eval_rows=0",
        *words,
    )


def run_stage(job: Job, kind: str, data: str, *words: str) -> tuple[Clock, TimedContext]:
    """Run a stage by itself to its end.

    Args:
        job: where its models lie.
        kind: of the stage.
        data: file below the workload.
        words: of the command line.
    """
    clock = Clock(job.device)
    context = _context(
        job,
        kind,
        data,
        clock,
        "stage.log_steps=1",
        "stage.lr_schedule=constant",
        "stage.warmup_ratio=0",
        *(f"stage.{name}={value}" for name, value in OPTIMIZER.items()),
        *words,
    )
    torch.manual_seed(SEED)
    STAGES[kind](scaled(context.task.config, context.task.adapter), context)
    return clock, context


def _context(job: Job, kind: str, data: str, clock: Clock, *words: str) -> TimedContext:
    """What the worker would hand to a stage run by itself."""
    composed = compose(
        [
            f"stage={kind}",
            f"model='{job.workload / POLICY}'",
            f"data='{job.workload / data}'",
            # The stage trains on every row, as the peer does.
            "data.shares={sft: 0.5, preference: 0.3, rl: 0.199999999, eval: 1.0e-9}",
            f"output_dir='{job.scratch}'",
            f"model.max_length={MAX_LENGTH}",
            f"model.max_prompt_length={MAX_LENGTH - 128}",
            "model.max_response_length=128",
            "launch=single",
            f"launch.device={job.device}",
            f"launch.precision={job.precision}",
            f"model.attn_implementation={job.settings.get('attention', 'sdpa')}",
            f"seed={SEED}",
            *words,
        ]
    )
    plan, store = make_plan(composed.config), Store(job.scratch)
    (node,) = plan.graph.nodes.values()
    task = stage_task(node, composed.config, plan, store)
    (task.work / "result").mkdir(parents=True)
    accelerator = Accelerator(cpu=job.device == "cpu")
    metrics = MetricLog(task.work, accelerator)
    return TimedContext(task, accelerator, metrics, TimedProgress(clock), StopSignal(task.work / STOP))


def _measured(job: Job, clock: Clock, context: Context, tokens: int) -> Measured:
    losses = [line["loss"] for line in figures(context) if "loss" in line]
    return Measured(clock.repetitions(job.repetitions), [tokens] * job.repetitions, clock.peak, losses=losses)


def figures(context: Context) -> list[dict[str, Any]]:
    """What the stage logged."""
    return [json.loads(line) for line in (context.task.work / METRICS).read_text().splitlines()]
