"""The shared loop: one division a step, the same numbers however it is cut or interrupted."""

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignpipe.config import SFTConfig, num_steps
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.errors import NumericalError, Stopped
from alignpipe.losses.logprobs import token_logprobs
from alignpipe.losses.sft import sft_loss
from alignpipe.signals import StopSignal
from alignpipe.training.checkpoint import load_newest_state, save_state
from alignpipe.training.context import Context
from alignpipe.training.gradients import LossScale
from alignpipe.training.loop import StepOutput, fit, optimizer_step
from alignpipe.training.optim import make_optimizer

MakeContext = Callable[..., Context]
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def config() -> SFTConfig:
    return SFTConfig(
        kind="sft",
        seed=0,
        policy="base",
        loss_on="response",
        num_samples=0,
        max_length=32,
        learning_rate=1e-2,
        lr_schedule="cosine",
        warmup_ratio=0.1,
        min_lr_ratio=0.1,
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        batch_size=8,
        micro_batch_size=8,
        epochs=3.0,
        max_steps=None,
        eval_steps=None,
        eval_rows=4,
        save_steps=2,
        log_steps=1,
        max_left_out=0,
        max_prompt_length=8,
        max_response_length=8,
        temperature=1.0,
        generation_batch_size=4,
    )


@pytest.fixture
def rows() -> list[Example]:
    """Twenty rows of unequal length, a number that no batch divides."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(20):
        ids = torch.randint(5, 60, (4 + index % 9,), generator=generator).tolist()
        made.append(Example(ids, [False, False] + [True] * (len(ids) - 2)))
    return made


def _loss_fn(model: PreTrainedModel) -> Callable[[Sequence[Example]], StepOutput]:
    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        batch = collate(micro, 0)
        logprobs = token_logprobs(model(input_ids=batch.input_ids, use_cache=False).logits, batch.input_ids)
        return StepOutput(sft_loss(logprobs, batch.loss_mask[:, 1:]))

    return loss_fn


def _nothing() -> dict[str, float]:
    return {}


def _gradients(
    model: PreTrainedModel, rows: Sequence[Example], config: SFTConfig, context: Context
) -> tuple[float, list[Tensor]]:
    """Loss and gradients that one step computes; the step itself does not move the weights."""
    kept: list[Tensor] = []

    class Keeping(AdamW):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            kept.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    figures = optimizer_step(model, Keeping(model.parameters()), rows, _loss_fn(model), config, context)
    return figures["loss"][0], kept


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_of_any_size_give_the_same_gradient(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext, micro: int
) -> None:
    model = make_llama()
    config = replace(config, max_grad_norm=1e9)
    whole_loss, whole = _gradients(model, rows[:8], config, make_context(config))
    cut_loss, cut = _gradients(model, rows[:8], replace(config, micro_batch_size=micro), make_context(config))
    assert cut_loss == pytest.approx(whole_loss, abs=1e-6)
    assert len(whole) == len(cut) > 0
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_order_of_rows_in_a_batch_changes_nothing(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    model = make_llama()
    config = replace(config, micro_batch_size=2, max_grad_norm=1e9)
    _, one = _gradients(model, rows[:8], config, make_context(config))
    _, other = _gradients(model, rows[:8][::-1], config, make_context(config))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_loss_is_the_mean_over_learnt_tokens_of_the_step(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    model = make_llama()
    loss, _ = _gradients(model, rows[:5], replace(config, micro_batch_size=2), make_context(config))
    total, count = 0.0, 0
    for row in rows[:5]:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        for position in range(1, len(row.ids)):
            if row.mask[position]:
                total -= logprobs[position - 1, row.ids[position]].item()
                count += 1
    assert loss == pytest.approx(total / count, abs=1e-5)


def test_stopped_and_resumed_equals_never_stopped(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext, tmp_path: Path
) -> None:
    whole = make_llama()
    fit(whole, rows, _loss_fn(whole), config, make_context(config, "whole"), _nothing)

    resumed = make_llama()
    steps = 0
    for _ in range(20):
        stop = StopSignal()
        inner = _loss_fn(resumed)

        def stopping(
            micro: Sequence[Example],
            stop: StopSignal = stop,
            inner: Callable[[Sequence[Example]], StepOutput] = inner,
        ) -> StepOutput:
            nonlocal steps
            steps += 1
            if steps % 3 == 0:
                stop.received = signal.SIGTERM
            return inner(micro)

        try:
            fit(resumed, rows, stopping, config, make_context(config, "cut", stop), _nothing)
            break
        except Stopped:
            # What is in memory is lost with the process.
            resumed = make_llama(seed=7)
    assert steps == num_steps(config, len(rows)) == 8
    for mine, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    losses = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in map(json.loads, part)] for part in lines
    ]
    assert losses[0] == losses[1]


def test_state_without_moments_would_be_noticed(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext, tmp_path: Path
) -> None:
    """The negative control of the test above: dropping AdamW's moments changes the result."""
    whole = make_llama()
    fit(whole, rows, _loss_fn(whole), config, make_context(config, "whole"), _nothing)
    half, stop = make_llama(), StopSignal()
    steps = iter(range(100))

    def stopping(micro: Sequence[Example]) -> StepOutput:
        if next(steps) == 3:
            stop.received = signal.SIGTERM
        return _loss_fn(half)(micro)

    with pytest.raises(Stopped):
        fit(half, rows, stopping, config, make_context(config, "cut", stop), _nothing)
    states = tmp_path / "cut" / "states"
    values = load_newest_state(states, {"model": half}, {"model": make_optimizer(half, config)})
    assert values is not None
    fresh = make_optimizer(half, config)
    for folder in list(states.glob("*")):
        folder.rename(tmp_path / folder.name)
    save_state(states, values["step"], {"model": half}, {"model": fresh}, values)
    fit(half, rows, _loss_fn(half), config, make_context(config, "cut"), _nothing)
    pairs = zip(whole.parameters(), half.parameters(), strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_before_the_update(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext, value: float
) -> None:
    model = make_llama()
    before = [parameter.clone() for parameter in model.parameters()]

    def broken(micro: Sequence[Example]) -> StepOutput:
        output = _loss_fn(model)(micro)
        return StepOutput(output.losses * value)

    with pytest.raises(NumericalError, match="loss"):
        optimizer_step(model, make_optimizer(model, config), rows[:8], broken, config, make_context(config))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rows_with_a_loss_that_is_not_finite_are_named(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    model, context = make_llama(), make_context(config)
    broken = (rows[3], rows[7])

    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        losses = _loss_fn(model)(micro).losses
        added = torch.tensor([math.nan if any(row is one for one in broken) else 0.0 for row in micro])
        return StepOutput(losses + added[:, None])

    with pytest.raises(NumericalError, match="not finite") as caught:
        optimizer_step(model, make_optimizer(model, config), rows[:8], loss_fn, config, context)
    assert caught.value.rows == (3, 7)
    with pytest.raises(NumericalError, match=r"rows 103, 107 of those it learns from; .*max_left_out$"):
        context.leave_out(caught.value, range(100, 108), 0)


def test_step_that_is_left_out_is_counted_across_an_interruption(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    config, model = replace(config, max_left_out=1, epochs=1.0), make_llama()

    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        output = _loss_fn(model)(micro)
        return StepOutput(output.losses * math.nan) if context.step == 0 else output

    context = make_context(config)
    fit(model, rows, loss_fn, config, context, _nothing)
    assert context.left_out == 1
    again = make_context(config)
    again.resume({"model": model}, {"model": make_optimizer(model, config)})
    assert again.left_out == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gradients_are_clipped_to_the_norm(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    model = make_llama()
    _, clipped = _gradients(model, rows[:8], replace(config, max_grad_norm=0.01), make_context(config))
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in clipped))
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_every_row_is_seen_once_an_epoch(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    model, seen = make_llama(), []

    def noting(micro: Sequence[Example]) -> StepOutput:
        seen.extend(id(row) for row in micro)
        return _loss_fn(model)(micro)

    fit(model, rows, noting, replace(config, epochs=2.0), make_context(config), _nothing)
    # 40 rows in 5 full batches of 8: every row twice.
    assert sorted(seen) == sorted([id(row) for row in rows] * 2)


def test_overflow_of_the_loss_scale_leaves_the_step_out(
    config: SFTConfig, rows: list[Example], make_llama: MakeModel, make_context: MakeContext
) -> None:
    model, context = make_llama(), make_context(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = make_optimizer(model, config)
    # Beyond the largest float32: every gradient is infinite.
    context.loss_scale = LossScale(2.0**130)
    figures = optimizer_step(model, optimizer, rows[:8], _loss_fn(model), config, context)
    assert context.loss_scale.value == 2.0**129
    assert "grad_norm" not in figures
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    context.loss_scale = LossScale(2.0**10)
    scaled = optimizer_step(model, optimizer, rows[:8], _loss_fn(model), config, context)
    assert scaled["loss"] == figures["loss"]
    fresh = make_llama()
    unscaled = optimizer_step(
        fresh, make_optimizer(fresh, config), rows[:8], _loss_fn(fresh), config, make_context(config)
    )
    assert scaled["grad_norm"][0] == pytest.approx(unscaled["grad_norm"][0], rel=1e-5)
