"""States of a stage under way.

modules, optimizers, counters -> `states/step-000120/` (kept: two) -> back, bit for bit
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from alignpipe.artifact import Manifest, damage, publish, read_manifest, remove_tree, seal
from alignpipe.errors import CheckpointError, MachineError

TENSORS = "state.safetensors"
VALUES = "values.json"
KEPT = 2


def save_state(
    states: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    values: Mapping[str, Any],
) -> None:
    """Write everything a stage needs to go on from `step`, durably, then drop all but the newest two.

    Args:
        states: folder of the stage's states.
        step: that is done.
        modules: trained modules by name.
        optimizers: by name.
        values: counters and coefficients, as JSON.

    Raises:
        MachineError: the disk is full or read-only.
    """
    final = states / f"step-{step:06d}"
    if final.exists():
        return
    temporary = states / f".step-{step:06d}.tmp"
    remove_tree(temporary)
    try:
        temporary.mkdir(parents=True)
        save_file(_tensors(modules, optimizers), temporary / TENSORS)
        (temporary / VALUES).write_text(json.dumps(dict(values)), encoding="utf-8")
        seal(temporary, Manifest(kind="state", key=str(step), versions={"torch": torch.__version__}))
    except (OSError, SafetensorError) as error:
        remove_tree(temporary)
        raise MachineError(
            f"{states}: the state of step {step} cannot be written ({error}); free some space"
        ) from error
    publish(temporary, final)
    for old in _steps(states)[KEPT:]:
        remove_tree(old)


def load_newest_state(
    states: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> dict[str, Any] | None:
    """Put modules and optimizers back to the newest state whose files agree with their hashes.

    Returns:
        The values saved with it, or None where there is no valid state.

    Raises:
        CheckpointError: the state is whole but was made by another model.
    """
    for folder in _steps(states):
        if not _valid(folder):
            # Out of the way, so that the same step can be saved again; kept, so that it can be looked at.
            remove_tree(states / f"corrupt-{folder.name}")
            folder.rename(states / f"corrupt-{folder.name}")
            continue
        tensors = load_file(folder / TENSORS)
        for name, target in _tensors(modules, {}).items():
            if name == "rng.cpu":
                continue
            if name not in tensors or tensors[name].shape != target.shape:
                raise CheckpointError(
                    f"{folder}: {name} does not fit the model; remove the folder and run again"
                )
            target.copy_(tensors[name])
        for name, optimizer in optimizers.items():
            _restore_optimizer(optimizer, f"optimizer.{name}.", tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        values: dict[str, Any] = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        return values
    return None


@torch.no_grad()
def _tensors(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """Trained parameters (a tied one once), moments of the optimizers, random state."""
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                found[f"module.{name}.{key}"] = parameter.detach()
    for name, optimizer in optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            for key, tensor in moments.items():
                found[f"optimizer.{name}.{index}.{key}"] = tensor
    found["rng.cpu"] = torch.get_rng_state()
    return found


def _restore_optimizer(optimizer: Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _steps(states: Path) -> list[Path]:
    """States, newest first."""
    return sorted(states.glob("step-*"), reverse=True)


def _valid(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return manifest is not None and damage(folder, manifest, read_files=True) is None
