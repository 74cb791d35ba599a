"""What is in a data set, before training: configuration -> format, rows, faults, lengths, uses."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import TypedDict

from rich.console import Console

from alignpipe.config import TOY, DataConfig
from alignpipe.data.records import (
    Demonstration,
    Ranking,
    Record,
    RecordType,
    Text,
    Unpaired,
    content_text,
    prompt_text,
)
from alignpipe.data.shares import share_of
from alignpipe.data.sources import (
    DataSource,
    RecordSet,
    Rejected,
    find_source,
    layout_of,
    read_records,
    readable_types,
    rows_of,
    scan,
)
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import printable

# Record type -> the stages it suits, in the order of a pipeline. The first that a data set can serve is read.
STAGES: dict[RecordType, tuple[str, ...]] = {
    "rankings": ("rm", "dpo"),
    "unpaired": ("dpo with loss=kto",),
    "demonstrations": ("sft",),
    "text": ("sft",),
    "prompts": ("collect", "rs", "ppo", "eval"),
}
_PERCENTILES = (50, 90, 99, 100)


class BadRows(TypedDict):
    """Rows that have one fault in common."""

    reason: str
    rows: int
    first: str


class Lengths(TypedDict):
    """How long examples are.

    Attributes:
        unit: `characters`, or `tokens` where a tokenizer was given.
        percentiles: Percentile -> length.
        max_length: Limit they are held against, if there is one.
        over: Share of the examples above it.
    """

    unit: str
    percentiles: dict[str, int]
    max_length: int | None
    over: float | None


class DataReport(TypedDict):
    """What a data set holds; plain values, ready for JSON.

    Attributes:
        path: Where it is.
        kind: `toy`, `file`, `hub` or `collect`.
        format: How its rows are read.
        columns: Of its first row.
        rows: In all.
        usable: Of them, those that became records.
        types: Types of record it can serve.
        stages: Kinds of stage it suits.
        bad: The other rows, by reason, most first.
        bad_allowed: Whether they are few enough for `data.max_bad`.
        duplicates: Rows that stood there before, word for word.
        first_duplicate: Where the first of them is.
        same_prompt: Rows whose prompt stood there before, with another response.
        contradictions: Pairs of responses that are ranked both ways.
        lengths: Of what is learnt from.
        controls: Special tokens typed into texts; null without a tokenizer.
        shares: Rows that each share gets.
    """

    path: str
    kind: str
    format: str
    columns: list[str]
    rows: int
    usable: int
    types: list[str]
    stages: list[str]
    bad: list[BadRows]
    bad_allowed: bool
    duplicates: int
    first_duplicate: str | None
    same_prompt: int
    contradictions: int
    lengths: Lengths
    controls: int | None
    shares: dict[str, int]


def check_data(
    config: DataConfig, tokenizer: Tokenizer | None = None, max_length: int | None = None
) -> DataReport:
    """Reads a data set whole and reports on it, however many of its rows are bad.

    Args:
        config: With the path and how rows are read.
        tokenizer: To count tokens instead of characters.
        max_length: Tokens (characters without a tokenizer) above which an example counts as too long.

    Raises:
        DataError: There is no such data, or a file is broken.
        MachineError: The hub cannot be reached.
    """
    source = find_source(config.path, config)
    types = readable_types(source)
    want = next(name for name in STAGES if name in types)
    found, columns = _read(source, want)
    duplicates, first, same_prompt = _duplicates(found)
    prompts = [prompt_text(record) for record in found.records]
    texts = [text for record in found.records for text in texts_of(record)] if tokenizer else []
    return DataReport(
        path=source.path,
        kind=source.kind,
        format=found.format,
        columns=columns,
        rows=found.num_rows,
        usable=len(found.records),
        types=sorted(types),
        stages=list(dict.fromkeys(stage for name in STAGES if name in types for stage in STAGES[name])),
        bad=_by_reason(found.rejected),
        bad_allowed=len(found.rejected) <= config.max_bad * found.num_rows and bool(found.records),
        duplicates=duplicates,
        first_duplicate=first,
        same_prompt=same_prompt,
        contradictions=_contradictions(found.records),
        lengths=_lengths(found.records, tokenizer, max_length),
        controls=sum(map(tokenizer.count_controls, texts)) if tokenizer else None,
        shares=dict(sorted(Counter(share_of(prompt, config.shares) for prompt in prompts).items())),
    )


def _read(source: DataSource, want: RecordType) -> tuple[RecordSet, list[str]]:
    if source.kind == TOY:
        return read_records(source, want), []
    first = next(row.values for _, row in rows_of(source) if row.fault is None)
    return scan(source, layout_of(source), want), list(first)


def texts_of(record: Record) -> list[str]:
    """Returns all texts of a record that people or models wrote."""
    if isinstance(record, Text):
        return [record.text]
    answers = record.responses if isinstance(record, Ranking) else ()
    if isinstance(record, Unpaired):
        answers = (record.response,)
    messages = record.messages if isinstance(record, Demonstration) else record.prompt
    return [*map(content_text, messages), *answers]


def _by_reason(rejected: Sequence[Rejected]) -> list[BadRows]:
    groups: dict[str, BadRows] = {}
    for row in rejected:
        # Which turn or response it was tells one row from another, not one fault.
        reason = re.sub(r"\[\d+\]", "[]", row.reason)
        group = groups.setdefault(reason, BadRows(reason=reason, rows=0, first=f"{row.file}:{row.line}"))
        group["rows"] += 1
    return sorted(groups.values(), key=lambda group: -group["rows"])


def _duplicates(found: RecordSet) -> tuple[int, str | None, int]:
    seen: set[Hashable] = set()
    prompts: set[str] = set()
    duplicates = same_prompt = 0
    first = None
    for index, record in enumerate(found.records):
        prompt = prompt_text(record)
        if record in seen:
            duplicates += 1
            first = first or (found.places[index] if found.places else f"row {index + 1}")
        elif prompt in prompts:
            same_prompt += 1
        seen.add(record)
        prompts.add(prompt)
    return duplicates, first, same_prompt


def _contradictions(records: Sequence[Record]) -> int:
    better: set[tuple[str, str, str]] = set()
    for record in records:
        if isinstance(record, Ranking):
            prompt = prompt_text(record)
            for i, j in combinations(range(len(record.ranks)), 2):
                if record.ranks[i] != record.ranks[j]:
                    best, worst = (i, j) if record.ranks[i] < record.ranks[j] else (j, i)
                    better.add((prompt, record.responses[best], record.responses[worst]))
    return sum((prompt, worst, best) in better for prompt, best, worst in better) // 2


def _lengths(records: Sequence[Record], tokenizer: Tokenizer | None, max_length: int | None) -> Lengths:
    lengths = sorted(_length(record, tokenizer) for record in records)
    last = len(lengths) - 1
    return Lengths(
        unit="tokens" if tokenizer else "characters",
        percentiles={str(part): lengths[round(last * part / 100)] for part in _PERCENTILES}
        if lengths
        else {},
        max_length=max_length,
        over=sum(length > max_length for length in lengths) / len(lengths)
        if max_length and lengths
        else None,
    )


def _length(record: Record, tokenizer: Tokenizer | None) -> int:
    """Returns the length of the longest sequence that a record makes."""
    if tokenizer is None:
        texts = list(map(len, texts_of(record)))
        kept = len(record.prompt) if isinstance(record, Ranking) else len(texts)
        return sum(texts[:kept]) + max(texts[kept:], default=0)
    if isinstance(record, Text):
        return len(tokenizer.encode_text(record.text)) + 1
    if isinstance(record, Demonstration):
        return len(tokenizer.encode_conversation(record.messages)[0])
    if isinstance(record, Ranking):
        prompt, responses = tokenizer.encode_responses(record.prompt, record.responses)
        return len(prompt) + max(map(len, responses))
    if isinstance(record, Unpaired):
        prompt, responses = tokenizer.encode_responses(record.prompt, (record.response,))
        return len(prompt) + len(responses[0])
    return len(tokenizer.encode_prompt(record.messages))


def print_report(report: DataReport, console: Console) -> None:
    """Prints a report for people, a fact a line."""
    lengths = report["lengths"]
    facts = {
        "data": f"{report['path']} ({report['kind']}, format {report['format']})",
        "columns": ", ".join(report["columns"]),
        "rows": f"{report['rows']}, {report['usable']} usable",
        "gives": ", ".join(report["types"]),
        "suits": ", ".join(report["stages"]),
        lengths["unit"]: ", ".join(f"{part}% up to {size}" for part, size in lengths["percentiles"].items()),
        "too long": "" if lengths["over"] is None else f"{lengths['over']:.1%} over {lengths['max_length']}",
        "repeated": _counted(report["duplicates"], f"rows, first {report['first_duplicate']}"),
        "same prompt": _counted(report["same_prompt"], "rows with another response"),
        "contradictions": _counted(report["contradictions"], "pairs ranked both ways"),
        "special tokens": _counted(report["controls"] or 0, "typed into texts; read as text"),
        "shares": ", ".join(f"{name} {count}" for name, count in report["shares"].items()),
    }
    for name, fact in facts.items():
        if fact:
            console.print(f"{name:<16}{printable(fact)}", markup=False, highlight=False, soft_wrap=True)
    for group in report["bad"]:
        line = printable(f"{'bad rows':<16}{group['rows']}: {group['reason']} (first {group['first']})")
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not report["bad_allowed"]:
        console.print(
            "more bad rows than data.max_bad allows; mend them or raise it", markup=False, soft_wrap=True
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count else ""
