"""What else befalls a run: no memory, a disk that breaks or stutters, nobody who reads, a clock that is set back."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from alignpipe import worker
from alignpipe.artifact import verify
from alignpipe.stages import sft
from alignpipe.training import context, loop
from tests.faults import chain, disk
from tests.faults.chain import SHORT
from tests.faults.commands import finish, start
from tests.faults.stopping import SFT, before_save, die, states, weights
from tests.faults.table import Faults

# More than any machine has for one process.
TOO_MUCH = 2**50
SAMPLING = "stage.num_samples=2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the stage, never disturbed."""
    return weights(finish(tmp_path_factory.mktemp("whole"), "run", *SFT).folder)


def _want_tensor() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def _want_list() -> None:
    bytearray(TOO_MUCH)


def _at_call(module: ModuleType, name: str, number: int, do: Callable[[], None]) -> None:
    """Do something in a command inside its nth call of a function, from 1."""
    function, calls = getattr(module, name), iter(range(1, 1000))

    def hooked(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            do()
        return function(*given, **named)

    setattr(module, name, hooked)


def _while_loading() -> None:
    _at_call(context, "load_policy", 1, _want_tensor)


def _in_a_step() -> None:
    _at_call(loop, "_add_gradients", 4, _want_tensor)


def _in_a_step_of_python() -> None:
    _at_call(loop, "_add_gradients", 4, _want_list)


def _while_sampling() -> None:
    _at_call(sft, "log_samples", 1, _want_tensor)


MOMENTS = [_while_loading, _in_a_step, _in_a_step_of_python, _while_sampling]


def test_memory_that_is_not_there_is_told_with_the_key_to_lower(
    tmp_path: Path, whole: str, faults: Faults, count: Callable[[int, int], int]
) -> None:
    told = gone_on = 0
    tried = MOMENTS[-count(2, len(MOMENTS)) :]
    for moment in tried:
        folder = tmp_path / moment.__name__
        words = (*SFT, SAMPLING) if moment is _while_sampling else SFT
        command = start(folder, "run", *words, before=moment)
        code = command.wait()
        line = command.told.splitlines()[-1]
        told += code == 5 and "sft: out of memory on cpu; lower micro_batch_size or" in line
        for state in folder.glob("outputs/work/*/states/step-*"):
            verify(state)
        finish(folder, "run", *words)
        gone_on += weights(folder) == whole
    faults.tell("no memory: exit 5 with the key to lower, states valid", told, len(tried))
    faults.tell("no memory: the same command with memory ends with the same weights", gone_on, len(tried))


def test_disk_that_breaks_once(tmp_path: Path, count: Callable[[int, int], int], faults: Faults) -> None:
    first, log = tmp_path / "whole", tmp_path / "record" / "log"
    assert chain.begin(first, *SHORT, before=disk.record, given=(log, first / "outputs")).wait() == 0
    expected, operations = chain.kept(first), len(disk.read_record(log))
    tried = count(3, 40)
    told = gone_on = 0
    for number in (1 + place * operations // tried for place in range(tried)):
        folder = tmp_path / str(number)
        broken = chain.begin(folder, *SHORT, before=disk.fail_at, given=(number, folder / "outputs"))
        code = broken.wait()
        lines = broken.told.splitlines()
        # What is to be tidied away may stay, and a folder that is there need not be made.
        harmless = code == 0 and (folder / disk.BROKE).read_text() in ("unlink", "rmdir", "mkdir")
        told += harmless or (code == 5 and "Input/output error" in lines[-1] and "outputs" in lines[-1])
        chain.finish(folder, *SHORT)
        gone_on += chain.kept(folder) == expected
    faults.tell("disk that breaks at an operation: exit 5, or only tidying is left", told, tried)
    faults.tell("disk that breaks at an operation: the same command ends with the same files", gone_on, tried)


def test_disk_that_is_slow_and_takes_half_of_each_write(tmp_path: Path, whole: str, faults: Faults) -> None:
    command = start(tmp_path, "run", *SFT, before=disk.stutter, given=(tmp_path / "outputs",))
    faults.tell("disk that stutters: the same weights", command.wait() == 0 and weights(tmp_path) == whole, 1)


def _leave_unread() -> None:
    """Let standard output and error go to a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, sys.stdout.fileno())
    os.dup2(writer, sys.stderr.fileno())


@pytest.mark.parametrize("more", [(), ("launch=ddp", "launch.num_processes=2")], ids=["alone", "two"])
def test_run_that_nobody_reads_goes_on(
    tmp_path: Path, whole: str, faults: Faults, more: tuple[str, ...]
) -> None:
    command = start(tmp_path, "run", *SFT, *more, before=_leave_unread)
    ended = command.wait() == 0 and (tmp_path / "outputs" / "latest").is_file()
    faults.tell(
        "nobody reads what is printed: the run goes on",
        ended and (weights(tmp_path) == whole or bool(more)),
        1,
    )


def _set_clock_back() -> None:
    """Let every look at the clock show a day before the last one."""
    begin, looks = time.time(), iter(range(10**6))
    time.time = lambda: begin - 86400 * next(looks)


def test_clock_that_is_set_back(tmp_path: Path, whole: str, faults: Faults) -> None:
    start(tmp_path, "run", *SFT, before=before_save, given=(3, die)).process.join(60)
    assert len(list(states(tmp_path).glob("step-*"))) == 2
    command = start(tmp_path, "run", *SFT, before=_set_clock_back)
    went_on = (
        command.wait() == 0 and ") goes on from step-000004" in command.told and weights(tmp_path) == whole
    )
    again = finish(tmp_path, "run", *SFT)
    faults.tell("clock set back: goes on, and reuses", went_on and again.process.exitcode == 0, 1)


def _on_two_threads() -> None:
    torch.set_num_threads(2)


def test_two_threads_give_the_same_bits_each_time(
    tmp_path: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    rounds = count(2, 6)
    found = []
    for number in range(rounds):
        command = chain.begin(tmp_path / str(number), *chain.WORDS, before=_on_two_threads)
        assert command.wait() == 0, command.told
        found.append(chain.kept(command.folder))
    same = sum(found[0] == other for other in found[1:])
    faults.tell("two threads: the same files each time", same, rounds - 1)


def test_device_that_cannot_compute_in_bf16_is_told(
    typed: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU older than Ampere.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert worker.computes_bf16(torch.device("cpu"))
    assert not worker.computes_bf16(torch.device("cuda"))
    monkeypatch.setattr(worker, "computes_bf16", lambda device: False)
    code, told = typed(tmp_path, "run", *SFT, "launch.precision=bf16")
    assert code == 5
    assert "launch.precision=bf16: cpu cannot compute in it; take fp16 or fp32" in told
