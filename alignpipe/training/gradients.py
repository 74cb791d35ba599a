"""Gradients of a step: added up over processes, measured, clipped, and scaled back from half precision.

gradients of this process's rows -> gradients of the whole step, in place -> their norm
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from alignpipe import processes

# Elements that travel at once: 100 MiB of float32, large enough to fill a link, small beside the weights.
BUCKET_ELEMENTS = 25 * 2**20


def sum_gradients(parameters: Iterable[Parameter]) -> None:
    """Add up gradients over all processes, since the loss is divided by the items of the whole step.

    Those of sharded weights were averaged in the backward pass already, and need but a factor.
    """
    if processes.count() == 1:
        return
    parameters = list(parameters)
    cut = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    if cut:
        torch._foreach_mul_(cut, float(processes.count()))
    for bucket in _buckets(
        [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    ):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        start = 0
        for gradient in bucket:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


def clip_gradients(parameters: Iterable[Parameter], max_norm: float, scale: float = 1.0) -> float:
    """Divide the gradients by the loss scale, and shrink them so that their joint norm is at most `max_norm`.

    Args:
        parameters: with gradients that are added up already.
        max_norm: L2, over all parameters of all processes.
        scale: that the loss was multiplied with.

    Returns:
        The norm before it was clipped; infinity or NaN leaves the gradients as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    cut = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if scale != 1.0:
        torch._foreach_div_(whole + cut, scale)
    norm = get_total_norm(whole)
    if cut:
        squares = processes.sum_tensor(get_total_norm(cut).square())
        norm = (norm.to(squares.device).square() + squares).sqrt()
    if torch.isfinite(norm):
        torch._foreach_mul_(whole + cut, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


@dataclass
class LossScale:
    """Keeps float16 gradients from vanishing: the loss is multiplied with a power of two (arXiv:1710.03740, 3.2).

    Attributes:
        value: of the factor; 1 where the precision needs none.
        good_steps: since it last changed.
    """

    value: float = 1.0
    good_steps: int = 0

    GROWTH_STEPS = 2000
    FIRST = 2.0**16

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        """The scale that a precision starts with."""
        return cls(cls.FIRST if precision == "fp16" else 1.0)

    def overflowed(self, finite: bool) -> bool:
        """Learn whether the gradient of a step was finite.

        Returns:
            Whether the step must be left out because of the scale; the next one has half of it.
        """
        if self.value == 1.0:
            return False
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            return True
        self.good_steps += 1
        if self.good_steps == self.GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
        return False


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > BUCKET_ELEMENTS or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
