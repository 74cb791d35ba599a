"""The table that `make faults` prints: what was broken, how often, how often that did no harm, and how long it took."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Line:
    """A fault that was tried.

    Attributes:
        fault: what was broken, in a few words.
        done: times that it went as it must.
        of: times that it was tried.
        seconds: that all of them took.
    """

    fault: str
    done: int
    of: int
    seconds: float

    @property
    def reached(self) -> str:
        """As the table says it."""
        return f"{self.done:,} of {self.of:,}"


class Faults:
    """Takes the lines of one test, and fails it where one of them is short.

    Args:
        properties: of the test's report, which travel to the process that prints the table.
    """

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties
        self._began = time.monotonic()

    def tell(self, fault: str, done: int, of: int, *, least: int | None = None) -> None:
        """Add a line to the table.

        Args:
            fault: what was broken; lines that say the same are added up.
            done: times that it went as it must.
            of: times that it was tried, more than none.
            least: times that it must have; by default all.

        Raises:
            AssertionError: it did harm, or nothing was tried.
        """
        now = time.monotonic()
        line = Line(fault, done, of, round(now - self._began, 1))
        self._began = now
        self._properties.append(("fault", asdict(line)))
        assert of > 0, fault
        assert done >= (of if least is None else least), f"{fault}: {line.reached}"


def added_up(told: Iterable[dict[str, Any]]) -> list[Line]:
    """One line for each fault, in the order of their first mention."""
    lines: dict[str, Line] = {}
    for one in told:
        line = Line(**one)
        known = lines.setdefault(line.fault, Line(line.fault, 0, 0, 0.0))
        known.done, known.of = known.done + line.done, known.of + line.of
        known.seconds = round(known.seconds + line.seconds, 1)
    return list(lines.values())


def as_text(lines: list[Line]) -> list[str]:
    """The table in plain text, the columns aligned."""
    width = max(len(line.fault) for line in lines)
    return [f"{line.fault:<{width}}  {line.reached:>16}  {line.seconds:>7.1f} s" for line in lines]
