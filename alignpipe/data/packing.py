"""Rows side by side without padding, and a prompt that several of them share laid once.

length and prompt of every row -> which stretch of one long row it is, and what it sees before itself; no torch
"""

from collections.abc import Sequence
from typing import NamedTuple

from alignpipe.data.encoding import Example

# A shorter prompt is computed again sooner than attended to through a mask.
MIN_SHARED = 16


class Span(NamedTuple):
    """What decides where a row of a batch is laid.

    Attributes:
        length: its tokens.
        prompt: how many of them are its prompt; fewer than `length`.
        group: rows of one group have the same prompt.
    """

    length: int
    prompt: int
    group: int


class Branch(NamedTuple):
    """The stretch of the long row that holds a row, or what of it no row before it holds.

    Its tokens see the shared prompt, and one another up to themselves.

    Attributes:
        start: its first token.
        end: behind its last.
        root: number of the branch that begins with the shared prompt; its own where it shares none.
        shared: tokens of that prompt; 0 where the stretch is the whole row.
    """

    start: int
    end: int
    root: int
    shared: int


def spans(examples: Sequence[Example], *, shared: bool = True) -> tuple[Span, ...]:
    """The rows that examples make; the prompt of each is what stands before the first token that is learnt.

    Args:
        examples: of a batch.
        shared: rows of the same prompt are one group; else each is its own.
    """
    groups: dict[tuple[int, ...], int] = {}
    found = []
    for row, example in enumerate(examples):
        prompt = example.mask.index(True) if True in example.mask else 0
        group = groups.setdefault(tuple(example.ids[:prompt]), row) if prompt and shared else row
        found.append(Span(len(example.ids), prompt, group))
    return tuple(found)


def lay_out(rows: Sequence[Span]) -> tuple[Branch, ...]:
    """The stretch of each row, in order, none between them left out."""
    roots: dict[int, int] = {}
    branches: list[Branch] = []
    end = 0
    for number, (length, prompt, group) in enumerate(rows):
        root = roots.setdefault(group, number) if prompt >= MIN_SHARED else number
        shared = prompt if root != number else 0
        start, end = end, end + length - shared
        branches.append(Branch(start, end, root, shared))
    return tuple(branches)
