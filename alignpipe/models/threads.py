"""How many of torch's threads a model keeps busy on a CPU."""

import os

import torch
from torch import nn

# What torch takes by itself: the cores.
ALL_THREADS = torch.get_num_threads()
# Of fewer a product is over before another thread has woken up.
WEIGHTS_PER_THREAD = 2 * 10**5


def fit_threads(model: nn.Module) -> None:
    """Let torch use no more threads than a model keeps busy, unless OMP_NUM_THREADS says how many.

    What a small model computes is then the same to the bit on machines that differ in their number of cores alone, as
    long as each has as many as the model keeps busy.

    Args:
        model: as large as any that works beside it, or nearly.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        weights = sum(parameter.numel() for parameter in model.parameters())
        torch.set_num_threads(min(ALL_THREADS, max(1, weights // WEIGHTS_PER_THREAD)))
