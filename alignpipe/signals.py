"""Ctrl-C, SIGTERM and a closed terminal become a flag that every loop looks at; a second one ends at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from alignpipe.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """Whether the user or the scheduler asked for the end.

    Args:
        file: of one of several processes: the command that started them asks for the end by making it, since a
            signal to all of them would come to some twice.
        tell: called once, at the first signal.
    """

    def __init__(self, file: Path | None = None, tell: Callable[[], None] = lambda: None) -> None:
        self._tell = tell
        self.received: signal.Signals | None = None
        self._file = file

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.received is not None or (self._file is not None and self._file.exists())

    def check(self) -> None:
        """Raise where nothing needs saving first.

        Raises:
            Stopped: a signal came.
        """
        if self.requested:
            self.end()

    def end(self) -> NoReturn:
        """Raise: another process of the stage was asked to end, or this one.

        Raises:
            Stopped: always.
        """
        by = f"stopped by {self.received.name}" if self.received else "stopped"
        raise Stopped(f"{by}; the state is saved, run the same command to go on")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and self._file is None:
            # The first signal was heard and the save is slow or stuck: the user means it.
            os._exit(130)
        self.received = signal.Signals(number)
        self._tell()

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Catch the signals inside the block, and give them back to whoever had them after it."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
