"""The order of data: (seed, epoch, size) -> a permutation; (seed, cursor) -> batches of row numbers.

Nothing but the arguments decides the order, so batch size, restarts and the number of processes cannot change
which rows are seen or in what sequence. The cursor counts samples consumed over all processes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's output function: spreads neighbouring counters over 64 bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, size: int) -> Sequence[int]:
    """Returns the numbers 0 to `size - 1` in the order of one epoch.

    Args:
        seed: Of the stage.
        epoch: From 0; each has its own order.
        size: Number of rows.
    """
    start = int.from_bytes(hashlib.sha256(f"order|{seed}|{epoch}".encode()).digest()[:8])
    keys = [_mix((start + index * 0x9E3779B97F4A7C15) & _MASK) for index in range(size)]
    return tuple(sorted(range(size), key=keys.__getitem__))


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
