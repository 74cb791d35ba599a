"""-m composes every job before the first one runs, and tells afterwards how each ended."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from alignpipe.compose.command_line import read_line
from alignpipe.compose.sweeps import compose_sweep
from alignpipe.errors import ConfigError
from alignpipe.hydra_front import sweep
from alignpipe.sweep import sweep_results


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "stage=dpo", "stage.beta=0.1,0.2"],
        ["stage=dpo", "-m", "stage.beta=0.1,0.2"],
        ["stage=dpo", "stage.beta=0.1,0.2", "--multirun"],
    ],
)
def test_multirun_flag_stands_anywhere(words: list[str]) -> None:
    jobs = compose_sweep(read_line(words)).jobs
    assert [vars(job.config.stage)["beta"] for job in jobs if job.config.stage is not None] == [0.1, 0.2]


def test_every_combination_is_one_job() -> None:
    jobs = compose_sweep(read_line(["-m", "stage=rm,dpo", "stage.policy=sft", "seed=1,2"])).jobs
    found = [(job.config.stage.kind, job.config.seed) for job in jobs if job.config.stage is not None]
    assert found == [("rm", 1), ("rm", 2), ("dpo", 1), ("dpo", 2)]


def test_sweep_over_a_glob_of_options() -> None:
    jobs = compose_sweep(
        read_line(["-m", "stage=glob([r*,d*],exclude=rs)", "stage.policy=base", "seed=1"])
    ).jobs
    assert [job.config.stage.kind for job in jobs if job.config.stage is not None] == ["dpo", "rm"]


def test_wrong_value_in_a_later_job_stops_the_sweep_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"stage\.beta: must be more than 0"):
        sweep(read_line(["-m", "stage=dpo", "stage.beta=0.1,0"]), Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_failed_job_does_not_stop_the_others_and_ends_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = sweep(read_line(["-m", "stage=rm", "stage.policy=nosuch_a,nosuch_b"]), Console())
    assert code == 1
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    results = sweep_results(folder)
    assert [result["state"] for result in results] == ["failed", "failed"]
    assert "nosuch_b" in results[1]["error"]
    assert json.loads((folder / "0" / "result.json").read_text(encoding="utf-8")) == results[0]
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 2
    assert "stage.policy=nosuch_a" in printed.out
    assert not (tmp_path / "outputs" / "runs").exists()
