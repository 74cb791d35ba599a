"""States of a stage under way.

modules, optimizers, counters -> `states/step-000120/` (kept: two) -> back, bit for bit
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from alignpipe import processes
from alignpipe.artifact import (
    MANIFEST,
    Manifest,
    Parent,
    changed_versions,
    damage,
    installed_versions,
    make_folder,
    publish,
    read_manifest,
    remove_tree,
    seal,
)
from alignpipe.disk import refusal
from alignpipe.errors import CheckpointError, MachineError

TENSORS = "state"
OFFSETS = "first_rows"
RANDOM_STATE = "rng.cpu"
VALUES = "values.json"
# Among the values: how many tensors of each optimizer belong to the state.
MOMENTS = "moments"
KEPT = 2
ANEW = "move the folder of states away to train the stage from its beginning"


def save_state(
    states: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    values: Mapping[str, Any],
    parents: Mapping[str, Parent] | None = None,
) -> None:
    """Write everything a stage needs to go on from `step`, durably, then drop all but the newest two.

    Sharded tensors are written by every process, its own rows each; the rest by the first one.

    Args:
        states: folder of the stage's states, on a disk that all processes share.
        step: that is done.
        modules: trained modules by name.
        optimizers: by name.
        values: counters and coefficients, as JSON.
        parents: the artifacts that the stage read, by role.

    Raises:
        MachineError: the disk is full or read-only.
    """
    final = states / f"step-{step:06d}"
    temporary = states / f".step-{step:06d}.tmp"
    if not processes.from_main(lambda: _begin(final, temporary, step)):
        return
    failure: Exception | None = None
    tensors, offsets = _own_rows(_tensors(modules, optimizers))
    needed = sum(tensor.nbytes for tensor in tensors.values())
    try:
        if tensors:
            path = temporary / f"{TENSORS}-{processes.rank():05d}.safetensors"
            save_file(tensors, path, metadata={OFFSETS: json.dumps(offsets)})
    except (OSError, SafetensorError) as error:
        failure = error
    if processes.any_of(failure is not None):
        processes.from_main(lambda: remove_tree(temporary))
        raise refusal(final, failure or "another process failed", needed)
    moments = {name: _num_tensors(optimizer) for name, optimizer in optimizers.items()}
    manifest = Manifest("state", str(step), dict(parents or {}), versions=made_with())
    processes.from_main(lambda: _publish(temporary, final, {**values, MOMENTS: moments}, manifest, needed))


def load_newest_state(
    states: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    parents: Mapping[str, Parent] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Put modules and optimizers back to the newest state whose files agree with their hashes.

    The number of processes, and whether weights are sharded, may differ from when it was saved.

    Args:
        states: folder of the stage's states.
        modules: as they were saved.
        optimizers: as they were saved.
        parents: the artifacts that the stage reads now, by role.
        tell: told of each newer state that is damaged, and of what keeps the rest from being the same to the bit.

    Returns:
        The values saved with it, or None where there is no state.

    Raises:
        CheckpointError: every state is damaged, or the newest whole one lacks something, is of another model, or was
            made with other artifacts.
    """
    folder = processes.from_main(lambda: _newest_valid(states, tell))
    if folder is None:
        return None
    manifest = read_manifest(folder) or Manifest("state", "")
    _check_parents(folder, manifest.parents, parents or {})
    if changed := changed_versions(manifest.versions, made_with()):
        tell(
            f"{', '.join(changed)} since {folder.name}: the rows stay the same, figures to 1e-5, not every bit"
        )
    saved = _SavedRows(folder)
    for name, target in _tensors(modules, {}).items():
        if name != RANDOM_STATE:
            saved.fill(name, target)
    for name, optimizer in optimizers.items():
        _restore_optimizer(optimizer, f"optimizer.{name}.", saved)
    random_state = torch.get_rng_state()
    saved.fill(RANDOM_STATE, random_state)
    torch.set_rng_state(random_state)
    values: dict[str, Any] = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    known = values.pop(MOMENTS, {})
    for name, optimizer in optimizers.items():
        if known.get(name) != (found := _num_tensors(optimizer)):
            raise CheckpointError(
                f"{folder}: has {found} moments of the optimizer of {name}, {known.get(name, 'an unknown number')} "
                f"were saved; {ANEW}"
            )
    return values


def made_with() -> dict[str, str]:
    """What decides the last bits of what is computed here: packages, threads, processes."""
    counted = {"threads": torch.get_num_threads(), "processes": processes.count()}
    return installed_versions() | {name: str(count) for name, count in counted.items()}


class _SavedRows:
    """The tensors of a state, whichever processes wrote which of their rows.

    Args:
        folder: of the state.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        for path in sorted(folder.glob(f"{TENSORS}-*.safetensors")):
            file = safe_open(path, framework="pt")
            offsets = json.loads(file.metadata()[OFFSETS])  # type: ignore[no-untyped-call]
            for name in offsets:
                self._parts.setdefault(name, []).append((offsets[name], file))

    def names(self, prefix: str) -> list[str]:
        """Names of tensors that begin so."""
        return [name for name in self._parts if name.startswith(prefix)]

    def shape(self, name: str) -> list[int]:
        """Shape of a whole tensor."""
        shapes = [file.get_slice(name).get_shape() for _, file in self._parts[name]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def fill(self, name: str, target: Tensor) -> None:
        """Copy a tensor's values, or of a sharded one this process's rows.

        Raises:
            CheckpointError: there is none of this name and shape.
        """
        if name not in self._parts or self.shape(name) != list(target.shape):
            raise CheckpointError(f"{self._folder}: {name} is not in it or does not fit the model; {ANEW}")
        first, own = _rows(target)
        for offset, file in self._parts[name]:
            part = file.get_slice(name)
            if not own.dim():
                own.copy_(file.get_tensor(name))
                continue
            start, end = max(first, offset), min(first + len(own), offset + part.get_shape()[0])
            if start < end:
                own[start - first : end - first] = part[start - offset : end - offset].to(own.device)


def _rows(tensor: Tensor) -> tuple[int, Tensor]:
    """This process's rows of a tensor, and the number of the first; all of them where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    # As torch.chunk cuts: all slices of the same size but for the last ones.
    chunk = -(-tensor.shape[0] // processes.count())
    return min(chunk * processes.rank(), tensor.shape[0]), tensor.to_local()


def _own_rows(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What this process writes: its rows of sharded tensors, on the first process all others too."""
    rows, offsets = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) or processes.is_main():
            offsets[name], own = _rows(tensor)
            rows[name] = own.contiguous()
    return rows, offsets


def _begin(final: Path, temporary: Path, step: int) -> bool:
    """Make the folder that a state is written into; False where the state is there already."""
    if final.exists():
        return False
    # Also what another step left behind, that was killed while it was saved.
    for unfinished in final.parent.glob(".step-*.tmp"):
        remove_tree(unfinished)
    make_folder(final.parent)
    try:
        temporary.mkdir()
    except OSError as error:
        raise refusal(final, error) from error
    return True


def _publish(
    temporary: Path, final: Path, values: Mapping[str, Any], manifest: Manifest, needed: int
) -> None:
    try:
        (temporary / VALUES).write_text(json.dumps(dict(values)), encoding="utf-8")
        seal(temporary, manifest)
    except (OSError, MachineError) as error:
        remove_tree(temporary)
        raise refusal(final, error.__cause__ or error, needed) from error
    publish(temporary, final)
    for old in _steps(final.parent)[KEPT:]:
        remove_tree(old)


def _newest_valid(states: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest state that is whole; newer ones are put out of the way, unless there is no other.

    Raises:
        CheckpointError: there are states, and none is whole.
    """
    damaged: dict[Path, str] = {}
    for folder in _steps(states):
        why = _damage(folder)
        if why is None:
            for other in damaged:
                _set_aside(other)
                tell(f"{damaged[other]}; kept as corrupt-{other.name}, goes on from {folder.name}")
            return folder
        damaged[folder] = why
    if damaged:
        files = ", ".join(why.removeprefix(f"{states}/").partition(": ")[0] for why in damaged.values())
        raise CheckpointError(f"{states}: no state is whole, look at {files}; {ANEW}")
    return None


def _set_aside(folder: Path) -> None:
    """Put a state out of the way, so that its step can be saved again; kept, so that it can be looked at."""
    target = folder.with_name(f"corrupt-{folder.name}")
    remove_tree(target)
    folder.rename(target)


def _check_parents(folder: Path, known: Mapping[str, Parent], parents: Mapping[str, Parent]) -> None:
    """Make sure that the stage goes on with what it began with.

    Raises:
        CheckpointError: an artifact that it reads holds something else now, as a reference that was trained again.
    """
    for role in sorted(known.keys() | parents.keys()):
        if known.get(role) != parents.get(role):
            raise CheckpointError(f"{folder}: was made with another {role} than there is now; {ANEW}")


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
    found[RANDOM_STATE] = torch.get_rng_state()
    return found


def _restore_optimizer(optimizer: Optimizer, prefix: str, saved: _SavedRows) -> None:
    """Moments take the layout of their weights, so that sharded ones are cut like those."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in saved.names(prefix):
        index, key = name.removeprefix(prefix).split(".", 1)
        moment = torch.zeros_like(parameters[int(index)]) if saved.shape(name) else torch.zeros(())
        saved.fill(name, moment.detach())
        state.setdefault(int(index), {})[key] = moment.detach()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _steps(states: Path) -> list[Path]:
    """States, newest first."""
    return sorted(states.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a state, or None."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error).rpartition(";")[0]
    if manifest is None:
        return f"{folder / MANIFEST}: missing"
    return damage(folder, manifest, read_files=True)


def _num_tensors(optimizer: Optimizer) -> int:
    """Moments that an optimizer has, of all its weights."""
    return sum(map(len, optimizer.state.values()))
