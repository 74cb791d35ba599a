"""Encoded rankings -> what a loss over preferences learns from: pairs, or single responses, each good or bad.

RankedExample -> Comparison; no torch
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from alignpipe.data.examples import Example, RankedExample
from alignpipe.data.order import order

# A row of one response stands on one side of this rank.
GOOD, BAD = 1.0, 2.0


@dataclass(frozen=True, slots=True)
class Scored:
    """A response with the numbers that a loss holds it against.

    Attributes:
        example: prompt and response.
        reference: its log-prob under the reference, 0 where there is none.
        baseline: log-ratio at which it counts as neither good nor bad, 0 but for kto.
    """

    example: Example
    reference: float = 0.0
    baseline: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row: a pair, or a response that is good or bad by itself.

    Attributes:
        chosen: the better response; None where a bad one stands alone.
        rejected: the worse response; None where a good one stands alone.
        mismatched: the row's prompt with the response to another prompt, where the loss asks for it.
    """

    chosen: Scored | None
    rejected: Scored | None
    mismatched: Scored | None = None

    @property
    def responses(self) -> tuple[Scored, ...]:
        """The responses learnt from, one or two."""
        return tuple(side for side in (self.chosen, self.rejected) if side is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens of the responses learnt from, with their prompts."""
        return sum(len(side.example.ids) for side in self.responses)

    @property
    def num_items(self) -> int:
        """One: a pair has one loss, as a response alone has."""
        return 1

    def rescored(self, change: Callable[[Scored], Scored]) -> "Comparison":
        """The same with every response changed."""
        sides = (self.chosen, self.rejected, self.mismatched)
        return Comparison(*(side and change(side) for side in sides))


def ranked_pairs(ranks: Sequence[float], pairs: str) -> list[tuple[int, int]]:
    """Winner and loser of every pair that is learnt.

    Args:
        ranks: of the responses to one prompt, 1 is best.
        pairs: `all` that are not tied, or `best_worst`, one a prompt.
    """
    if pairs == "best_worst":
        best, worst = min(ranks), max(ranks)
        return [(ranks.index(best), ranks.index(worst))] if best != worst else []
    untied = (pair for pair in combinations(range(len(ranks)), 2) if ranks[pair[0]] != ranks[pair[1]])
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in untied]


def compare(rows: Iterable[RankedExample], pairs: str) -> list[Comparison]:
    """The pairs of all rankings."""
    return [
        Comparison(Scored(row.examples[won]), Scored(row.examples[lost]))
        for row in rows
        for won, lost in ranked_pairs(row.ranks, pairs)
    ]


def label(rows: Iterable[RankedExample], pairs: str) -> list[Comparison]:
    """The responses of all rankings, each good where it wins a pair and bad where it loses one.

    One in the middle is both, once each. A response that came alone has its label as its rank.
    """
    found = []
    for row in rows:
        won, lost = zip(*ranked_pairs(row.ranks, pairs), strict=True) if len(row.ranks) > 1 else ((), ())
        alone = row.ranks[0] if len(row.ranks) == 1 else None
        for index, example in enumerate(row.examples):
            if index in won or alone == GOOD:
                found.append(Comparison(Scored(example), None))
            if index in lost or alone == BAD:
                found.append(Comparison(None, Scored(example)))
    return found


def mismatch(rows: Sequence[Comparison], seed: int, max_length: int) -> list[Comparison]:
    """Give each row its prompt with the response of another row: the next, in a shuffled circle, of another prompt.

    The partner is the row's own for the whole stage, so that the reference need score it only once.

    Args:
        rows: each of one response.
        seed: of the shuffle.
        max_length: tokens; a longer response is cut.
    """
    circle = order(seed, 0, len(rows))
    place = {index: number for number, index in enumerate(circle)}
    parts = [_parts(row.responses[0].example) for row in rows]

    def other(index: int) -> list[int]:
        later = (circle[(place[index] + step) % len(rows)] for step in range(1, len(rows) + 1))
        return parts[next((row for row in later if parts[row][0] != parts[index][0]), index)][1]

    made = []
    for index, row in enumerate(rows):
        prompt, response = parts[index][0], other(index)[: max_length - len(parts[index][0])]
        made.append(replace(row, mismatched=Scored(Example.of(prompt, response))))
    return made


def examples_of(rows: Iterable[Comparison]) -> Iterator[Example]:
    """All sequences of some rows, those that several rows share as often as they do."""
    for row in rows:
        yield from (side.example for side in (*row.responses, row.mismatched) if side is not None)


def _parts(example: Example) -> tuple[list[int], list[int]]:
    start = example.mask.index(True)
    return example.ids[:start], example.ids[start:]
