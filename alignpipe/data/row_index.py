"""Where the usable rows of a data set stand: files read once, on all cores -> an index, by which rows are read again.

A row of JSONL is read from the user's file, by the bytes that it stands in; any other is written down as JSON beside
the index.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.cores import on_all_cores
from alignpipe.data.lines import WHOLE, Row, Stretch
from alignpipe.errors import DataError

# Of a usable row: number of the file that holds it, the line it begins on, bytes before it and of it, and the point
# at which its prompt falls into a share. What is written down of file i is file n + i of n.
ROW = np.dtype([("file", "<i8"), ("line", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("point", "<f8")])
INDEX, OTHERS = "index.npy", "others.json"


class Piece(NamedTuple):
    """What one process reads at a time.

    Attributes:
        file: its number.
        stretch: of it.
    """

    file: int
    stretch: Stretch = WHOLE


class Unusable(NamedTuple):
    """A row that is set aside: number of its file, its line, why."""

    file: int
    line: int
    reason: str


class _Found(NamedTuple):
    rows: NDArray[Any]
    unusable: list[Unusable]


# Rows of a piece, and a row -> the point of its prompt, or why it cannot be used.
Read = Callable[[Piece], Iterator[Row]]
Judge = Callable[[Row], float | str]


def write_index(
    pieces: Sequence[Piece], num_files: int, read: Read, judge: Judge, max_rows: int | None, folder: Path
) -> None:
    """Reads all rows and writes down where the usable ones stand, and what the others lack.

    Args:
        pieces: In order; those of a file with rows that are no lines of their own are the whole file.
        num_files: How many files there are.
        read: Rows of a piece.
        judge: What to make of a row.
        max_rows: Rows to read at most, one piece after the other; None for all, on all cores.
        folder: To write into.

    Raises:
        DataError: A file is broken.
    """
    work = partial(_look, num_files=num_files, read=read, judge=judge, folder=folder)
    found = list(on_all_cores(work, pieces) if max_rows is None else _first(work, pieces, max_rows))
    np.save(folder / INDEX, np.concatenate([np.empty(0, ROW), *(one.rows for one in found)]))
    unusable = [row for one in found for row in one.unusable]
    (folder / OTHERS).write_text(json.dumps(unusable))


def read_index(folder: Path) -> tuple[NDArray[Any], list[Unusable]]:
    """Returns the usable rows, (N,) of `ROW`, and the others."""
    others = json.loads((folder / OTHERS).read_text())
    return np.load(folder / INDEX), [Unusable(*row) for row in others]


def written(folder: Path, file: int) -> Path:
    """What is written down of a file."""
    return folder / f"rows-{file}.jsonl"


def _first(work: Callable[..., _Found], pieces: Sequence[Piece], max_rows: int) -> Iterator[_Found]:
    for piece in pieces:
        found = work(piece, limit=max_rows)
        yield found
        max_rows -= len(found.rows) + len(found.unusable)
        if max_rows == 0:
            return


def _look(
    piece: Piece, num_files: int, read: Read, judge: Judge, folder: Path, limit: int | None = None
) -> _Found:
    """Reads a piece."""
    rows: list[tuple[int, int, int, int, float]] = []
    unusable: list[Unusable] = []
    with ExitStack() as stack:
        copy = None
        for row in islice(read(piece), limit):
            judged = judge(row)
            if isinstance(judged, str):
                unusable.append(Unusable(piece.file, row.line, judged))
            elif row.span is not None:
                rows.append((piece.file, row.line, *row.span, judged))
            else:
                copy = copy or stack.enter_context(written(folder, piece.file).open("wb"))
                # What JSON does not know no record is made of.
                text = json.dumps(row.values, default=str, skipkeys=True).encode()
                rows.append((num_files + piece.file, row.line, copy.tell(), len(text), judged))
                copy.write(text + b"\n")
    return _Found(np.array(rows, ROW), unusable)


class Lines:
    """JSON values in files, each read when it is asked for.

    Args:
        paths: Of the files; those that hold a value stay open.
        files: (N,), number of the file of each value.
        offsets: (N,), bytes before it.
        sizes: (N,), bytes of it.
    """

    def __init__(
        self, paths: Sequence[Path], files: NDArray[Any], offsets: NDArray[Any], sizes: NDArray[Any]
    ) -> None:
        self._paths = paths
        self._handles = {int(file): paths[file].open("rb") for file in np.unique(files)}
        self._files, self._offsets, self._sizes = files, offsets, sizes

    def __call__(self, number: int) -> Any:
        """Returns the value of a number.

        Raises:
            DataError: It is not there any more.
        """
        file = int(self._files[number])
        # Not through a map of the file, whose pages would count as memory of this process.
        raw = os.pread(self._handles[file].fileno(), self._sizes[number], self._offsets[number])
        try:
            return json.loads(raw)
        except ValueError as error:
            raise DataError(
                f"{self._paths[file]} has changed since it was read first; start again"
            ) from error
