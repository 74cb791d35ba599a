"""Rows by an index and encoded rows on disk: the same as in memory, kept once, made again when they are damaged."""

import gzip
import json
import multiprocessing
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignpipe.config import DataConfig
from alignpipe.data import encoded_rows, row_store, sources
from alignpipe.data.cores import on_all_cores
from alignpipe.data.dialogue import RowFault
from alignpipe.data.encoding import (
    Encoded,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_texts,
)
from alignpipe.data.examples import Example
from alignpipe.data.formats import read_record
from alignpipe.data.lazy import Lazy
from alignpipe.data.mixture import read_portion
from alignpipe.data.records import Record, RecordType
from alignpipe.data.sources import (
    DataSource,
    Keep,
    RecordSet,
    content_hash,
    find_mixture,
    find_source,
    read_parts,
)
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError, MachineError
from tests.data.conftest import make_config

Write = Callable[[str, Any], Path]
TOKENIZER = Tokenizer.toy()
NUM_ROWS = 60


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are cut and kept as large ones are."""
    monkeypatch.setattr(sources, "MIN_KEPT", 0)
    monkeypatch.setattr(sources, "STRETCH", 300)
    monkeypatch.setattr(encoded_rows, "MIN_KEPT", 1)
    monkeypatch.setattr(encoded_rows, "BLOCK", 7)


def rows(count: int = NUM_ROWS, word: str = "sky") -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {word} {index} é\u2028?", "response": "Blue. " * (index % 9 + 1)}
        for index in range(count)
    ]


def awkward() -> bytes:
    """JSONL with a byte order mark, CRLF, blank lines, rows that cannot be used, and no end of the last line."""
    lines = [json.dumps(row, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows())]
    lines[3] = '{"prompt": "x", "prompt": "y", "response": "z"}'
    lines[20] = '{"prompt": null, "response": "z"}'
    lines[41] = "[1]"
    ends = [
        "\r\n" if index % 3 == 0 else "\n\n \n" if index % 7 == 0 else "\n" for index in range(len(lines))
    ]
    return b"\xef\xbb\xbf" + "".join(map(str.__add__, lines, ends)).rstrip().encode()


def csv(count: int = NUM_ROWS) -> str:
    return "prompt,response\n" + "".join(f'"a, ""b""\n{index}",c\n' for index in range(count))


def eager(source: DataSource, want: RecordType) -> tuple[list[Record], list[str], list[tuple[int, str]]]:
    """Records, places and faults, one row after the other."""
    records, places, faults = [], [], []
    layout = sources.layout_of(source)
    for number, (file, row) in enumerate(sources.rows_of(source)):
        if number == source.config.max_rows:
            break
        try:
            if row.fault is not None:
                raise RowFault(row.fault)
            records.append(read_record(row.values, layout, want))
            places.append(f"{file}:{row.line}")
        except RowFault as fault:
            faults.append((row.line, str(fault)))
    return records, places, faults


def kept(source: DataSource, root: Path, want: RecordType = "demonstrations", share: str = "all") -> Any:
    """Records of a share, kept in a folder."""
    found = read_parts(source, want, Keep(root, content_hash(source)))
    return read_portion(source, found, share).records


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


FORMS: dict[str, bytes | str] = {
    "awkward.jsonl": awkward(),
    "awkward.ndjson": awkward(),
    "awkward.jsonl.gz": gzip.compress(awkward()),
    "lines.json": awkward(),
    "array.json": json.dumps(rows(), indent=1),
    "a.csv": csv(),
    "a.csv.gz": gzip.compress(csv().encode()),
}


@pytest.mark.parametrize("max_rows", [None, 17])
@pytest.mark.parametrize("name", FORMS)
def test_records_by_index_are_those_read_one_after_the_other(
    name: str, max_rows: int | None, write: Write, config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    source = find_source(str(write(name, FORMS[name])), config(max_rows=max_rows, max_bad=1.0))
    for want in ("demonstrations", "prompts"):
        records, places, faults = eager(source, want)
        for root in (None, tmp_path / "rows", tmp_path / "rows"):
            (found,) = read_parts(source, want, root and Keep(root, content_hash(source)))
            assert (found.records, found.places) == (records, places)
            assert [(row.line, row.reason) for row in found.rejected] == faults
            assert found.num_rows == len(records) + len(faults)
            assert [found.records[index] for index in (-1, 0)] == [records[-1], records[0]]


def test_parquet_keeps_what_records_are_made_of(tmp_path: Path, config: Callable[..., DataConfig]) -> None:
    other = {"bytes": b"\xff", "when": pyarrow.scalar(0, pyarrow.timestamp("s")).as_py()}
    table = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ],
            **other,
        }
        for row in rows()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    source = find_source(str(tmp_path / "a.parquet"), config())
    assert kept(source, tmp_path / "rows") == eager(source, "demonstrations")[0]


def test_folder_and_mixture_by_index_are_those_in_memory(tmp_path: Path, write: Write) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(awkward())
    (tmp_path / "folder" / "b.csv").write_text(csv())
    single = write("c.jsonl", rows(40, "grass"))
    weights = {str(tmp_path / "folder"): 0.7, str(single): 0.3}
    for stopping in ("first_exhausted", "all_exhausted"):
        source = find_mixture(make_config(mixture=weights, max_bad=1.0, mixture_stopping=stopping))
        parts = [eager(part, "demonstrations") for part in sources.parts_of(source)]
        in_memory = [
            RecordSet(records, [], len(records), "", places, sources.points_of(records))
            for records, places, _ in parts
        ]
        by_index = read_parts(source, "demonstrations", Keep(tmp_path / "rows", content_hash(source)))
        for share in ("train", "eval", "all"):
            found, expected = (read_portion(source, one, share) for one in (by_index, in_memory))
            assert found.records == list(expected.records)
            assert found.places == list(expected.places)
            assert found.sources == expected.sources
            assert encoded(found.records).examples == encoded(list(expected.records)).examples


def test_broken_line_is_told_with_its_number_and_the_first_of_several(
    write: Write, config: Callable[..., DataConfig]
) -> None:
    lines = [json.dumps(row) for row in rows()]
    lines[30], lines[50] = "{", "}"
    source = find_source(str(write("a.jsonl", "\n".join(lines) + "\n")), config())
    with pytest.raises(DataError, match=r"a\.jsonl:31:2: broken JSON"):
        read_parts(source, "demonstrations")


def encoded(records: Any, max_length: int = 40, tokenizer: Tokenizer = TOKENIZER) -> Encoded[Example]:
    return encode_demonstrations(records, tokenizer, max_length, "drop")


@pytest.fixture
def source(write: Write, config: Callable[..., DataConfig]) -> DataSource:
    return find_source(str(write("a.jsonl", rows())), config())


@pytest.mark.parametrize("on_overflow", ["drop", "cut"])
@pytest.mark.parametrize("max_length", [35, 100])
def test_encoded_rows_on_disk_are_those_in_memory(
    source: DataSource, tmp_path: Path, max_length: int, on_overflow: str
) -> None:
    for want, encode in (("demonstrations", encode_demonstrations), ("prompts", encode_prompts)):
        records = kept(source, tmp_path / "rows", want)
        expected = encode(list(records), TOKENIZER, max_length, on_overflow)  # type: ignore[operator]
        for _ in range(2):
            found = encode(records, TOKENIZER, max_length, on_overflow)  # type: ignore[operator]
            assert isinstance(found.examples, Lazy)
            assert found == expected


def test_rankings_and_windows_on_disk_are_those_in_memory(
    tmp_path: Path, write: Write, config: Callable[..., DataConfig]
) -> None:
    ranked = [
        {"prompt": f"{i}?", "responses": ["a", "b", "c" * i, "a"], "ranks": [2, 1.5, 1.5, 3]}
        for i in range(1, 40)
    ]
    source = find_source(str(write("ranked.jsonl", ranked)), config())
    records = kept(source, tmp_path / "rows", "rankings")
    assert encode_rankings(records, TOKENIZER, 20, "drop") == encode_rankings(
        list(records), TOKENIZER, 20, "drop"
    )
    source = find_source(
        str(write("a.txt", "\n\n".join("One. " * i for i in range(1, 40)))), config(format="text")
    )
    texts = kept(source, tmp_path / "rows", "text")
    found = encode_texts(texts, TOKENIZER, 10)
    assert isinstance(found.examples, Lazy)
    assert found == encode_texts(list(texts), TOKENIZER, 10)


def test_faults_of_rows_on_disk_are_those_in_memory(source: DataSource, tmp_path: Path) -> None:
    records = kept(source, tmp_path / "rows")
    for max_length, on_overflow in ((40, "error"), (3, "drop")):
        told = []
        for given in (list(records), records, records):
            with pytest.raises(DataError) as error:
                encode_demonstrations(given, TOKENIZER, max_length, on_overflow)
            told.append(str(error.value))
        assert len(set(told)) == 1


def test_second_time_nothing_is_read_or_encoded(
    source: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(encoded(kept(source, tmp_path / "rows", share="train")).examples)

    def refuse(*args: Any) -> Any:
        raise AssertionError("again")

    monkeypatch.setattr(sources, "write_index", refuse)
    monkeypatch.setattr(Tokenizer, "encode_conversation", refuse)
    assert encoded(kept(source, tmp_path / "rows", share="train")).examples == first


@pytest.mark.parametrize("want", ["demonstrations", "prompts"])
def test_more_rows_than_can_be_waited_for_are_encoded_as_they_are_asked_for(
    source: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, want: RecordType
) -> None:
    encode: Any = {"demonstrations": encode_demonstrations, "prompts": encode_prompts}[want]
    records = kept(source, tmp_path / "rows", want)
    expected = encode(list(records), TOKENIZER, 15, "cut")
    assert expected.num_overflow > 0
    before = len(entries(tmp_path / "rows"))
    monkeypatch.setattr(encoded_rows, "MAX_BEFORE", 0)
    asked: list[int] = []
    make = records.make
    monkeypatch.setattr(records, "make", lambda number: asked.append(number) or make(number))
    found = encode(records, TOKENIZER, 15, "cut")
    assert asked == [], "nothing is read before it is asked for"
    found.examples[5]
    assert asked == [5]
    assert found.examples == expected.examples
    assert found.kept == expected.kept
    assert found.figures == {"rows_cut": None, "rows_dropped": 0}
    assert len(entries(tmp_path / "rows")) == before, "and nothing kept"
    # Which rows are left out is not known before all have been encoded.
    assert encode(records, TOKENIZER, 40, "drop") == encode(list(records), TOKENIZER, 40, "drop")


def test_whatever_decides_the_rows_is_in_their_key(source: DataSource, tmp_path: Path, write: Write) -> None:
    root = tmp_path / "rows"
    encoded(kept(source, root, share="train"))
    numbers = [len(entries(root))]
    other = Tokenizer(TOKENIZER._files, TOKENIZER.chat_template + " ")

    def note(action: Callable[[], Any]) -> None:
        action()
        numbers.append(len(entries(root)))

    note(lambda: encoded(kept(source, root, share="train"), max_length=41))
    note(lambda: encoded(kept(source, root, share="train"), tokenizer=other))
    note(lambda: encode_demonstrations(kept(source, root, share="train"), TOKENIZER, 40, "cut"))
    note(lambda: encode_demonstrations(kept(source, root, share="train"), TOKENIZER, 40, "drop", "all"))
    note(lambda: encoded(kept(source, root, share="eval")))
    note(lambda: encoded(kept(source, root, share="train")[:9]))
    assert numbers == list(range(2, 9))
    # Other content, and another way to read it, are another index and other rows.
    write("a.jsonl", rows(word="sea"))
    note(lambda: encoded(kept(source, root, share="train")))
    note(lambda: encoded(kept(find_source(source.path, make_config(max_rows=50)), root, share="train")))
    assert numbers[-2:] == [10, 12]
    assert "sea" in TOKENIZER.decode(encoded(kept(source, root)).examples[0].ids)


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [_cut_short, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["rows.jsonl", "places.npy", "lengths.npy", "index.npy", "alignpipe.json"])
def test_damaged_entry_is_made_again(
    source: DataSource, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    root = tmp_path / "rows"
    first = list(encoded(kept(source, root)).examples)
    for path in root.glob(f"*/{name}"):
        harm(path)
    assert encoded(kept(source, root)).examples == first
    for entry in entries(root):
        manifest = row_store.read_manifest(entry)
        assert manifest is not None and row_store.damage(entry, manifest, read_files=True) is None


def test_what_was_left_half_written_is_no_entry(
    source: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "rows"

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(row_store, "seal", fail)
        patch.setattr(row_store, "remove_tree", lambda folder: None)
        with pytest.raises(KeyboardInterrupt):
            kept(source, root)
    assert len(entries(root)) == 1
    assert kept(source, root) == eager(source, "demonstrations")[0]
    assert [path.name.startswith(".") for path in entries(root)] == [False]


def test_processes_that_want_the_same_rows_at_once_all_get_them(source: DataSource, tmp_path: Path) -> None:
    expected = encoded(eager(source, "demonstrations")[0]).examples
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()

    def ask() -> None:
        found = encoded(kept(source, tmp_path / "rows")).examples
        queue.put(found == expected)

    processes = [fork.Process(target=ask) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert len(entries(tmp_path / "rows")) == 2


def test_file_that_changed_after_it_was_read_is_told(source: DataSource, tmp_path: Path) -> None:
    records = kept(source, tmp_path / "rows")
    path = Path(source.path)
    with path.open("r+b") as file:
        file.write(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"a\.jsonl has changed since it was read first"):
        records[3]


def test_results_come_in_order_and_the_first_error_ends_them() -> None:
    def work(number: int) -> int:
        if number == 31:
            raise DataError("31")
        return os.getpid() * 1000 + number

    found = on_all_cores(work, range(40))
    results = [next(found) for _ in range(31)]
    assert [one % 1000 for one in results] == list(range(31))
    assert (len({one // 1000 for one in results}) > 1) == (len(os.sched_getaffinity(0)) > 1)
    with pytest.raises(DataError, match="31"):
        next(found)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_killed_process_is_an_error_and_none_is_left() -> None:
    def work(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), 9)
        return number

    with pytest.raises(MachineError, match="was killed"):
        list(on_all_cores(work, range(8)))
    assert not multiprocessing.active_children()


def test_memory_does_not_grow_with_the_text_of_rows(
    tmp_path: Path, config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "STRETCH", 1 << 16)
    monkeypatch.setattr(encoded_rows, "BLOCK", 64)
    peaks = []
    for count in (250, 1000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": f"{index} " + "Blue. " * 40}) + "\n" for index in range(count))
        )
        source = find_source(str(path), config(format="text"))
        tracemalloc.start()
        examples = encode_texts(kept(source, tmp_path / "rows", "text"), TOKENIZER, 512).examples
        assert sum(example.num_tokens for example in examples) > 80 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # In memory a row takes thousands of bytes; here, the places of its record and of its ids do, some of them twice.
    assert peaks[1] - peaks[0] < 750 * 600
