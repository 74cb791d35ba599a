"""Formats of data -> records: which one a file has by its columns, and what a row of each becomes.

Alpaca, messages, ShareGPT, prompt and completion, pairs, ranked lists, prompts, text; see `FIELDS` and
`NEEDS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from alignpipe.config import ColumnsConfig
from alignpipe.data.dialogue import HH_MARK, RowFault, check_turns, messages_of, prompt_of, text_of
from alignpipe.data.preferences import read_pair, read_ranked
from alignpipe.data.records import (
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Record,
    RecordType,
    Text,
    Unpaired,
)
from alignpipe.errors import DataError, nearest

# Field -> the names that columns usually have for it, tried in order.
FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query"),
    "response": ("completion", "response", "answer", "output"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "responses": ("responses", "completions"),
    "ranks": ("ranks",),
    "margin": ("margin",),
    "label": ("label",),
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input",),
    "text": ("text",),
    "system": ("system", "system_prompt"),
}
# Columns that a message names.
MAX_NAMED = 8
# Fields that a row may leave out.
_OPTIONAL = ("input", "margin", "ranks", "system")
# NeMo's name for the prompt of a ranked list; elsewhere `context` is often a document.
_RANKED_PROMPT = (*FIELDS["prompt"], "context")

# Format -> the fields without which it cannot be read, in the order in which formats are recognised.
NEEDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
    "unpaired": ("prompt", "response", "label"),
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "alpaca": ("instruction", "response"),
    "prompt_completion": ("prompt", "response"),
    "prompts": ("prompt",),
    "text": ("text",),
}

TYPES: dict[str, frozenset[RecordType]] = {
    "preference": frozenset({"rankings", "prompts", "demonstrations"}),
    "ranked": frozenset({"rankings", "prompts", "demonstrations"}),
    "unpaired": frozenset({"unpaired", "prompts"}),
    "messages": frozenset({"demonstrations", "prompts"}),
    "sharegpt": frozenset({"demonstrations", "prompts"}),
    "alpaca": frozenset({"demonstrations", "prompts"}),
    "prompt_completion": frozenset({"demonstrations", "prompts"}),
    "prompts": frozenset({"prompts"}),
    "text": frozenset({"text"}),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one file are read.

    Attributes:
        format: One of `NEEDS`.
        columns: Field -> column, for the fields that the file has.
    """

    format: str
    columns: Mapping[str, str]


def find_layout(first: Mapping[str, Any], wanted: str, config: ColumnsConfig, at: str) -> Layout:
    """Finds how rows are to be read from the first of them.

    Args:
        first: The first row's values.
        wanted: A format, or `auto`.
        config: The user's names of columns.
        at: Where the row stands, for the message.

    Raises:
        DataError: A column that is named or needed is not there; says which are there, which are needed, and
            the key that names them.
    """
    named = {spec.name: getattr(config, spec.name) for spec in fields(config)}
    for field, column in named.items():
        if column is not None and column not in first:
            raise DataError(f"{at}: data.columns.{field}={column} is not there; {_have(first, column)}")
    found = {
        field: column
        for field in FIELDS
        if (column := _column(field, FIELDS[field], first, named)) is not None
    }
    if (
        "responses" in found
        and "prompt" not in found
        and (context := _column("prompt", _RANKED_PROMPT, first, named))
    ):
        found["prompt"] = context
    if wanted == "auto":
        # A column of that name often says something else; true and false it says of a response alone.
        if "label" in found and named["label"] is None and not isinstance(first[found["label"]], bool):
            del found["label"]
        fitting = [name for name, needs in NEEDS.items() if all(field in found for field in needs)]
        if not fitting:
            raise DataError(f"{at}: no known layout. {_have(first)}; {_needs(found)}")
        wanted = fitting[0]
    if wanted in ("messages", "sharegpt"):
        wanted = _turn_style(first.get(found.get("messages", "")), wanted)
    # A file of prompts alone may write them as conversations.
    needs = (
        ("messages",)
        if wanted == "prompts" and "prompt" not in found and "messages" in found
        else NEEDS[wanted]
    )
    missing = [field for field in needs if field not in found]
    if not missing and wanted == "preference" and "prompt" not in found:
        chosen = first.get(found["chosen"])
        missing = ["prompt"] if isinstance(chosen, str) and HH_MARK not in chosen else []
    if missing:
        keys = " ".join(f"data.columns.{field}=..." for field in missing)
        raise DataError(
            f"{at}: data of format {wanted} lacks {' and '.join(missing)}. {_have(first)}; set {keys}"
        )
    # The first row may lack what later rows have.
    return Layout(wanted, {**{field: named[field] or FIELDS[field][0] for field in _OPTIONAL}, **found})


def read_record(values: Mapping[str, Any], layout: Layout, want: RecordType) -> Record:
    """Makes one record of a row.

    Raises:
        RowFault: The row cannot be used.
    """
    return _as_type(_READERS[layout.format](values, layout.columns), want)


def _column(
    field: str, usual: Sequence[str], first: Mapping[str, Any], named: Mapping[str, str | None]
) -> str | None:
    explicit = named[field]
    return explicit if explicit is not None else next((name for name in usual if name in first), None)


def _turn_style(turns: Any, default: str) -> str:
    """Tells ShareGPT's turns from plain ones."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return default
    return "sharegpt" if "from" in turns[0] and "role" not in turns[0] else "messages"


def _have(first: Mapping[str, Any], column: str = "") -> str:
    close = nearest(column, first) if column else None
    names = [str(name)[:40] for name in first]
    more = f", ... {len(names)} in all" if len(names) > MAX_NAMED else ""
    return f"It has the columns {', '.join(names[:MAX_NAMED]) or '(none)'}{more}" + (
        f"; did you mean {close}?" if close else ""
    )


def _needs(found: Mapping[str, str]) -> str:
    """Names the format that lacks least and the keys that would mend it."""
    best = max(
        NEEDS, key=lambda name: (sum(field in found for field in NEEDS[name]), name == "prompt_completion")
    )
    options = "; or ".join(" and ".join(needs) for needs in dict.fromkeys(NEEDS.values()))
    keys = " ".join(f"data.columns.{field}=..." for field in NEEDS[best] if field not in found)
    return f"needed are {options}; name yours with {keys}"


def _conversation(messages: tuple[Message, ...], name: str) -> Record:
    check_turns(messages, name)
    if messages[-1].role == "assistant":
        return Demonstration(messages)
    return Prompt(messages)


def _system(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Message, ...]:
    column = columns["system"]
    if values.get(column) is None:
        return ()
    text = text_of(values[column], column, blank=True)
    return (Message("system", text),) if text.strip() else ()


def _with_system(
    prompt: tuple[Message, ...], values: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[Message, ...]:
    return prompt if prompt[0].role == "system" else (*_system(values, columns), *prompt)


def _read_alpaca(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    instruction, output = columns["instruction"], columns["response"]
    extra = values.get(columns["input"])
    given = None if extra is None else text_of(extra, columns["input"], blank=True)
    asked = Message(
        "user", text_of(values.get(instruction), instruction), given if given and given.strip() else None
    )
    answer = Message("assistant", text_of(values.get(output), output))
    return Demonstration((*_system(values, columns), asked, answer))


def _read_messages(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    name = columns["messages"]
    return _conversation(_with_system(messages_of(values.get(name), name), values, columns), name)


def _read_completion(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    asked, answered = columns["prompt"], columns["response"]
    prompt = _with_system(prompt_of(values.get(asked), asked), values, columns)
    value = values.get(answered)
    if not isinstance(value, list):
        return Demonstration((*prompt, Message("assistant", text_of(value, answered))))
    messages = (*prompt, *messages_of(value, answered))
    check_turns(messages, answered)
    return Demonstration(messages) if messages[-1].role == "assistant" else Prompt(messages)


def _read_prompt(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    name = columns["prompt"] if "prompt" in columns else columns["messages"]
    return Prompt(_with_system(prompt_of(values.get(name), name), values, columns))


def _read_text(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    return Text(text_of(values.get(columns["text"]), columns["text"]))


def _read_pair(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    record = read_pair(values, columns)
    return replace(record, prompt=_with_system(record.prompt, values, columns))


def _read_ranked(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    record = read_ranked(values, columns)
    return replace(record, prompt=_with_system(record.prompt, values, columns))


def _read_unpaired(values: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    value, said = values.get(columns["label"]), columns["label"]
    words = {"true": True, "1": True, "false": False, "0": False}
    desirable = value if isinstance(value, bool) else words.get(str(value).strip().lower())
    if desirable is None:
        raise RowFault(f"{said} is {str(value)[:20]!r}, expected true or false")
    read = _read_completion(values, columns)
    if isinstance(read, Prompt):
        raise RowFault(f"{columns['response']} ends with the user, expected the assistant")
    assert isinstance(read, Demonstration)
    return Unpaired(read.prompt, read.response, desirable)


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, str]], Record]] = {
    "preference": _read_pair,
    "ranked": _read_ranked,
    "unpaired": _read_unpaired,
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_completion,
    "prompts": _read_prompt,
    "text": _read_text,
}


def _as_type(record: Record, want: RecordType) -> Record:
    """Turns a record into one of the type that is wanted."""
    if isinstance(record, Text):
        return record
    if want == "prompts":
        return Prompt(record.prompt)
    if want == "demonstrations" and isinstance(record, Ranking):
        return Demonstration((*record.prompt, Message("assistant", record.responses[record.best])))
    if want == "demonstrations" and isinstance(record, Prompt):
        raise RowFault("the conversation ends with the user, expected the assistant")
    return record
