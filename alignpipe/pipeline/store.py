"""The store of finished artifacts, and the folders of stages under way.

outputs/stages/<kind>-<key>/   finished, each written once, whatever run asked for it
outputs/work/<kind>-<key>/     lock, states and unfinished results; gone when the stage is done
outputs/rows/<key>/            rows of large data sets, read or encoded once; can be deleted while nothing runs
outputs/runs/<name>/           lock, what a run was told, and a link to each of its stages
outputs/latest                 name of the newest run
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alignpipe.artifact import (
    Manifest,
    damage,
    make_folder,
    read_manifest,
    refuse_link,
    remove_tree,
    set_aside,
    sha256_file,
    write_json,
    write_text,
)
from alignpipe.errors import CheckpointError, MachineError

LOCK = "lock"
HOLDER = "holder.json"
TASK = "task.yaml"


@dataclass(frozen=True)
class Store:
    """Where everything of a project lies.

    Attributes:
        root: the output folder.
    """

    root: Path

    def stage(self, kind: str, key: str) -> Path:
        """Folder of a finished artifact."""
        return self.root / "stages" / f"{kind}-{key}"

    def work(self, kind: str, key: str) -> Path:
        """Folder of a stage under way."""
        return self.root / "work" / f"{kind}-{key}"

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.root / "runs" / name

    @property
    def rows(self) -> Path:
        """Folder of what was read and encoded of data sets; each entry can be made again."""
        return self.root / "rows"

    def find(self, kind: str, key: str) -> Manifest | None:
        """The manifest of a finished artifact, sizes compared; None when there is none or it is damaged.

        Raises:
            CheckpointError: a newer alignpipe made it.
        """
        folder = self.stage(kind, key)
        manifest = read_manifest(folder)
        if manifest is None or damage(folder, manifest, read_files=False) is not None:
            return None
        return manifest

    def clear(self, kind: str, key: str) -> Path | None:
        """Put a folder that cannot be reused out of the way.

        Returns:
            Where it went; None when there was nothing.
        """
        folder = self.stage(kind, key)
        return set_aside(folder, "replaced") if folder.exists() else None

    @contextmanager
    def lock(self, kind: str, key: str, waiting: Callable[[str], None]) -> Iterator[int | None]:
        """Hold a stage while it is made.

        The kernel frees the lock when its holder dies, however it dies, and every process that it gave the
        descriptor to; that is what the block gets.

        Args:
            kind: of the stage.
            key: of the stage.
            waiting: told who holds it, every half second; may raise to give up.

        Raises:
            ConfigError: the folder is a link.
            MachineError: it cannot be written.
        """
        work = self.work(kind, key)
        # Beside the folder, not in it: the folder goes away while others wait.
        with _held(Path(f"{work}.{LOCK}"), work, waiting) as descriptor:
            yield descriptor

    @contextmanager
    def lock_run(self, name: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder of a run while it is under way; as `lock` does a stage."""
        folder = self.run(name)
        with _held(folder / LOCK, folder, waiting):
            yield

    def is_locked(self, kind: str, key: str) -> bool:
        """Whether some process makes the stage right now."""
        return _is_held(Path(f"{self.work(kind, key)}.{LOCK}"))

    def is_anything_locked(self) -> bool:
        """Whether some process makes any stage right now."""
        return any(_is_held(path) for path in (self.root / "work").glob(f"*.{LOCK}"))

    def finish(self, kind: str, key: str) -> None:
        """Drop the working folder of a stage that is done."""
        remove_tree(self.work(kind, key))

    def states(self, kind: str, key: str) -> list[str]:
        """Names of the saved states of a stage under way, oldest first."""
        names = (path.name for path in (self.work(kind, key) / "states").glob("step-*"))
        return sorted(names, key=lambda name: (len(name), name))

    def runs(self) -> list[Path]:
        """Folders of all runs, newest first."""
        found = [path.parent for path in (self.root / "runs").glob("*/run.json")]
        return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime_ns, reverse=True)

    def set_latest(self, run: str) -> None:
        """Name the newest run."""
        write_text(self.root / "latest", f"{run}\n")


class FileHashes:
    """Content hashes of input files, remembered by size and time so that a big file is read once.

    Args:
        path: of the memory; made when first written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        if path.is_file():
            try:
                self._known = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                # A torn memory costs one more reading, nothing else.
                self._known = {}
        self._changed = False

    def __call__(self, path: Path) -> str:
        """sha256 of a file."""
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns]
        known = self._known.get(str(path))
        if known is not None and known[:2] == stamp:
            return str(known[2])
        digest = sha256_file(path)
        self._known[str(path)] = [*stamp, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was learnt for the next command."""
        if self._changed:
            make_folder(self._path.parent)
            write_json(self._path, self._known)


def read_run(folder: Path) -> dict[str, Any] | None:
    """The record of a run: its name, the user's words, and each stage with its key and how it ended."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    except ValueError as error:
        raise MachineError(
            f"{path}: is no JSON any more ({error}); remove the run folder and run again"
        ) from error


def run_stages(folder: Path) -> list[dict[str, Any]]:
    """The stages of a run; none where there is no such run."""
    record = read_run(folder)
    return [] if record is None else list(record["stages"])


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _held(path: Path, folder: Path, waiting: Callable[[str], None]) -> Iterator[int | None]:
    """Hold a lock, and say in the folder that it guards who does."""
    refuse_link(folder)
    make_folder(folder)
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            waiting(_holder(folder))
    try:
        make_folder(folder)
        write_json(folder / HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield lock._context.lock_file_fd
    finally:
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} (since {since})"
    except (OSError, ValueError, KeyError):
        return "another process"


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a user's folder; None where alignpipe did not make it.

    Raises:
        CheckpointError: the folder was made by alignpipe and is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is not None and (found := damage(folder, manifest, read_files=False)) is not None:
        raise CheckpointError(f"{found}; run its stage again or choose another folder")
    return manifest
