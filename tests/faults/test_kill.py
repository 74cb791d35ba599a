"""`kill -9` at any moment: the same command goes on, ends with the same files, and makes no finished stage again."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from alignpipe.pipeline.status import run_status
from alignpipe.pipeline.store import run_stages
from tests.faults.chain import STAGES, WORDS, begin, finish, kept, made
from tests.faults.commands import Command
from tests.faults.table import Faults


def test_killed_at_random_moments_it_ends_with_the_same_files(
    tmp_path: Path, undisturbed: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    expected, seconds = kept(undisturbed), _seconds(undisturbed)
    assert {name.split("-")[0] for name in expected} == set(STAGES)
    kills, chance, total = Counter[str](), random.Random(0), count(4, 200)
    unharmed = 0
    while kills.total() < total:
        folder = tmp_path / f"after-{kills.total()}"
        hit = _kill_all_along(folder, seconds, STAGES[:: count(2, 1)], count(1, 4), chance)
        finish(folder, *WORDS)
        assert not any((folder / "outputs" / "work").glob("*/"))
        unharmed += hit.total() * (kept(folder) == expected)
        kills += hit
    assert min(kills[stage] for stage in STAGES) >= count(0, 10), kills
    faults.tell("kill -9 at random moments of all stages", unharmed, kills.total())


def _kill_all_along(
    folder: Path, seconds: dict[str, float], stages: Sequence[str], times: int, chance: random.Random
) -> Counter[str]:
    """Kill a run several times in each of its stages; how often it was in which.

    Args:
        folder: of the run.
        seconds: that each stage takes at most; less from the time on that a kill came after its end.
        stages: to be killed.
        times: each of them.
        chance: when.
    """
    hit: Counter[str] = Counter()
    for stage in stages:
        for _ in range(times):
            before = made(folder)
            command = begin(folder, *WORDS)
            if command.until(partial(_has_come_to, command, stage)):
                time.sleep(chance.uniform(0, seconds[stage]))
            if command.kill().process.exitcode == -signal.SIGKILL:
                hit[stopped := _stopped(folder)] += 1
                if stopped != stage:
                    seconds[stage] *= 0.7
            assert before.items() <= made(folder).items(), "a finished stage was made again"
    return hit


def _has_come_to(command: Command, stage: str) -> bool:
    """Whether this command, not one before it, has begun or reused a stage."""
    for run in (command.folder / "outputs" / "runs").glob("*/holder.json"):
        states = {one["name"]: one["state"] for one in run_stages(run.parent)}
        return json.loads(run.read_text())["pid"] == command.pid and states.get(stage, "waiting") != "waiting"
    return False


def _stopped(folder: Path) -> str:
    """The stage that a killed run was at, as `alignpipe status` tells it."""
    (run,) = (folder / "outputs" / "runs").iterdir()
    states = {one["name"]: one["state"] for one in run_status(folder / "outputs", run.name)["stages"]}
    assert "running" not in states.values()
    return next((name for name, state in states.items() if state == "stopped"), "between")


def _seconds(folder: Path) -> dict[str, float]:
    """How long each stage of a run took that was let be."""
    (run,) = (folder / "outputs" / "runs").iterdir()
    return {stage["name"]: stage["seconds"] for stage in run_stages(run)}
