"""Opens data files and cuts them into numbered lines: path -> (number, text); unpacks gzip."""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from alignpipe.errors import DataError

# No honest row is longer; a file without line ends would fill the memory.
MAX_LINE_BYTES = 100_000_000
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        line: Line it begins on, from 1; for Parquet and hub data, its number from 1.
        values: By column.
        fault: What spoils the row, or None.
        span: Bytes of the file before it and of it, where it is a line of JSON in a file that is not packed.
    """

    line: int
    values: dict[str, Any]
    fault: str | None = None
    span: tuple[int, int] | None = None


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        number: From 1.
        text: With its end, without a byte order mark.
        offset: Bytes of the file before the text.
        size: Bytes of the text.
    """

    number: int
    text: str
    offset: int
    size: int


class Stretch(NamedTuple):
    """Whole lines of a file.

    Attributes:
        start: Bytes before them.
        end: Bytes up to the end of the last; None for all that follow.
        line: Number of the first.
    """

    start: int = 0
    end: int | None = None
    line: int = 1


WHOLE = Stretch()


def open_data(path: Path) -> BinaryIO:
    """Opens a file for reading bytes, gzip unpacked.

    Raises:
        DataError: It is empty, unreadable, UTF-16, or not what its suffix says.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file; give one, or a folder of them")
    try:
        handle = path.open("rb")
        head = handle.read(4)
        handle.seek(0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its name and permissions") from error
    suffix = path.suffix.lower()
    complaint = None
    if not head:
        complaint = "is empty; expected at least one row"
    elif head.startswith(b"\x1f\x8b") and suffix != ".gz":
        complaint = f"is gzip data; rename it to {path.name}.gz"
    elif suffix == ".gz" and not head.startswith(b"\x1f\x8b"):
        complaint = f"is not gzip data; rename it to {path.stem}"
    elif head == b"PAR1" and suffix != ".parquet":
        complaint = f"is Parquet data; rename it to {path.stem}.parquet"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        complaint = "is UTF-16, expected UTF-8; convert it with iconv -f UTF-16 -t UTF-8"
    if complaint is not None:
        handle.close()
        raise DataError(f"{path} {complaint}")
    if suffix == ".gz":
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=handle))))
    return handle


def stretches(path: Path, size: int) -> list[Stretch]:
    """Cuts a file at line ends into stretches of about so many bytes.

    Raises:
        DataError: As in `open_data`.
    """
    found: list[Stretch] = []
    start, line = 0, 1
    with open_data(path) as handle:
        while block := handle.read(size):
            block += handle.readline(MAX_LINE_BYTES + 1)
            found.append(Stretch(start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
    return found


def read_lines(path: Path, stretch: Stretch = WHOLE) -> Iterator[Line]:
    r"""Yields the lines of a file, or of a stretch of it.

    Raises:
        DataError: As in `open_data`, or a line is too long or not UTF-8.
    """
    offset = stretch.start
    with open_data(path) as handle:
        handle.seek(offset)
        for line, raw in enumerate(_raw_lines(handle, path), stretch.line):
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}:{line}: longer than {MAX_LINE_BYTES:,} bytes; expected one row a line"
                )
            skipped = len(_UTF8_BOM) if line == 1 and raw.startswith(_UTF8_BOM) else 0
            try:
                text = raw[skipped:].decode()
            except UnicodeDecodeError as error:
                at = offset + skipped + error.start
                raise DataError(
                    f"{path}:{line}: not UTF-8 (byte {at} of the file); convert it with iconv -f LATIN1 -t "
                    "UTF-8, "
                    "or from what it really is"
                ) from error
            yield Line(line, text, offset + skipped, len(raw) - skipped)
            offset += len(raw)
            if offset == stretch.end:
                return


def _raw_lines(handle: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        while raw := handle.readline(MAX_LINE_BYTES + 1):
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file ({error}); pack it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the disk") from error
