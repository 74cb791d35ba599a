"""Starts the processes of one stage with torch's own launcher, and does not outlive the command it works for.

task.yaml, rendezvous id -> `torch.distributed.run` -> one worker for each process of this machine
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch.distributed.elastic.multiprocessing.errors as elastic_errors
from torch.distributed.run import parse_args
from torch.distributed.run import run as launch

from alignpipe.artifact import write_json
from alignpipe.task import ERRORS, LAUNCHER, STUCK, Task, read_task

# Seconds that the other processes get to end by themselves once one has failed.
GRACE = 5.0


def main(path: Path, rendezvous_id: str, num_local: int) -> int:
    """Run the workers of this machine to their end.

    Args:
        path: of the task.
        rendezvous_id: the same on all machines of the stage.
        num_local: processes of this machine.

    Returns:
        0 when all of them ended well, else 1; which one died of what is written beside their errors.
    """
    task = read_task(path)
    os.environ[LAUNCHER] = str(os.getpid())
    # The command says in one line what the launcher would tell in a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with _watched(task):
        options = [*_arguments(task, rendezvous_id, num_local), "-m", "alignpipe.worker", str(path)]
        try:
            launch(parse_args(options))  # type: ignore[no-untyped-call]
        except elastic_errors.ChildFailedError as error:
            dead = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
            (task.work / ERRORS).mkdir(exist_ok=True)
            write_json(task.work / ERRORS / f"machine{task.launch.machine_rank}.json", dead)
            return 1
    return 0


def _arguments(task: Task, rendezvous_id: str, num_local: int) -> list[str]:
    """Options of torchrun."""
    launch = task.launch
    common = [f"--nproc-per-node={num_local}", "--max-restarts=0", "--monitor-interval=0.1"]
    if launch.num_machines == 1:
        return [*common, "--standalone"]
    return [
        *common,
        f"--nnodes={launch.num_machines}",
        f"--node-rank={launch.machine_rank}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.rendezvous}",
        f"--rdzv-id={rendezvous_id}",
        f"--rdzv-conf=is_host={int(launch.machine_rank == 0)},timeout={int(launch.timeout)}",
    ]


@contextmanager
def _watched(task: Task) -> Iterator[None]:
    """Kill the workers when the command is gone, or when they do not end after one of them has failed."""
    command, done = os.getppid(), threading.Event()
    errors = task.work / ERRORS

    def watch() -> None:
        failed_at: float | None = None
        while not done.wait(0.2):
            if os.getppid() != command:
                # The lock of the stage is this process's too: it is free once nobody writes any more.
                psutil.wait_procs(_kill_workers(), GRACE)
                os._exit(1)
            if failed_at is None and errors.is_dir() and any(errors.glob("rank*.json")):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE:
                # Those killed here did not fail first.
                (errors / STUCK).touch()
                _kill_workers()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _kill_workers() -> list[psutil.Process]:
    workers: list[psutil.Process] = psutil.Process().children(recursive=True)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGKILL)
    return workers


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
