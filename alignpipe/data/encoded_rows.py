"""Records encoded: in memory where they are few, else once, on all cores, to a file that is read row by row.

So many that this would hold up the first step for long are encoded one by one as they are asked for, where it is known
beforehand which items there will be.

records, fit -> items, the record of each, the length of each record
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.cores import count_cores, on_all_cores
from alignpipe.data.lazy import Lazy
from alignpipe.data.row_index import Lines
from alignpipe.data.row_store import digest, entry

AnyRecord = TypeVar("AnyRecord")
Item = TypeVar("Item")
Result = TypeVar("Result")

# Fewer records are encoded again sooner than rows of them are kept.
MIN_KEPT = 4096
# More of them for each core take above half a minute, at half a millisecond each.
MAX_BEFORE = 2**16
# Records that one process encodes at a time.
BLOCK = 256
# Of an item on disk: index of its record, bytes before it and of it.
PLACE = np.dtype([("record", "<i8"), ("offset", "<i8"), ("size", "<u4")])
ROWS, PLACES, LENGTHS = "rows.jsonl", "places.npy", "lengths.npy"


class Fit(NamedTuple, Generic[Item]):
    """One record fitted into a length: what is left of it, and how many tokens it had."""

    items: Sequence[Item]
    length: int


class Form(NamedTuple, Generic[Item]):
    """An item as JSON values, and back."""

    pack: Callable[[Item], Any]
    unpack: Callable[[Any], Item]


class _Block(NamedTuple):
    """Items of some records: their lines, the record and the bytes of each, and the length of each record."""

    lines: bytes
    records: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Fitted(NamedTuple, Generic[Item]):
    """What became of records.

    Attributes:
        items: In the order of their records.
        records: For each item, the index of its record.
        lengths: (N,), tokens of each record; None where records are encoded as they are asked for.
    """

    items: Sequence[Item]
    records: Sequence[int]
    lengths: NDArray[np.int64] | None


def fit_all(
    records: Sequence[AnyRecord],
    fit: Callable[[AnyRecord], Fit[Item]],
    form: Form[Item],
    settings: Callable[[], Sequence[Any]],
    *,
    one_each: bool = False,
) -> Fitted[Item]:
    """Fits every record.

    Args:
        records: Kept rows are looked up by their identity, where they have one.
        fit: What to make of a record.
        form: How an item is kept.
        settings: Gives, as JSON values, all that `fit` depends on beside the record.
        one_each: Every record makes exactly one item.

    Raises:
        MachineError: The disk refuses the rows.
    """
    if not isinstance(records, Lazy) or not records.identity or len(records) < MIN_KEPT:
        fits = [
            one
            for block in _in_blocks(lambda block: [fit(records[i]) for i in block], records)
            for one in block
        ]
        numbers = [index for index, one in enumerate(fits) for _ in one.items]
        lengths = np.array([one.length for one in fits], np.int64)
        return Fitted([item for one in fits for item in one.items], numbers, lengths)
    if one_each and len(records) > MAX_BEFORE * count_cores():
        every = np.arange(len(records))
        return Fitted(Lazy(lambda number: fit(records[number]).items[0], every), Lazy(int, every), None)
    build = partial(_write, records, fit, form)
    with entry(records.home, digest("encoded", records.identity, settings()), build) as folder:
        places, lengths = np.load(folder / PLACES), np.load(folder / LENGTHS)
        lines = Lines([folder / ROWS], np.zeros(len(places), np.uint8), places["offset"], places["size"])
    items = Lazy(lambda number: form.unpack(lines(number)), np.arange(len(places)))
    return Fitted(items, Lazy(int, places["record"]), lengths)


def _write(
    records: Sequence[AnyRecord], fit: Callable[[AnyRecord], Fit[Item]], form: Form[Item], folder: Path
) -> None:
    """Encodes records into a folder."""

    def encode(block: range) -> _Block:
        """Encodes some of them, in a process that can only hand over plain values."""
        fits = {index: fit(records[index]) for index in block}
        lines = [(index, _line(form.pack(item))) for index, one in fits.items() for item in one.items]
        return _Block(
            b"".join(line for _, line in lines),
            np.array([index for index, _ in lines], np.int64),
            np.array([len(line) for _, line in lines], np.int64),
            np.array([one.length for one in fits.values()], np.int64),
        )

    found = []
    with (folder / ROWS).open("wb") as file:
        for one in _in_blocks(encode, records):
            file.write(one.lines)
            found.append(one._replace(lines=b""))
    sizes = np.concatenate([one.sizes for one in found])
    places = np.empty(len(sizes), PLACE)
    places["record"], places["size"] = np.concatenate([one.records for one in found]), sizes
    places["offset"] = np.cumsum(sizes) - sizes
    np.save(folder / PLACES, places)
    np.save(folder / LENGTHS, np.concatenate([one.lengths for one in found]))


def _in_blocks(work: Callable[[range], Result], records: Sequence[Any]) -> Iterator[Result]:
    """Work on blocks of records: of many, on all cores."""
    blocks = [range(start, min(start + BLOCK, len(records))) for start in range(0, len(records), BLOCK)]
    return map(work, blocks) if len(records) < MIN_KEPT else on_all_cores(work, blocks)


def _line(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"
