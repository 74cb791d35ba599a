"""The real command with two real processes: what a lost, stuck or stopped one does to the run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alignpipe.artifact import verify
from alignpipe.config import LaunchConfig
from alignpipe.errors import ConfigError
from alignpipe.pipeline.launch import environment, num_processes
from tests.project import SMALL, Project

PATIENCE = 240.0
SFT = [
    *SMALL,
    "stage=sft",
    "model.training.sft.log_steps=1",
    "model.training.sft.save_steps=2",
    "stage.epochs=8",
]
TWO = [*SFT, "launch=cpu", "launch.num_processes=2"]


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "alignpipe", "run", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"waited in vain: {what}"
        time.sleep(0.02)


def _workers(command: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes of the stage by rank."""
    found = {}
    for child in psutil.Process(command.pid).children(recursive=True):
        try:
            if "alignpipe.worker" in child.cmdline():
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return found


def _under_way(folder: Path, command: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Wait until the stage has saved a state; its processes."""
    _wait(
        lambda: any(folder.glob("outputs/work/sft-*/states/step-*")) or command.poll() is not None, "a state"
    )
    assert command.poll() is None, command.communicate()[1]
    return _workers(command)


def _gone(workers: dict[int, psutil.Process]) -> bool:
    return not any(
        worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers.values()
    )


def _ends(command: subprocess.Popen[str], code: int) -> str:
    _, told = command.communicate(timeout=PATIENCE)
    assert command.returncode == code, told
    assert "Traceback" not in told
    return told


def _curve(folder: Path) -> list[float]:
    (artifact,) = (folder / "outputs" / "stages").glob("sft-*")
    verify(artifact)
    return [
        json.loads(line)["loss"]
        for line in (artifact / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same stage on one process, never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Project(folder / "outputs").run(*SFT[len(SMALL) :], "launch=cpu")
    return _curve(folder)


def test_killed_process_ends_the_stage_and_one_process_alone_goes_on(
    tmp_path: Path, undisturbed: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    command = _start(tmp_path, *TWO)
    workers = _under_way(tmp_path, command)
    assert sorted(workers) == [0, 1]
    workers[1].kill()
    began = time.monotonic()
    told = _ends(command, 7)
    assert time.monotonic() - began < 30
    assert "error: sft: process 1 was killed by signal 9; run the same command to go on" in told
    assert _gone(workers)
    Project(tmp_path / "outputs").run(*SFT[len(SMALL) :], "launch=cpu")
    assert "goes on from step-" in capfd.readouterr().err
    assert _curve(tmp_path) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow
def test_stuck_process_ends_the_stage_within_the_timeout(tmp_path: Path) -> None:
    command = _start(tmp_path, *TWO, "launch.timeout=20")
    workers = _under_way(tmp_path, command)
    workers[1].suspend()
    began = time.monotonic()
    told = _ends(command, 7)
    assert time.monotonic() - began < 60
    assert "rank0 lost rank1 (" in told and "launch.timeout=20 s" in told
    assert _gone(workers)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["command", "everybody"])
def test_signal_saves_the_state_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: list[float], to_all: bool
) -> None:
    command = _start(tmp_path, *TWO)
    workers = _under_way(tmp_path, command)
    command.send_signal(signal.SIGTERM)
    # A cluster's scheduler signals every process of a job.
    for worker in workers.values() if to_all else ():
        worker.terminate()
    told = _ends(command, 75)
    assert "the state is saved, run the same command to go on" in told
    assert _gone(workers)
    _ends(_start(tmp_path, *TWO), 0)
    assert _curve(tmp_path) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow
def test_processes_do_not_outlive_the_command(tmp_path: Path) -> None:
    command = _start(tmp_path, *TWO)
    workers = _under_way(tmp_path, command)
    command.kill()
    began = time.monotonic()
    _wait(lambda: _gone(workers), "the processes to end")
    assert time.monotonic() - began < 5
    _ends(_start(tmp_path, *TWO), 0)


@pytest.mark.slow
def test_error_of_a_process_is_the_commands_error(tmp_path: Path) -> None:
    told = _ends(_start(tmp_path, *TWO, "stage.learning_rate=1e30", "stage.warmup_ratio=0"), 6)
    assert told.count("error:") == 1
    assert "not finite" in told


@pytest.mark.slow
def test_two_machines_make_one_run(tmp_path: Path, undisturbed: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*TWO, "launch.num_machines=2", f"launch.rendezvous=127.0.0.1:{port}"]
    machines = [_start(tmp_path, *words, f"launch.machine_rank={rank}") for rank in (1, 0)]
    for machine in machines:
        _ends(machine, 0)
    assert _curve(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    logs = list(tmp_path.glob("outputs/runs/*/logs/sft.rank1.log"))
    assert len(logs) == 1


def _launch(*words: str) -> LaunchConfig:
    return Project(Path("unused")).compose(*words).config.launch


def test_offload_of_moments_that_are_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^launch\.optimizer_offload: fsdp2 cuts the moments"):
        _launch("launch=fsdp2", "launch.num_processes=2", "launch.optimizer_offload=true")


def test_environment_divides_the_cores_and_leaves_the_users_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert environment(_launch("launch=ddp"), 1)["OMP_NUM_THREADS"] == str(cores)
    assert environment(_launch("launch=ddp"), 2 * cores)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(_launch("launch=ddp"), 1)["OMP_NUM_THREADS"] == "7"


def test_one_process_a_visible_gpu_where_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,3")
    assert num_processes(_launch()) == 3
    assert num_processes(_launch("launch=ddp")) == 3
    assert num_processes(_launch("launch=single")) == 1
    assert num_processes(_launch("launch=cpu")) == 1
    assert num_processes(_launch("launch=fsdp2", "launch.num_processes=8")) == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_processes(_launch()) == 1
