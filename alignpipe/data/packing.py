"""Rows side by side without padding, and what several of them begin with laid once.

token ids of every row -> which stretch of one long row it is, and what it sees before itself; no torch
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A shorter beginning is computed again sooner than attended to from afar.
MIN_SHARED = 16


class Branch(NamedTuple):
    """The stretch of the long row that holds a row, or what of it no row before it holds.

    Its tokens see what it shares, and one another up to themselves.

    Attributes:
        start: its first token.
        end: behind its last.
        root: number of the branch whose row begins with what is shared; its own where it shares nothing.
        shared: tokens that both rows begin with; 0 where the stretch is the whole row.
    """

    start: int
    end: int
    root: int
    shared: int


def lay_out(rows: Sequence[Sequence[int]], *, shared: bool = True) -> tuple[Branch, ...]:
    """The stretch of each row, in order, none between them left out.

    A row leaves out what it begins with where one before it begins so too: the prompt of several responses, the
    opening of a template. What that one shares in its turn is shared by both.

    Args:
        rows: token ids of each, at least one.
        shared: else each is laid whole.
    """
    alike = _alike(rows) if shared else [(0, 0)] * len(rows)
    branches: list[Branch] = []
    end = 0
    for number, (row, (root, count)) in enumerate(zip(rows, alike, strict=True)):
        if count < MIN_SHARED:
            root, count = number, 0
        start, end = end, end + len(row) - count
        branches.append(Branch(start, end, root, count))
    return tuple(branches)


def _alike(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Which row before it each begins most like, the first of them, and for how many tokens.

    The last token of a row is always its own.
    """
    # Behind its end each row is like no other.
    table = np.repeat(-1 - np.arange(len(rows))[:, None], 1 + max(map(len, rows)), 1)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    found = [(0, 0)]
    for number, row in enumerate(rows[1:], 1):
        counts = (table[:number] != table[number]).argmax(1)
        root = int(counts.argmax())
        found.append((root, min(int(counts[root]), len(row) - 1)))
    return found
