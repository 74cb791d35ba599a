"""-m composes every job before the first one runs, and tells afterwards how each ended."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from alignpipe import cli
from alignpipe.compose import compose
from alignpipe.compose.command_line import read_line
from alignpipe.compose.rerun import rerun_yaml
from alignpipe.compose.sweeps import compose_sweep
from alignpipe.errors import AlignpipeError, ConfigError
from alignpipe.hydra_front import sweep
from alignpipe.pipeline.runner import run
from alignpipe.pipeline.store import run_stages
from alignpipe.sweep import sweep_results
from tests.project import SMALL, Project


def _sweep(project: Project, *words: str) -> int:
    output = f"output_dir='{project.outputs}'"
    return sweep(read_line(["-m", *SMALL, output, "sweep.name=mine", *words]), Console())


def _rows(project: Project) -> list[dict[str, str]]:
    with (project.outputs / "sweeps" / "mine" / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


def test_sweep_over_pipelines_and_groups() -> None:
    jobs = compose_sweep(read_line(["-m", "pipeline=llama2_style,zephyr_style", "adapter=lora"])).jobs
    found = [(getattr(job.config.pipeline, "name", ""), job.config.adapter.kind) for job in jobs]
    assert found == [("llama2_style", "lora"), ("zephyr_style", "lora")]


def test_values_that_a_file_sweeps_over_are_swept(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      stages.ppo.kl_coef: 0.1,0.2\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found = compose_sweep(read_line(["-m", "experiment=mine", "--config-dir", str(tmp_path)]))
    assert [vars(job.config.stages["ppo"])["kl_coef"] for job in found.jobs] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["stage=dpo", "stage.beta=0.1,0"], r"stage\.beta: must be more than 0"),
        (["stage=dpo", "stage.beta=interval(0,1)", "hydra/sweeper=optuna"], r"stage\.beta: must be more"),
        (["stage=dpo", "stage.betta=interval(0.1,1)", "hydra/sweeper=optuna"], r"Did you mean stage\.beta\?"),
        (["stage=dpo", "stage.beta=0.1,0.2", "objective=dpo.eval_los"], r"Did you mean dpo\.eval_loss\?"),
        (
            ["stage=dpo", "stage.beta=0.1,0.2", "hydra/sweeper=optuna"],
            r"for example objective=dpo\.eval_loss",
        ),
        (["seed=1,2", "run.name=mine"], r"name the sweep with sweep\.name=mine"),
        (["seed=1,2", "sweep.name=a/b"], r"sweep\.name: 'a/b' is no folder name"),
        (["seed=1,2", "objective=ppo.reward"], r"ppo\.reward is the reward that training maximizes"),
        (
            ["seed=1,2", "hydra/sweeper=optuna", "hydra.sweeper.direction=minimize"],
            "say objective_direction=minimize instead",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_whatever_is_wrong_stops_the_sweep_before_the_first_job(
    words: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        sweep(read_line(["-m", *words]), Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "extra"),
    [
        ("hydra/launcher=joblib", "sweep"),
        ("hydra/sweeper=optuna", "sweep"),
        ("hydra/launcher=submitit_slurm", "slurm"),
    ],
)
def test_missing_plugin_is_one_line_with_the_command_that_brings_it(
    word: str, extra: str, tmp_path: Path
) -> None:
    # As Python finds it where no plugin of Hydra's is installed.
    code = (
        "import sys; from importlib.machinery import PathFinder as P; find = P.find_spec\n"
        "P.find_spec = lambda name, *rest: None if name.startswith('hydra_plugins') else find(name, *rest)\n"
        f"sys.argv = ['alignpipe', 'run', '-m', 'seed=1,2', {word!r}]\n"
        "from alignpipe.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = f"error: {word}: its plugin is not installed; pip install 'alignpipe[{extra}]'"
    assert (done.returncode, done.stderr.strip()) == (5, told)


def test_search_gets_direction_and_seed_unless_told() -> None:
    words = ["-m", "stage=dpo", "stage.beta=interval(0.1,1)", "hydra/sweeper=optuna", "seed=3"]
    found = compose_sweep(read_line([*words, "objective=dpo.eval_accuracy"])).words
    assert {"hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=3"} <= set(found)
    words += ["objective=dpo.eval_loss", "hydra.sweeper.sampler.seed=5"]
    found = compose_sweep(read_line(words)).words
    assert "hydra.sweeper.direction=minimize" in found
    assert "hydra.sweeper.sampler.seed=3" not in found


@pytest.mark.parametrize(
    "words",
    [
        ["pipeline=from_scratch", "data.world.mix.loaded=2"],
        ["stage=dpo", "model=pretrained", "model.path='/a b (x)'", "adapter=lora", "launch=fsdp2"],
    ],
    ids=str,
)
def test_file_of_a_job_composes_to_what_it_was_made_from(words: list[str], tmp_path: Path) -> None:
    composed = compose([*words, "seed=3"])
    (tmp_path / "best.yaml").write_text(rerun_yaml(composed.yaml), encoding="utf-8")
    again = ["--config-dir", str(tmp_path), "--config-name", "best"]
    assert compose(again).config == composed.config


def test_seed_after_the_file_of_a_job_reaches_every_stage(tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text(rerun_yaml(compose(["pipeline=zephyr_style"]).yaml), encoding="utf-8")
    config = compose(["--config-dir", str(tmp_path), "--config-name", "best", "seed=7"]).config
    assert {stage.seed for stage in config.stages.values()} == {7}


def test_failed_jobs_do_not_stop_the_others(
    copied: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _sweep(copied, "stage=rm", "stage.policy=nosuch_a,latest/sft,nosuch_b", "stage.data.path=toy")
    assert code == 1
    folder = copied.outputs / "sweeps" / "mine"
    results = sweep_results(folder)
    assert [result.state for result in results] == ["failed", "done", "failed"]
    assert "nosuch_b" in str(results[2].error)
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 2
    assert "stage.policy=nosuch_a" in printed.out
    assert {row["job"]: row["error"] != "" for row in _rows(copied)} == {"0": True, "1": False, "2": True}
    assert not (folder / "best.yaml").exists()


def test_best_job_stands_first_and_runs_again_from_its_file(
    copied: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("pipeline.order=[sft,collect]", "stages.collect.num_samples=3,4")
    figure = "objective=collect.labeler_agreement"
    assert _sweep(copied, *words, figure) == 0
    rows = _rows(copied)
    values = [float(row["collect.labeler_agreement"]) for row in rows]
    assert values == sorted(values, reverse=True) and len(set(values)) == 2
    folder = copied.outputs / "sweeps" / "mine"
    command = f"alignpipe run --config-dir {folder} --config-name best"
    assert command in capsys.readouterr().out
    composed = compose(command.split()[2:])
    assert (
        str(vars(composed.config.stages["collect"])["num_samples"]) == rows[0]["stages.collect.num_samples"]
    )
    done = run(composed.config, [], composed.yaml)
    assert done.value == values[0]
    stages = run_stages(copied.outputs / "runs" / done.name)
    assert [stage["state"] for stage in stages] == ["reused", "reused"]
    # The same sweep, the other way up.
    assert _sweep(copied, *words, figure, "objective_direction=minimize") == 0
    assert [float(row["collect.labeler_agreement"]) for row in _rows(copied)] == values[::-1]
    with pytest.raises(ConfigError, match=r"sweep\.name: mine was a sweep of other words"):
        _sweep(copied, *words, figure, "seed=1")


@pytest.mark.parametrize(
    "words",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"],
        pytest.param(["hydra/launcher=submitit_local"], marks=pytest.mark.slow),
        ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "hydra.sweeper.direction=maximize"],
    ],
    ids=lambda words: words[0],
)
def test_launcher_and_sweeper_run_whole_runs_and_reuse(words: list[str], copied: Project) -> None:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "alignpipe", "run", "-m", *SMALL, "sweep.name=mine"),
            *("pipeline.order=[sft,collect]", "stages.collect.num_samples=choice(4)"),
            *("objective=collect.labeler_agreement", *words),
        ],
        cwd=copied.outputs.parent,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    rows = _rows(copied)
    assert {row["state"] for row in rows} == {"done"}
    scores = {row["collect.labeler_agreement"] for row in rows}
    assert len(scores) == 1 and scores != {""}
    assert copied.states() == {"sft": "reused", "collect": "reused"}


def test_launcher_that_cannot_start_says_so_in_one_line(copied: Project) -> None:
    with pytest.raises(AlignpipeError, match="hydra") as caught:
        _sweep(copied, "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobz=1")
    assert "\n" not in str(caught.value)
