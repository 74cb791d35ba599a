"""The reward model as every other stage uses it: frozen, its scores shifted and scaled.

prompt and response -> score at the last token -> (score - mean) / deviation on demonstrations
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from alignpipe.artifact import read_manifest
from alignpipe.data.encoding import Example
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.rollout.score import Normalizer, collapse, head_scores
from alignpipe.training.context import Context


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
