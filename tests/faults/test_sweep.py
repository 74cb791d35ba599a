"""A sweep under launchers: shared stages are made once, and no kill or signal loses more than it must."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.project import SMALL

WORDS = [
    *SMALL,
    "pipeline.order=[sft,collect,rm,ppo,eval]",
    "stages.ppo.policy=sft",
    "stages.eval.policies=[sft,ppo]",
    "sweep.name=mine",
]
TWO_AT_A_TIME = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
FOUR = "stages.ppo.kl_coef=0.05,0.1,0.2,0.4"
# Training that takes long enough to be met in the middle.
LONG = ["model.training.sft.epochs=60", "model.training.sft.save_steps=2", "model.training.sft.log_steps=1"]
PATIENCE = 300.0
SWEEP = Path("outputs", "sweeps", "mine")
pytestmark = pytest.mark.slow


def _start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """A sweep in a session of its own, so that every process it leaves behind can be found by it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "told").open("ab") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "alignpipe", "run", "-m", *WORDS, *words],
            cwd=folder,
            env=environment,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes], folder: Path) -> str:
    process.wait(PATIENCE)
    told = (folder / "told").read_text(encoding="utf-8")
    assert "Traceback" not in told, told
    return told


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)


def _made(folder: Path) -> dict[str, int]:
    """How often a stage of each kind was trained, told by the runs."""
    made: dict[str, int] = {}
    for path in (folder / "outputs" / "runs").glob("*/run.json"):
        for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]:
            made[stage["kind"]] = made.get(stage["kind"], 0) + (stage["state"] == "done")
    return made


def _results(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / SWEEP).glob("*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _states(folder: Path) -> list[str]:
    return [result["state"] for result in _results(folder)]


def _trains(folder: Path) -> bool:
    return any((folder / "outputs" / "work").glob("sft-*/states/step-*"))


def _holder(folder: Path) -> int:
    (path,) = (folder / "outputs" / "work").glob("sft-*/holder.json")
    return int(json.loads(path.read_text(encoding="utf-8"))["pid"])


def _left(folder: Path) -> list[str]:
    """Command lines of processes that still work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder.resolve():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def _gone(folder: Path, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while _left(folder) and time.monotonic() < limit:
        time.sleep(0.1)
    return not _left(folder)


@pytest.mark.parametrize("launcher", [[], TWO_AT_A_TIME, ["hydra/launcher=submitit_local"]], ids=str)
def test_sweep_of_four_makes_what_it_shares_once(launcher: list[str], tmp_path: Path) -> None:
    process = _start(tmp_path, FOUR, *launcher)
    told = _end(process, tmp_path)
    assert process.returncode == 0, told
    assert _states(tmp_path) == ["done"] * 4
    assert _made(tmp_path) == {"sft": 1, "collect": 1, "rm": 1, "ppo": 4, "eval": 4}
    assert len(list((tmp_path / "outputs" / "stages").iterdir())) == 11
    with (tmp_path / SWEEP / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["stages.ppo.kl_coef"] for row in rows) == ["0.05", "0.1", "0.2", "0.4"]
    values = [float(row["gold"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert _gone(tmp_path, 10)


def test_waiter_takes_over_within_seconds_when_the_training_job_is_killed(tmp_path: Path) -> None:
    process = _start(tmp_path, "stages.ppo.kl_coef=0.05,0.1", *TWO_AT_A_TIME, *LONG)
    _until(
        lambda: _trains(tmp_path) and "makes it; waiting" in (tmp_path / "told").read_text(encoding="utf-8"),
        process,
    )
    killed, began = _holder(tmp_path), time.monotonic()
    os.kill(killed, signal.SIGKILL)
    _until(lambda: "goes on from step-" in (tmp_path / "told").read_text(encoding="utf-8"), process)
    took = time.monotonic() - began
    told = _end(process, tmp_path)
    assert took < 30, told
    assert process.returncode == 1, told
    assert sorted(_states(tmp_path)) == ["done", "failed"]
    (lost,) = [result for result in _results(tmp_path) if result["state"] == "failed"]
    assert "was killed by SIGKILL" in lost["error"]
    assert len(list((tmp_path / "outputs" / "stages").glob("sft-*"))) == 1
    # The same command makes up for the job that was lost, and makes nothing else again.
    process = _start(tmp_path, "stages.ppo.kl_coef=0.05,0.1", *TWO_AT_A_TIME, *LONG)
    assert _end(process, tmp_path) and process.returncode == 0
    assert len(list((tmp_path / "outputs" / "stages").iterdir())) == 3 + 2 * 2


@pytest.mark.parametrize("everyone", [False, True], ids=["parent", "terminal"])
def test_interrupt_saves_leaves_nobody_behind_and_the_same_command_goes_on(
    everyone: bool, tmp_path: Path
) -> None:
    process = _start(tmp_path, "stages.ppo.kl_coef=0.05,0.1,0.2", *TWO_AT_A_TIME, *LONG)
    _until(lambda: _trains(tmp_path), process)
    if everyone:
        # A terminal sends Ctrl-C to the whole group.
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    told = _end(process, tmp_path)
    assert process.returncode == 75, told
    assert _gone(tmp_path, 10), _left(tmp_path)
    assert "done" not in _states(tmp_path) and "running" not in _states(tmp_path)
    assert "stopped" in _states(tmp_path)
    process = _start(tmp_path, "stages.ppo.kl_coef=0.05,0.1,0.2", *TWO_AT_A_TIME, *LONG)
    told = _end(process, tmp_path)
    assert process.returncode == 0, told
    assert "goes on from step-" in told
    assert _states(tmp_path) == ["done"] * 3


def test_killed_worker_or_parent_leaves_nobody_behind(tmp_path: Path) -> None:
    process = _start(tmp_path, "stages.ppo.kl_coef=0.05,0.1", *TWO_AT_A_TIME, *LONG)
    _until(lambda: _trains(tmp_path), process)
    process.kill()
    process.wait()
    assert _gone(tmp_path, 30), _left(tmp_path)
    assert not any((tmp_path / "outputs" / "stages").glob("*"))


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopped_submitit_jobs_save_and_end(stop: signal.Signals, tmp_path: Path) -> None:
    process = _start(tmp_path, "stages.ppo.kl_coef=0.05,0.1", "hydra/launcher=submitit_local", *LONG)
    _until(lambda: _trains(tmp_path), process)
    process.send_signal(stop)
    told = _end(process, tmp_path)
    assert process.returncode == 75, told
    assert set(_states(tmp_path)) == {"stopped"}
    assert _gone(tmp_path, 20), _left(tmp_path)
