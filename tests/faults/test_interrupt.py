"""However a run is stopped, the same command goes on, and the weights are those of a run never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignpipe.artifact import sha256_file, verify
from tests.project import SMALL

WORDS = [
    *SMALL,
    "pipeline.order=[sft,collect,rm,ppo]",
    "stages.ppo.policy=sft",
    "model.training.sft.log_steps=1",
    "model.training.sft.save_steps=2",
    "model.training.ppo.save_steps=1",
    "model.training.ppo.log_steps=1",
    "model.training.rm.save_steps=1",
]
PATIENCE = 120.0
STOPPED = 75
pytestmark = pytest.mark.slow


def _start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "alignpipe", "run", *WORDS],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> str:
    _, told = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in told, told
    return told


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Whether it came true before the process ended."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < limit
        time.sleep(0.005)
    return True


def _any(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any((folder / "outputs" / "work").glob(pattern))


def _states(folder: Path) -> dict[str, str]:
    call = [sys.executable, "-m", "alignpipe", "status", "--json"]
    told = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True).stdout
    status: dict[str, Any] = json.loads(told)
    return {stage["name"]: stage["state"] for stage in status["stages"]}


def _weights(folder: Path) -> dict[str, str]:
    """Hash of the weights of every stage that has some, each folder verified."""
    found = {}
    for stage in sorted((folder / "outputs" / "stages").iterdir()):
        verify(stage)
        if (stage / "model.safetensors").is_file():
            found[stage.name] = sha256_file(stage / "model.safetensors")
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[str]]:
    """A project that two processes were started in at the same time, exit codes, and what they told."""
    folder = tmp_path_factory.mktemp("together")
    processes = [_start(folder), _start(folder)]
    told = [_end(process) for process in processes]
    return folder, [process.returncode for process in processes], told


def test_two_runs_at_once_make_each_stage_once(together: tuple[Path, list[int], list[str]]) -> None:
    folder, codes, told = together
    assert codes == [0, 0], told
    for name in ("sft", "collect", "rm", "ppo"):
        done = sum(f"{name:<8} done in" in text for text in told)
        reused = sum(f"{name:<8} reused" in text for text in told)
        assert (done, reused) == (1, 1), told
    assert any("makes it; waiting" in text for text in told)
    assert len(list((folder / "outputs" / "stages").iterdir())) == 4
    assert not any((folder / "outputs" / "work").glob("*/"))
    run = folder / "outputs" / "runs" / (folder / "outputs" / "latest").read_text().strip()
    assert all((run / name / "alignpipe.json").is_file() for name in ("sft", "collect", "rm", "ppo"))


def test_signal_in_training_saves_and_the_same_command_goes_on(
    together: tuple[Path, list[int], list[str]], tmp_path: Path
) -> None:
    process = _start(tmp_path)
    assert _wait(_any(tmp_path, "sft-*/states/step-*"), process)
    process.send_signal(signal.SIGTERM)
    told = _end(process)
    assert process.returncode == 75, told
    assert told.splitlines()[-1].startswith("error: stopped by SIGTERM")
    assert _states(tmp_path)["sft"] == "stopped"
    process = _start(tmp_path)
    assert _wait(_any(tmp_path, "ppo-*/states/step-*"), process)
    process.send_signal(signal.SIGINT)
    told = _end(process)
    assert process.returncode == 75, told
    assert "goes on from step-" in told
    assert _states(tmp_path) == {"sft": "done", "collect": "done", "rm": "done", "ppo": "stopped"}
    process = _start(tmp_path)
    told = _end(process)
    assert process.returncode == 0, told
    assert "goes on from step-" in told
    assert _weights(tmp_path) == _weights(together[0])


def test_killed_again_and_again_it_ends_with_the_same_weights(
    together: tuple[Path, list[int], list[str]], tmp_path: Path
) -> None:
    chance = random.Random(0)
    for pattern in ("sft-*/metrics.jsonl", "sft-*/states/*", "ppo-*"):
        process = _start(tmp_path)
        _wait(_any(tmp_path, pattern), process)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert "running" not in _states(tmp_path).values()
    process = _start(tmp_path)
    told = _end(process)
    assert process.returncode == 0, told
    assert _weights(tmp_path) == _weights(together[0])
    assert not any((tmp_path / "outputs" / "work").glob("*/"))


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    # Two signals in one moment count as one, and a run may be stopped before the second comes.
    codes = (_interrupted_until_it_ends(tmp_path / str(attempt)) for attempt in range(5))
    assert next(code for code in codes if code != STOPPED) == 130


def _interrupted_until_it_ends(folder: Path) -> int:
    process = _start(folder)
    assert _wait(lambda: (folder / "outputs" / "latest").is_file(), process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _end(process)
    return process.returncode
