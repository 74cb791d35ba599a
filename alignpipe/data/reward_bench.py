"""RewardBench's file layout (arXiv:2403.13787): rows of prompt, chosen, rejected, subset, id -> pairs by subset."""

from dataclasses import dataclass
from pathlib import Path

from alignpipe.data.dialogue import RowFault, text_of
from alignpipe.data.preferences import read_pair
from alignpipe.data.records import Ranking
from alignpipe.data.rows import read_rows
from alignpipe.errors import DataError

COLUMNS = ("prompt", "chosen", "rejected", "subset")


@dataclass(frozen=True, slots=True)
class BenchmarkPair:
    """One row.

    Attributes:
        subset: What it tests.
        ranking: The chosen response first, the rejected one second.
    """

    subset: str
    ranking: Ranking


def read_reward_bench(path: Path) -> list[BenchmarkPair]:
    """Reads a whole file; other columns (`id`, `chosen_model`, ...) are not looked at.

    Raises:
        DataError: A column is missing or a row cannot be used; a score over the rows that are left would be no
            RewardBench score.
    """
    pairs = []
    for row in read_rows(path):
        try:
            if row.fault is not None:
                raise RowFault(row.fault)
            missing = [name for name in COLUMNS if name not in row.values]
            if missing:
                raise RowFault(
                    f"lacks {' and '.join(missing)}; a benchmark has the columns {', '.join(COLUMNS)}, as RewardBench's"
                )
            ranking = read_pair(row.values, {name: name for name in COLUMNS[:3]})
            pairs.append(BenchmarkPair(text_of(row.values["subset"], "subset"), ranking))
        except RowFault as fault:
            raise DataError(f"{path}:{row.line}: {fault}") from fault
    return pairs
