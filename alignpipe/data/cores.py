"""Work on all cores: items -> results in the order of the items, a few of them ahead of whoever asks."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar

from alignpipe.errors import MachineError

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_cores() -> int:
    """Returns how many cores there are to work on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def on_all_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yields `work(item)` of each item in order.

    Processes are forked, so `work` may hold what cannot be pickled; of n of them each does every n-th item and waits
    once its pipe is full. They touch neither torch nor a device.

    Raises:
        MachineError: A process was killed.
    """
    count = min(count_cores(), len(items))
    if count < 2:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    workers = []
    try:
        for first in range(count):
            reader, writer = fork.Pipe(duplex=False)
            readers.append(reader)
            worker = fork.Process(
                target=_send, args=(work, items[first::count], readers, writer), daemon=True
            )
            worker.start()
            workers.append(worker)
            # Each end in one process alone, so that either side notices when the other is gone.
            writer.close()
        for index in range(len(items)):
            found = _received(readers[index % count])
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        for worker in workers:
            # Nothing softer: signals go where this process's go, to a handler that only notes them.
            worker.kill()
            worker.join()
        for reader in readers:
            reader.close()


def _received(reader: Connection) -> Result | Exception:
    try:
        found: Result | Exception = reader.recv()
    except EOFError:
        raise MachineError(
            "a process that reads or encodes rows was killed; is there enough memory?"
        ) from None
    return found


def _send(
    work: Callable[[Item], Result], items: Sequence[Item], readers: Sequence[Connection], writer: Connection
) -> None:
    """Works on items in a process of its own; an error is the last thing that is sent."""
    # Ctrl-C reaches every process; the one that asks decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What was there before the fork is shared until it is touched, which collecting garbage does.
    gc.freeze()
    for reader in readers:
        reader.close()
    with suppress(BrokenPipeError):
        for item in items:
            try:
                writer.send(work(item))
            except BrokenPipeError:
                raise
            except Exception as error:
                writer.send(error)
                return
