"""The processes that work on a stage together, and what they tell each other.

Each process runs the same stage over the same rows and calls every function here at the same point: work is dealt
out by length, done, and gathered, so that all of them hold the same results and take the same decisions. With one
process each function is the identity.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignpipe.errors import AlignpipeError

T = TypeVar("T")


def count() -> int:
    """Processes of this stage, over all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes files."""
    return rank() == 0


def deal(lengths: Sequence[int]) -> list[int]:
    """The items that are this process's own, longest first.

    Dealt like cards, to and fro, so that each process gets as many items as the others, give or take one, and
    nearly as many tokens.

    Args:
        lengths: cost of each item, such as its tokens.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    if count() == 1:
        return by_length
    round_trip = [*range(count()), *reversed(range(count()))]
    return [item for place, item in enumerate(by_length) if round_trip[place % len(round_trip)] == rank()]


def spread(lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """Let every process work on its part of some items.

    Args:
        lengths: cost of each item.
        work: indices of items, ascending -> one result for each. Called without items too: sharded weights are
            gathered by all processes together.

    Returns:
        The results of all items in the order of the items, on every process.
    """
    mine = sorted(deal(lengths))
    results = work(mine)
    if count() == 1:
        return list(results)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, list(zip(mine, results, strict=True)))
    found = dict(pair for part in parts for pair in part)
    return [found[index] for index in range(len(lengths))]


def sum_tensor(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_figures(figures: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Add up figures, each a sum and a count, over all processes; a process may lack some."""
    if count() == 1:
        return dict(figures)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, dict(figures))
    total: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, number) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + number)
    return total


def union(items: set[int]) -> set[int]:
    """What any process has."""
    if count() == 1:
        return items
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, items)
    return set().union(*parts)


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return bool(sum_tensor(torch.tensor(int(flag))))


def from_main(work: Callable[[], T]) -> T:
    """Let the first process do something while the others wait.

    Returns:
        What it found, on every process.

    Raises:
        AlignpipeError: on every process, when the first one failed with it.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except AlignpipeError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
