r"""Conversations as files write them -> messages: lists of turns, ShareGPT, hh-rlhf's `\n\nHuman:` text.

hh-rlhf (arXiv:2204.05862) writes a whole dialogue as one text, and both sides of a pair repeat its beginning.
"""

import re
from collections.abc import Sequence
from typing import Any

from alignpipe.data.records import Message

HH_MARK = "\n\nHuman:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


class RowFault(Exception):
    """Why a row cannot be used, in one phrase."""


def text_of(value: Any, name: str, *, blank: bool = False) -> str:
    """Returns a text that can be learnt from.

    Args:
        value: As read from the file.
        name: Of its column, for the message.
        blank: Whether it may be blank.

    Raises:
        RowFault: It is null, no text, blank, or holds what no tokenizer can read.
    """
    if value is None:
        raise RowFault(f"{name} is null, expected text")
    if not isinstance(value, str):
        raise RowFault(f"{name} is {_kind(value)}, expected text")
    if "\0" in value:
        raise RowFault(f"{name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowFault(f"{name} holds a lone surrogate, half a character") from None
    if not blank and not value.strip():
        raise RowFault(f"{name} is empty")
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """Returns a list.

    Raises:
        RowFault: It is none.
    """
    if value is None:
        raise RowFault(f"{name} is null, expected a list")
    if not isinstance(value, list):
        raise RowFault(f"{name} is {_kind(value)}, expected a list")
    return value


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """Reads a list of turns, `role`/`content` or ShareGPT's `from`/`value`, whatever their order.

    Raises:
        RowFault: A turn is no object, has an unknown role, or no text.
    """
    turns = list_of(value, name)
    if not turns:
        raise RowFault(f"{name} is an empty list")
    messages = []
    for number, turn in enumerate(turns, 1):
        at = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise RowFault(f"{at} is {_kind(turn)}, expected an object with role and content")
        said = turn["role"] if "role" in turn else turn.get("from")
        role = _ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise RowFault(f"{at} has role {said!r:.40}, expected system, user or assistant")
        content = _joined(turn["content"] if "content" in turn else turn.get("value"))
        extra = turn.get("input")
        text = text_of(content, f"{at} ({role})")
        messages.append(Message(role, text, None if extra is None else text_of(extra, f"{at} input")))
    return tuple(messages)


def check_turns(messages: Sequence[Message], name: str) -> None:
    """Checks the order of roles: maybe a system message, then user and assistant in turn.

    Raises:
        RowFault: They come in another order.
    """
    turns = [message.role for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    for number, role in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            before = turns[number - 1] if number else "system" if len(turns) < len(messages) else None
            raise RowFault(
                f"{name}: {role} after {before}" if before else f"{name}: {role} comes first, expected user"
            )
    if not turns:
        raise RowFault(f"{name}: has no user turn")


def read_hh(text: str, name: str) -> list[Message]:
    """Cuts a dialogue text at its markers; each turn is stripped and may be empty.

    Raises:
        RowFault: It does not begin with a marker.
    """
    pieces = _TURN.split(text_of(text, name))
    if pieces[0].strip() or len(pieces) < 3:
        raise RowFault(f"{name} does not begin with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def merge_turns(messages: Sequence[Message], name: str) -> tuple[Message, ...]:
    """Joins neighbouring turns of one speaker, which is how a marker inside a turn reads.

    Raises:
        RowFault: A turn is empty.
    """
    merged: list[Message] = []
    for message in messages:
        text_of(message.content, f"{name}: a {message.role} turn")
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, f"{merged[-1].content}\n\n{message.content}")
        else:
            merged.append(message)
    return tuple(merged)


def prompt_of(value: Any, name: str) -> tuple[Message, ...]:
    """Reads a prompt: a text, a dialogue text, or a list of turns that ends with the user.

    Raises:
        RowFault: It is none of these.
    """
    if isinstance(value, list):
        messages = messages_of(value, name)
    elif isinstance(value, str) and value.startswith(HH_MARK):
        turns = read_hh(value, name)
        if turns[-1].role == "assistant" and not turns[-1].content:
            # What opens the answer; every template writes its own.
            turns.pop()
        messages = merge_turns(turns, name)
    else:
        return (Message("user", text_of(value, name)),)
    check_turns(messages, name)
    if messages[-1].role == "assistant":
        raise RowFault(f"{name} ends with the assistant, expected the user")
    return messages


def _joined(content: Any) -> Any:
    """Joins a content that is given in parts, if all of them are text."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    return content


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
