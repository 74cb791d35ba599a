"""The learning rate by hand, and which weights decay."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from alignpipe.compose.composition import compose
from alignpipe.config import OptimizerConfig, PPOConfig
from alignpipe.training.optim import make_optimizer, scaled, schedule


@pytest.fixture
def config() -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1.0,
        lr_schedule="cosine",
        warmup_ratio=0.1,
        min_lr_ratio=0.1,
        weight_decay=0.5,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        batch_size=4,
        micro_batch_size=2,
        save_steps=10,
        log_steps=1,
    )


def test_warmup_rises_in_equal_steps_to_the_peak(config: OptimizerConfig) -> None:
    # 10 % of 40 steps are 4: a quarter more each.
    assert [schedule(step, 40, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_is_half_way_between_peak_and_floor_in_the_middle(config: OptimizerConfig) -> None:
    # 4 of warm-up, 36 of decay: half of them are over at step 22.
    assert schedule(22, 40, config) == pytest.approx(0.1 + 0.9 / 2)
    assert schedule(4, 40, config) == 1.0


def test_linear_falls_to_the_floor(config: OptimizerConfig) -> None:
    linear = replace(config, lr_schedule="linear", warmup_ratio=0.0, min_lr_ratio=0.0)
    assert [schedule(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_constant_stays(config: OptimizerConfig) -> None:
    assert {
        schedule(step, 9, replace(config, lr_schedule="constant", warmup_ratio=0.0)) for step in range(9)
    } == {1.0}


def test_only_matrices_decay(config: OptimizerConfig) -> None:
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(layer, replace(config, learning_rate=0.1))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Decoupled decay: w <- w (1 - lr * decay) where the gradient is zero.
    assert torch.allclose(layer.weight, torch.full_like(layer.weight, 1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, torch.ones_like(layer.bias))


def test_one_step_equals_adam_by_hand(config: OptimizerConfig) -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    holder = nn.ParameterList([weight])
    optimizer = make_optimizer(holder, replace(config, learning_rate=0.1))
    weight.grad = torch.tensor([0.3])
    optimizer.step()
    # First step: both moments are bias-corrected back to g and g^2, so the step is lr * g / (|g| + eps).
    assert math.isclose(weight.item(), 2.0 - 0.1 * 0.3 / (0.3 + 1e-8), rel_tol=1e-6)


def test_adapters_learn_at_scaled_rates_and_whole_weights_do_not() -> None:
    composed = compose(["adapter=lora", "adapter.learning_rate_scale=3"]).config
    assert composed.stages is not None
    ppo, rm, collect = (composed.stages[name] for name in ("ppo", "rm", "collect"))
    assert isinstance(ppo, PPOConfig) and isinstance(rm, OptimizerConfig)
    with_adapters = scaled(ppo, composed.adapter)
    assert with_adapters.learning_rate == pytest.approx(3 * ppo.learning_rate)
    assert with_adapters.value_learning_rate == pytest.approx(3 * ppo.value_learning_rate)
    assert scaled(rm, composed.adapter).learning_rate == pytest.approx(3 * rm.learning_rate)
    assert scaled(collect, composed.adapter) == collect
    assert scaled(ppo, replace(composed.adapter, kind="none")) == ppo
