"""The best epoch's weights: those that were measured best, whenever training was stopped."""

import signal
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.config import SFTConfig
from alignpipe.data.examples import Example
from alignpipe.errors import Stopped
from alignpipe.signals import StopSignal
from alignpipe.training.best_epoch import BestEpoch
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit
from tests.training.test_loop import _loss_fn, config, rows

__all__ = ["config", "rows"]
MakeContext = Callable[..., Context]
MakeModel = Callable[..., PreTrainedModel]
# 20 rows, 8 a step, 3 epochs: these end after steps 3, 5 and 8.
ENDS = [3, 5, 8]


def _measured(context: Context, figures: dict[int, float]) -> Callable[[], dict[str, float]]:
    return lambda: {"loss": figures[context.step]}


def _run(
    model: PreTrainedModel,
    rows: list[Example],
    config: SFTConfig,
    context: Context,
    figures: dict[int, float],
) -> tuple[BestEpoch, dict[int, list[Tensor]]]:
    """Train with figures that are given beforehand; the weights at the end of every epoch."""
    weights: dict[int, list[Tensor]] = {}

    def measure() -> dict[str, float]:
        weights[context.step] = [parameter.detach().clone() for parameter in model.parameters()]
        return {"loss": figures[context.step]}

    best = BestEpoch("loss", measure, model, len(rows), config.batch_size, context)
    fit(model, rows, _loss_fn(model), config, context, lambda: {}, watcher=best)
    return best, weights


@pytest.mark.parametrize(
    ("losses", "epoch"), [([3.0, 1.0, 2.0], 2), ([1.0, 1.0, 2.0], 1), ([3.0, 2.0, 1.0], 3)]
)
def test_model_ends_with_the_weights_of_the_best_epoch(
    config: SFTConfig,
    rows: list[Example],
    make_llama: MakeModel,
    make_context: MakeContext,
    losses: list[float],
    epoch: int,
) -> None:
    model = make_llama()
    figures = dict(zip(ENDS, losses, strict=True))
    best, weights = _run(model, rows, config, make_context(config), figures)
    assert sorted(weights) == ENDS
    assert best.epochs == [{"epoch": i + 1, "step": s, "loss": figures[s]} for i, s in enumerate(ENDS)]
    assert best.best["epoch"] == epoch
    for mine, theirs in zip(model.parameters(), weights[ENDS[epoch - 1]], strict=True):
        assert torch.equal(mine, theirs)
    others = [step for step in ENDS if step != ENDS[epoch - 1]]
    assert all(
        any(
            not torch.equal(mine, theirs)
            for mine, theirs in zip(model.parameters(), weights[step], strict=True)
        )
        for step in others
    )


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
def test_best_epoch_survives_being_stopped_at_every_step(
    config: SFTConfig,
    rows: list[Example],
    make_llama: MakeModel,
    make_context: MakeContext,
    losses: list[float],
) -> None:
    figures = dict(zip(ENDS, losses, strict=True))
    whole = make_llama()
    kept, _ = _run(whole, rows, config, make_context(config, "whole"), figures)
    for _ in range(20):
        stop, resumed = StopSignal(), make_llama(seed=7)
        context = make_context(config, "cut", stop)
        inner = _loss_fn(resumed)

        def stopping(
            micro: Sequence[Example],
            stop: StopSignal = stop,
            inner: Callable[[Sequence[Example]], StepOutput] = inner,
        ) -> StepOutput:
            stop.received = signal.SIGTERM
            return inner(micro)

        if not context.states.exists():
            resumed = make_llama()
            inner = _loss_fn(resumed)
        best = BestEpoch("loss", _measured(context, figures), resumed, len(rows), config.batch_size, context)
        try:
            fit(
                resumed,
                rows,
                lambda micro, s=stopping, i=inner: s(micro, inner=i),
                config,
                context,
                dict,
                watcher=best,
            )
            break
        except Stopped:
            continue
    else:
        raise AssertionError("it never ended")
    assert best.epochs == kept.epochs
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
