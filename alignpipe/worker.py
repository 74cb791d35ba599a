"""What each process of a stage runs: read the task, build the context, call the stage, publish its artifact.

task.yaml -> inputs verified -> stage -> result folder sealed, opened once more, renamed into the store
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from alignpipe.artifact import Manifest, Parent, installed_versions, publish, remove_tree, seal, verify
from alignpipe.errors import MachineError
from alignpipe.signals import StopSignal
from alignpipe.stages import STAGES
from alignpipe.task import Task, read_task
from alignpipe.training.context import REJECTED, Context
from alignpipe.training.metrics import METRICS, SAMPLES, MetricLog
from alignpipe.training.optim import scaled
from alignpipe.training.progress import StageProgress


def run_task(path: Path, console: Console, stop: StopSignal) -> Manifest:
    """Run one stage to its end and put its artifact into the store.

    Args:
        path: of the task's YAML.
        console: where progress goes.
        stop: looked at in every loop.

    Returns:
        The manifest of the new artifact.

    Raises:
        AlignpipeError: an input is damaged, the machine is too small, numbers are not finite, or a signal came.
    """
    task = read_task(path)
    parents = _verified_parents(task)
    torch.manual_seed(task.config.seed)
    accelerator = _accelerator(task)
    with StageProgress(task.name, console) as progress:
        metrics = MetricLog(task.work, accelerator)
        context = Context(task, accelerator, metrics, progress, stop)
        remove_tree(context.result)
        context.result.mkdir(parents=True)
        try:
            figures = STAGES[task.kind](scaled(task.config, task.adapter), context)
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"{task.name}: out of memory on {accelerator.device}; lower micro_batch_size or generation_batch_size"
            ) from error
        finally:
            accelerator.end_training()
    for name in (METRICS, SAMPLES, REJECTED):
        if (task.work / name).is_file():
            (task.work / name).replace(context.result / name)
    versions = installed_versions() | {"threads": str(torch.get_num_threads())}
    manifest = seal(
        context.result, Manifest(task.kind, task.key, parents, task.inputs, figures, versions=versions)
    )
    publish(context.result, task.target)
    return manifest


def _verified_parents(task: Task) -> dict[str, Parent]:
    """Hash every artifact the stage reads before it is read."""
    parents = {}
    for role, model in task.models.items():
        if model.kind is not None:
            parents[role] = Parent(model.key, verify(Path(model.path)).digest)
    for role, data in task.data.items():
        if data.kind == "collect":
            parents[role] = Parent(data.key, verify(Path(data.path)).digest)
    return parents


def _accelerator(task: Task) -> Accelerator:
    accelerator = Accelerator(
        cpu=task.launch.device == "cpu",
        mixed_precision="bf16" if task.launch.precision == "bf16" else "no",
        log_with=task.trackers or None,
        project_dir=str(task.trackers_folder),
    )
    if task.launch.device not in ("auto", accelerator.device.type):
        raise MachineError(
            f"launch.device={task.launch.device}: this machine has no such device, only {accelerator.device.type}"
        )
    if task.trackers:
        accelerator.init_trackers(f"alignpipe-{task.kind}", config=_flat(asdict(task.config)))
    return accelerator


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b: value`; trackers take scalars alone."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str) else str(value)
    return flat


if __name__ == "__main__":
    with StopSignal().listening() as signal:
        run_task(Path(sys.argv[1]), Console(stderr=True), signal)
