"""What rewards a response, as every stage uses it: a frozen reward model, several of them, a function of the user's.

prompt and response -> score at the last token -> (score - mean) / deviation on demonstrations -> summed, gated
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.artifact import read_manifest
from alignpipe.config import RewardConfig, Rewarded, is_composed, reward_models, reward_weights
from alignpipe.data.examples import Example
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError
from alignpipe.evaluation.reward_function import RewardFunction
from alignpipe.losses.reward import ENSEMBLES, gated
from alignpipe.rollout.score import Normalizer, collapse, head_scores
from alignpipe.training.context import Context

# Of the figures that the terms of a reward are.
TERM = "reward/"


@dataclass(frozen=True)
class RewardModel:
    """A frozen reward model with its normalisation.

    Attributes:
        model: gives raw scores.
        normalizer: of raw scores.
        pad_id: of its tokenizer.
        batch_size: responses scored at once.
        context: precision to compute in.
        uncertainty_penalty: of each score, in deviations over the heads.
    """

    model: PreTrainedModel
    normalizer: Normalizer
    pad_id: int
    batch_size: int
    context: Context
    uncertainty_penalty: float = 0.0

    def __call__(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Normalised scores (N,) of prompts with responses."""
        with self.context.autocast():
            raw = head_scores(self.model, examples, self.pad_id, self.batch_size)
        if self.uncertainty_penalty == 0:
            return self.normalizer(raw.mean(1)).double().numpy()
        return collapse(self.normalizer.of_heads(raw), self.uncertainty_penalty).double().numpy()


@dataclass(frozen=True)
class Scored:
    """The rewards of N responses, and what they are made of.

    Attributes:
        rewards: (N,).
        terms: of each reward model by name and of the `function`, (N,) each, before weights; whether the gate is shut
            on a response, as 0 or 1, is `gated`. Empty where the reward is one model's score and no more.
    """

    rewards: NDArray[np.float64]
    terms: dict[str, NDArray[np.float64]]

    @property
    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Each term under the name of its figure."""
        return {f"{TERM}{name}": values for name, values in self.terms.items()}

    @property
    def figures(self) -> dict[str, float]:
        """The mean of each term."""
        return {name: float(values.mean()) for name, values in self.columns.items()}


@dataclass(frozen=True)
class Reward:
    """What a stage rewards responses by.

    Reward models are opened when they are first asked, so that a stage which samples first does not hold them then.

    Attributes:
        config: how terms become one reward.
        weights: of the reward models that are summed, by name.
        roles: under which the stage has its reward models, by name.
        function: of the user's.
        context: of the stage.
        tokenizer: that all of them share.
        batch_size: responses that a reward model scores at once.
        head_penalty: deviations between the heads of a reward model that are taken off its score.
    """

    config: RewardConfig
    weights: dict[str, float]
    roles: dict[str, str]
    function: RewardFunction | None
    context: Context
    tokenizer: Tokenizer
    batch_size: int
    head_penalty: float = 0.0

    @cached_property
    def models(self) -> dict[str, "RewardModel"]:
        """The reward models, by name."""
        return {
            name: load_reward_model(self.context, self.tokenizer, self.batch_size, role, self.head_penalty)
            for name, role in self.roles.items()
        }

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], examples: Sequence[Example]
    ) -> Scored:
        """Reward N responses.

        Args:
            prompts: texts.
            responses: texts.
            examples: prompts with responses, as tokens.

        Raises:
            AlignpipeError: the user's function fails.
            NumericalError: a reward model gives a score that is not finite.
        """
        scores = {name: torch.from_numpy(model(examples)) for name, model in self.models.items()}
        total, terms = self._sum(scores, len(examples)), dict(scores)
        if self.function is not None:
            terms["function"] = torch.from_numpy(self.function(prompts, responses))
            total = total + self.config.function_weight * terms["function"]
        gate = self.config.gate
        if gate.model is not None:
            raw = self.models[gate.model].normalizer.raw(scores[gate.model])
            total, shut = gated(total, scores[gate.model], raw, gate.below)
            terms["gated"] = shut.double()
        if len(total) > 1 and total.min() == total.max():
            self.context.warn("the reward of all responses asked for at once is the same; it teaches nothing")
        return Scored(
            total.numpy(),
            {name: term.numpy() for name, term in terms.items()} if is_composed(self.config) else {},
        )

    def rewards(
        self, prompts: Sequence[str], responses: Sequence[str], examples: Sequence[Example]
    ) -> NDArray[np.float64]:
        """The rewards alone, (N,)."""
        return self(prompts, responses, examples).rewards

    def _sum(self, scores: dict[str, Tensor], count: int) -> Tensor:
        if not self.weights:
            return torch.zeros(count, dtype=torch.float64)
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        summed = torch.stack([scores[name] for name in self.weights])
        return ENSEMBLES[self.config.ensemble](summed, weights, self.config.uncertainty_penalty)


def load_reward(
    config: Rewarded, context: Context, tokenizer: Tokenizer, batch_size: int, prefix: str = ""
) -> Reward:
    """What a section of the configuration says a reward is.

    Args:
        config: the section.
        context: of the stage.
        tokenizer: of the policy; every reward model must have the same.
        batch_size: responses that a reward model scores at once.
        prefix: of the roles of a second reward beside the stage's own.

    Raises:
        CheckpointError: a reward model has another tokenizer.
        ConfigError: an ensemble of one reward model with one head.
        AlignpipeError: the user's file cannot be loaded.
    """
    roles = {name: role for role, name in reward_models(config, prefix).items()}
    for role in roles.values():
        context.check_same_tokens(role, tokenizer)
    source = context.task.functions.get(f"{prefix}reward")
    function = None if source is None else RewardFunction(source)
    weights, penalty = reward_weights(config), 0.0
    if config.reward.ensemble == "mean_minus_std" and len(weights) == 1:
        # Of one reward model the members are its heads.
        (name,), penalty = weights, config.reward.uncertainty_penalty
        if not read_normalizer(context.model(roles[name]).folder()).head_means:
            raise ConfigError(
                f"{context.task.name}: reward.ensemble=mean_minus_std needs members that can disagree, but {name} has "
                f"one head; train it with num_heads above 1, or name more reward models in reward.models"
            )
    return Reward(config.reward, weights, roles, function, context, tokenizer, batch_size, penalty)


def load_reward_model(
    context: Context,
    tokenizer: Tokenizer,
    batch_size: int,
    role: str = "reward_model",
    uncertainty_penalty: float = 0.0,
) -> RewardModel:
    """The frozen reward model of a stage; a penalty above 0 asks how far its heads differ."""
    model = context.load_scalar_model(role, tokenizer, all_heads=uncertainty_penalty > 0, frozen=True)
    normalizer = read_normalizer(context.model(role).folder())
    return RewardModel(model, normalizer, tokenizer.pad_id, batch_size, context, uncertainty_penalty)


def read_normalizer(folder: Path) -> Normalizer:
    """Shift and scale that the rm stage measured; none for a reward model from elsewhere."""
    manifest = read_manifest(folder)
    return Normalizer.from_metrics({} if manifest is None else manifest.metrics)
