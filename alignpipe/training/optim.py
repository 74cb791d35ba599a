"""AdamW (arXiv:1711.05101) and the learning rate as a function of the step.

model, OptimizerConfig -> optimizer; step -> learning rate
"""

import math
from dataclasses import replace
from typing import TypeVar

from torch import nn
from torch.optim import AdamW

from alignpipe.config import AdapterConfig, OptimizerConfig, PPOConfig, StageConfig
from alignpipe.models.sharding import is_sharded

AnyConfig = TypeVar("AnyConfig", bound=StageConfig)


def scaled(config: AnyConfig, adapter: AdapterConfig) -> AnyConfig:
    """A stage's configuration with the learning rates of its adapters, where it trains some."""
    if adapter.kind == "none" or not isinstance(config, OptimizerConfig):
        return config
    scale = adapter.learning_rate_scale
    if isinstance(config, PPOConfig):
        config = replace(config, value_learning_rate=config.value_learning_rate * scale)
    return replace(config, learning_rate=config.learning_rate * scale)


def make_optimizer(model: nn.Module, config: OptimizerConfig, learning_rate: float | None = None) -> AdamW:
    """AdamW over the trained parameters; vectors (norms, biases) are not decayed.

    Args:
        model: whose parameters are trained.
        config: betas, epsilon, weight decay.
        learning_rate: peak; the configuration's when not given.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate if learning_rate is None else learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        # One pass over each tensor rather than ten; it does not take weights of which some alone are sharded.
        fused=not is_sharded(model),
    )


def schedule(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the chosen decay.

    It depends on the step alone, so a resumed stage needs no scheduler state.

    Args:
        step: updates done before this one, from 0.
        num_steps: updates in all.
        config: schedule, warm-up and floor.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)
    decay = 0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay


def step_with_moments(optimizer: AdamW, *, offload: bool) -> None:
    """Update the weights; the moments stay on the CPU between steps where `offload` says so.

    Moments are needed in the step alone, where activations are gone, so the peak is the larger of the two rather
    than their sum, at the price of moving eight bytes a weight there and back.
    """
    if offload:
        _move_moments(optimizer, to_weights=True)
    optimizer.step()
    if offload:
        _move_moments(optimizer, to_weights=False)


def _move_moments(optimizer: AdamW, *, to_weights: bool) -> None:
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.dim():
                moments[name] = moment.to(parameter.device if to_weights else "cpu")


def set_learning_rate(optimizer: AdamW, learning_rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
