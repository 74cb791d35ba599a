"""Runs a stage in this process or in several: how many, with what environment, and what became of them.

Task -> in this process, or torch's launcher and its workers -> an artifact, or the first error
"""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten

from alignpipe.artifact import remove_tree, write_text
from alignpipe.config import SHARDED, LaunchConfig
from alignpipe.errors import AlignpipeError, MachineError, ProcessLost
from alignpipe.signals import StopSignal
from alignpipe.task import ERRORS, STOP, STUCK, Task

# In a stage's working folder: the attempt under way.
RENDEZVOUS = "rendezvous"
# Characters of what a library says of a lost process.
MAX_TOLD = 80


def num_processes(launch: LaunchConfig) -> int:
    """Processes over all machines: as said, else one for each visible GPU, else one."""
    if launch.num_processes is not None:
        return launch.num_processes
    if launch.strategy == "single" or launch.device in ("cpu", "mps"):
        return 1
    return max(1, visible_gpus())


def visible_gpus() -> int:
    """GPUs that this process may use, counted without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def check_devices(launch: LaunchConfig) -> None:
    """Make sure that every process of this machine has a GPU to itself, where GPUs are used.

    Raises:
        MachineError: there are fewer of them than processes.
    """
    local, gpus = num_processes(launch) // launch.num_machines, visible_gpus()
    if launch.device in ("auto", "cuda") and 0 < gpus < local:
        raise MachineError(
            f"launch.num_processes: {local} processes on a machine with {gpus} visible GPU(s); lower it, or take "
            f"launch.device=cpu"
        )


def runs_here(launch: LaunchConfig) -> bool:
    """Whether a stage runs in the process that the user started."""
    return num_processes(launch) == 1 and launch.strategy not in SHARDED


def begin(task: Task) -> str:
    """Forget how the last attempt at a stage went, and tell other machines that a new one begins.

    Returns:
        The id by which the machines of this attempt find each other.
    """
    remove_tree(task.work / ERRORS)
    (task.work / STOP).unlink(missing_ok=True)
    rendezvous_id = uuid.uuid4().hex
    write_text(task.work / RENDEZVOUS, rendezvous_id)
    return rendezvous_id


def run_in_processes(
    task: Task,
    path: Path,
    rendezvous_id: str,
    stop: StopSignal,
    *,
    lock: int | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Start the processes of this machine, wait for them, and raise what the first to fail said.

    Args:
        task: of the stage.
        path: where it was written.
        rendezvous_id: by which the machines of a stage find each other.
        stop: a signal to this process is passed on to all of them.
        lock: descriptor of the stage's lock; it is held until the last of the processes is gone, however they go.
        abandoned: asked while they work; True ends them, without an error.

    Raises:
        AlignpipeError: of the process that failed first.
        ProcessLost: one was killed, or did not answer in time.
        Stopped: a signal came and the state is saved.
    """
    num_local = num_processes(task.launch) // task.launch.num_machines
    launcher = subprocess.Popen(
        [sys.executable, "-m", "alignpipe.launcher", str(path), rendezvous_id, str(num_local)],
        env=environment(task.launch, num_local),
        # Ctrl-C comes to this process alone, which passes it on once.
        start_new_session=True,
        # The one descriptor that a process hands on to those it starts, and they to theirs.
        stdin=subprocess.DEVNULL if lock is None else lock,
    )
    while True:
        try:
            code = launcher.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            if stop.requested:
                (task.work / STOP).touch()
            if abandoned():
                launcher.kill()
                launcher.wait()
                return
    if code != 0:
        raise first_error(task)


def environment(launch: LaunchConfig, num_local: int) -> dict[str, str]:
    """The environment of the processes of one machine: what they must be told before torch is loaded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = {
        "OMP_NUM_THREADS": str(max(1, cores // num_local)),
        "TOKENIZERS_PARALLELISM": "false",
        # A large state takes longer to save than torch's launcher waits by itself.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(launch.timeout)),
    }
    if launch.num_machines == 1 and Path("/sys/class/net/lo").exists():
        # A machine's name may resolve to an address that its own processes cannot reach.
        values["GLOO_SOCKET_IFNAME"] = "lo"
    return {**os.environ, **{name: value for name, value in values.items() if name not in os.environ}}


def first_error(task: Task) -> AlignpipeError:
    """What the first process to fail said; the others fail because of it."""
    errors = task.work / ERRORS
    said = {path.stem: json.loads(path.read_text()) for path in errors.glob("rank*.json")}
    dead = [json.loads(path.read_text()) for path in errors.glob("machine*.json")]
    killed = {
        rank: code
        for codes in dead
        for rank, code in codes.items()
        # The launcher itself ends the others, by SIGTERM first.
        if f"rank{rank}" not in said and code != -signal.SIGTERM and not (errors / STUCK).exists()
    }
    ordered = sorted(said.items(), key=lambda item: item[1]["time"])
    real = [(rank, error) for rank, error in ordered if error["exit_code"] != ProcessLost.exit_code]
    if not real and killed:
        rank, code = next(iter(killed.items()))
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return ProcessLost(f"{task.name}: process {rank} {how}; run the same command to go on")
    if not ordered:
        return ProcessLost(f"{task.name}: the launcher ended without a word; run the same command to go on")
    rank, error = (real or ordered)[0]
    if error["trace"] is None:
        kinds: list[type[AlignpipeError]] = [*AlignpipeError.__subclasses__(), AlignpipeError]
        kind = next(kind for kind in kinds if kind.exit_code == error["exit_code"])
        return kind(error["message"])
    log = task.logs / f"{task.name}.error.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(error["trace"], encoding="utf-8")
    if not real:
        # Without where in a library's source it was said: what a person may do about it stands behind.
        how = shorten(re.sub(r"\[\S+:\d+\] ", "", error["message"]), MAX_TOLD, placeholder=" ...")
        silent = [f"rank{n}" for n in range(num_processes(task.launch)) if f"rank{n}" not in said]
        return ProcessLost(
            f"{task.name}: {rank} lost {' and '.join(silent) or 'the others'} ({how}) within "
            f"launch.timeout={task.launch.timeout:g} s; see {log}; run the same command to go on"
        )
    return AlignpipeError(f"stage {task.name} failed on {rank}: {error['message']}; see {log}")
