"""The order of data: (seed, epoch, size) -> a permutation; (seed, cursor) -> batches of row numbers.

Nothing but the arguments decides the order, so batch size, restarts and the number of processes cannot change
which rows are seen or in what sequence. The cursor counts samples consumed over all processes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.lazy import Lazy


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function, modulo 2^64: spreads neighbouring counters over 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, size: int) -> Sequence[int]:
    """Returns the numbers 0 to `size - 1` in the order of one epoch.

    Args:
        seed: Of the stage.
        epoch: From 0; each has its own order.
        size: Number of rows.
    """
    start = int.from_bytes(hashlib.sha256(f"order|{seed}|{epoch}".encode()).digest()[:8])
    counters = np.uint64(start) + np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return Lazy(int, np.argsort(_mix(counters), kind="stable"))


def batches(seed: int, size: int, batch_size: int, start: int = 0) -> Iterator[list[int]]:
    """Yields batches of row numbers without end; each row comes once an epoch.

    Every batch is full: one that reaches the end of an epoch goes on into the next.

    Args:
        seed: Of the stage.
        size: Number of rows.
        batch_size: Rows a batch, over all processes.
        start: Samples consumed before.

    Raises:
        ValueError: No rows, an empty batch, or a cursor below 0.
    """
    if size < 1 or batch_size < 1 or start < 0:
        raise ValueError(
            f"batches of {batch_size} from {size} rows at {start}: sizes must be above 0, start at least 0"
        )
    cursor = start
    while True:
        yield [order(seed, at // size, size)[at % size] for at in range(cursor, cursor + batch_size)]
        cursor += batch_size
