"""JSON and JSONL files -> rows with line numbers.

Own reader on Python's parser: NaN, a column twice, and what is no object spoil their row; broken JSON stops
the reading at `file:line`.
"""

import bisect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignpipe.data.lines import WHOLE, Row, Stretch, read_lines
from alignpipe.errors import DataError

_WRAPPED = re.compile(r'\s*\{\s*"(?:data|rows|examples)"\s*:\s*(?=\[)')
_SPACE = re.compile(r"[ \t\r\n]*")


class _Decoder:
    """A JSON parser that notes what Python lets pass."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, at: int, line: int) -> tuple[Row, int]:
        """Reads the value that begins at `at`; returns its row and where it ends."""
        self._faults.clear()
        value, end = self._decoder.raw_decode(text, at)
        if not isinstance(value, dict):
            kind = {"list": "an array", "str": "text", "NoneType": "null", "bool": "true or false"}
            found = kind.get(type(value).__name__, "a number")
            return Row(line, {}, f'is {found}, expected an object like {{"prompt": ...}}'), end
        return Row(line, value, self._faults[0] if self._faults else None), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                self._faults.append(f"column {name!r:.40} stands there twice")
            values[name] = value
        return values

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name} is no JSON number; write null")


def read_jsonl(path: Path, stretch: Stretch = WHOLE) -> Iterator[Row]:
    """Yields the rows of a file, or of a stretch of it, with one JSON object a line; blank lines are skipped.

    Raises:
        DataError: As in `read_lines`, or a line is broken JSON.
    """
    decoder = _Decoder()
    packed = path.suffix.lower() == ".gz"
    for line, raw, offset, size in read_lines(path, stretch):
        # Without the line end, so that an error at the end is in this line's columns.
        text = raw.rstrip("\r\n")
        start = _after_space(text, 0)
        if start == len(text):
            continue
        try:
            row, end = decoder.decode(text, start, line)
            rest = _after_space(text, end)
            if rest < len(text):
                raise json.JSONDecodeError("more text after the object", text, rest)
        except (ValueError, RecursionError) as error:
            cut = "" if raw.endswith("\n") else "; it is the last line and may be cut off"
            raise DataError(f"{path}:{line}{_complaint(error)}{cut}; mend or remove the line") from error
        yield Row(line, row.values, row.fault, None if packed else (offset, size))


def read_json(path: Path) -> Iterator[Row]:
    """Yields the rows of a file with one JSON array, alone or under `data`; else reads it as JSONL.

    Raises:
        DataError: As in `read_lines`, or the JSON is broken.
    """
    text = "".join(line.text for line in read_lines(path))
    wrapped = _WRAPPED.match(text)
    at = wrapped.end() if wrapped else _after_space(text, 0)
    if not text.startswith("[", at):
        yield from read_jsonl(path)
        return
    decoder = _Decoder()
    ends = [match.start() for match in re.finditer("\n", text)]
    expected = "["
    while True:
        at = _after_space(text, at + 1)
        line = bisect.bisect_left(ends, at) + 1
        if expected == "[" and text.startswith("]", at):
            return
        try:
            row, end = decoder.decode(text, at, line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}:{error.colno}: broken JSON, {error.msg}; mend the file"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}{_complaint(error)}; mend the file") from error
        yield row
        at = _after_space(text, end)
        if text.startswith("]", at):
            return
        if not text.startswith(",", at):
            line = bisect.bisect_left(ends, at) + 1
            raise DataError(
                f"{path}:{line}: broken JSON, expected a comma or the end of the array; mend the file"
            )
        expected = ","


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _complaint(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f":{error.colno}: broken JSON, {error.msg}"
    return (
        f": broken JSON, {'nested too deep' if isinstance(error, RecursionError) else 'a number is too long'}"
    )
