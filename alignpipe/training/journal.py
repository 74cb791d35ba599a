"""Work that is done item by item is written item by item, so that a killed stage keeps what it had.

records -> appended lines, each durable -> read back after a crash without the torn last line
"""

import json
import os
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
        """All whole records; a record torn by a crash is cut off the file."""
        if not self._path.is_file():
            return []
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            os.truncate(self._path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records and wait until the disk has them."""
        is_new = not self._path.exists()
        with self._path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self._path.parent)
