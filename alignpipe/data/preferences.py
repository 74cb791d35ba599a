"""Rows of pairs and ranked lists -> rankings: explicit prompts, implicit ones, NeMo's, and our own file.

A pair without a prompt column holds it twice: both sides begin with the same dialogue, which ends before the
last assistant turn.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignpipe.data.dialogue import (
    HH_MARK,
    RowFault,
    check_turns,
    list_of,
    merge_turns,
    messages_of,
    prompt_of,
    read_hh,
    text_of,
)
from alignpipe.data.records import DEGREES, MAX_RESPONSES, MIN_RESPONSES, Degree, Message, Ranking

_Side = tuple[tuple[Message, ...], str]


def read_pair(values: Mapping[str, Any], columns: Mapping[str, str]) -> Ranking:
    """Reads a chosen and a rejected response.

    Args:
        values: The row.
        columns: Column of `chosen`, `rejected` and maybe `prompt` and `margin`.

    Raises:
        RowFault: A response is empty, both are equal, the two have no prompt in common, or the margin is none.
    """
    prompt = None
    if "prompt" in columns:
        prompt = prompt_of(values.get(columns["prompt"]), columns["prompt"])
    sides = [_side(values.get(columns[name]), columns[name], prompt) for name in ("chosen", "rejected")]
    (shared, chosen), (other, rejected) = sides
    if shared != other:
        raise RowFault("chosen and rejected differ in their prompt")
    if prompt is None:
        shared = merge_turns(shared, "the shared prompt")
        check_turns(shared, "the shared prompt")
        if shared[-1].role == "assistant":
            raise RowFault("the shared prompt ends with the assistant, expected the user")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        text_of(text, columns[name])
    if chosen.strip() == rejected.strip():
        raise RowFault("chosen and rejected are equal")
    return Ranking(shared, (chosen, rejected), (1.0, 2.0), margin=_margin(values, columns.get("margin", "")))


def _margin(values: Mapping[str, Any], name: str) -> float | Degree | None:
    """Returns the margin of a pair: a number, a degree, or None where the row has none."""
    value = values.get(name)
    if isinstance(value, str):
        word = value.strip().lower().removesuffix(" better")
        if word in DEGREES:
            return word
        # CSV has no numbers.
        with suppress(ValueError):
            value = float(word)
    if value is None or value == "":
        return None
    number = _finite(value)
    if number is None or number < 0:
        raise RowFault(
            f"{name} holds {str(value)[:20]!r}, expected a number of at least 0 or one of {', '.join(DEGREES)}"
        )
    return number


def _finite(value: Any) -> float | None:
    """A number that is one, or None; an integer may be too long for it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _side(value: Any, name: str, prompt: tuple[Message, ...] | None) -> _Side:
    """Returns the prompt and the response of one side of a pair."""
    if isinstance(value, list):
        messages = messages_of(value, name)
    elif isinstance(value, str) and value.startswith(HH_MARK):
        messages = tuple(read_hh(value, name))
    elif prompt is not None:
        return prompt, text_of(value, name)
    else:
        raise RowFault(
            f"{name}: {'no prompt, and no dialogue' if isinstance(value, str) else text_of(value, name)}"
        )
    if messages[-1].role != "assistant":
        raise RowFault(f"{name} ends with {messages[-1].role}, expected assistant")
    before = messages[:-1]
    if prompt is None and not before:
        raise RowFault(f"{name} has no prompt before the response")
    # A whole dialogue on each side wins over the prompt column, which may hold its first turn alone.
    return (before or prompt or ()), messages[-1].content


def read_ranked(values: Mapping[str, Any], columns: Mapping[str, str]) -> Ranking:
    """Reads 2 to 9 ranked responses: `responses` with `ranks`, best first without, or NeMo's completions.

    Args:
        values: The row.
        columns: Column of `prompt`, `responses` and `ranks`, which a row may lack.

    Raises:
        RowFault: The lists do not fit each other, or fewer than two responses differ.
    """
    prompt = prompt_of(values.get(columns["prompt"]), columns["prompt"])
    name = columns["responses"]
    items = list_of(values.get(name), name)
    if not MIN_RESPONSES <= len(items) <= MAX_RESPONSES:
        raise RowFault(f"{name} holds {len(items)}, expected {MIN_RESPONSES} to {MAX_RESPONSES} responses")
    ranks: list[float] = list(range(1, len(items) + 1))
    if all(isinstance(item, dict) and "completion" in item for item in items):
        ranks = _numbers([item.get("rank") for item in items], f"{name}.rank", len(items))
        items = [item["completion"] for item in items]
    elif values.get(columns["ranks"]) is not None:
        ranks = _numbers(values[columns["ranks"]], columns["ranks"], len(items))
    responses = tuple(_response(item, f"{name}[{number}]") for number, item in enumerate(items, 1))
    if len({response.strip() for response in responses}) < MIN_RESPONSES:
        raise RowFault(f"{name} holds fewer than {MIN_RESPONSES} that differ")
    gold = values.get("gold")
    return Ranking(
        prompt,
        responses,
        # Some count from 0.
        tuple(float(rank - min(ranks) + 1) for rank in ranks),
        None if gold is None else tuple(_numbers(gold, "gold", len(items))),
    )


def _response(value: Any, name: str) -> str:
    if not isinstance(value, list):
        return text_of(value, name)
    messages = messages_of(value, name)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise RowFault(f"{name} has {len(messages)} turns, expected one of the assistant")
    return messages[0].content


def _numbers(value: Any, name: str, count: int) -> list[float]:
    items = list_of(value, name)
    if len(items) != count:
        raise RowFault(f"{name} holds {len(items)}, expected {count}, one a response")
    numbers = []
    for item in items:
        number = _finite(item)
        if number is None:
            raise RowFault(f"{name} holds {str(item)[:20]!r}, expected a number")
        numbers.append(number)
    return numbers


def write_rankings(
    rankings: Sequence[Ranking], path: Path, labels: Iterable[Sequence[Sequence[int]]] | None = None
) -> None:
    """Writes rankings as JSON lines that the `ranked` format reads back unchanged.

    Args:
        rankings: The rows.
        path: Of the file.
        labels: For each ranking, the ranks that each labeler gave; kept for people to look at.
    """
    columns: list[dict[str, Any]] = []
    for ranking in rankings:
        row: dict[str, Any] = {
            "prompt": [
                {name: value for name, value in asdict(message).items() if value is not None}
                for message in ranking.prompt
            ],
            "responses": list(ranking.responses),
            "ranks": list(ranking.ranks),
        }
        if ranking.gold is not None:
            row["gold"] = list(ranking.gold)
        columns.append(row)
    if labels is not None:
        for row, ranks in zip(columns, labels, strict=True):
            row["labels"] = [list(one) for one in ranks]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in columns]
    path.write_bytes("".join(lines).encode())
