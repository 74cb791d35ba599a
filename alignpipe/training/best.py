"""The weights that were best so far, kept beside those that go on being trained.

model -> a copy in memory, saved with every state -> the model again
"""

import torch
from torch import nn


class BestWeights(nn.Module):
    """A copy of a model's trained weights: of a sharded one this process's part, of an adapted one the adapter.

    It is a module, so that it is saved and resumed with the state that names it: no file of its own can be newer or
    older than that. It lies on the CPU, where it takes no memory from the training.

    Args:
        model: that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is no part of this module
        for name, weight in self._trained().items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(weight.detach().cpu().clone()))

    @torch.no_grad()
    def keep(self) -> None:
        """Take the model's weights as they are now."""
        for name, weight in self._trained().items():
            self.get_parameter(name.replace(".", "/")).copy_(weight.detach().cpu())

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model these weights back."""
        for name, weight in self._trained().items():
            weight.copy_(self.get_parameter(name.replace(".", "/")).to(weight.device))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self._model[0].named_parameters() if weight.requires_grad}
