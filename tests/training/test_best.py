"""The best weights: kept beside the training, saved with its state, given back; and the monitor that does so."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.config import DPOConfig
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.errors import Stopped
from alignpipe.evaluation.alarms import Look
from alignpipe.evaluation.monitor import Monitor
from alignpipe.losses.logprobs import token_logprobs
from alignpipe.losses.sft import sft_loss
from alignpipe.signals import StopSignal
from alignpipe.training.best import BestWeights
from alignpipe.training.checkpoint import load_newest_state, save_state
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit

MakeContext = Callable[..., Context]
MakeModel = Callable[..., PreTrainedModel]
# The judge likes the weights after step 2 best and those after step 4 so little that it is alarmed.
LIKED = {0: 0.5, 1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.1}


@pytest.fixture
def config() -> DPOConfig:
    words = [
        "stage=dpo",
        "monitor=restore",
        "stage.monitor.every=1",
        "stage.max_steps=5",
        "stage.batch_size=4",
    ]
    words += [
        "stage.micro_batch_size=4",
        "stage.learning_rate=0.01",
        "stage.save_steps=100",
        "stage.log_steps=1",
    ]
    config = compose(words).config.stage
    assert isinstance(config, DPOConfig)
    return config


def _weights(model: PreTrainedModel) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _shift(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1


def test_best_weights_stay_as_they_were_until_the_next_are_kept(make_llama: MakeModel) -> None:
    model = make_llama()
    start = _weights(model)
    best = BestWeights(model)
    _shift(model)
    moved = _weights(model)
    best.restore()
    assert _same(_weights(model), start)
    _shift(model)
    best.keep()
    _shift(model)
    best.restore()
    assert _same(_weights(model), moved)


def test_best_weights_hold_what_is_trained_alone(make_llama: MakeModel) -> None:
    model = make_llama()
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)
    assert len(list(BestWeights(model).parameters())) == 2


def test_best_weights_are_part_of_a_state(make_llama: MakeModel, tmp_path: Path) -> None:
    model = make_llama()
    best, start = BestWeights(model), _weights(model)
    _shift(model)
    moved = _weights(model)
    save_state(tmp_path, 1, {"model": model, "best": best}, {}, {})
    again = make_llama(seed=7)
    restored = BestWeights(again)
    load_newest_state(tmp_path, {"model": again, "best": restored}, {})
    assert _same(_weights(again), moved)
    restored.restore()
    assert _same(_weights(again), start)


def _rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(5, 60, (5 + index % 4,), generator=generator).tolist() for index in range(20)]
    return [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in made]


def _looked(done: int) -> Look:
    return Look(done, [LIKED[done] + 0.1 * (i % 4) for i in range(16)], float(done), 0.0, 1.0, 9.0, 0.0)


def _fit(
    config: DPOConfig, make_context: MakeContext, model: PreTrainedModel, stop: StopSignal | None = None
) -> tuple[Monitor, dict[int, list[Tensor]]]:
    """Train with a judge of known tastes; the weights at every look, as it saw them."""
    context = make_context(config, "stage", stop)
    seen: dict[int, list[Tensor]] = {}

    def look(done: int) -> Look:
        seen[done] = _weights(model)
        if stop is not None and done == 3:
            stop.received = signal.SIGTERM
        return _looked(done)

    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        batch = collate(micro, 0)
        logprobs = token_logprobs(model(input_ids=batch.input_ids, use_cache=False).logits, batch.input_ids)
        return StepOutput(sft_loss(logprobs, batch.loss_mask[:, 1:]))

    monitor = Monitor(config, context, model, look)
    fit(model, _rows(), loss_fn, config, context, dict, watcher=monitor)
    return monitor, seen


def test_restore_goes_back_to_the_look_that_the_judge_liked_best(
    config: DPOConfig, make_context: MakeContext, make_llama: MakeModel
) -> None:
    model = make_llama()
    monitor, seen = _fit(config, make_context, model)
    assert list(seen) == [0, 1, 2, 3, 4]
    assert not _same(seen[2], seen[4])
    assert _same(_weights(model), seen[2])
    figures = monitor.summary()["monitor"]
    assert figures["alarms"] == {"overoptimization": 4}
    assert (figures["best_at"], figures["stopped_at"]) == (2, 4)


def test_stop_ends_with_the_weights_of_the_alarm_and_warn_goes_on(
    config: DPOConfig, make_context: MakeContext, make_llama: MakeModel
) -> None:
    stopped, warned = make_llama(), make_llama()
    section = config.monitor
    monitor, seen = _fit(replace(config, monitor=replace(section, action="stop")), make_context, stopped)
    assert list(seen)[-1] == 4
    assert _same(_weights(stopped), seen[4])
    assert monitor.summary()["monitor"]["stopped_at"] == 4
    fresh = make_context(config, "other")

    def elsewhere(*_: object) -> Context:
        return fresh

    monitor, seen = _fit(replace(config, monitor=replace(section, action="warn")), elsewhere, warned)
    assert list(seen)[-1] == 5
    assert _same(_weights(warned), seen[5])
    assert monitor.summary()["monitor"]["alarms"] == {"overoptimization": 4}
    assert monitor.summary()["monitor"]["stopped_at"] is None


def test_interrupted_training_goes_back_to_weights_that_only_the_state_holds(
    config: DPOConfig, make_context: MakeContext, make_llama: MakeModel
) -> None:
    _, seen = _fit(config, lambda *_: make_context(config, "whole"), make_llama())
    with pytest.raises(Stopped):
        _fit(config, make_context, make_llama(), StopSignal())
    model = make_llama()
    monitor, after = _fit(config, make_context, model)
    # Step 4 alone was left; the best look was before the interruption, and none was looked at twice.
    assert list(after) == [4]
    assert _same(after[4], seen[4])
    assert _same(_weights(model), seen[2])
    assert monitor.summary()["monitor"]["best_at"] == 2


def test_looks_come_every_so_many_steps_and_at_the_end(
    config: DPOConfig, make_context: MakeContext, make_llama: MakeModel
) -> None:
    calm = replace(config, monitor=replace(config.monitor, every=3, max_fall=None))
    _, seen = _fit(calm, make_context, make_llama())
    assert list(seen) == [0, 3, 5]
