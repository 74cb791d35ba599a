"""Records -> examples, cut or dropped to a length; no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.encoded_rows import Fit, Form, fit_all
from alignpipe.data.examples import Example, RankedExample
from alignpipe.data.lazy import as_numbers
from alignpipe.data.records import (
    Demonstration,
    Prompt,
    Ranking,
    Record,
    Text,
    Unpaired,
    messages_text,
)
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError

Item = TypeVar("Item")
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True, slots=True)
class Encoded(Generic[Item]):
    """What became of records.

    Attributes:
        examples: What can be batched.
        num_overflow: Records over the length, whether they were cut or dropped; None where records are so many that
            each is encoded, and cut, when it is asked for.
        kept: For each example, the index of its record.
        num_dropped: Records over the length of which nothing is left.
    """

    examples: Sequence[Item]
    num_overflow: int | None
    kept: Sequence[int]
    num_dropped: int = 0

    @property
    def figures(self) -> dict[str, int | None]:
        """What became of the records over the length, for the figures of a stage."""
        cut = None if self.num_overflow is None else self.num_overflow - self.num_dropped
        return {"rows_cut": cut, "rows_dropped": self.num_dropped}


class _Limit(NamedTuple):
    """The tokens that a record may have, the key that says so, and what becomes of one over it."""

    key: str
    tokens: int
    on_overflow: str


# Raised by hand when a change of the code changes what is made of the same records.
VERSION = 1
EXAMPLE = Form(Example.pack, Example.unpack)
RANKED = Form(RankedExample.pack, RankedExample.unpack)
PROMPT: Form[list[int]] = Form(list, list)


def encode_demonstrations(
    records: Sequence[Demonstration],
    tokenizer: Tokenizer,
    max_length: int,
    on_overflow: str,
    loss_on: str = "response",
) -> Encoded[Example]:
    """Encodes conversations.

    Args:
        records: The conversations.
        tokenizer: With the template they are written in.
        max_length: Tokens an example may have, at least 2.
        on_overflow: For one over it: `drop` it, `cut` the prompt from the left (BOS stays) and only then the
            response from the right, or `error`. A token of the prompt stays and one of the response at least, so
            that there is something to learn; a response that was cut does not learn to end there.
        loss_on: `response` learns the assistant's turns, `last` its last turn alone, `all` every token.

    Raises:
        DataError: One is over the length and that is an error, or none is left.
    """

    def fit(record: Demonstration) -> Fit[Example]:
        ids, mask = tokenizer.encode_conversation(record.messages)
        length, prompt_length = len(ids), _num_before_last_turn(mask)
        if loss_on == "last":
            mask = [False] * prompt_length + mask[prompt_length:]
        if length > max_length:
            if on_overflow != "cut":
                return Fit((), length)
            start, end = _cut_prompt(ids[:prompt_length], length - max_length, tokenizer)
            ids, mask = [*ids[:start], *ids[end:]][:max_length], [*mask[:start], *mask[end:]][:max_length]
        mask = [False, *([True] * (len(ids) - 1) if loss_on == "all" else mask[1:])]
        return Fit((Example(ids, mask),), length)

    limit = _Limit("max_length", max_length, on_overflow)
    settings = partial(_settings, tokenizer, "demonstrations", loss_on, *limit)
    return _encode(records, fit, EXAMPLE, limit, settings, one_each=on_overflow == "cut")


def encode_rankings(
    records: Sequence[Ranking],
    tokenizer: Tokenizer,
    max_length: int,
    on_overflow: str,
    *,
    keep_tied: bool = False,
) -> Encoded[RankedExample]:
    """Encodes rankings; each response is one example, and all of a ranking have the same prompt.

    Responses that are equal in tokens are one, with the best of their ranks; a ranking in which no two
    responses differ in rank is left out, since it teaches nothing where ties are dropped.

    Args:
        records: The rankings.
        tokenizer: With the template they are written in.
        max_length: Tokens an example may have, at least 2.
        on_overflow: For responses over it: `drop` them (and the ranking when fewer than two are left), `cut`
            the prompt from the left for all of them, then each from the right, or `error`.
        keep_tied: Keep rankings whose responses are all tied too.

    Raises:
        DataError: One is over the length and that is an error, or none is left.
    """

    def fit(record: Ranking) -> Fit[RankedExample]:
        prompt, responses = tokenizer.encode_responses(record.prompt, record.responses)
        length = len(prompt) + max(map(len, responses))
        if length > max_length and on_overflow == "cut":
            start, end = _cut_prompt(prompt, length - max_length, tokenizer)
            prompt = [*prompt[:start], *prompt[end:]]
            responses = [response[: max_length - len(prompt)] for response in responses]
        first: dict[tuple[int, ...], int] = {}
        for index in sorted(range(len(responses)), key=record.ranks.__getitem__):
            if len(prompt) + len(responses[index]) <= max_length:
                first.setdefault(tuple(responses[index]), index)
        chosen = sorted(first.values())
        ranks = tuple(record.ranks[index] for index in chosen)
        if len(ranks if keep_tied else set(ranks)) < 2:
            return Fit((), length)
        examples = tuple(Example.of(prompt, responses[index]) for index in chosen)
        gold = None if record.gold is None else tuple(record.gold[index] for index in chosen)
        return Fit((RankedExample(examples, ranks, gold, len(prompt), record.margin),), length)

    limit = _Limit("max_length", max_length, on_overflow)
    return _encode(records, fit, RANKED, limit, partial(_settings, tokenizer, "rankings", keep_tied, *limit))


def encode_unpaired(
    records: Sequence[Unpaired], tokenizer: Tokenizer, max_length: int, on_overflow: str
) -> Encoded[RankedExample]:
    """Encodes responses that stand alone: rankings of one, with rank 1 if it is good and 2 if it is bad.

    Args:
        records: The responses.
        tokenizer: With the template they are written in.
        max_length: Tokens an example may have, at least 2.
        on_overflow: As in `encode_rankings`.

    Raises:
        DataError: One is over the length and that is an error, or none is left.
    """

    def fit(record: Unpaired) -> Fit[RankedExample]:
        prompt, responses = tokenizer.encode_responses(record.prompt, (record.response,))
        length = len(prompt) + len(responses[0])
        if length > max_length:
            if on_overflow != "cut":
                return Fit((), length)
            start, end = _cut_prompt(prompt, length - max_length, tokenizer)
            prompt = [*prompt[:start], *prompt[end:]]
        example = Example.of(prompt, responses[0][: max_length - len(prompt)])
        rank = 1.0 if record.desirable else 2.0
        return Fit((RankedExample((example,), (rank,), None, len(prompt)),), length)

    limit = _Limit("max_length", max_length, on_overflow)
    return _encode(records, fit, RANKED, limit, partial(_settings, tokenizer, "unpaired", *limit))


def encode_prompts(
    records: Sequence[Prompt], tokenizer: Tokenizer, max_prompt_length: int, on_overflow: str
) -> Encoded[list[int]]:
    """Encodes prompts, up to and with what opens the assistant's turn.

    Args:
        records: The prompts.
        tokenizer: With the template they are written in.
        max_prompt_length: Tokens a prompt may have.
        on_overflow: For one over it: `drop` it, `cut` it from the left (BOS stays), or `error`.

    Raises:
        DataError: One is over the length and that is an error, or none is left.
    """

    def fit(record: Prompt) -> Fit[list[int]]:
        ids = tokenizer.encode_prompt(record.messages)
        length = len(ids)
        if length > max_prompt_length:
            if on_overflow != "cut":
                return Fit((), length)
            start, end = _cut_prompt(ids, length - max_prompt_length, tokenizer)
            ids = [*ids[:start], *ids[end:]]
        return Fit((ids,), length)

    limit = _Limit("max_prompt_length", max_prompt_length, on_overflow)
    settings = partial(_settings, tokenizer, "prompts", *limit)
    return _encode(records, fit, PROMPT, limit, settings, one_each=on_overflow == "cut")


def encode_texts(records: Sequence[Text], tokenizer: Tokenizer, max_length: int) -> Encoded[Example]:
    """Encodes documents, each ended by EOS and cut into windows in which every token is learnt.

    A window begins with the last token of the one before, so that each token of a document but its first is
    learnt exactly once. Nothing is over the length.

    Args:
        records: The documents.
        tokenizer: Its template is not used.
        max_length: Tokens a window may have, at least 2.
    """

    def fit(record: Text) -> Fit[Example]:
        ids = [*tokenizer.encode_text(record.text), tokenizer.eos_id]
        starts = range(0, max(1, len(ids) - 1), max_length - 1)
        windows = [ids[start : start + max_length] for start in starts]
        return Fit([Example(window, [False] + [True] * (len(window) - 1)) for window in windows], len(ids))

    found = fit_all(records, fit, EXAMPLE, partial(_settings, tokenizer, "texts", max_length))
    return Encoded(found.items, 0, found.records)


def _num_before_last_turn(mask: Sequence[bool]) -> int:
    """Tokens up to the assistant's last turn, which stands at the end and is learnt whole."""
    return max((index + 1 for index, learnt in enumerate(mask) if not learnt), default=0)


def _cut_prompt(prompt: list[int], surplus: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns begin and end of what to take out: `surplus` tokens after BOS, of which at least one stays."""
    start = 1 if prompt[:1] == [tokenizer.bos_id] else 0
    return start, start + min(surplus, len(prompt) - 1)


def _settings(tokenizer: Tokenizer, *settings: Any) -> list[Any]:
    """All that decides what becomes of a record."""
    # A template may write the date.
    today = str(date.today()) if "strftime_now" in tokenizer.chat_template else ""
    return [VERSION, version("tokenizers"), tokenizer.fingerprint, today, *settings]


def _encode(
    records: Sequence[AnyRecord],
    fit: Callable[[AnyRecord], Fit[Item]],
    form: Form[Item],
    limit: _Limit,
    settings: Callable[[], Sequence[Any]],
    *,
    one_each: bool = False,
) -> Encoded[Item]:
    """Encodes records of which each makes one item, or none; `one_each` knows that none makes none."""
    found = fit_all(records, fit, form, settings, one_each=one_each)
    if found.lengths is None:
        return Encoded(found.items, None, found.records)
    over = np.flatnonzero(found.lengths > limit.tokens)
    if limit.on_overflow == "error" and len(over):
        index, key = int(over[0]), limit.key
        raise DataError(
            f"row {index + 1} of those read ({_shown(records[index])}) has {found.lengths[index]} tokens, more than "
            f"{key}={limit.tokens}; "
            f"raise {key} or set data.on_overflow=cut or drop"
        )
    if records and not found.items:
        raise DataError(_none_left(found.lengths, limit))
    num_dropped = len(np.setdiff1d(over, as_numbers(found.records)))
    return Encoded(found.items, len(over), found.records, num_dropped)


def _shown(record: Record) -> str:
    text = " ".join((record.text if isinstance(record, Text) else messages_text(record.prompt)).split())
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _none_left(lengths: NDArray[np.int64], limit: _Limit) -> str:
    key, tokens, on_overflow = limit
    sizes = f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens"
    if max(lengths) <= tokens:
        return f"none of {sizes} has two responses of different rank, so there is nothing to learn; rank them"
    mend = f"raise {key}" if on_overflow == "cut" else f"raise {key} or set data.on_overflow=cut"
    return f"nothing is left of {sizes} within {key}={tokens}; {mend}"
