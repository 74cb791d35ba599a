"""The weights of the best epoch in place of the last one's (InstructGPT, arXiv:2203.02155, section 3.5 and C.1).

figures at the end of each epoch -> a copy of the best weights -> put back when training is done
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from alignpipe.models.loading import evaluating
from alignpipe.training.best import BestWeights
from alignpipe.training.context import Context

# Figure an epoch is chosen by -> whether more of it is better.
HIGHER = {"loss": False, "reward": True}


class BestEpoch:
    """Watches a training over rows: remembers the figures of every epoch, keeps the best weights; the earlier of a tie.

    Args:
        figure: `loss` or `reward`.
        measure: figures of the model as it is, that one among them.
        model: that is trained.
        num_rows: of an epoch.
        batch_size: rows of a step.
        context: where figures go.
    """

    def __init__(
        self,
        figure: str,
        measure: Callable[[], dict[str, float]],
        model: PreTrainedModel,
        num_rows: int,
        batch_size: int,
        context: Context,
    ) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._figure = figure
        self._measure = measure
        self._model = model
        self._num_rows = num_rows
        self._batch_size = batch_size
        self._context = context
        self._weights = BestWeights(model)
        self._total = 0

    @property
    def best(self) -> dict[str, Any]:
        """Number, step and figures of the best epoch so far."""
        sign = 1 if HIGHER[self._figure] else -1
        return max(self.epochs, key=lambda epoch: sign * epoch[self._figure])

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The best weights: they are saved and resumed beside the model."""
        return {"best": self._weights}

    def values(self) -> dict[str, Any]:
        """What is saved with a state, as JSON."""
        return {"epochs": self.epochs}

    def begin(self, state: Mapping[str, Any], total: int) -> None:
        """Take up what a state holds."""
        self.epochs, self._total = list(state.get("epochs", [])), total

    def ends(self, done: int, step: int) -> bool:
        """Look at the model where an epoch ends; after the last one the model gets the best weights. Ends nothing."""
        if not ends_epoch(done, self._num_rows, self._batch_size, self._total):
            return False
        with evaluating(self._model):
            figures = self._measure()
        self._context.metrics.log(step, {f"eval/{name}": value for name, value in figures.items()})
        self.epochs.append({"epoch": len(self.epochs) + 1, "step": done, **figures})
        if self.best["step"] == done:
            self._weights.keep()
        if done == self._total:
            self._weights.restore()
        return False


def ends_epoch(step: int, num_rows: int, batch_size: int, total: int) -> bool:
    """Whether an epoch ends with a step; the last step ends one, whole or not."""
    return step == total or step * batch_size // num_rows > (step - 1) * batch_size // num_rows
