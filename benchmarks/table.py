"""Results of a case, and the line of the table that says them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean, median
from typing import Any

from benchmarks.case import SIZES, Case, Measured

COLUMNS = (
    "case",
    "model",
    "best peer",
    "times as fast (least, most)",
    "at least",
    "ours, theirs tokens/s",
    "share of matrix rate",
    "peak MB",
    "memory",
    "at most",
    "losses",
    "each setting of the peer: times as fast, memory",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def rate(measured: Measured) -> float:
    """Tokens a second: the median of the repetitions of one process."""
    return median(tokens / second for tokens, second in zip(measured.tokens, measured.seconds, strict=True))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two series of losses.

    Raises:
        ValueError: they have no step, or not equally many.
    """
    if not ours:
        raise ValueError("no losses to compare")
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Result:
    """What all processes of a case found.

    Attributes:
        ours: one a pair.
        peers: label -> one a pair; the first setting is the one whose losses are compared.
    """

    case: Case
    size: str
    ours: list[Measured]
    peers: Mapping[str, list[Measured]]

    @cached_property
    def best(self) -> str:
        """The fastest setting of the peers."""
        return max(self.peers, key=lambda label: median(map(rate, self.peers[label])))

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the best peer we were, pair by pair."""
        return self.ratios_to(self.best)

    @property
    def target(self) -> float | None:
        """How many times as fast we have to be; None where that is reported alone."""
        return self.case.targets.get(self.size)

    @property
    def memory(self) -> float:
        """Our peak memory as a share of the best peer's."""
        return self.memory_of(self.best)

    def ratios_to(self, label: str) -> list[float]:
        """How many times as fast as one setting of the peers we were, pair by pair."""
        return [rate(one) / rate(other) for one, other in zip(self.ours, self.peers[label], strict=True)]

    def memory_of(self, label: str) -> float:
        """Our peak memory as a share of that of one setting of the peers."""
        return _peak(self.ours) / _peak(self.peers[label])

    @cached_property
    def loss_difference(self) -> float | None:
        """The largest between us and the first peer, over all pairs; None where losses are not compared."""
        if not self.case.same_losses:
            return None
        theirs = next(iter(self.peers.values()))
        return max(difference(one.losses, other.losses) for one, other in zip(self.ours, theirs, strict=True))

    @property
    def losses_agree(self) -> bool:
        """Whether the two trained on the same rows to the same end."""
        return self.loss_difference is None or self.loss_difference <= self.case.max_loss_difference

    def share(self, measured: Sequence[Measured]) -> float:
        """Of the matrix rate measured around them, what the useful tokens took."""
        needed = self.case.flops * SIZES[self.size].num_parameters
        return median(needed * rate(one) / mean(one.rates) for one in measured)

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        return {
            "case": self.case.name,
            "size": self.size,
            "best_peer": self.best,
            "ratio": median(self.ratios),
            "ratios": self.ratios,
            "target": self.target,
            "memory": self.memory,
            "max_memory": self.case.max_memory,
            "loss_difference": self.loss_difference,
            "sides": {
                label: {"share": self.share(found), "runs": [asdict(one) for one in found]}
                for label, found in {self.case.ours.label: self.ours, **self.peers}.items()
            },
        }


def line(result: Result) -> str:
    """A result as a line of the table."""
    theirs, ratios = result.peers[result.best], result.ratios
    ratio, loss = median(ratios), result.loss_difference
    cells = (
        result.case.name,
        result.size,
        result.best,
        f"{ratio:.2f} ({min(ratios):.2f}, {max(ratios):.2f})",
        _bound(result.target, result.target is not None and ratio >= result.target),
        f"{_rate(result.ours):,.0f}, {_rate(theirs):,.0f}",
        _shares(result),
        f"{_peak(result.ours) / 1e6:,.0f}, {_peak(theirs) / 1e6:,.0f}",
        f"{result.memory:.2f}",
        _bound(result.case.max_memory, result.memory <= (result.case.max_memory or 0)),
        "" if loss is None else f"{loss:.0e}{'' if result.losses_agree else ': FAILED'}",
        _each(result),
    )
    return f"| {' | '.join(cells)} |"


def _shares(result: Result) -> str:
    """Of the matrix rate, ours and the best peer's."""
    ours, theirs = (result.share(side) for side in (result.ours, result.peers[result.best]))
    least = result.case.min_share
    bound = "" if least is None else f" (at least {least:.0%}: {'met' if ours >= least else 'no'})"
    return f"{ours:.0%}{bound}, {theirs:.0%}"


def _each(result: Result) -> str:
    """Nothing where there is but one."""
    told = [
        f"{label} {median(result.ratios_to(label)):.2f}, {result.memory_of(label):.2f}"
        for label in result.peers
    ]
    return "; ".join(told) if len(told) > 1 else ""


def _bound(bound: float | None, met: bool) -> str:
    return "" if bound is None else f"{bound:.1f}: {'met' if met else 'no'}"


def _rate(measured: Sequence[Measured]) -> float:
    return median(map(rate, measured))


def _peak(measured: Sequence[Measured]) -> float:
    return median(one.peak for one in measured)
