"""Several runs on one store: each stage is made once, whoever dies; a run that is under way lets no second one in."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from alignpipe.errors import MachineError
from alignpipe.pipeline.store import Store
from tests.faults.chain import SHORT, STAGES, WORDS, begin, kept
from tests.faults.commands import PATIENCE
from tests.faults.table import Faults

# With its start, on a machine that is busy with other tests.
SECONDS_TO_REFUSE = 5.0
SECONDS_TO_BE_FREE = 1.0


@pytest.mark.parametrize("runs", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_runs_at_once_make_each_stage_once_though_the_holder_is_killed(
    tmp_path: Path, undisturbed: Path, runs: int, faults: Faults
) -> None:
    commands = [begin(tmp_path, *WORDS, f"run.name=run-{number}") for number in range(runs)]
    by_pid = {command.pid: command for command in commands}
    assert commands[0].until(lambda: _holder(tmp_path, "ppo") in by_pid)
    killed = by_pid[_holder(tmp_path, "ppo")].kill()
    began = time.monotonic()
    commands.remove(killed)
    assert commands[0].until(lambda: _holder(tmp_path, "ppo") not in (0, killed.pid), patience=10)
    free = time.monotonic() - began
    assert [command.wait() for command in commands] == [0] * len(commands)
    told = commands[0].told
    once = sum(told.count(f"{name:<8} done in") == 1 for name in STAGES)
    assert free < SECONDS_TO_BE_FREE
    assert kept(tmp_path) == kept(undisturbed)
    assert not any((tmp_path / "outputs" / "work").glob("*/"))
    faults.tell(f"{runs} runs on one store, the holder killed: stages made once", once, len(STAGES))


def test_run_under_way_lets_no_second_one_in_and_says_who_holds_it(
    tmp_path: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    refused, times, together = 0, count(1, 10), count(2, 8)
    for number in range(times):
        folder, go = tmp_path / str(number), tmp_path / str(number) / "go"
        commands = [
            begin(folder, *SHORT, "run.name=mine", before=pause_in_run, given=(go,)) for _ in range(together)
        ]
        limit = time.monotonic() + PATIENCE
        while sum(command.is_running for command in commands) > 1:
            assert time.monotonic() < limit, commands[0].told
            time.sleep(0.01)
        go.touch()
        codes = sorted(command.wait() for command in commands)
        refused += codes == [0, *[MachineError.exit_code] * (together - 1)]
    faults.tell("runs of one name at once: one goes on, the others exit 5", refused, times)


def pause_in_run(go: Path) -> None:
    """Let this process wait for a file while it holds the run."""
    set_latest = Store.set_latest

    def paused(store: Store, run: str) -> None:
        while not go.exists():
            time.sleep(0.01)
        set_latest(store, run)

    Store.set_latest = paused  # type: ignore[method-assign]


def test_run_that_waits_for_a_stage_says_who_makes_it(tmp_path: Path) -> None:
    go = tmp_path / "go"
    maker = begin(tmp_path, *SHORT, "run.name=first", before=pause_in_stage, given=(go,))
    assert maker.until(lambda: _holder(tmp_path, "sft") == maker.pid)
    waiter = begin(tmp_path, *SHORT, "run.name=second")
    assert waiter.until(lambda: "makes it; waiting" in waiter.told)
    assert f"sft: process {maker.pid} on " in waiter.told
    go.touch()
    assert [maker.wait(), waiter.wait()] == [0, 0]
    assert "sft      reused" in waiter.told


def pause_in_stage(go: Path) -> None:
    """Let this process wait for a file while it holds a stage."""
    lock = Store.lock

    @contextmanager
    def paused(*arguments: Any) -> Iterator[int | None]:
        with lock(*arguments) as descriptor:
            while not go.exists():
                time.sleep(0.01)
            yield descriptor

    Store.lock = paused  # type: ignore[method-assign]


def test_held_run_is_refused_within_seconds_untouched_and_free_after_the_kill(
    tmp_path: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    words = (*WORDS, "run.name=mine")
    chance, free, times = random.Random(0), 0, count(1, 10)
    for _ in range(times):
        holder = begin(tmp_path, *words)
        assert holder.until(lambda holder=holder: _run_holder(tmp_path).get("pid") == holder.pid)
        time.sleep(chance.uniform(0, 0.3))
        # Still, so that nothing in the tree moves but by the second command.
        holder.send(signal.SIGSTOP)
        before = _tree(tmp_path / "outputs")
        began = time.monotonic()
        second = begin(tmp_path, *words)
        assert second.wait() == MachineError.exit_code
        assert time.monotonic() - began < SECONDS_TO_REFUSE
        known = _run_holder(tmp_path)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(known["since"]))
        told = second.told.splitlines()[-1]
        assert f"process {holder.pid} on {known['host']} (since {since}) has it under way" in told
        assert len(told) < 300
        assert _tree(tmp_path / "outputs") == before
        holder.kill()
        with FileLock(tmp_path / "outputs" / "runs" / "mine" / "lock").acquire(timeout=SECONDS_TO_BE_FREE):
            free += 1
    faults.tell("the holder of a run killed: free within a second", free, times)


@pytest.mark.slow
@pytest.mark.parametrize("also_launcher", [False, True], ids=["command", "command and launcher"])
def test_lock_is_free_only_once_no_process_of_the_killed_one_is_left(
    tmp_path: Path, also_launcher: bool, faults: Faults
) -> None:
    words = (
        *SHORT,
        "model.training.sft.max_steps=400",
        "model.training.sft.epochs=100",
        "launch=cpu",
        "launch.num_processes=2",
        "launch.device=cpu",
    )
    command = begin(tmp_path, *words)
    assert command.until(lambda: any(tmp_path.glob("outputs/work/sft-*/states/step-*")))
    (launcher,) = psutil.Process(command.pid).children()
    workers = launcher.children(recursive=True)
    assert len(workers) == 2
    (lock,) = tmp_path.glob("outputs/work/sft-*.lock")
    if also_launcher:
        launcher.suspend()
    command.kill()
    if also_launcher:
        launcher.kill()
    began = time.monotonic()
    with FileLock(lock).acquire(timeout=10, poll_interval=0.001):
        left = [worker for worker in workers if _is_alive(worker)]
        seconds = time.monotonic() - began
    assert seconds < SECONDS_TO_BE_FREE
    faults.tell("a run of two processes killed: none left as the lock is free", 2 - len(left), 2)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _holder(folder: Path, stage: str) -> int:
    """The process that makes a stage; 0 for none."""
    for path in folder.glob(f"outputs/work/{stage}-*/holder.json"):
        with suppress(FileNotFoundError):
            return int(json.loads(path.read_text())["pid"])
    return 0


def _run_holder(folder: Path) -> dict[str, Any]:
    path = folder / "outputs" / "runs" / "mine" / "holder.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
