"""A disk that is full, read-only or out of files ends a run in one line; its states stay, and with room it goes on."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alignpipe import worker
from alignpipe.artifact import verify
from alignpipe.training import context
from tests.faults.commands import Command, finish, start
from tests.faults.stopping import SFT, before_save, content, die, states, weights
from tests.faults.table import Faults

SIZE = 64 * 2**20
BALLAST = "ballast"
POINTS = 8
TAKEN = 500


def _mount(folder: Path, options: str) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes projects whose output folder is a small disk of its own."""
    made: list[Path] = []

    def make(name: str, options: str = f"size={SIZE}") -> Path:
        outputs = tmp_path / name / "outputs"
        outputs.mkdir(parents=True)
        try:
            _mount(outputs, options)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no disk can be mounted here")
        made.append(outputs)
        return outputs.parent

    yield make
    for outputs in made:
        subprocess.run(["umount", "--lazy", str(outputs)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """Weights of the stage, never disturbed, and the bytes that one of its states takes."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(folder, "run", *SFT).process.exitcode == 0
    killed = tmp_path_factory.mktemp("killed")
    start(killed, "run", *SFT, before=before_save, given=(2, die)).process.join(60)
    (state,) = states(killed).glob("step-*")
    return weights(folder), sum(path.stat().st_blocks * 512 for path in state.iterdir())


def _leave(outputs: Path, room: int) -> None:
    """Fill a disk but for some bytes."""
    disk = os.statvfs(outputs)
    (outputs / BALLAST).write_bytes(bytes(disk.f_bavail * disk.f_frsize - room))


def _leave_no_file(outputs: Path) -> None:
    """Take all files that a disk can have."""
    (outputs / BALLAST).mkdir()
    for number in range(os.statvfs(outputs).f_favail):
        (outputs / BALLAST / str(number)).touch()


def _before(module: Any, name: str, do: Callable[..., None], *arguments: Any) -> None:
    """Do something in a command before it calls a function."""
    function = getattr(module, name)

    def hooked(*given: Any, **named: Any) -> Any:
        do(*arguments)
        return function(*given, **named)

    setattr(module, name, hooked)


def _before_model(outputs: Path) -> None:
    _before(context, "save_model", _leave, outputs, 0)


def _before_seal(outputs: Path) -> None:
    _before(worker, "seal", _leave, outputs, 0)


def _is_refused(command: Command, needs: bool = True) -> bool:
    """Whether it ended as it must, with every state whole."""
    line = command.told.splitlines()[-1]
    told = (
        line.startswith("error: ") and "has " in line and " free" in line and ("needs " in line or not needs)
    )
    for state in command.folder.glob("outputs/work/*/states/step-*"):
        verify(state)
    return command.wait() == 5 and told and len(line) < 400 and "outputs/" in line


def _make_room(folder: Path) -> None:
    subprocess.run(["rm", "-r", str(folder / "outputs" / BALLAST)], check=True)


def _goes_on(folder: Path, whole: str) -> bool:
    return finish(folder, "run", *SFT).process.exitcode == 0 and weights(folder) == whole


def test_full_disk_at_each_point_between_no_state_and_two(
    disk: Callable[..., Path], whole: tuple[str, int], count: Callable[[int, int], int], faults: Faults
) -> None:
    expected, state = whole
    points = range(POINTS) if count(1, POINTS) == POINTS else [5]
    refused = gone_on = 0
    for point in points:
        folder, room = disk(str(point)), 2 * state * point // POINTS
        full = start(folder, "run", *SFT, before=before_save, given=(1, _leave, folder / "outputs", room))
        full.process.join(60)
        refused += _is_refused(full) and len(list(states(folder).glob("step-*"))) == (room >= state)
        _make_room(folder)
        gone_on += _goes_on(folder, expected)
    faults.tell("disk full at 8 points: exit 5 with need and have, state valid", refused, len(points))
    faults.tell("disk full at 8 points: with room the same weights", gone_on, len(points))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [_before_model, _before_seal], ids=["weights", "manifest"])
def test_full_disk_while_the_result_is_written(
    disk: Callable[..., Path], whole: tuple[str, int], faults: Faults, moment: Callable[..., None]
) -> None:
    folder = disk("full")
    full = start(folder, "run", *SFT, before=moment, given=(folder / "outputs",))
    full.process.join(60)
    refused = _is_refused(full) and not list((folder / "outputs").glob("stages/*"))
    _make_room(folder)
    faults.tell("disk full while the result is written", refused and _goes_on(folder, whole[0]), 1)


@pytest.mark.slow
def test_no_file_more(disk: Callable[..., Path], whole: tuple[str, int], faults: Faults) -> None:
    folder = disk("files", f"size={SIZE},nr_inodes={TAKEN}")
    full = start(folder, "run", *SFT, before=before_save, given=(2, _leave_no_file, folder / "outputs"))
    full.process.join(60)
    refused = _is_refused(full, needs=False) and "for 0 more files" in full.told
    _make_room(folder)
    faults.tell("no file more", refused and _goes_on(folder, whole[0]), 1)


def test_read_only_folder(disk: Callable[..., Path], whole: tuple[str, int], faults: Faults) -> None:
    folder = disk("read-only")
    start(folder, "run", *SFT, before=before_save, given=(3, die)).process.join(60)
    before = content(folder / "outputs")
    remount = partial(subprocess.run, check=True)
    remount(["mount", "-o", "remount,ro", str(folder / "outputs")])
    refused = _is_refused(finish(folder, "run", *SFT), needs=False)
    refused = refused and "Read-only file system" in finish(folder, "run", *SFT, "stage.seed=1").told
    refused = refused and content(folder / "outputs") == before
    remount(["mount", "-o", "remount,rw", str(folder / "outputs")])
    faults.tell("read-only folder", refused and _goes_on(folder, whole[0]), 1)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_file_that_may_not_grow(tmp_path: Path, whole: tuple[str, int], faults: Faults) -> None:
    command = start(tmp_path, "run", *SFT, before=before_save, given=(2, _limit, whole[1] // 2))
    command.process.join(60)
    refused = _is_refused(command) and len(list(states(tmp_path).glob("step-*"))) == 1
    faults.tell("file that may not grow", refused and _goes_on(tmp_path, whole[0]), 1)


def test_disk_that_is_too_small_is_told_before_the_first_step(
    disk: Callable[..., Path], whole: tuple[str, int], faults: Faults
) -> None:
    folder = disk("small", f"size={whole[1] // 4096 * 4096}")
    command = finish(folder, "run", *SFT)
    told = "outputs: needs about " in command.told and " free; choose another output_dir" in command.told
    assert not any((folder / "outputs").glob("stages/*")) and not any((folder / "outputs").glob("runs/*"))
    faults.tell("disk too small at the start", command.process.exitcode == 5 and told, 1)
