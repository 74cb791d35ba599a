"""Ctrl-C, SIGTERM and a closed terminal in every phase: saved within seconds; a second one ends at once, harmless."""

import os
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from alignpipe.artifact import verify
from alignpipe.errors import Stopped
from tests.faults.chain import WORDS, begin, finish, kept
from tests.faults.commands import Command
from tests.faults.table import Faults

# Phase -> a function that is called in it, and which of its calls.
PHASES = {
    "tokenise": ("alignpipe.stages.sft:encode_demonstrations", 1),
    "step": ("alignpipe.training.loop:optimizer_step", 2),
    "between stages": ("alignpipe.pipeline.store:Store.finish", 1),
    "save": ("alignpipe.training.context:save_state", 1),
    "generate": ("alignpipe.stages.ppo:sample_responses", 2),
    "score": ("alignpipe.stages.ppo:_scores", 1),
    "evaluate": ("alignpipe.stages.eval:response_columns", 1),
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STAMP = "signalled"
SECONDS_TO_STOP = 5.0
SECONDS_TO_END = 1.0


def signal_in(place: str, call: int, number: int, stuck: bool) -> None:
    """Let this process be signalled as it enters a function for the n-th time; stuck, it stays there."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    function, calls = getattr(owner, name), 0

    def signalled(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            Path(STAMP).touch()
            os.kill(os.getpid(), number)
            while stuck:
                time.sleep(0.01)
        return function(*args, **more)

    setattr(owner, name, signalled)


def test_signal_in_each_phase_saves_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    stopped = tried = 0
    for number in SIGNALS[: count(1, 3)]:
        folder = tmp_path / number.name
        for place, call in PHASES.values():
            command = begin(folder, *WORDS, before=signal_in, given=(place, call, number, False))
            code = command.wait()
            seconds = time.time() - (folder / STAMP).stat().st_mtime
            stopped += code == Stopped.exit_code and seconds < SECONDS_TO_STOP and _has_valid_states(folder)
            tried += 1
            assert f"error: stopped by {number.name}; the state is saved" in command.told, command.told
            (folder / STAMP).unlink()
        finish(folder, *WORDS)
        assert kept(folder) == kept(undisturbed)
    faults.tell("SIGTERM, SIGINT, SIGHUP in each of 7 phases", stopped, tried)


def test_second_signal_ends_at_once_and_does_no_harm(
    tmp_path: Path, undisturbed: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    ended = 0
    phases = list(PHASES.values())[-count(1, len(PHASES)) :]
    for place, call in phases:
        command = begin(tmp_path, *WORDS, before=signal_in, given=(place, call, signal.SIGINT, True))
        assert command.until((tmp_path / STAMP).exists)
        ended += _ends_at_once(command)
        (tmp_path / STAMP).unlink()
    finish(tmp_path, *WORDS)
    assert kept(tmp_path) == kept(undisturbed)
    faults.tell("a second signal in each of 7 phases", ended, len(phases))


def _ends_at_once(command: Command) -> bool:
    # The first signal was sent by the process to itself, just after the stamp.
    time.sleep(0.1)
    assert command.is_running
    began = time.monotonic()
    command.send(signal.SIGINT)
    return command.wait() == 130 and time.monotonic() - began < SECONDS_TO_END


def _has_valid_states(folder: Path) -> bool:
    """Whether each state is whole; raises where one is not."""
    for state in folder.glob("outputs/work/*/states/step-*"):
        verify(state)
    return True
