"""Several data sets as one, by weights, and the share of it that a stage sees: record sets -> records with places.

The weights are shares of the rows of an epoch. Which rows of a plentiful source are taken is drawn once, so every
epoch has the same ones.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpipe.data.order import order
from alignpipe.data.shares import indices_in_share
from alignpipe.data.sources import COLLECT, MIXTURE, DataSource, RecordSet, parts_of


@dataclass(frozen=True, slots=True)
class Portion:
    """The records of a share, or of a part of it.

    Attributes:
        records: In order; those of a mixture stand among each other evenly.
        places: For each record, `file:line`, or `toy:number`.
        sources: For each record, the data set it comes from, as it is called.
    """

    records: list[Any]
    places: list[str]
    sources: list[str]

    def take(self, indices: Sequence[int]) -> "Portion":
        """Returns some of the records, in the order given."""
        return Portion(
            *([column[i] for i in indices] for column in (self.records, self.places, self.sources))
        )

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
    parts = parts_of(source)
    shares = source.config.shares
    within = [
        indices_in_share(one.records, share, shares, COLLECT if part.kind == COLLECT else "")
        for part, one in zip(parts, found, strict=True)
    ]
    if source.kind == MIXTURE:
        weights = list(source.config.mixture.values())
        taken = mix([len(indices) for indices in within], weights, source.config.mixture_stopping)
        within = [[indices[at] for at in rows] for indices, rows in zip(within, taken, strict=True)]
    # Side by side, so that the first rows of all are a mixture too.
    places = sorted(
        ((at + 0.5) / len(indices), part, index)
        for part, indices in enumerate(within)
        for at, index in enumerate(indices)
    )
    names = source_names(source)
    return Portion(
        [found[part].records[index] for _, part, index in places],
        [_place(parts[part], found[part], index) for _, part, index in places],
        [names[part] for _, part, _ in places],
    )


def mix(sizes: Sequence[int], weights: Sequence[float], stopping: str) -> list[list[int]]:
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
        _take(size, int(rows * weight / total + 1e-9)) if size else []
        for size, weight in zip(sizes, weights, strict=True)
    ]


def _take(size: int, count: int) -> list[int]:
    copies, rest = divmod(count, size)
    return sorted([*range(size)] * copies + [*order(0, 0, size)[:rest]])


def source_names(source: DataSource) -> list[str]:
    """Returns what the parts of a data set are called: names of files where these tell them apart, else paths."""
    parts = parts_of(source)
    short = [Path(part.path).name if part.kind == "file" else part.path for part in parts]
    return short if len(set(short)) == len(short) else [part.path for part in parts]


def _place(part: DataSource, found: RecordSet, index: int) -> str:
    return found.places[index] if found.places else f"{part.path}:{index + 1}"
