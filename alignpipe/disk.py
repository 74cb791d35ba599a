"""What a disk refuses, in one line: where, why, what it needs, what there is.

OSError, path, bytes -> MachineError
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignpipe.errors import MachineError

# A disk that is full, read-only, broken, or somebody else's; any other error is no refusal.
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}


def refusal(path: Path, why: object, needed: int | None = None) -> MachineError:
    """The error to raise for a write that was refused.

    Args:
        path: of what cannot be written.
        why: in the words of the system.
        needed: bytes of it, where they are known.
    """
    reason = why.strerror if isinstance(why, OSError) else why
    needs = "" if needed is None else f"needs {format_bytes(needed)}, "
    return MachineError(
        f"{path}: cannot be written ({reason}); {needs}has {_room(path)}; make room, mend its permissions or "
        f"choose another output_dir"
    )


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses inside the block into one line.

    Args:
        folder: that the block writes to; named where the system names no file.

    Raises:
        MachineError: in place of such an OSError; others are let through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise refusal(Path(error.filename or folder), error) from error


def format_bytes(number: float) -> str:
    """Such as 12 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _room(path: Path) -> str:
    disk = os.statvfs(existing(path))
    # Some file systems have no limit on files, and say 0 of 0.
    files = f" for {disk.f_favail} more files" if disk.f_files else ""
    return f"{format_bytes(disk.f_bavail * disk.f_frsize)} free{files}"
