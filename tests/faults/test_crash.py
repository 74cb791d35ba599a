"""A process that dies at any of its operations on the disk: the same command goes on, with nothing to mend by hand."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.chain import SHORT, begin, finish, kept
from tests.faults.disk import die_at, read_record, record
from tests.faults.table import Faults


def test_dead_at_any_operation_it_ends_with_the_same_files(
    tmp_path: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    whole, log = tmp_path / "whole", tmp_path / "record" / "log"
    assert begin(whole, *SHORT, before=record, given=(log, whole / "outputs")).wait() == 0
    expected, operations = kept(whole), read_record(log)
    # Saves, hand-overs and records of the run are among them.
    assert {"open", "write", "fsync", "rename", "unlink", "mkdir", "symlink", "rmdir"} <= {
        operation["what"] for operation in operations
    }
    assert len(operations) > 200
    tried = count(4, len(operations))
    recovered = 0
    for number in (1 + place * len(operations) // tried for place in range(tried)):
        folder = tmp_path / str(number)
        dead = begin(folder, *SHORT, before=die_at, given=(number, folder / "outputs"))
        assert dead.wait() == -signal.SIGKILL, dead.told
        finish(folder, *SHORT)
        tidy = not any((folder / "outputs" / "work").glob("*/"))
        recovered += tidy and kept(folder) == expected
        shutil.rmtree(folder)
    faults.tell("crash at each operation on the disk", recovered, tried)
