"""The loop that every stage over fixed rows shares: accumulate, normalise once, step, log, look up, save.

rows -> micro-batches -> losses per item -> one division by the items of the whole step -> AdamW
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import OptimizerConfig, TrainingConfig, num_steps
from alignpipe.data.order import batches
from alignpipe.errors import NumericalError
from alignpipe.models.sharding import in_step, is_sharded
from alignpipe.training.context import Context
from alignpipe.training.gradients import clip_gradients, sum_gradients
from alignpipe.training.metrics import Averages
from alignpipe.training.optim import make_optimizer, schedule, set_learning_rate, step_with_moments


class Row(Protocol):
    """An encoded training row."""

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads for it."""

    @property
    def num_items(self) -> int:
        """Losses it gives: learnt tokens, or one a prompt or pair."""


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass
class StepOutput:
    """What a loss function returns for one micro-batch.

    Attributes:
        losses: one value per item, of any shape, zero where there is no item; never reduced.
        metrics: name -> (sum over the micro-batch, count it is a mean over).
        rows: of the micro-batch, whose losses stand first, second, ...; None where they stand in its order.
    """

    losses: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class Term(Generic[AnyRow]):
    """A part of a step's loss with rows of its own, divided by the items of these.

    Attributes:
        rows: of the whole step, on every process.
        loss_fn: a micro-batch of rows -> losses per item.
        weight: that the mean loss is multiplied with.
        name: of the mean loss among the figures.
    """

    rows: Sequence[AnyRow]
    loss_fn: Callable[[Sequence[AnyRow]], StepOutput]
    weight: float = 1.0
    name: str = "loss"


class Watcher(Protocol):
    """Looks at a model while it is trained, and may end the training."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What is saved and resumed beside the model."""

    def values(self) -> dict[str, Any]:
        """What is saved with a state, as JSON."""

    def begin(self, state: Mapping[str, Any], total: int) -> None:
        """Look at the start, or take up what a state holds."""

    def ends(self, done: int, step: int) -> bool:
        """Whether training ends after so many steps."""


class Unwatched:
    """Never looks."""

    modules: Mapping[str, nn.Module] = {}

    def values(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def begin(self, state: Mapping[str, Any], total: int) -> None:
        """Do nothing."""

    def ends(self, done: int, step: int) -> bool:
        """Never."""
        return False


def micro_batches(rows: Sequence[AnyRow], size: int) -> Iterator[list[AnyRow]]:
    """Cut the rows of a step into forwards of like length, longest first so that memory fails early."""
    by_length = sorted(rows, key=lambda row: row.num_tokens, reverse=True)
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


def fit(
    model: PreTrainedModel,
    rows: Sequence[AnyRow],
    loss_fn: Callable[[Sequence[AnyRow]], StepOutput],
    config: TrainingConfig,
    context: Context,
    evaluate: Callable[[], dict[str, float]],
    prepare: Callable[[Sequence[AnyRow]], Sequence[AnyRow]] = list,
    watcher: Watcher | None = None,
) -> dict[str, float]:
    """Train a model on rows.

    Args:
        model: trained in place.
        rows: encoded; step `s` sees the same ones whatever the micro-batch and however often it was interrupted.
        loss_fn: a micro-batch of rows -> losses per item.
        config: steps, batch, optimizer.
        context: device, states, figures.
        evaluate: figures on held-out rows, logged under `eval/`.
        prepare: all rows of a step, before it -> the same with what depends on all of them; every process calls it.
        watcher: asked after every step whether training ends there.

    Returns:
        The held-out figures of the weights that the model ends with.

    Raises:
        NumericalError: a loss or gradient is not finite, and no such step may be left out; the weights are those of the
            last good step.
        Stopped: a signal came; the state is saved.
    """
    optimizer = make_optimizer(model, config)
    total = num_steps(config, len(rows))
    watcher = watcher or Unwatched()
    modules = {"model": model, **watcher.modules}
    state = context.resume(modules, {"model": optimizer}, watcher.values())
    first = done = int(state["step"])
    watcher.begin(state, total)
    order = batches(config.seed, len(rows), config.batch_size, start=first * config.batch_size)
    averages, tokens = Averages(), 0
    context.progress.begin("training", total, first)
    model.train()
    for step in range(first, total):
        chosen = next(order)
        batch: Sequence[AnyRow] = [rows[index] for index in chosen]
        context.step = step
        set_learning_rate(optimizer, config.learning_rate * schedule(step, total, config))
        try:
            batch = prepare(batch)
            found = optimizer_step(model, optimizer, batch, loss_fn, config, context)
        except NumericalError as error:
            context.leave_out(error, chosen, config.max_left_out)
            found = {}
        for name, (value, count) in found.items():
            averages.add(name, value, count)
        tokens += sum(row.num_tokens for row in batch)
        context.step = done = step + 1
        if done % config.log_steps == 0 or done == total:
            rate = optimizer.param_groups[0]["lr"]
            means = {**averages.means(), "learning_rate": rate, **context.left_out_figures}
            figures = context.metrics.log(done, means, tokens=tokens)
            averages, tokens = Averages(), 0
            context.progress.update(done, figures)
        if config.eval_steps is not None and done % config.eval_steps == 0 and done != total:
            _log_held_out(model, evaluate, context, done)
        if watcher.ends(done, done):
            break
        stopping = context.stopping()
        if stopping or done % config.save_steps == 0:
            context.save(done, modules, {"model": optimizer}, watcher.values())
        if stopping:
            context.stop.end()
    return _log_held_out(model, evaluate, context, done)


def optimizer_step(
    model: PreTrainedModel,
    optimizer: AdamW,
    rows: Sequence[AnyRow],
    loss_fn: Callable[[Sequence[AnyRow]], StepOutput],
    config: OptimizerConfig,
    context: Context,
    more: Sequence[Term[Any]] = (),
) -> dict[str, tuple[float, float]]:
    """One update: gradients of all micro-batches of all processes, divided by the items of the whole step.

    Args:
        model: trained in place.
        optimizer: over its parameters.
        rows: of the whole step; every process gets the same and works on its own part of them.
        loss_fn: a micro-batch of rows -> losses per item.
        config: micro-batch, clipping.
        context: precision, loss scale.
        more: further terms of the loss; their gradients are added in passes of their own.

    Returns:
        Figures of the step as (sum, count): the loss of each term, the gradient norm, and what `loss_fn` measured.

    Raises:
        NumericalError: before the update, when a loss or the gradient is not finite.
    """
    terms = [Term(rows, loss_fn), *more]
    figures: dict[str, tuple[float, float]] = {}
    culprits: set[int] = set()
    for term in terms:
        added, not_finite = _add_gradients(model, term, config, context)
        figures |= added
        if term is terms[0]:
            culprits = not_finite
    sum_gradients(model.parameters())
    figures = processes.sum_figures(figures)
    losses = {term.name: figures[term.name][0] for term in terms}
    norm = clip_gradients(model.parameters(), config.max_grad_norm, context.loss_scale.value)
    # With a loss scale the gradient of a sound loss may overflow, and the next step has half the scale.
    overflow = context.loss_scale.overflowed(math.isfinite(norm))
    if not all(map(math.isfinite, losses.values())) or not (overflow or math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        told = ", ".join(f"{name} {loss}" for name, loss in losses.items())
        error = NumericalError(f"{told}, gradient norm {norm}: not finite at step {context.step}")
        error.rows = tuple(sorted(processes.union(culprits)))
        raise error
    if not overflow:
        step_with_moments(optimizer, offload=context.task.launch.optimizer_offload)
    optimizer.zero_grad(set_to_none=True)
    means = {name: (loss, 1.0) for name, loss in losses.items()}
    return {**figures, **means, **({} if overflow else {"grad_norm": (norm, 1.0)})}


def _add_gradients(
    model: PreTrainedModel, term: Term[AnyRow], config: OptimizerConfig, context: Context
) -> tuple[dict[str, tuple[float, float]], set[int]]:
    """This process's part of a term: its gradient is added to the model's.

    Returns:
        Figures as (sum, count), and the places of the rows that have a loss which is not finite.
    """
    num_items = sum(row.num_items for row in term.rows)
    places = {id(row): place for place, row in enumerate(term.rows)}
    not_finite: set[int] = set()
    figures = {term.name: (0.0, 0.0)}
    for micro, weight in _own_micro_batches(model, term.rows, config.micro_batch_size):
        with context.autocast(), context.saved_activations():
            output = term.loss_fn(micro)
        loss = output.losses.sum() * weight / num_items
        (loss * (context.loss_scale.value * term.weight)).backward()  # type: ignore[no-untyped-call]
        told = float(loss.detach())
        if not math.isfinite(told):
            not_finite |= {places[id(micro[row])] for row in _rows_not_finite(output)}
        for name, (value, count) in {term.name: (told, 0.0), **output.metrics}.items():
            before = figures.get(name, (0.0, 0.0))
            figures[name] = (before[0] + value * weight, before[1] + count * weight)
    return figures, not_finite


def _rows_not_finite(output: StepOutput) -> list[int]:
    """Which rows of a micro-batch have a loss that is not finite."""
    losses = output.losses.detach()
    found = (~losses.isfinite()).reshape(len(losses), -1).any(1).nonzero().flatten().tolist()
    return found if output.rows is None else [output.rows[place] for place in found]


def _own_micro_batches(
    model: PreTrainedModel, rows: Sequence[AnyRow], size: int
) -> Iterator[tuple[list[AnyRow], float]]:
    """This process's micro-batches of a step, each with its weight.

    Sharded weights are gathered by all processes together, so all must make the same number of forwards: one that
    has fewer rows repeats its last micro-batch at weight 0.
    """
    mine = list(micro_batches([rows[i] for i in processes.deal([row.num_tokens for row in rows])], size))
    for micro in mine:
        yield micro, 1.0
    if is_sharded(model):
        most = math.ceil(math.ceil(len(rows) / processes.count()) / size)
        for _ in range(len(mine), most):
            yield mine[-1], 0.0


@torch.no_grad()
def mean_losses(
    model: PreTrainedModel,
    rows: Sequence[AnyRow],
    loss_fn: Callable[[Sequence[AnyRow]], StepOutput],
    size: int,
    context: Context,
) -> dict[str, float]:
    """The loss and its figures over held-out rows, each process on its part of them, without training on them."""
    averages = Averages()
    mine = [rows[index] for index in processes.deal([row.num_tokens for row in rows])]
    with in_step(model):
        for micro in micro_batches(mine, size):
            with context.autocast():
                output = loss_fn(micro)
            averages.add("loss", float(output.losses.sum()), sum(row.num_items for row in micro))
            for name, (value, count) in output.metrics.items():
                averages.add(name, value, count)
    return averages.summed().means()


def _log_held_out(
    model: PreTrainedModel, evaluate: Callable[[], dict[str, float]], context: Context, step: int
) -> dict[str, float]:
    model.train(False)
    figures = evaluate()
    model.train()
    if figures:
        context.metrics.log(step, {f"eval/{name}": value for name, value in figures.items()})
    return figures
