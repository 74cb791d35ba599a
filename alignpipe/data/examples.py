"""Sequences that a model reads, each with a mask of what is learnt; no torch.

`mask[i]` says that token `i` is learnt, predicted from the tokens before it; so the first is never set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from alignpipe.data.records import Degree


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence and which of its tokens are learnt; both lists have the same length."""

    ids: list[int]
    mask: list[bool]

    def pack(self) -> list[list[int]]:
        """Returns it as JSON values: the ids, and how long the mask stays False, then True, and so on."""
        runs = [len(list(run)) for _, run in groupby([False, *self.mask])]
        return [self.ids, [runs[0] - 1, *runs[1:]]]

    @classmethod
    def unpack(cls, values: Any) -> "Example":
        """Returns what was packed."""
        ids, runs = values
        return cls(ids, [bool(number % 2) for number, run in enumerate(runs) for _ in range(run)])

    @classmethod
    def of(cls, prompt: Sequence[int], response: Sequence[int]) -> "Example":
        """A prompt with its response, of which the response alone is learnt."""
        return cls([*prompt, *response], [False] * len(prompt) + [True] * len(response))

    @property
    def prompt(self) -> list[int]:
        """What stands before the first token that is learnt; all of it where none is."""
        return self.ids[: self.mask.index(True)] if True in self.mask else self.ids

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads."""
        return len(self.ids)

    @property
    def num_items(self) -> int:
        """Tokens that are learnt."""
        return sum(self.mask)


@dataclass(frozen=True, slots=True)
class RankedExample:
    """The sequences of one ranking.

    Attributes:
        examples: One a response, all beginning with the same prompt; only the response is learnt.
        ranks: One an example; 1 is best.
        gold: True worth of each, where it is known.
        prompt_length: Tokens of the prompt.
        margin: By how much the best is better, where people said it.
    """

    examples: tuple[Example, ...]
    ranks: tuple[float, ...]
    gold: tuple[float, ...] | None
    prompt_length: int
    margin: float | Degree | None = None

    def pack(self) -> list[Any]:
        """Returns it as JSON values."""
        examples = [example.pack() for example in self.examples]
        return [examples, self.ranks, self.gold, self.prompt_length, self.margin]

    @classmethod
    def unpack(cls, values: Any) -> "RankedExample":
        """Returns what was packed."""
        examples, ranks, gold, prompt_length, margin = values
        gold = None if gold is None else tuple(gold)
        return cls(tuple(map(Example.unpack, examples)), tuple(ranks), gold, prompt_length, margin)

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads, over all responses."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_items(self) -> int:
        """One: all pairs of a prompt weigh as one."""
        return 1
