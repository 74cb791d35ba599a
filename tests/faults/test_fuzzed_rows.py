"""Rows that somebody broke, in any way: each is used or named with its line, and no good row goes with a bad one."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignpipe.config import DataConfig
from alignpipe.data.records import RecordType
from alignpipe.data.sources import find_source, read_records
from alignpipe.errors import DataError
from tests.data.conftest import make_config
from tests.faults.table import Faults

Row = dict[str, Any]
# Rows of a file: good ones, and among them broken ones.
GOOD, BROKEN = 6, 6
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
FORMATS: dict[str, tuple[RecordType, Row]] = {
    "preference": ("rankings", {"prompt": "Hello", "chosen": "Hi", "rejected": "No", "margin": 1.5}),
    "ranked": ("rankings", {"prompt": "Hello", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}),
    "unpaired": ("unpaired", {"prompt": "Hello", "completion": "Hi", "label": True}),
    "messages": ("demonstrations", {"messages": TALK}),
    "sharegpt": (
        "demonstrations",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    ),
    "alpaca": (
        "demonstrations",
        {"instruction": "Sum", "input": "Text", "output": "T.", "system": "Be good."},
    ),
    "prompt_completion": ("demonstrations", {"prompt": "Hello", "completion": "Hi"}),
    "prompts": ("prompts", {"prompt": "Hello"}),
    "text": ("text", {"text": "Once upon a time."}),
}
# What stands where something else is due.
STRANGE: list[Any] = [
    None, True, 0, -1, 1e308, 10**400, "", " \n", "\0", "\ud800", "\u202e", "\x1b[2J", "x" * 5000, [], [[]], [None], {},
    {"role": "user"}, {"role": 5, "content": "x"}, [{"role": "tool", "content": "x"}], "\n\nHuman:", "\n\nHuman: a",
    "\n\nAssistant: a\n\nHuman: b", [TALK, TALK], float("nan"), float("inf"),
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a row where a value stands, as container and key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _broken(row: Row, rng: random.Random) -> bytes:
    """A row with one thing wrong, as a line."""
    row = json.loads(json.dumps(row))
    place, key = rng.choice(list(_places(row)))
    way = rng.choice(("strange", "gone", "twice", "renamed", "beside"))
    if way == "strange":
        place[key] = rng.choice(STRANGE)
    elif way == "gone":
        del place[key]
    elif way == "twice" and isinstance(place, list):
        place.append(place[key])
    elif way == "renamed" and isinstance(place, dict):
        place[str(rng.choice(STRANGE[6:11])) + key] = place.pop(key)
    else:
        row[rng.choice(("id", "margin", "label", "ranks", "gold", "system", "input"))] = rng.choice(STRANGE)
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _read(path: Path, config: DataConfig, want: RecordType) -> tuple[dict[int, Any], set[int]]:
    """Line -> record, and the lines of rows that were set aside."""
    found = read_records(find_source(str(path), config), want)
    lines = [int(place.rpartition(":")[2]) for place in found.places]
    rejected = [row.line for row in found.rejected]
    assert found.num_rows == len(lines) + len(rejected)
    assert len({*lines, *rejected}) == found.num_rows
    return dict(zip(lines, found.records, strict=True)), set(rejected)


@pytest.fixture
def config() -> DataConfig:
    """Nothing that is set aside stops the reading."""
    return make_config(max_bad=1.0)


@pytest.mark.parametrize("layout", FORMATS)
def test_broken_row_is_used_or_named_and_costs_no_other(
    layout: str, tmp_path: Path, config: DataConfig, count: Callable[[int, int], int], faults: Faults
) -> None:
    want, row = FORMATS[layout]
    config.format = layout
    rng, path = random.Random(layout), tmp_path / "rows.jsonl"
    good = json.dumps(row).encode()
    path.write_bytes(good)
    (record,) = _read(path, config, want)[0].values()
    tried = done = 0
    for _ in range(count(10, 130)):
        # The first row says which columns there are.
        rows = [good] * (GOOD - 1) + [_broken(row, rng) for _ in range(BROKEN)]
        rng.shuffle(rows)
        rows.insert(0, good)
        # Half characters are no UTF-8, which is a fault of the whole file.
        rows = [one if _is_utf8(one) else good for one in rows]
        path.write_bytes(b"\n".join(rows) + b"\n")
        used, rejected = _read(path, config, want)
        assert {*used, *rejected} == set(range(1, len(rows) + 1))
        right = [used.get(line) == record for line, one in enumerate(rows, 1) if one == good]
        assert all(right), rows
        tried, done = tried + len(rows), done + len(used) + len(rejected)
    faults.tell("rows with a fault: used or named with their line", done, tried)


@pytest.mark.parametrize("layout", FORMATS)
def test_bytes_changed_at_random_are_told_with_their_line(
    layout: str, tmp_path: Path, config: DataConfig, count: Callable[[int, int], int], faults: Faults
) -> None:
    want, row = FORMATS[layout]
    rng, path = random.Random(layout), tmp_path / "rows.jsonl"
    good = json.dumps(row).encode()
    tried = done = 0
    for _ in range(count(15, 400)):
        number, line = rng.randint(1, GOOD), bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line))
            line[at : at + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 3)))
        path.write_bytes(b"\n".join([*[good] * (number - 1), bytes(line), *[good] * (GOOD - number)]) + b"\n")
        # A line end among the bytes makes two lines of one.
        lines = range(number, number + 1 + line.count(b"\n"))
        tried += 1
        try:
            used, rejected = _read(path, config, want)
            ends = line.count(b"\n")
            done += rejected <= set(lines) and {*used, *rejected, *lines} == set(range(1, GOOD + 1 + ends))
        except DataError as error:
            place = re.match(r".*?rows\.jsonl(?::(\d+))?", str(error))
            # The first row says which columns there are; of a file that is no text there is no line to name.
            told = place is not None and (place[1] is None or int(place[1]) in lines)
            done += told and (place[1] is not None or number == 1)
    faults.tell("rows with bytes changed: told with their line", done, tried)


def _is_utf8(line: bytes) -> bool:
    try:
        return line.decode() is not None
    except UnicodeDecodeError:
        return False
