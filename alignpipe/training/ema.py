"""The moving average of a model's weights (InstructGPT, arXiv:2203.02155, appendix C.4).

weights after each update -> w_ema = decay * w_ema + (1 - decay) * w, which a stage hands on in place of the last ones
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage(nn.Module):
    """An average of the trained weights, of the same layout: adapters where those are trained, slices where cut.

    The average after n updates is `decay^n * w_0 + (1 - decay) * sum_i decay^(n - i) * w_i`; it starts at the weights
    as they are, so a short stage needs a smaller decay than the paper's 0.992.

    Args:
        model: whose weights are averaged, in float32.
        decay: part of the old average that stays at an update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        # Parameters, so that a state of the stage holds them; no loss reaches them.
        self.averages = nn.ParameterList(p.detach().clone() for p in _trained(model))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one update."""
        for average, weight in zip(self._own(), _trained(model), strict=True):
            average.lerp_(_local(weight), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average in the place of the weights."""
        for average, weight in zip(self._own(), _trained(model), strict=True):
            _local(weight).copy_(average)

    def _own(self) -> list[Tensor]:
        return [_local(average) for average in self.averages]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
