"""A number that is not finite ends the stage in its step, before the weights change, or is left out and counted."""

import importlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from alignpipe.errors import NumericalError
from alignpipe.pipeline.store import TASK
from alignpipe.signals import StopSignal
from alignpipe.stages import STAGES
from alignpipe.training.context import Context
from alignpipe.worker import run_task
from tests.faults.commands import start
from tests.faults.stopping import SFT, content
from tests.faults.table import Faults
from tests.project import Project

# Stage -> tensor -> function that makes it.
PLACES = {
    "sft": {
        "log-prob": "alignpipe.stages.sft.batch_logprobs",
        "loss": "alignpipe.stages.sft.sft_loss",
        "gradient": "",
    },
    "rm": {
        "score": "alignpipe.stages.rm.sequence_head_scores",
        "loss": "alignpipe.stages.rm.ranking_losses",
        "gradient": "",
    },
    "dpo": {
        "log-prob": "alignpipe.stages.dpo.batch_logprobs",
        "loss": "alignpipe.stages.dpo.nll",
        "gradient": "",
    },
    "ppo": {
        "log-prob": "alignpipe.rollout.score.batch_logprobs",
        "value": "alignpipe.rollout.score.next_token_scores",
        "reward": "alignpipe.rollout.score.sequence_head_scores",
        "advantage": "alignpipe.stages.ppo.gae",
        "loss": "alignpipe.stages.ppo.value_loss",
        "gradient": "",
    },
}
# Steps between which a rollout of ppo lies.
STEPS = {"sft": (0, 2), "rm": (0, 2), "dpo": (0, 2), "ppo": (0, 4)}
VALUES = (math.nan, math.inf)
CASES = [
    (stage, tensor, step, value)
    for value in VALUES
    for turn in range(2)
    for stage in PLACES
    for tensor in PLACES[stage]
    for step in STEPS[stage][turn : turn + 1]
]
WORDS = (
    "+stage@stages.dpo=dpo",
    "pipeline.order=[sft,collect,rm,rs,ppo,dpo]",
    "stages.dpo.policy=sft",
    "stages.dpo.reference=sft",
    "stages.dpo.data.path=collect",
    "stages.ppo.policy=sft",
    "model.training.sft.num_samples=0",
    "model.training.dpo.num_samples=0",
    *(f"model.training.{kind}.{every}_steps=1" for kind in PLACES for every in ("save", "log")),
    *(f"model.training.{kind}.eval_rows=8" for kind in ("sft", "rm", "dpo")),
)


@dataclass
class Broken:
    """Puts a number that is not finite into a stage, and sees what the stage does then.

    Attributes:
        value: the number.
        step: at which it comes.
        times: that it comes, from that step on, once a step.
        context: of the stage, once it runs.
        updates: of weights, after the number came and before the next step.
        states: on the disk when the number came.
    """

    value: float
    step: int
    times: int = 1
    context: Context | None = None
    came: list[int] = field(default_factory=list)
    updates: int = 0
    states: dict[str, str] = field(default_factory=dict)

    def is_due(self) -> bool:
        """Whether it comes now."""
        now = -1 if self.context is None else self.context.step
        if now < self.step or len(self.came) == self.times or now in self.came:
            return False
        assert self.context is not None
        self.came.append(now)
        self.states = content(self.context.states)
        return True

    def into(self, result: Any) -> Any:
        """The result of a function with the number in its first row; of a pair, in the first."""
        if isinstance(result, tuple):
            return self.into(result[0]), *result[1:]
        added = torch.zeros_like(result)
        added[0] = self.value
        return result + added


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """What the stages stand on."""
    project = Project(tmp_path_factory.mktemp("chain") / "outputs")
    project.run(*WORDS, "pipeline.order=[sft,collect,rm]")
    return project


def _break(patch: pytest.MonkeyPatch, stage: str, tensor: str, broken: Broken) -> None:
    run = STAGES[stage]

    def watched(config: Any, context: Context) -> dict[str, Any]:
        broken.context = context
        return run(config, context)

    patch.setitem(STAGES, stage, watched)
    loop = importlib.import_module("alignpipe.training.loop")
    update = loop.step_with_moments

    def counted(*given: Any, **named: Any) -> None:
        assert broken.context is not None
        broken.updates += broken.context.step in broken.came
        update(*given, **named)

    patch.setattr(loop, "step_with_moments", counted)
    module, _, name = PLACES[stage][tensor].rpartition(".")
    if not module:
        patch.setattr(loop, "sum_gradients", lambda parameters: _poison(parameters, broken))
        return
    function = getattr(importlib.import_module(module), name)

    def poisoned(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        # What is learnt from, not what is looked at; PPO's numbers are all computed without gradients but for its loss.
        learnt = torch.is_grad_enabled() or stage == "ppo"
        return broken.into(result) if learnt and broken.is_due() else result

    patch.setattr(importlib.import_module(module), name, poisoned)


def _poison(parameters: Iterable[nn.Parameter], broken: Broken) -> None:
    gradient = next(parameter.grad for parameter in parameters if parameter.grad is not None)
    if broken.is_due():
        gradient.view(-1)[0] = broken.value


def _run(chain: Project, stage: str, *words: str) -> tuple[Path, str]:
    """Run a stage; folder of its artifact, what it told."""
    # Under another seed, so that what other stages stand on stays as it is.
    task = chain.prepare(stage, *WORDS, f"stages.{stage}.seed=9", *words)
    told = io.StringIO()
    run_task(task.work / TASK, Console(file=told, width=1000), StopSignal())
    return task.target, told.getvalue()


def test_it_is_caught_in_its_step_with_weights_untouched_and_rows_named(
    chain: Project, count: Callable[[int, int], int], faults: Faults
) -> None:
    tried = CASES[:: len(CASES) // count(6, len(CASES))]
    assert len(CASES) == 60
    caught = 0
    for stage, tensor, step, value in tried:
        broken = Broken(value, step)
        with pytest.MonkeyPatch.context() as patch:
            _break(patch, stage, tensor, broken)
            try:
                _run(chain, stage)
            except NumericalError as error:
                told, code = str(error), error.exit_code
            else:
                raise AssertionError(f"{stage}: {tensor} {value} at step {step} was not caught")
        assert broken.came == [step] and broken.context is not None, (stage, tensor, step)
        named = re.search(r"^\w+: .*not finite.*; rows [\d, ]+( and \d+ more)? of those it learns", told)
        assert named and len(told) < 300, told
        untouched = not broken.updates and content(broken.context.states) == broken.states
        caught += untouched and not broken.context.task.target.exists() and code == 6
    faults.tell("NaN or infinity: caught in its step, rows named, exit 6", caught, len(tried))


def test_it_is_left_out_and_counted_where_the_user_says_so(
    chain: Project, count: Callable[[int, int], int], faults: Faults
) -> None:
    places = [(stage, tensor) for stage in PLACES for tensor in PLACES[stage]]
    tried = places[:: len(places) // count(3, len(places))]
    counted = 0
    for stage, tensor in tried:
        broken = Broken(math.nan, STEPS[stage][0])
        with pytest.MonkeyPatch.context() as patch:
            _break(patch, stage, tensor, broken)
            folder, told = _run(chain, stage, f"stages.{stage}.max_left_out=1")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        finite = all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
        counted += (
            not broken.updates
            and finite
            and [row["left_out"] for row in rows if "left_out" in row][-1] == 1
            and "the step is left out, 1 of 1 that may be" in told
        )
    faults.tell("NaN or infinity: left out and counted by choice", counted, len(tried))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_more_is_left_out_than_the_user_says(chain: Project, faults: Faults, stage: str) -> None:
    broken = Broken(math.nan, 0, times=5)
    with pytest.MonkeyPatch.context() as patch:
        _break(patch, stage, "loss", broken)
        with pytest.raises(NumericalError):
            _run(chain, stage, f"stages.{stage}.max_left_out=1")
    faults.tell("NaN or infinity: no more than the bound is left out", len(broken.came) == 2, 1)


@pytest.mark.parametrize("stage", ["ppo", "rs"])
def test_reward_model_that_returns_what_it_must_not(
    chain: Project, faults: Faults, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    caught = 0
    for value in (math.nan, math.inf, -math.inf):
        monkeypatch.setattr(
            "alignpipe.rollout.score.sequence_head_scores", lambda model, batch, v=value: _filled(batch, v)
        )
        with pytest.raises(NumericalError, match=r"scores of responses 0, 1, .* of \d+: not finite"):
            _run(chain, stage)
        caught += 1
    monkeypatch.setattr(
        "alignpipe.rollout.score.sequence_head_scores", lambda model, batch: _filled(batch, 0.5)
    )
    _, told = _run(chain, stage)
    caught += told.count("the reward of all responses asked for at once is the same") == 1
    faults.tell("reward model returns NaN, infinity, one number for all", caught, 4)


def _filled(batch: Any, value: float) -> Tensor:
    return torch.full((len(batch.input_ids), 1), value)


def _break_sft() -> None:
    patch = pytest.MonkeyPatch()
    _break(patch, "sft", "loss", Broken(math.nan, 3))


def test_command_ends_with_its_exit_code_and_the_same_command_goes_on(tmp_path: Path, faults: Faults) -> None:
    broken = start(tmp_path, "run", *SFT, before=_break_sft)
    code, line = broken.wait(), broken.told.splitlines()[-1]
    assert line.startswith("error: sft: loss nan"), broken.told
    assert "goes on from step-000002" in _told_again(tmp_path)
    faults.tell("NaN or infinity: exit 6, the same command goes on", code == 6, 1)


def _told_again(folder: Path) -> str:
    """What the same command tells where nothing is broken."""
    command = start(folder, "run", *SFT)
    assert command.wait() == 0
    return command.told
