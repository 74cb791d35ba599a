"""Several data sets as one, by weights, and the share of it that a stage sees: record sets -> records with places.

The weights are shares of the rows of an epoch. Which rows of a plentiful source are taken is drawn once, so every
epoch has the same ones.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.lazy import Lazy, as_numbers, take
from alignpipe.data.order import order
from alignpipe.data.row_store import digest
from alignpipe.data.shares import indices_in_share
from alignpipe.data.sources import MIXTURE, DataSource, RecordSet, parts_of

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Portion:
    """The records of a share, or of a part of it.

    Attributes:
        records: In order; those of a mixture stand among each other evenly.
        places: For each record, `file:line`, or `toy:number`.
        sources: For each record, the data set it comes from, as it is called.
    """

    records: Sequence[Any]
    places: Sequence[str]
    sources: Sequence[str]

    def take(self, indices: Sequence[int]) -> "Portion":
        """Returns some of the records, in the order given."""
        return Portion(*(take(column, indices) for column in (self.records, self.places, self.sources)))

    def rows_by_source(self) -> dict[str, int]:
        """Counts the records of each source."""
        return dict(Counter(self.sources))


def read_portion(source: DataSource, found: Sequence[RecordSet], share: str) -> Portion:
    """Returns what a stage sees of a data set.

    Args:
        source: One data set, or a mixture of several; each is split into shares by itself.
        found: What each of its parts holds.
        share: As in `in_share`.
    """
    shares = source.config.shares
    within = [indices_in_share(one.points, share, shares) for one in found]
    if source.kind == MIXTURE:
        weights = list(source.config.mixture.values())
        taken = mix([len(indices) for indices in within], weights, source.config.mixture_stopping)
        within = [indices[as_numbers(rows)] for indices, rows in zip(within, taken, strict=True)]
    names = source_names(source)
    if len(found) == 1:
        (one,), (indices,) = found, within
        return Portion(take(one.records, indices), take(one.places, indices), names * len(indices))
    # Side by side, so that the first rows of all are a mixture too.
    sizes = [len(indices) for indices in within]
    depths = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    parts, indices = np.repeat(np.arange(len(sizes)), sizes), np.concatenate(within)
    rows = np.lexsort((indices, parts, depths))
    parts, indices = parts[rows], indices[rows]
    return Portion(
        _joined([one.records for one in found], parts, indices),
        _joined([one.places for one in found], parts, indices),
        [names[part] for part in parts],
    )


def _joined(
    columns: Sequence[Sequence[Item]], parts: NDArray[np.int64], indices: NDArray[np.int64]
) -> Lazy[Item]:
    """Items of several sequences as one: for each the number of its sequence, and its index there."""
    origins = [column.identity if isinstance(column, Lazy) else "" for column in columns]
    chosen = hashlib.sha256(parts.tobytes() + indices.tobytes()).hexdigest()
    return Lazy(
        lambda row: columns[parts[row]][indices[row]],
        np.arange(len(parts)),
        digest(origins, chosen) if all(origins) else "",
        next((column.home for column in columns if isinstance(column, Lazy)), None),
    )


def mix(sizes: Sequence[int], weights: Sequence[float], stopping: str) -> list[Lazy[int]]:
    """Returns, for each source, the numbers of the rows that an epoch takes from it, ascending.

    With w_i the weight as a share of all weights, an epoch of R rows takes floor(w_i R) from source i. R is where
    the first source is used up, min_i n_i / w_i, or where the last is, max_i n_i / w_i; then the others repeat.

    Args:
        sizes: Rows of each source; one that has none does not count.
        weights: Of each source, above 0.
        stopping: `first_exhausted` or `all_exhausted`.
    """
    total = sum(weight for size, weight in zip(sizes, weights, strict=True) if size)
    reach = [size * total / weight for size, weight in zip(sizes, weights, strict=True) if size]
    rows = (min if stopping == "first_exhausted" else max)(reach, default=0.0)
    # A hair more, since 0.3 of 10 rows must not be 2.9999.
    return [
        _take(size, int(rows * weight / total + 1e-9) if size else 0)
        for size, weight in zip(sizes, weights, strict=True)
    ]


def _take(size: int, count: int) -> Lazy[int]:
    copies, rest = divmod(count, max(1, size))
    rows = np.sort(np.concatenate([np.tile(np.arange(size), copies), as_numbers(order(0, 0, size)[:rest])]))
    return Lazy(int, rows)


def source_names(source: DataSource) -> list[str]:
    """Returns what the parts of a data set are called: names of files where these tell them apart, else paths."""
    parts = parts_of(source)
    short = [Path(part.path).name if part.kind == "file" else part.path for part in parts]
    return short if len(set(short)) == len(short) else [part.path for part in parts]
