"""How much better one ranked response is than another (Llama 2, arXiv:2307.09288, 3.2.2 and table 27).

ranking -> a worth for each response; the margin of a pair is the difference of the two worths
"""

from collections.abc import Callable, Iterable

from alignpipe.config import RMConfig
from alignpipe.data.examples import RankedExample
from alignpipe.data.records import Degree, Ranking
from alignpipe.errors import DataError

# Llama 2's two tables.
DEGREE_MARGINS: dict[str, dict[Degree, float]] = {
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0},
}
AnyRanking = Ranking | RankedExample


def worths(ranking: AnyRanking, config: RMConfig) -> list[float]:
    """Returns one number a response; a pair's margin is worth_w - worth_l.

    Args:
        ranking: With what the margin is read from.
        config: `margin`, `margin_degrees`, `margin_scale`.

    Raises:
        DataError: The ranking has not what the margin is read from.
    """
    return [config.margin_scale * worth for worth in _WORTHS[config.margin](ranking, config)]


def check_margins(rankings: Iterable[AnyRanking], config: RMConfig, name: str) -> None:
    """Makes sure that every ranking has what its margins are read from.

    Raises:
        DataError: One has not; says which.
    """
    for number, ranking in enumerate(rankings, 1):
        try:
            worths(ranking, config)
        except DataError as error:
            raise DataError(f"{name}: row {number} of those read {error}") from error


def _none(ranking: AnyRanking, config: RMConfig) -> list[float]:
    return [0.0] * len(ranking.ranks)


def _column(ranking: AnyRanking, config: RMConfig) -> list[float]:
    margin = ranking.margin
    if margin is None:
        raise DataError(
            "has no margin; give it a column margin, name yours with data.columns.margin, or margin=rank"
        )
    if isinstance(margin, str):
        margin = DEGREE_MARGINS[config.margin_degrees][margin]
    best = min(ranking.ranks)
    return [margin if rank == best else 0.0 for rank in ranking.ranks]


def _rank(ranking: AnyRanking, config: RMConfig) -> list[float]:
    return [-rank for rank in ranking.ranks]


def _gold(ranking: AnyRanking, config: RMConfig) -> list[float]:
    if ranking.gold is None:
        raise DataError(
            "has no gold scores, which only the embedded world has; set margin=rank or margin=column"
        )
    return list(ranking.gold)


_WORTHS: dict[str, Callable[[AnyRanking, RMConfig], list[float]]] = {
    "none": _none,
    "column": _column,
    "rank": _rank,
    "gold": _gold,
}
