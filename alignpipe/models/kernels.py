"""Kernels of others for what every block does: rotary positions, RMSNorm, SwiGLU.

Liger (arXiv:2410.10989), put in by the function that transformers itself calls. Its head and its losses are left out:
losses here are one value a token, and their head works only where a token is learnt (losses/logprobs.py).
"""

from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from alignpipe.errors import MachineError

LIGER = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def use_liger(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Put Liger's kernels into a model, in place.

    Args:
        model: on any device yet.
        device: that it will run on.

    Raises:
        MachineError: it is no CUDA device, liger-kernel is not installed, or has nothing for the model's architecture.
    """
    if device.type != "cuda":
        raise MachineError(
            f"model.kernels: liger runs on CUDA devices, this is {device.type}; leave model.kernels=none"
        )
    if not is_liger_kernel_available():
        raise MachineError("model.kernels: liger is not installed; pip install 'alignpipe[liger]'")
    liger: Any = import_module("liger_kernel.transformers.monkey_patch")
    # It would say nothing and change nothing.
    if model.config.model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise MachineError(
            f"model.kernels: liger has no kernels for {model.config.model_type}; leave model.kernels=none"
        )
    liger._apply_liger_kernel_to_instance(model=model, **LIGER)
    return model
