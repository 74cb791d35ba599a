"""One of two processes is killed, fails or hangs: the other ends soon, the command says which, none is left running."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alignpipe.artifact import verify
from alignpipe.launcher import GRACE
from tests.faults.broken_process.breaking import BROKEN, PHASES, WAYS
from tests.faults.commands import start
from tests.faults.stopping import SFT
from tests.faults.table import Faults

ROOT = Path(__file__).parents[2]
TIMEOUT = 10.0
TWO = (*SFT, "launch=cpu", "launch.num_processes=2", f"launch.timeout={TIMEOUT:g}", "stage.num_samples=4")
CASES = [(phase, way) for phase in PHASES for way in WAYS]
# Seconds that the launcher takes to end, once all its processes have.
ENDING = 3.0
# Seconds from the break to the end of the command, its exit code, and what it says.
EXPECTED = {
    "killed": (10.0, 7, "process 1 was killed by signal 9"),
    "raising": (10.0, 1, "failed on rank1: RuntimeError: broken on purpose"),
    "stuck": (TIMEOUT + 2 + GRACE + ENDING, 7, "error: sft: rank0 lost rank1 ("),
}


def _left_running(folder: Path) -> list[psutil.Process]:
    """Processes of the stage, or started by it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BROKEN_IN") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _is_survived(folder: Path, phase: str, way: str) -> bool:
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/faults/broken_process"), str(ROOT)]),
        "BROKEN_RANK": "1",
        "BROKEN_PHASE": phase,
        "BROKEN_HOW": way,
        "BROKEN_IN": str(folder),
    }
    command = start(folder, "run", *TWO, environment=environment)
    command.process.join(120)
    seconds = time.time() - float((folder / BROKEN).read_text())
    longest, code, told = EXPECTED[way]
    assert told in command.told, f"{phase} {way}: {command.told}"
    assert seconds < longest, f"{phase} {way}: {seconds:.1f} s"
    if way == "stuck":
        (error,) = folder.glob("outputs/work/*/errors/rank0.json")
        waited = json.loads(error.read_text())["time"] - float((folder / BROKEN).read_text())
        assert waited < TIMEOUT + 2, f"{phase}: {waited:.1f} s"
    for state in folder.glob("outputs/work/*/states/step-*"):
        verify(state)
    assert not any(folder.glob("outputs/stages/*"))
    return command.wait() == code and not _left_running(folder)


@pytest.mark.slow
def test_one_of_two_processes_is_lost(
    tmp_path: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    tried = CASES[3:][: count(1, len(CASES))] + CASES[: count(0, 3)]
    survived = sum(_is_survived(tmp_path / f"{phase}-{way}", phase, way) for phase, way in tried)
    faults.tell("one of two processes killed, raising, stuck", survived, len(tried))
