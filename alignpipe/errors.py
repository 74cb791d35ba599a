"""What a user can cause, as one line: what is wrong and where, what was expected, how to mend it."""

import difflib
from collections.abc import Iterable, Sequence

# Characters of a line that tells an error, with the word before it.
LINE = 290
# Of them, those kept of the end of a longer one, where the mend stands.
TAIL = 120


class AlignpipeError(Exception):
    """A failure that is told in one line, without a traceback.

    Attributes:
        exit_code: what the process returns to the shell.
        trace: a traceback worth keeping in the error log, as that of the user's own code is.
    """

    exit_code = 1
    trace: str | None = None


class ConfigError(AlignpipeError):
    """A key, value, option or name in the configuration is wrong."""

    exit_code = 2


class DataError(AlignpipeError):
    """A data file is missing, broken, or lacks what the stage needs."""

    exit_code = 3


class CheckpointError(AlignpipeError):
    """A model folder is missing, half-written, damaged or of the wrong kind."""

    exit_code = 4


class MachineError(AlignpipeError):
    """The machine cannot do it: disk, lock, device, network."""

    exit_code = 5


class NumericalError(AlignpipeError):
    """A loss, gradient or score is not finite.

    Attributes:
        rows: places of the rows that it comes from, among those at hand; none where that is not known.
    """

    exit_code = 6
    rows: tuple[int, ...] = ()


class ProcessLost(AlignpipeError):
    """One of several processes died or did not answer in time."""

    exit_code = 7


class Stopped(AlignpipeError):
    """A signal asked for the end; the state is saved and the same command goes on."""

    exit_code = 75


def listed(numbers: Iterable[int], most: int = 8) -> str:
    """Such as `3, 17, 4 and 12 more`, since a line has no room for all."""
    numbers = list(numbers)
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def printable(text: str) -> str:
    r"""A text of which a terminal obeys nothing: control, direction and half characters are spelled out.

    >>> print(printable("red \x1b[31m"))
    red \x1b[31m
    """
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


def as_line(text: str) -> str:
    """A message in one line that fits a terminal; a longer one is cut in its middle."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LINE else f"{line[: LINE - TAIL - 5]} ... {line[-TAIL:]}"


def several(problems: Sequence[str]) -> str:
    """The problems in one line: as many as fit it, at least the first, and how many more there are."""
    told = problems[0]
    for number, problem in enumerate(problems[1:], 1):
        more = f"; and {len(problems) - number} more"
        if len(told) + len(problem) + len(more) + 2 > LINE:
            return told + more
        told = f"{told}; {problem}"
    return told


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None when nothing is close.

    A choice that holds the same letters in another order, or starts with the word, wins over plain
    similarity, since those are the commonest slips of the hand.
    """
    choices = list(dict.fromkeys(choices))
    lowered = {choice.lower(): choice for choice in reversed(choices)}
    word = word.lower()
    starts = [choice for choice in lowered if choice.startswith(word)]
    anagrams = [choice for choice in lowered if sorted(choice) == sorted(word)]
    close = difflib.get_close_matches(word, list(lowered), n=1, cutoff=0.6)
    best = anagrams or close or (starts if len(starts) == 1 else [])
    return lowered[best[0]] if best else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence that names the nearest choice, and all of them while they are few.

    >>> did_you_mean("sfft", ["sft", "rm"])
    'Did you mean sft? (rm, sft)'
    """
    choices = sorted(set(choices))
    best = nearest(word, choices)
    listed = (
        ", ".join(choices) if len(choices) <= 12 else f"{', '.join(choices[:12])}, ... {len(choices)} in all"
    )
    if best is None:
        return f"Known: {listed}." if choices else ""
    return f"Did you mean {best}? ({listed})" if len(choices) <= 12 else f"Did you mean {best}?"
