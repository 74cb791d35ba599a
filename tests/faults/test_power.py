"""Power loss: what was not fsynced is gone, at whatever moment; what is left is whole, or not trusted."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpipe.artifact import MANIFEST, damage, read_manifest
from alignpipe.pipeline.store import Store, read_run
from alignpipe.training.journal import Journal
from alignpipe.training.metrics import METRICS
from tests.faults.chain import SHORT, begin, finish, kept
from tests.faults.disk import read_record, record
from tests.faults.table import Faults

Operation = Mapping[str, Any]


@dataclass
class Link:
    target: str


@dataclass
class File:
    """What a power loss leaves of a file: what it held when it was last fsynced."""

    content: str | None = None


@dataclass
class Folder:
    """Names as a process sees them, and as a power loss leaves them: those of the last fsync."""

    names: dict[str, "Folder | File | Link"] = field(default_factory=dict)
    synced: dict[str, "Folder | File | Link"] = field(default_factory=dict)

    def of(self, path: Path) -> "Folder":
        folder = self
        for part in path.parent.parts:
            folder = folder.names.setdefault(part, Folder())  # type: ignore[assignment]
        return folder


# How names outlive a power loss: all of them, those that were fsynced, or of these the ones not removed since.
LOSSES: dict[str, Callable[[Folder], Mapping[str, Any]]] = {
    "content alone": lambda folder: folder.names,
    "names too": lambda folder: folder.synced,
    "new names alone": lambda folder: {
        name: node for name, node in folder.synced.items() if folder.names.get(name) is node
    },
}


class Disk:
    """A disk that operations are done on.

    Args:
        root: the folder that they were recorded in.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = Folder()

    def do(self, operation: Operation) -> None:
        """Follow one operation."""
        folder, name = self._place(operation["path"])
        match operation["what"]:
            case "open":
                file = folder.names.setdefault(name, File())
                if operation["empty"]:
                    file.content = None
            case "fsync" if "content" in operation:
                folder.names.setdefault(name, File()).content = operation["content"]
            case "fsync":
                synced = folder.names[name] if name else folder
                synced.synced = dict(synced.names)
            case "mkdir" if name:
                folder.names[name] = Folder()
            case "symlink":
                folder.names[name] = Link(operation["target"])
            case "unlink" | "rmdir":
                folder.names.pop(name, None)
            case "rename":
                self._rename(operation)

    def _rename(self, operation: Operation) -> None:
        folder, name = self._place(operation["path"])
        node = folder.names.pop(name)
        for held in operation["holds"]:
            # Written by foreign code, and never fsynced.
            node.of(Path(held)).names.setdefault(Path(held).name, File())
        folder, name = self._place(operation["to"])
        folder.names[name] = node

    def _place(self, path: str) -> tuple[Any, str]:
        inside = Path(path).relative_to(self._root)
        return self._top.of(inside), inside.name

    def leave(self, folder: Path, loss: str, contents: Path) -> None:
        """Write what a power loss leaves into a folder that is not there yet."""
        _write(self._top, folder, LOSSES[loss], contents)


def _write(node: Folder, folder: Path, names: Callable[[Folder], Mapping[str, Any]], contents: Path) -> None:
    folder.mkdir(parents=True)
    for name, held in names(node).items():
        match held:
            case Folder():
                _write(held, folder / name, names, contents)
            case Link():
                (folder / name).symlink_to(held.target)
            case File(None):
                (folder / name).touch()
            case File(content):
                shutil.copyfile(contents / content, folder / name)


def _progress(outputs: Path) -> dict[str, float]:
    """How far each stage has come, by its newest state that is trusted and the items in its journals.

    Raises:
        AssertionError: what is trusted is not whole.
    """
    store = Store(outputs)
    come: dict[str, float] = {}
    for stage in (outputs / "stages").glob("*/"):
        kind, key = stage.name.split("-")
        if (manifest := store.find(kind, key)) is not None:
            assert damage(stage, manifest, read_files=True) is None
            come[stage.name] = math.inf
    for work in (outputs / "work").glob("*/"):
        if work.name in come:
            continue
        steps = [step for step in work.glob("states/step-*") if _is_valid(step)]
        newest = max((int(step.name.removeprefix("step-")) for step in steps), default=0)
        assert set(range(1, newest + 1)) <= _logged(work / METRICS), "figures before the state are gone"
        come[work.name] = newest + sum(len(Journal(path).read()) for path in work.glob("*.journal.jsonl"))
    for run in (outputs / "runs").glob("*/"):
        read_run(run)
    if (latest := outputs / "latest").exists():
        assert (outputs / "runs" / latest.read_text().strip()).is_dir()
    return come


def _is_valid(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and damage(folder, manifest, read_files=True) is None


def _logged(path: Path) -> set[int]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line)["step"] for line in lines}


def test_power_lost_at_any_moment_leaves_nothing_wrong_that_is_trusted(
    tmp_path: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    whole, log = tmp_path / "whole", tmp_path / "record" / "log"
    assert begin(whole, *SHORT, before=record, given=(log, whole / "outputs")).wait() == 0
    operations, expected = read_record(log), kept(whole)
    again = {len(operations) * place // count(1, 20) for place in range(count(1, 20))}
    looked = range(0, len(operations), count(9, 1))
    left, sound, finished_again = tmp_path / "left", 0, 0
    for loss in LOSSES:
        disk, come = Disk(whole / "outputs"), dict[str, float]()
        for number, operation in enumerate(operations):
            disk.do(operation)
            if number not in looked and number not in again:
                continue
            disk.leave(left / "outputs", loss, log.parent)
            now = _progress(left / "outputs")
            sound += number in looked and all(now.get(stage, 0) >= before for stage, before in come.items())
            come |= now
            if number in again:
                finish(left, *SHORT)
                finished_again += kept(left) == expected
            shutil.rmtree(left)
        disk.leave(left / "outputs", loss, log.parent)
        assert list(_progress(left / "outputs").values()) == [math.inf, math.inf], "what was finished is gone"
        shutil.rmtree(left)
    faults.tell("power lost after each operation on the disk", sound, len(LOSSES) * len(looked))
    faults.tell("power lost, the same command", finished_again, len(LOSSES) * len(again))


def test_what_is_handed_over_is_on_the_disk_first(tmp_path: Path) -> None:
    whole, log = tmp_path / "whole", tmp_path / "record" / "log"
    assert begin(whole, *SHORT, before=record, given=(log, whole / "outputs")).wait() == 0
    operations = read_record(log)
    handed = [
        number
        for number, operation in enumerate(operations)
        if operation["what"] == "rename" and MANIFEST in operation.get("holds", ())
    ]
    assert len(handed) >= 5
    for number in handed:
        folder = Path(operations[number]["path"])
        synced = [one["path"] for one in operations[:number] if one["what"] == "fsync"]
        last = {path: place for place, path in enumerate(synced)}
        manifest = max(
            place for path, place in last.items() if Path(path).parent == folder and MANIFEST in path
        )
        files = [str(folder / name) for name in operations[number]["holds"] if name != MANIFEST]
        assert all(last[path] < manifest < last[str(folder)] for path in files)
        assert operations[number + 1] == {"what": "fsync", "path": str(Path(operations[number]["to"]).parent)}
