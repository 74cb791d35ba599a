"""What a process does to the disk, seen one operation at a time: recorded, or cut short by death.

An operation is opening a file to write, a write, fsync, rename, link, removal, or making a folder. A part of a file
that is written by foreign code, as tensors are, counts as one write.
"""

import builtins
import errno
import io
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch

BROKE = "broke"
# What is done, to which path, how it is done, and how it is begun without being finished.
See = Callable[[str, str, Callable[[], Any], Callable[[], Any]], Any]


def die_at(number: int, root: Path) -> None:
    """Let this process be killed at its operation of that number, counted from 1; a write is half done by then."""
    _break_at(number, root, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def fail_at(number: int, root: Path) -> None:
    """Let the disk break at that operation likewise, and work again after it; what it was stands beside the folder."""

    def fail(what: str, path: str) -> None:
        (root.parent / BROKE).write_text(what)
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    _break_at(number, root, fail)


def _break_at(number: int, root: Path, how: Callable[[str, str], None]) -> None:
    numbers = itertools.count(1)

    def see(what: str, path: str, act: Callable[[], Any], begin: Callable[[], Any]) -> Any:
        if next(numbers) == number:
            begin()
            how(what, path)
        return act()

    _watch(see, root)


def stutter(root: Path) -> None:
    """Let every write take in half of what it is given, and every hundredth operation take two seconds."""
    seen = 0

    def see(what: str, _path: str, act: Callable[[], Any], begin: Callable[[], Any]) -> Any:
        nonlocal seen
        seen += 1
        if seen % 100 == 0:
            time.sleep(2)
        half = begin() if what == "write" else None
        return act() if half is None or half == 0 else half

    _watch(see, root)


def record(log: Path, root: Path) -> None:
    """Write down every operation of this process, and what each file held when it was fsynced, beside the log."""
    log.parent.mkdir(parents=True)
    # Opened before anything is watched.
    lines = log.open("w", encoding="utf-8")

    def see(what: str, path: str, act: Callable[[], Any], _begin: Callable[[], Any]) -> Any:
        line: dict[str, Any] = {"what": what, "path": path}
        if what == "rename":
            source, line["to"] = path.split("\0")
            line["path"] = source
            line["holds"] = _files_below(Path(source))
        found = act()
        if what == "open":
            line["empty"] = not Path(path).exists() or Path(path).stat().st_size == 0
        if what == "fsync" and Path(path).is_file():
            line["content"] = _keep(Path(path), log.parent)
        if what == "symlink":
            line["target"] = str(Path(path).readlink())
        lines.write(json.dumps(line) + "\n")
        lines.flush()
        return found

    _watch(see, root)


def read_record(log: Path) -> list[dict[str, Any]]:
    """The operations of a process, in order."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _files_below(folder: Path) -> list[str]:
    if folder.is_symlink():
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _keep(path: Path, folder: Path) -> str:
    content = path.read_bytes()
    name = sha256(content).hexdigest()
    if not (folder / name).exists():
        with _open(folder / name, "wb") as file:
            file.write(content)
    return name


def _watch(see: See, root: Path) -> None:
    """Put `see` between this process and the disk, for a folder and everything below it."""
    top = str(root.resolve())

    def watched(what: str, path: str, act: Callable[[], Any], begin: Callable[[], Any] = lambda: None) -> Any:
        return see(what, path, act, begin) if Path(path).is_relative_to(top) else act()

    for name in ("unlink", "remove", "mkdir", "rmdir"):
        setattr(os, name, _on_path(watched, name.replace("remove", "unlink"), getattr(os, name)))
    for name in ("rename", "replace"):
        setattr(os, name, _on_two_paths(watched, getattr(os, name)))
    _watch_links(watched)
    _watch_descriptors(watched)
    _watch_files(watched)


def _on_path(see: Callable[..., Any], what: str, act: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> Any:
        return see(what, _absolute(path, dir_fd), lambda: act(path, *args, dir_fd=dir_fd, **more))

    return call


def _on_two_paths(see: Callable[..., Any], act: Callable[..., Any]) -> Callable[..., Any]:
    def call(source: Any, target: Any, **more: Any) -> Any:
        return see("rename", f"{_absolute(source)}\0{_absolute(target)}", lambda: act(source, target, **more))

    return call


def _watch_links(see: Callable[..., Any]) -> None:
    symlink = os.symlink

    def call(target: Any, path: Any, *args: Any, **more: Any) -> Any:
        return see("symlink", _absolute(path), lambda: symlink(target, path, *args, **more))

    os.symlink = call


def _watch_descriptors(see: Callable[..., Any]) -> None:
    fsync, truncate, os_open = os.fsync, os.truncate, os.open

    def call_fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        see("fsync", str(Path(f"/proc/self/fd/{number}").readlink()), lambda: fsync(number))

    def call_truncate(path: Any, length: int) -> None:
        see("truncate", _absolute(path), lambda: truncate(path, length))

    def call_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        def act() -> int:
            return os_open(path, flags, *args, **more)

        # One that is there is only opened.
        creates = flags & os.O_CREAT and not Path(os.fspath(path)).exists()
        found: int = see("open", _absolute(path), act) if creates else act()
        return found

    os.fsync, os.truncate, os.open = call_fsync, call_truncate, call_open  # type: ignore[assignment]


def _watch_files(see: Callable[..., Any]) -> None:
    class Watched(io.FileIO):
        def write(self, data: Any) -> int:
            whole, write = bytes(data), super().write
            number: int = see(
                "write", _absolute(self.name), lambda: write(whole), lambda: write(whole[: len(whole) // 2])
            )
            return number

    def call_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **more: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax") or "+" in mode or "opener" in more:
            return _open(file, mode, buffering, *args, **more)
        raw = see("open", _absolute(file), lambda: Watched(file, mode.replace("b", "").replace("t", "")))
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **more)

    serialize = safetensors.torch.serialize_file

    def call_serialize(tensors: Any, path: Any, *args: Any, **more: Any) -> None:
        def act() -> None:
            serialize(tensors, path, *args, **more)

        def begin() -> None:
            act()
            content = Path(path).read_bytes()
            with _open(path, "wb") as file:
                file.write(content[: len(content) // 2])

        see("open", _absolute(path), lambda: None)
        see("write", _absolute(path), act, begin)

    io.open = builtins.open = call_open
    safetensors.torch.serialize_file = call_serialize


def _absolute(path: Any, folder: int | None = None) -> str:
    start = Path.cwd() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
    return os.path.normpath(start / os.fsdecode(path))


_open = io.open
