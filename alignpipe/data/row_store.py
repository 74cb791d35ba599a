"""What was made of rows once, kept by its key: a folder an entry, whole or not there.

key -> folder, made if it is missing or damaged; deleting any of them costs the time to make it again
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from alignpipe.artifact import Manifest, damage, publish, read_manifest, remove_tree, seal
from alignpipe.disk import refusal
from alignpipe.errors import CheckpointError

KIND = "rows"


def digest(*parts: Any) -> str:
    """Returns a key of JSON values."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def entry(root: Path | None, key: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """The folder of a key, while it is opened; files that are open may stay so.

    Args:
        root: Holds the entries; None for a folder that goes away.
        key: Names all that decides what is in it.
        build: Writes the files of an entry into an empty folder; not called where the entry is there and sound.

    Raises:
        MachineError: The disk refuses it.
    """
    if root is None:
        with tempfile.TemporaryDirectory(prefix="alignpipe-") as name:
            build(Path(name))
            yield Path(name)
        return
    folder = root / key[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Who comes while another builds it waits, and then finds it.
        with FileLock(f"{folder}.lock"):
            if not _is_sound(folder):
                _build(folder, key, build)
            yield folder
    except OSError as error:
        raise refusal(folder, error) from error


def _is_sound(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return manifest is not None and damage(folder, manifest, read_files=True) is None


def _build(folder: Path, key: str, build: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove_tree(temporary)
    temporary.mkdir()
    try:
        build(temporary)
        seal(temporary, Manifest(KIND, key))
        remove_tree(folder)
        publish(temporary, folder)
    finally:
        remove_tree(temporary)
