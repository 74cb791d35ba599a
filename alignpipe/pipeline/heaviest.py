"""The micro-batches of a run that read the most tokens, drawn as the run draws them.

tokens of the items looked at, seed, sizes -> mean tokens of a row in the heaviest forward
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from alignpipe.data.order import batches

# Enough for the largest of many sums to be seen, few enough to be drawn in milliseconds.
MAX_DRAWN = 2**15


class Length(NamedTuple):
    """Tokens of a row, or the mean of several rows: all, and those that are learnt."""

    tokens: float
    learnt: float


def mean_length(lengths: Iterable[Length]) -> Length:
    """The mean of some rows, at least one."""
    tokens, learnt = zip(*lengths, strict=True)
    return Length(sum(tokens) / len(tokens), sum(learnt) / len(learnt))


@lru_cache
def heaviest(
    items: tuple[Length, ...], seed: int, steps: int, batch_size: int, size: int, processes: int, place: int
) -> Length:
    """The mean row of the heaviest micro-batch that has this place in its step.

    Args:
        items: of the stage, or a sample of them.
        seed: of the stage.
        steps: that are drawn, as far as `MAX_DRAWN` items go.
        batch_size: items of a step.
        size: items of a micro-batch.
        processes: that a step is dealt to.
        place: 0 is the first micro-batch, which has the longest rows of a step.
    """
    steps = max(1, min(steps, MAX_DRAWN // batch_size))
    drawn = islice(batches(seed, len(items), batch_size), steps)
    own = slice(place * size, (place + 1) * size)
    # Longest first, dealt like cards.
    return max(
        mean_length(sorted((items[i] for i in step), reverse=True)[::processes][own]) for step in drawn
    )
