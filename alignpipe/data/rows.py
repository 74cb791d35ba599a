"""Data files -> rows, by suffix: JSONL, JSON, CSV, TSV, plain text, each also under gzip, and Parquet.

Own readers, since those of `datasets` take NaN, NUL and mixed types in silence and number rows within a
block. What breaks a whole file raises at once with `file:line`; what spoils one row goes with that row.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from alignpipe.data.json_rows import read_json, read_jsonl
from alignpipe.data.lines import MAX_LINE_BYTES, Row, open_data, read_lines
from alignpipe.errors import DataError


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a data file.

    Raises:
        DataError: The suffix is not known, or the file is not what it says, broken or without rows; with the
            line where there is one.
    """
    kind = suffix_of(path)
    if kind not in _READERS:
        known = ", ".join(_READERS)
        raise DataError(f"{path}: {f'suffix {kind}' if kind else 'no suffix'}; expected one of {known}")
    found = False
    for row in _READERS[kind](path):
        found = True
        yield row
    if not found:
        raise DataError(f"{path} has no rows; expected at least one")


def suffix_of(path: Path) -> str:
    """Returns the suffix that says what is in a file: `.jsonl` for `a.jsonl` and `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def is_data_file(path: Path) -> bool:
    """Whether a path has a suffix of data."""
    return suffix_of(path) in _READERS


def is_jsonl(path: Path) -> bool:
    """Whether each line of a file is a row by itself."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    reader = csv.reader((line.text for line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if cells and header is None:
                header = _header(path, cells)
            elif cells and header is not None:
                fault = None
                if len(cells) != len(header):
                    fault = f"has {len(cells)} cells, expected {len(header)} as in the header"
                yield Row(line, dict(zip(header, cells, strict=False)), fault)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV, {error}; check the quotes") from error


def _header(path: Path, cells: list[str]) -> list[str]:
    if len(set(cells)) < len(cells):
        twice = next(cell for cell in cells if cells.count(cell) > 1)
        raise DataError(f"{path}:1: column {twice!r:.40} stands twice in the header; rename one")
    return cells


def _read_text(path: Path) -> Iterator[Row]:
    """Yields one row a paragraph: documents are set apart by blank lines."""
    start, paragraph = 1, ""
    for line, text, _, _ in read_lines(path):
        if text.strip():
            start = start if paragraph else line
            paragraph += text
        elif paragraph:
            yield Row(start, {"text": paragraph.strip("\r\n")})
            paragraph = ""
    if paragraph:
        yield Row(start, {"text": paragraph.strip("\r\n")})


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # noqa: PLC0415  0.3 s that only readers of Parquet should pay
    import pyarrow.parquet  # noqa: PLC0415

    open_data(path).close()
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} is broken Parquet at row {number + 1} ({reason[:120]}); write it again"
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
