"""What no run points to any more, and its removal; told without torch.

runs, what their stages were made from -> what is kept; the rest of the store -> sizes and reasons
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.artifact import read_manifest, remove_tree
from alignpipe.disk import format_bytes
from alignpipe.errors import CheckpointError, MachineError
from alignpipe.pipeline.store import Store, run_stages


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing points to.

    Attributes:
        path: of the folder.
        bytes: in its files.
        why: it is not needed.
    """

    path: Path
    bytes: int
    why: str


def leftovers(output_dir: Path) -> list[Leftover]:
    """Folders of the store that no run needs.

    A run needs its stages, finished or under way, and whatever those were made from, all the way back. Rows can be
    made again from the data, so none of them is needed; they are left alone while any stage is under way.

    Raises:
        MachineError: there is no such folder.
    """
    if not output_dir.is_dir():
        raise MachineError(
            f"{output_dir.resolve()}: no such folder; name the one of the runs with --output-dir"
        )
    store = Store(output_dir)
    needed = _needed(store)
    found = []
    for path in _folders(store.root / "stages"):
        if ".replaced-" in path.name:
            found.append(_leftover(path, "moved aside"))
        elif path.name not in needed:
            found.append(_leftover(path, "no run has it"))
    for path in _folders(store.root / "work"):
        if path.name not in needed and not store.is_locked(*path.name.rpartition("-")[::2]):
            found.append(_leftover(path, "under way for no run"))
    if not store.is_anything_locked():
        found += [_leftover(path, "can be made again") for path in _folders(store.rows)]
    return found


def clean(found: list[Leftover]) -> None:
    """Delete folders.

    Raises:
        MachineError: one of them stays.
    """
    for leftover in found:
        remove_tree(leftover.path)
        if leftover.path.exists():
            raise MachineError(f"{leftover.path}: cannot be removed; check its permissions")


def print_leftovers(found: list[Leftover], console: Console, *, removed: bool) -> None:
    """Show them as a table, and what they come to."""
    if not found:
        console.print("nothing to clean: every stage belongs to a run")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("folder", "size", "why"):
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for leftover in found:
        cells = str(leftover.path), format_bytes(leftover.bytes), leftover.why
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    total = format_bytes(sum(leftover.bytes for leftover in found))
    told = f"removed {total}" if removed else f"{total} in all; nothing was removed, --yes removes it"
    console.print(Text(told), soft_wrap=True)


def as_json(found: list[Leftover]) -> list[dict[str, Any]]:
    """The same for a program."""
    return [{"path": str(one.path), "bytes": one.bytes, "why": one.why} for one in found]


def _needed(store: Store) -> set[str]:
    """Names of the stage folders that runs point to, directly or through what their stages were made from."""
    by_key = {path.name.rpartition("-")[2]: path for path in _folders(store.root / "stages")}
    named = {(stage["kind"], stage["key"]) for run in store.runs() for stage in run_stages(run)}
    found, keys = {f"{kind}-{key}" for kind, key in named}, [key for _, key in named]
    while keys:
        path = by_key.pop(keys.pop(), None)
        if path is not None:
            found.add(path.name)
            keys += _parents(path)
    return found


def _parents(folder: Path) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return []
    return [] if manifest is None else [parent.key for parent in manifest.parents.values()]


def _leftover(path: Path, why: str) -> Leftover:
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return Leftover(path, sum(file.stat().st_size for file in files), why)


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir() and not path.is_symlink())
