"""Which demonstrations are fit to learn from, as far as no model is needed: records -> why a row is refused.

Near duplicates are found exactly, by the prefix filter of all-pairs similarity search (Bayardo, Ma and Srikant,
"Scaling up all pairs similarity search", WWW 2007): two sets of Jaccard similarity t or more share a member within
their rarest n - ceil(t n) + 1, so only rows that share one of those are compared.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from alignpipe.config import SelectionConfig
from alignpipe.data.records import Demonstration, content_text

SHINGLE_WORDS = 3


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row is left out.

    Attributes:
        reason: In one word.
        like: Index of the earlier row that it repeats.
    """

    reason: str
    like: int | None = None


def refusals(
    records: Sequence[Demonstration], lengths: Sequence[int], config: SelectionConfig
) -> list[Refusal | None]:
    """Holds each row against the bounds, cheapest first, then against the rows before it that are kept.

    Args:
        records: The rows.
        lengths: Tokens of each last response.
        config: The bounds.

    Returns:
        For each row why it is refused; None for one that is fit.
    """
    texts = [" ".join(content_text(message) for message in record.messages) for record in records]
    found = [_bound(text, length, config) for text, length in zip(texts, lengths, strict=True)]
    if config.drop_duplicates:
        _refuse(found, "exact_duplicate", exact_duplicates(_fit(texts, found)))
    if config.near_duplicates is not None:
        _refuse(found, "near_duplicate", near_duplicates(_fit(texts, found), config.near_duplicates))
    return found


def exact_duplicates(texts: Sequence[str]) -> list[int | None]:
    """Returns, for each text, the index of the first one equal to it but for white space; None for a first one."""
    first: dict[str, int] = {}
    earlier = [first.setdefault(" ".join(text.split()), index) for index, text in enumerate(texts)]
    return [None if index == own else index for own, index in enumerate(earlier)]


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """Returns, for each text, the first kept one whose Jaccard similarity reaches the threshold; None to keep it.

    Args:
        texts: In order; one that is like an earlier kept one is not kept.
        threshold: Above 0, at most 1.
    """
    sets = [shingles(text) for text in texts]
    counts = Counter(shingle for one in sets for shingle in one)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found: list[int | None] = []
    for index, one in enumerate(sets):
        rarest = sorted(one, key=lambda shingle: (counts[shingle], shingle))
        prefix = rarest[: len(one) - ceil(threshold * len(one) - 1e-9) + 1]
        candidates = sorted({other for shingle in prefix for other in holders[shingle]})
        like = next((other for other in candidates if jaccard(one, sets[other]) >= threshold), None)
        found.append(like)
        if like is None:
            for shingle in prefix:
                holders[shingle].append(index)
    return found


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Returns every run of three words in lower case; a shorter text is one run."""
    words = text.lower().split()
    return frozenset(
        tuple(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))
    )


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Returns |A and B| / |A or B| of two sets that are not both empty."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def script_share(text: str, scripts: Sequence[str]) -> float:
    """Returns the share of a text's letters that are of some scripts; 1 for a text without letters."""
    letters = [_script(character) for character in text if character.isalpha()]
    return sum(script in scripts for script in letters) / len(letters) if letters else 1.0


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """The first word of a letter's name: `latin` for LATIN SMALL LETTER A."""
    return unicodedata.name(character, "").partition(" ")[0].lower()


def _bound(text: str, length: int, config: SelectionConfig) -> Refusal | None:
    if config.min_tokens is not None and length < config.min_tokens:
        return Refusal("too_short")
    if config.max_tokens is not None and length > config.max_tokens:
        return Refusal("too_long")
    if config.scripts and script_share(text, config.scripts) < config.min_script_share:
        return Refusal("other_script")
    return None


def _fit(texts: Sequence[str], found: Sequence[Refusal | None]) -> list[str]:
    return [text for text, refusal in zip(texts, found, strict=True) if refusal is None]


def _refuse(found: list[Refusal | None], reason: str, likes: Sequence[int | None]) -> None:
    """Note which of the rows that were fit until now repeat another."""
    fit = [index for index, refusal in enumerate(found) if refusal is None]
    for index, like in zip(fit, likes, strict=True):
        if like is not None:
            found[index] = Refusal(reason, fit[like])
