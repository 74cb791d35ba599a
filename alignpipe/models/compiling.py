"""torch.compile for training: each block of a model but the last on its own, whatever the lengths of its rows.

Attention over rows without padding differs in its cuts at every step, so it stays outside what is compiled. The rest
of a block depends on one size alone, the tokens of the row, which is dynamic. Blocks of one shape share their code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignpipe.errors import MachineError
from alignpipe.models.attention import PACKED
from alignpipe.models.sharding import blocks


def compile_training(model: PreTrainedModel) -> PreTrainedModel:
    """Compile the blocks of a model, in place, for forwards in training mode; names of its weights stay.

    The first forwards compile, which takes from seconds to minutes. Evaluation and sampling stay as they were.

    Raises:
        MachineError: there is no compiler for the model's device.
    """
    _check_compiler(model.device)
    for name in PACKED.values():
        attend = torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name])  # type: ignore[no-untyped-call]
        AttentionInterface.register(name, attend)
    # The last block's feed-forward has a hook of its own at every step (last_block.py), which dynamo does not watch.
    for block in blocks(model)[:-1]:
        # Not nn.Module.compile: that compiles the forwards of sampling as well.
        block.forward = _in_training(block)
    return model


def _in_training(block: nn.Module) -> Callable[..., Any]:
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        chosen = compiled if block.training and torch.is_grad_enabled() else plain
        return chosen(*args, **kwargs)

    return forward


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise MachineError(
                "model.compile: there is no C++ compiler, which torch.compile needs on a CPU; install g++ or clang++, "
                "name one in CXX, or leave model.compile=false"
            ) from error
    elif device.type == "cuda" and not has_triton():
        raise MachineError(
            "model.compile: there is no triton, which torch.compile needs on a GPU; pip install triton, or leave "
            "model.compile=false"
        )
