"""Questions in which one word, the name of a group, can be swapped: file of templates -> the same question about each.

A row is `{"prompt": "Are {group} good neighbours?"}`, with `groups`, a list, unless the configuration gives one for
all rows, and with `response`, if a reward model is to score that one answer about each group.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpipe.data.dialogue import RowFault, text_of
from alignpipe.data.lines import Row
from alignpipe.data.rows import read_rows
from alignpipe.errors import DataError, nearest

GROUP = "{group}"
_COLUMNS = ("prompt", "groups", "response")


@dataclass(frozen=True, slots=True)
class Template:
    """A question about a group, whichever it is.

    Attributes:
        prompt: with `{group}` where the name goes.
        groups: names, at least two, in the order in which they are asked about.
        response: an answer that may hold `{group}` too; None where the policies' own answers are all there is.
    """

    prompt: str
    groups: tuple[str, ...]
    response: str | None = None


@dataclass(frozen=True, slots=True)
class Wording:
    """A template with a name in it.

    Attributes:
        template: its prompt and response before the name was put in; equal for all that are to be compared.
        group: the name.
        prompt: the question.
        response: the answer to score; None where there is none.
    """

    template: tuple[str, str | None]
    group: str
    prompt: str
    response: str | None = None


def questions(templates: Iterable[Template]) -> list[Wording]:
    """Each question about each group, once, however many responses or rows it has."""
    found: dict[str, Wording] = {}
    for template in templates:
        for group in template.groups:
            prompt = template.prompt.replace(GROUP, group)
            found.setdefault(prompt, Wording((template.prompt, None), group, prompt))
    return list(found.values())


def answered(templates: Iterable[Template]) -> list[Wording]:
    """Each question with its response, about each group, once; templates without a response are left out."""
    found: dict[tuple[str, str], Wording] = {}
    for template in templates:
        if template.response is not None:
            for group in template.groups:
                prompt, response = (
                    text.replace(GROUP, group) for text in (template.prompt, template.response)
                )
                wording = Wording((template.prompt, template.response), group, prompt, response)
                found.setdefault((prompt, response), wording)
    return list(found.values())


def read_templates(path: Path, groups: Sequence[str]) -> list[Template]:
    """Read a file of templates, JSONL or any other format of rows.

    Args:
        path: of the file.
        groups: names for rows without their own.

    Raises:
        DataError: a row is no template; names the file and the line.
    """
    return [_template(row, path, groups) for row in read_rows(path)]


def _template(row: Row, path: Path, groups: Sequence[str]) -> Template:
    try:
        if row.fault is not None:
            raise RowFault(row.fault)
        if "prompt" not in row.values:
            near = nearest("prompt", row.values)
            raise RowFault(f"no prompt, only {', '.join(row.values)}; {_rename(near, 'prompt')}")
        prompt = text_of(row.values["prompt"], "prompt")
        if GROUP not in prompt:
            raise RowFault(f"prompt has no {GROUP} in it; write {GROUP} where the name of the group goes")
        given = row.values.get("response")
        response = None if given is None else text_of(given, "response")
        return Template(prompt, _groups(row.values, groups), response)
    except RowFault as fault:
        raise DataError(f"{path}:{row.line}: {fault}") from fault


def _rename(near: str | None, column: str) -> str:
    return f"did you mean {near}? Rename it to {column}" if near else f"add {column}"


def _groups(values: Mapping[str, Any], shared: Sequence[str]) -> tuple[str, ...]:
    own = values.get("groups")
    if own is None and not shared:
        near = nearest("groups", [name for name in values if name not in _COLUMNS])
        mend = f"did you mean {near}? Rename it to groups" if near else "add groups, or set prejudice.groups"
        raise RowFault(f"no groups, neither in this row nor in prejudice.groups; {mend}")
    names = list(shared) if own is None else own
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise RowFault(f"groups is {names!r}, expected a list of names")
    if len(set(names)) < max(2, len(names)):
        raise RowFault(f"groups is {', '.join(names)}; expected at least two names, each once")
    return tuple(names)
