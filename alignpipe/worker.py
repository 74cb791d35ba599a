"""What each process of a stage runs: read the task, build the context, call the stage, publish its artifact.

task.yaml -> inputs verified -> stage -> result folder sealed, opened once more, renamed into the store
"""

import ctypes
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from torch.utils import deterministic

from alignpipe import processes
from alignpipe.artifact import (
    Manifest,
    Parent,
    publish,
    remove_tree,
    seal,
    verify,
    write_json,
)
from alignpipe.disk import refusals
from alignpipe.errors import AlignpipeError, MachineError, ProcessLost
from alignpipe.secrets import hide_secrets
from alignpipe.signals import StopSignal
from alignpipe.stages import STAGES
from alignpipe.task import ERRORS, LAUNCHER, STOP, Task, read_task
from alignpipe.terminal import Terminal
from alignpipe.training.checkpoint import made_with
from alignpipe.training.context import REJECTED, Context
from alignpipe.training.gradients import LossScale
from alignpipe.training.metrics import METRICS, SAMPLES, MetricLog
from alignpipe.training.optim import scaled
from alignpipe.training.progress import StageProgress

# Libraries whose errors mean that the others are out of reach.
CONTACT = ("gloo", "nccl")
# What torch says in a RuntimeError where an allocator got nothing.
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
# Of prctl(2): the signal that a process gets when the one that started it dies.
PR_SET_PDEATHSIG = 1


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
    with refusals(task.work):
        return _run(task, console, stop)


def _run(task: Task, console: Console, stop: StopSignal) -> Manifest:
    accelerator = _accelerator(task)
    parents = processes.from_main(lambda: _verified_parents(task))
    torch.manual_seed(task.config.seed)
    with StageProgress(task.name, console) as progress:
        metrics = MetricLog(task.work, accelerator)
        scale = LossScale.of(task.launch.precision)
        context = Context(task, accelerator, metrics, progress, stop, scale, parents=parents)
        if not any(context.states.glob("step-*")):
            # Whatever was written is written again.
            metrics.rewind({})
        processes.from_main(lambda: _make_empty(context.result))
        try:
            figures = STAGES[task.kind](scaled(task.config, task.adapter), context)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
                raise
            raise MachineError(
                f"{task.name}: out of memory on {accelerator.device}; lower micro_batch_size or generation_batch_size"
            ) from error
        finally:
            # Not end_training: it would also take the group of processes apart.
            for tracker in accelerator.trackers:
                tracker.finish()
    return processes.from_main(lambda: _publish(task, context.result, parents, figures))


def _make_empty(folder: Path) -> None:
    remove_tree(folder)
    folder.mkdir(parents=True)


def _publish(task: Task, result: Path, parents: dict[str, Parent], figures: dict[str, Any]) -> Manifest:
    """Seal the result and put it into the store."""
    for name in (METRICS, SAMPLES, REJECTED):
        if (task.work / name).is_file():
            # Copied: whoever makes the stage anew after a crash goes on from the figures so far.
            shutil.copyfile(task.work / name, result / name)
    manifest = seal(
        result, Manifest(task.kind, task.key, parents, task.inputs, figures, versions=made_with())
    )
    publish(result, task.target)
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
    """Device and trackers, and the group of processes where there are several.

    Raises:
        MachineError: the machine has no such device or precision, or the processes did not find each other.
    """
    on_cpu = task.launch.device == "cpu" or not torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Small things travel over gloo, and no process waits for its GPU to tell the others a number.
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        if not on_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=timedelta(seconds=task.launch.timeout))
    accelerator = Accelerator(
        cpu=task.launch.device == "cpu" or (on_cpu and processes.count() > 1),
        log_with=task.trackers or None,
        project_dir=str(task.trackers_folder),
    )
    if accelerator.num_processes != processes.count():
        raise MachineError(
            f"launch.num_processes: {processes.count()} processes were started, accelerate sees "
            f"{accelerator.num_processes}; unset ACCELERATE_* in the environment"
        )
    if task.launch.device not in ("auto", accelerator.device.type):
        raise MachineError(
            f"launch.device={task.launch.device}: this machine has no such device, only {accelerator.device.type}"
        )
    if task.launch.precision == "bf16" and not computes_bf16(accelerator.device):
        raise MachineError(
            f"launch.precision=bf16: {accelerator.device} cannot compute in it; take fp16 or fp32"
        )
    if accelerator.device.type == "cpu":
        # Of kernels that add in any order there are others; on a GPU those cost more, and some are not there.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Memory need not be filled for that.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if task.trackers:
        accelerator.init_trackers(f"alignpipe-{task.kind}", config=_flat(asdict(task.config)))
    return accelerator


def computes_bf16(device: torch.device) -> bool:
    """Whether a device does so by itself; GPUs before Ampere do not."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b: value`; trackers take scalars alone."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str) else str(value)
    return flat


def main(path: Path) -> None:
    """Be one of several processes of a stage, started by torch's launcher; how it failed is left in a file."""
    task = read_task(path)
    number = int(os.environ["RANK"])
    _die_with_parent()
    if number > 0:
        _write_to_log(task.logs / f"{task.name}.rank{number}.log")
    code = 1
    with StopSignal(task.work / STOP).listening() as stop:
        try:
            run_task(path, Terminal(stderr=True), stop)
            code = 0
        except AlignpipeError as error:
            code = error.exit_code
            _leave_error(task, number, str(error), code, error.trace)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            broken = type(error) is RuntimeError and any(word in str(error).lower() for word in CONTACT)
            lost = isinstance(error, dist.DistError) or broken
            code = ProcessLost.exit_code if lost else 1
            _leave_error(task, number, f"{type(error).__name__}: {first}", code, traceback.format_exc())
    sys.stderr.flush()
    # Not by the interpreter's own way out: a collective that never ends would hold it.
    os._exit(code)


def _leave_error(task: Task, number: int, message: str, code: int, trace: str | None = None) -> None:
    """Say how this process failed, for the command to find the first one."""
    folder = task.work / ERRORS
    folder.mkdir(exist_ok=True)
    told = {"message": hide_secrets(message), "trace": None if trace is None else hide_secrets(trace)}
    outcome = {"time": time.time(), "exit_code": code, **told}
    write_json(folder / f"rank{number}.json", outcome)


def _write_to_log(path: Path) -> None:
    """Send what this process prints to a file of its own; the first process has the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())


def _die_with_parent() -> None:
    """End at once when the launcher is gone: nobody would stop this process, and it would go on writing."""
    parent = int(os.environ[LAUNCHER])
    if sys.platform == "linux":
        # The kernel does it sooner, whatever this process is at.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(ProcessLost.exit_code)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
