"""Files: each suffix gives the same rows, each fault one line with its place; nothing else comes out."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alignpipe.config import DataConfig
from alignpipe.data import lines
from alignpipe.data.rows import read_rows
from alignpipe.data.sources import find_source, read_records
from alignpipe.errors import DataError

Write = Callable[[str, Any], Path]
ROWS = [{"prompt": "Hé?", "completion": 'a "b",\nc'}, {"prompt": "two", "completion": "d"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'prompt,completion\nHé?,"a ""b"",\nc"\ntwo,d\n'


def contents() -> dict[str, bytes]:
    """The same two rows in every form."""
    return {
        "a.jsonl": JSONL.encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + JSONL.encode(),
        "blank.jsonl": b"\n" + JSONL.replace("\n", "\r\n \n").encode(),
        "open.ndjson": JSONL.rstrip("\n").encode(),
        "a.jsonl.gz": gzip.compress(JSONL.encode()),
        "array.json": json.dumps(ROWS).encode(),
        "pretty.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
        "wrapped.json": json.dumps({"data": ROWS}).encode(),
        "lines.json": JSONL.encode(),
        "a.csv": CSV.encode(),
        "bom.csv": b"\xef\xbb\xbf" + CSV.replace("two", "\r\ntwo").replace("\r\ntwo", "two").encode(),
        "a.tsv": CSV.replace("Hé?,", "Hé?\t").replace("t,c", "t\tc").replace("o,d", "o\td").encode(),
        "a.csv.gz": gzip.compress(CSV.encode()),
    }


@pytest.mark.parametrize("name", contents())
def test_read_rows_any_form_gives_the_same(name: str, write: Write) -> None:
    rows = list(read_rows(write(name, contents()[name])))
    assert [row.values for row in rows] == ROWS
    assert [row.fault for row in rows] == [None, None]


def test_read_rows_parquet_gives_the_same(tmp_path: Path) -> None:
    nested = [{**row, "messages": [{"role": "user", "content": "x"}]} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [(row.line, row.values) for row in rows] == [(1, nested[0]), (2, nested[1])]


def test_read_rows_text_gives_a_document_a_paragraph(write: Write) -> None:
    rows = list(read_rows(write("a.txt", "One\ntwo\n\n\n three\n")))
    assert [(row.line, row.values["text"]) for row in rows] == [(1, "One\ntwo"), (5, " three")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "\n\n" + JSONL, [3, 4]),
        ("a.json", "[\n\n" + ",\n\n".join(json.dumps(row) for row in ROWS) + "]", [3, 5]),
        ("a.csv", CSV, [2, 4]),
    ],
)
def test_read_rows_tells_the_line_each_begins_on(
    name: str, content: str, expected: list[int], write: Write
) -> None:
    assert [row.line for row in read_rows(write(name, content))] == expected


FAULTS: dict[str, tuple[str, Any, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl is empty; expected at least one row"),
    "blank": ("a.jsonl", b"\n \n", "a.jsonl has no rows; expected at least one"),
    "byte order mark alone": ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl has no rows"),
    "broken": (
        "a.jsonl",
        '{"a": "x"}\n{"a": }\n{"a": "y"}\n',
        "a.jsonl:2:7: broken JSON, Expecting value; mend",
    ),
    "truncated": (
        "a.jsonl",
        '{"a": "x"}\n{"a": "y',
        "a.jsonl:2:7: broken JSON, Unterminated string starting at; it is",
    ),
    "two objects": (
        "a.jsonl",
        '{"a": 1} {"a": 2}\n',
        "a.jsonl:1:10: broken JSON, more text after the object",
    ),
    "pretty printed": ("a.jsonl", '{\n"a": 1\n}\n', "a.jsonl:1:2: broken JSON"),
    "deep": ("a.jsonl", "[" * 200_000, "a.jsonl:1: broken JSON, nested too deep"),
    "huge number": ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl:1: broken JSON, a number is too long"),
    "latin 1": ("a.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 (byte 21 of the file)"),
    "utf-16": (
        "a.jsonl",
        '{"a": 1}'.encode("utf-16"),
        "a.jsonl is UTF-16, expected UTF-8; convert it with iconv",
    ),
    "gzip by name": ("a.jsonl.gz", JSONL, "a.jsonl.gz is not gzip data; rename it to a.jsonl"),
    "gzip by content": ("a.jsonl", gzip.compress(b"{}"), "a.jsonl is gzip data; rename it to a.jsonl.gz"),
    "gzip cut": ("a.jsonl.gz", gzip.compress(JSONL.encode() * 99)[:-20], "a.jsonl.gz is a broken gzip file"),
    "parquet by content": ("a.jsonl", b"PAR1xxxx", "a.jsonl is Parquet data; rename it to a.parquet"),
    "parquet cut": ("a.parquet", b"PAR1xxxxPAR", "a.parquet is broken Parquet at row 1"),
    "parquet not": ("a.parquet", b"text", "a.parquet is broken Parquet at row 1"),
    "suffix": ("a.xlsx", b"x", "a.xlsx: suffix .xlsx; expected one of .jsonl, .ndjson, .json"),
    "no suffix": ("a", b"x", "a: no suffix; expected one of"),
    "array broken": ("a.json", '[{"a": 1},\n {"a": }]', "a.json:2:8: broken JSON, Expecting value"),
    "array open": (
        "a.json",
        '[{"a": 1}\n',
        "a.json:2: broken JSON, expected a comma or the end of the array",
    ),
    "array comma": ("a.json", '[{"a": 1},]', "a.json:1:11: broken JSON"),
    "array empty": ("a.json", "[]", "a.json has no rows"),
    "csv header twice": ("a.csv", "a,a\n1,2\n", "a.csv:1: column 'a' stands twice in the header; rename one"),
    "csv quotes": ("a.csv", 'a,b\n1,2\n"x" y,3\n', "a.csv:3: broken CSV"),
    "csv header alone": ("a.csv", "a,b\n", "a.csv has no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_read_rows_broken_file_is_one_line_with_its_place(fault: str, write: Write) -> None:
    name, content, expected = FAULTS[fault]
    path = write(name, content)
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    message = str(error.value)
    assert message.startswith(f"{path.parent}/{expected}")
    assert "\n" not in message
    assert len(message) - len(str(path.parent)) < 300


def test_read_rows_long_line_names_the_cap(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 20)
    with pytest.raises(DataError, match=r"a\.jsonl:2: longer than 20 bytes"):
        list(read_rows(write("a.jsonl", '{"a": 1}\n' + '{"a": "' + "x" * 50 + '"}\n')))


def test_read_rows_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        list(read_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[]", "is an array, expected an object"),
        ("5", "is a number, expected an object"),
        ("null", "is null, expected an object"),
        ('"x"', "is text, expected an object"),
        ("true", "is true or false, expected an object"),
        ('{"a": 1, "a": 2}', "column 'a' stands there twice"),
        ('{"a": {"b": 1, "b": 2}}', "column 'b' stands there twice"),
        ('{"a": NaN}', "NaN is no JSON number; write null"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON number; write null"),
    ],
)
@pytest.mark.parametrize("form", ["{good}\n{bad}\n{good}\n", "[{good},\n{bad},\n{good}]"])
def test_read_rows_bad_json_row_spoils_itself_alone(text: str, fault: str, form: str, write: Write) -> None:
    content = form.replace("{good}", '{"a": "x"}').replace("{bad}", text)
    rows = list(read_rows(write("a.json" if content.startswith("[") else "a.jsonl", content)))
    assert [row.line for row in rows] == [1, 2, 3]
    assert str(rows[1].fault).startswith(fault)
    assert rows[0].fault is rows[2].fault is None


def test_read_rows_csv_row_of_other_width_spoils_itself_alone(write: Write) -> None:
    rows = list(read_rows(write("a.csv", "a,b\n1,2\n1\n1,2,3\n1,2\n")))
    assert [row.fault for row in rows] == [
        None,
        "has 1 cells, expected 2 as in the header",
        "has 3 cells, expected 2 as in the header",
        None,
    ]


GOOD = '{"prompt": "x", "completion": "y"}'
BAD = (
    "[]",
    "5",
    "null",
    '"x"',
    "{}",
    '{"prompt": "x"}',
    '{"prompt": 1, "completion": "y"}',
    '{"prompt": NaN}',
    '{"prompt": "x", "completion": null}',
    '{"prompt": "\\u0000", "completion": "y"}',
    '{"prompt": "\\ud800", "completion": "y"}',
    '{"prompt": "x", "prompt": "x", "completion": "y"}',
    '{"prompt": [], "completion": "y"}',
    '{"prompt": [{"role": "x"}], "completion": "y"}',
    '{"prompt": "x", "completion": [{"from": 3, "value": {}}]}',
    '{"prompt": "\\n\\nHuman:", "completion": "y"}',
)
MALFORMED = st.one_of(
    st.sampled_from(BAD),
    st.dictionaries(
        st.sampled_from(["prompt", "completion"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.just(" "),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    ).map(lambda row: json.dumps({"completion": None, **row})),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.just(GOOD) | MALFORMED | st.just(""), max_size=12), end=st.sampled_from(["\n", "\r\n"])
)
def test_read_records_malformed_rows_are_counted_and_never_crash(
    rows: list[str], end: str, tmp_path: Path, config: Callable[..., DataConfig]
) -> None:
    path = tmp_path / "fuzz.jsonl"
    rows = [GOOD, *rows]
    path.write_bytes(end.join(rows).encode())
    found = read_records(find_source(str(path), config(max_bad=1.0)), "demonstrations")
    good = [line for line, row in enumerate(rows, 1) if row == GOOD]
    bad = [line for line, row in enumerate(rows, 1) if row not in ("", GOOD)]
    assert [int(place.rpartition(":")[2]) for place in found.places] == good
    assert [row.line for row in found.rejected] == bad
    assert len(found.records) + len(found.rejected) == found.num_rows
    assert all(row.reason and "\n" not in row.reason for row in found.rejected)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.binary(max_size=60),
    at=st.integers(0, 200),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt"]),
)
@example(damage=b"\xff", at=3, name="a.csv")
def test_read_records_damaged_bytes_give_records_or_one_line(
    damage: bytes, at: int, name: str, tmp_path: Path, config: Callable[..., DataConfig]
) -> None:
    content = {"a.jsonl": JSONL, "a.json": json.dumps(ROWS), "a.csv": CSV, "a.txt": "x\n\ny"}[name].encode()
    path = tmp_path / name
    path.write_bytes(content[:at] + damage + content[at + len(damage) // 2 :])
    try:
        found = read_records(
            find_source(str(path), config(max_bad=1.0)), "text" if name == "a.txt" else "prompts"
        )
    except DataError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert len(found.records) + len(found.rejected) == found.num_rows
