"""Weights cut over processes: torch's `fully_shard` (FSDP2, arXiv:2304.11277; ZeRO, arXiv:1910.02054).

whole model on the CPU -> each process holds a slice of every weight; a layer is gathered while it works
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import LaunchConfig

# What matrix products are computed in; nothing stands for float32.
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard(model: PreTrainedModel, launch: LaunchConfig, device: torch.device) -> PreTrainedModel:
    """Cut a model over all processes, block by block, in place.

    The backward pass averages gradients over processes; `sum_gradients` turns that into the sum.

    Args:
        model: whole, on the CPU, the same on every process.
        launch: how long weights stay gathered, and in which format they travel.
        device: where slices live and blocks work.
    """
    mesh = init_device_mesh(device.type, (processes.count(),))
    # A scalar model is called through its body, so the body is what gathers; its head is a few numbers and stays whole.
    root = model.base_model if hasattr(model, "score") else model
    # ZeRO's second stage keeps a block's weights from its forward to its backward pass; the third gathers them twice.
    reshard = launch.strategy != "zero2"
    # Gathered in the format of the products, which halves what travels; slices stay float32, and so do sums.
    half = HALF.get(launch.precision)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=None if half is None else torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    model.to(device)  # type: ignore[arg-type]
    root.__dict__["gathers_once"] = launch.generation_gather == "rollout" or not reshard
    root.__dict__["reshards"] = reshard
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are cut over processes."""
    return _root(model) is not None


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Allow different numbers of forwards on different processes inside the block; no gradients there.

    A forward of sharded weights needs all processes. Either they are gathered once for the whole block, or each
    forward is announced: a process that is done goes on gathering with the others until all are done.
    """
    root = _root(model)
    if root is None:
        yield
        return
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    gathered = root.gathers_once
    handle = None if gathered else root.register_forward_pre_hook(lambda *_: _announce(), prepend=True)
    for module in modules if gathered else ():
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    if not gathered:
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(root.parameters()).device)
        with torch.no_grad():
            while processes.any_of(False):
                root(input_ids=ids, use_cache=False)
    for module in modules:
        # Without a backward pass the outermost weights would stay whole, and be taken for what is trained.
        module.set_reshard_after_forward(root.reshards and module is not root, recurse=False)
        module.reshard()


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights gathered on the CPU of the first process, a tied one once; empty on the others.

    Returns:
        None where nothing is sharded and the model can be saved as it is.
    """
    if not is_sharded(model):
        return None
    weights: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *_saved_buffers(model)]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_main():
            # A copy: what was gathered may still be on its way, in a wrapper that writers of files do not know.
            weights[name] = whole.detach().clone().cpu()
    return weights


def _announce() -> None:
    processes.any_of(True)


def _root(model: nn.Module) -> Any:
    """The outermost sharded module; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks, by the class names that transformers keeps for sharding."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _saved_buffers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
