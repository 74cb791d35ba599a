"""Work that is done item by item is written item by item, so that a killed stage keeps what it had.

records -> appended lines, each durable and with a checksum -> read back up to the first that is torn or damaged
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignpipe.artifact import sync_folder


class Journal:
    """A file of JSON lines that only grows.

    Args:
        path: of the file; made when first written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[dict[str, Any]]:
        """All records up to the first that was torn by a crash or changed since; that and the rest are cut off."""
        if not self._path.is_file():
            return []
        records, length = [], 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            checksum, _, text = line.partition(b" ")
            if checksum != _checksum(text):
                os.truncate(self._path, length)
                break
            records.append(json.loads(text))
            length += len(line)
        return records

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records and wait until the disk has them."""
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            for record in records:
                text = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                file.write(_checksum(text) + b" " + text)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self._path.parent)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
