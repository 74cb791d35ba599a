"""The weights of the best epoch in place of the last one's (InstructGPT, arXiv:2203.02155, section 3.5 and C.1).

figures at the end of each epoch -> the weights of the best kept on disk -> put back when training is done
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.artifact import remove_tree
from alignpipe.training.checkpoint import load_newest_state, save_state

# Figure an epoch is chosen by -> whether more of it is better.
HIGHER = {"loss": False, "reward": True}


class BestEpoch:
    """Remembers the figures of every epoch, and keeps the weights of the best; the earlier of a tie.

    Args:
        figure: `loss` or `reward`.
        measure: figures of the model as it is, that one among them.
        folder: where the weights are kept meanwhile.
    """

    def __init__(self, figure: str, measure: Callable[[], dict[str, float]], folder: Path) -> None:
        self.measure = measure
        self.epochs: list[dict[str, Any]] = []
        self._figure = figure
        self._folder = folder

    @property
    def best(self) -> dict[str, Any]:
        """Number, step and figures of the best epoch so far."""
        sign = 1 if HIGHER[self._figure] else -1
        return max(self.epochs, key=lambda epoch: sign * epoch[self._figure])

    def ends_at(self, step: int, num_rows: int, batch_size: int, total: int) -> bool:
        """Whether an epoch ends with a step; the last step ends one, whole or not."""
        return step == total or step * batch_size // num_rows > (step - 1) * batch_size // num_rows

    def note(self, model: PreTrainedModel, step: int, figures: dict[str, float]) -> None:
        """Remember an epoch that has just ended, and keep its weights if it is the best."""
        self.epochs.append({"epoch": len(self.epochs) + 1, "step": step, **figures})
        if self.best["step"] == step:
            save_state(self._folder, step, {"model": model}, {}, {})

    def resume(self, epochs: Sequence[dict[str, Any]], step: int) -> None:
        """Go back to what was known at a step; weights kept later are forgotten."""
        self.epochs = list(epochs)
        processes.from_main(lambda: self._forget_after(step))

    def restore(self, model: PreTrainedModel) -> None:
        """Put the best weights into the model."""
        load_newest_state(self._folder, {"model": model}, {})

    def _forget_after(self, step: int) -> None:
        for folder in self._folder.glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                remove_tree(folder)
