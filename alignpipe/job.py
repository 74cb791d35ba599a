"""One job of a sweep, here or in a process of its own: configuration -> `result.json`, however it ends.

A launcher's worker gives each job its own process, so that one that is killed takes no other with it, and its
memory goes back. The worker holds the other end of the job's standard input: once that closes, because a signal
came or the worker died, the job saves its state and ends.
"""

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from alignpipe.artifact import write_text
from alignpipe.compose.composition import Composed, compose
from alignpipe.compose.rerun import rerun_yaml
from alignpipe.errors import AlignpipeError, Stopped, as_line
from alignpipe.pipeline.runner import run
from alignpipe.secrets import hide_secrets
from alignpipe.signals import StopSignal
from alignpipe.sweep import JOB, STOP, JobResult, read_result, write_result
from alignpipe.terminal import Terminal

LOG = "log.txt"
ERROR_LOG = "error.log"
# Tells workers which process is the sweep.
SWEEP_PROCESS = "ALIGNPIPE_SWEEP_PROCESS"


def prepare_job(composed: Composed, number: int, folder: Path) -> JobResult:
    """Put a job's configuration into its folder, and a result that says it waits.

    Raises:
        MachineError: the disk refuses it.
    """
    words = [word for word in composed.overrides if not word.startswith(("~", "hydra"))]
    result = JobResult(number, words)
    write_result(folder, result)
    write_text(folder / f"{JOB}.yaml", rerun_yaml(composed.yaml))
    return result


def run_here(composed: Composed, folder: Path) -> JobResult:
    """Run a prepared job in this process; its errors are told here and kept in the result."""
    result = replace(read_result(folder), state="running")
    write_result(folder, result)
    try:
        done = run(composed.config, result.words, composed.yaml, wait=True)
        result = replace(result, state="done", value=done.value, run=done.name)
    except Stopped as error:
        result = replace(result, state="stopped", error=str(error))
    except AlignpipeError as error:
        result = replace(result, state="failed", error=as_line(hide_secrets(str(error))))
    except Exception as error:
        write_text(folder / ERROR_LOG, hide_secrets(traceback.format_exc()))
        told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}; see {folder / ERROR_LOG}"
        result = replace(result, state="failed", error=as_line(hide_secrets(told)))
    if result.error is not None:
        Terminal(stderr=True).print(Text(f"error: {result.error}"), soft_wrap=True)
    write_result(folder, result)
    return result


def run_apart(folder: Path) -> JobResult:
    """Run a prepared job in a process of its own and wait for it; what it says goes to its log and on from there.

    Returns:
        The result; `stopped` also when this process was asked to end, or the whole sweep was.
    """
    stop_file = folder.parent / STOP
    result = read_result(folder)
    if stop_file.exists():
        return result
    write_result(folder, replace(result, state="running"))
    parent = os.getppid()
    # A worker of joblib is nothing without the sweep; one of a cluster goes on by itself.
    is_child = os.environ.get(SWEEP_PROCESS) == str(parent)
    with StopSignal().listening() as stop, _process(folder) as process:
        assert process.stdin is not None
        with (folder / LOG).open(encoding="utf-8", errors="replace") as log:
            while _runs(process):
                _pass_on(log.read(), result.job)
                orphaned = is_child and os.getppid() != parent
                if stop.requested or stop_file.exists() or orphaned:
                    process.stdin.close()
            _pass_on(log.read(), result.job)
        asked = process.stdin.closed
    if is_child and os.getppid() != parent:
        # Nobody is left to hand a result to, and the pool would wait for more work.
        os._exit(Stopped.exit_code)
    result = read_result(folder)
    if result.state == "running":
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        # A signal before the first stage finds nothing to save, and ends it the plain way.
        stopped = asked and code == -signal.SIGTERM
        told = f"its process {how}; run the same command to go on; see {folder / LOG}"
        result = replace(result, state="stopped" if stopped else "failed", error=told)
        write_result(folder, result)
    return result


@contextmanager
def _process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    # In a session of its own: a terminal's Ctrl-C reaches the worker, and through it the job, once.
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "alignpipe.job", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # Also when a scheduler's signal became an exception here: the job saves first.
        if process.stdin is not None:
            process.stdin.close()
        process.wait()


def _runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.2)
        return False
    except subprocess.TimeoutExpired:
        return True


def _pass_on(text: str, number: int) -> None:
    for line in text.splitlines():
        print(f"[job {number}] {line}", file=sys.stderr)  # noqa: T201  (a worker has no console of its own)


def _end_with_the_worker() -> None:
    """Become a signal to this process once the worker closes its end, or is gone."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _main(folder: Path) -> None:
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    run_here(compose(["--config-dir", str(folder), "--config-name", JOB]), folder)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
