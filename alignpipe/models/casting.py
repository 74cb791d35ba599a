"""Forwards without gradients that read each weight again and again, a token at a time: turned into 16 bits once.

model, inside autocast or not -> a block in which sampling reads it
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from alignpipe.models.sharding import is_sharded


@contextmanager
def without_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block nothing is kept for a backward pass, and autocast turns each matrix into 16 bits once.

    Autocast keeps such a copy, until it ends, of weights that want a gradient, and outside of inference mode. Of others
    it makes one for every product, which costs more than the product where a forward is of one token a response.

    Args:
        model: on any device; what is frozen is so again after the block.
    """
    if is_sharded(model):
        # Gathered in 16 bits already, and under inference mode they could not be trained afterwards.
        with torch.no_grad():
            yield
    elif torch.is_autocast_enabled(model.device.type):
        weights = (parameter for parameter in model.parameters() if parameter.is_floating_point())
        frozen = [parameter for parameter in weights if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with torch.no_grad():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    else:
        # Its calls cost least.
        with torch.inference_mode():
            yield
