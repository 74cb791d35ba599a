"""Commands in processes forked from one that has imported everything, so that a start takes no seconds.

`start(folder, "run", *words)` is `alignpipe run WORDS` typed in a folder: a process of its own, in a session of its
own, that can be watched, signalled and killed, with a program's own way out. What it prints is kept.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from alignpipe import cli

# Imported once, in the process that all others are forked from.
PRELOADED = [
    "alignpipe.worker",
    "alignpipe.compose.composition",
    "alignpipe.pipeline.runner",
    "tests.faults.warm",
    __name__,
]
PATIENCE = 120.0
TOLD = "told"

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(PRELOADED)


@dataclass
class Command:
    """A command that was started.

    Attributes:
        folder: where it was typed.
        process: that runs it; its number is that of its session too.
    """

    folder: Path
    process: BaseProcess

    @property
    def pid(self) -> int:
        """Number of the process."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.exitcode is None

    @property
    def told(self) -> str:
        """What this and earlier commands in the folder printed, errors among it."""
        return (self.folder / TOLD).read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Signal the process; one that is gone is let be."""
        if self.is_running:
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
        """Wait; whether the condition came true before the process ended."""
        limit = time.monotonic() + patience
        while not condition():
            if not self.is_running:
                return False
            assert time.monotonic() < limit, self.told
            time.sleep(0.002)
        return True

    def wait(self, patience: float = PATIENCE) -> int:
        """Exit code, below 0 that of a signal.

        Raises:
            AssertionError: it did not end in time, or ended in a traceback.
        """
        self.process.join(patience)
        assert self.process.exitcode is not None, f"still running after {patience} s: {self.told}"
        assert "Traceback" not in self.told, self.told
        return self.process.exitcode

    def kill(self) -> Self:
        """End it as `kill -9` does."""
        self.send(signal.SIGKILL)
        self.process.join(PATIENCE)
        return self


_started: list[Command] = []


def start(
    folder: Path,
    *words: str,
    before: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Type a command in a folder.

    Args:
        folder: made where there is none.
        words: after `alignpipe`.
        before: a function of some module, called in the new process first, to break something there.
        given: its arguments.
        environment: variables for this command alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _forked.Process(target=_run, args=(folder, words, before, given, dict(environment or {})))
    process.start()
    _started.append(Command(folder, process))
    return _started[-1]


def kill_all() -> None:
    """Kill every command that is still running, be it stopped: a test that fails leaves nobody to wait for."""
    while _started:
        _started.pop().kill()


def finish(folder: Path, *words: str) -> Command:
    """Type a command in a folder and wait for its end."""
    command = start(folder, *words)
    command.wait()
    return command


def _run(
    folder: Path,
    words: tuple[str, ...],
    before: Callable[..., None] | None,
    given: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    told = os.open(TOLD, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(told, sys.stdout.fileno())
    os.dup2(told, sys.stderr.fileno())
    sys.argv = ["alignpipe", *words]
    if before is not None:
        before(*given)
    cli.main()
