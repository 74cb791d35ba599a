"""A user's function is found and looked at without being run, and is in the key of the stage that calls it."""

import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from alignpipe.compose.composition import compose
from alignpipe.config import Config, GateConfig
from alignpipe.errors import ConfigError
from alignpipe.pipeline.build import build_graph
from alignpipe.pipeline.functions import find_function
from alignpipe.pipeline.keys import add_keys, why_not_reused
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from tests.project import SMALL, Project

GOOD = "def score(prompts, responses):\n    return [0.0] * len(responses)\n"
KEY = "stages.ppo.reward.function"
WriteFile = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Write a Python file into the working folder and name a function in it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = GOOD, name: str = "score", file: str = "my_reward.py") -> str:
        (tmp_path / file).write_text(text, encoding="utf-8")
        return f"./{file}:{name}"

    return write


def _error(label: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find_function(KEY, label)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "def score(prompts, responses, *, strict=True): ...",
        "def score(*columns): ...",
        "def score(prompts, responses, third=0): ...",
        "score = lambda prompts, responses: []",
        "from elsewhere import grade as score",
        "try:\n    from elsewhere import score\nexcept ImportError:\n    score = None",
        "if True:\n    def score(prompts, responses): ...",
        "class score: ...",
    ],
)
def test_name_is_found_wherever_the_top_level_binds_it(write: WriteFile, tmp_path: Path, text: str) -> None:
    found = find_function(KEY, write(text))
    assert (found.path, found.name) == (str(tmp_path / "my_reward.py"), "score")


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (GOOD, "scroe", "my_reward.py has no 'scroe' at its top level. Did you mean score?"),
        ("def outer():\n    def score(p, r): ...\n", "score", "has no 'score' at its top level"),
        (
            "\n\ndef score(prompts): ...\n",
            "score",
            "my_reward.py:3: it is called as score(prompts, responses)",
        ),
        ("def score(p, r, third): ...\n", "score", "my_reward.py:1: it is called as"),
        ("def score(p, r, *, strict): ...\n", "score", "my_reward.py:1: it is called as"),
        ("x = 1\ndef score(p, r:\n", "score", "my_reward.py:2: not Python: "),
        ("x = 1\nreturn x\n", "score", "my_reward.py:2: not Python: "),
        ("x = '\0'\n", "score", "my_reward.py:"),
    ],
)
def test_fault_in_the_file_is_told_with_its_place(write: WriteFile, text: str, name: str, told: str) -> None:
    assert told in _error(write(text, name))


def test_missing_file_gets_the_nearest_one(write: WriteFile) -> None:
    write()
    line = _error("./my_rewrd.py:score")
    assert line.startswith(f"{KEY}: ")
    assert "Did you mean my_reward.py:score?" in line


@pytest.mark.parametrize(
    "label", ["score", "./my_reward.py", "./my_reward.py:", ":score", "./my_reward.py:a b"]
)
def test_word_without_file_and_name_is_told_its_form(label: str) -> None:
    assert "write FILE.py:NAME" in _error(label)


@cache
def _composed(*words: str) -> Config:
    return compose([*SMALL, *words]).config


def _config(project: Project, *words: str, stage: str = "ppo", **reward: Any) -> Config:
    """A run in which fields of one stage's reward are changed; composing is slow, so that is done once."""
    config = deepcopy(_composed(*words))
    config.output_dir = str(project.outputs)
    section = vars(config.stages[stage])["reward"]
    for name, value in reward.items():
        setattr(section, name, value)
    return config


def _keys(project: Project, *words: str, **reward: Any) -> dict[str, str]:
    config, store = _config(project, *words, **reward), Store(project.outputs)
    graph = build_graph(config, store)
    add_keys(graph, config, store, "")
    return {node.name: node.key for node in graph}


def test_planning_runs_nothing_of_the_file(write: WriteFile, project: Project, tmp_path: Path) -> None:
    label = write(f"open({str(tmp_path / 'ran')!r}, 'w')\n{GOOD}")
    plan = make_plan(_config(project, function=label))
    (row,) = [row for row in plan.rows if row.name == "ppo"]
    assert "reward=1*rm+1*my_reward.py:score" in row.reads
    assert not (tmp_path / "ran").exists()


def test_an_edit_makes_the_stage_and_what_follows_anew_and_no_other(
    write: WriteFile, project: Project
) -> None:
    label = write()
    before, plain = _keys(project, function=label), _keys(project)
    assert {name for name in before if before[name] != plain[name]} == {"ppo", "eval"}
    # One figure, and nothing of the file's size or time, need differ.
    write(GOOD.replace("0.0", "0.5"))
    after = _keys(project, function=label)
    assert {name for name in before if before[name] != after[name]} == {"ppo", "eval"}
    write()
    assert _keys(project, function=label) == before
    assert _keys(project, function=write(file="moved.py")) == before


def test_other_function_of_the_same_file_has_another_key(write: WriteFile, project: Project) -> None:
    text = f"{GOOD}\ndef other(prompts, responses):\n    return [1.0] * len(responses)\n"
    one, other = (_keys(project, function=write(text, name))["ppo"] for name in ("score", "other"))
    assert one != other


def test_only_what_takes_part_is_in_the_key(write: WriteFile, project: Project) -> None:
    plain, label = _keys(project), write()
    alone = _keys(project, function=label)
    for unused in ({"uncertainty_penalty": 3.0}, {"gate": GateConfig(None, 0.5)}):
        assert _keys(project, **unused) == plain, unused
        assert _keys(project, function=label, **unused) == alone, unused
    assert _keys(project, function_weight=2.0) == plain
    keys = [
        plain["ppo"],
        _keys(project, models={"rm": 0.5})["ppo"],
        _keys(project, gate=GateConfig("rm", 0.5))["ppo"],
        _keys(project, gate=GateConfig("rm", 0.6))["ppo"],
        alone["ppo"],
        _keys(project, function=label, function_weight=2.0)["ppo"],
    ]
    assert len(set(keys)) == len(keys)


def test_what_differs_is_the_function(write: WriteFile, finished: Project) -> None:
    node = make_plan(_config(finished, function=write())).graph.nodes["ppo"]
    told = why_not_reused(node, Store(finished.outputs))
    assert "functions.reward None -> " in told and "settings.reward.function_weight None -> 1.0" in told


SECOND = (
    "+stage@stages.safety_rm=rm",
    "stages.safety_rm.data.path=collect",
    "stages.safety_rm.seed=1",
    "pipeline.order=[sft,collect,rm,safety_rm,ppo]",
    "stages.ppo.policy=sft",
)


def test_reward_models_beside_the_first_are_parents(project: Project) -> None:
    reward = {"models": {"safety_rm": 0.5, "rm": 2.0}, "gate": GateConfig("safety_rm", 0.15)}
    plan = make_plan(_config(project, *SECOND, **reward))
    node = plan.graph.nodes["ppo"]
    # Each once, however often it is named.
    assert {role: ref.name for role, ref in node.models.items()} == {
        "policy": "sft",
        "reference": "sft",
        "reward_model": "rm",
        "reward_0": "safety_rm",
    }
    assert node.parents == ["sft", "rm", "safety_rm"]
    row = plan.rows[-1]
    assert "reward=2*rm+0.5*safety_rm gate=safety_rm<0.15" in row.reads
    alone = make_plan(_config(project, *SECOND)).rows[-1]
    assert row.estimate is not None and alone.estimate is not None
    # Reference and two reward models in place of one: half as much again.
    assert row.estimate.memory.frozen == pytest.approx(1.5 * alone.estimate.memory.frozen, rel=0.05)


def test_names_that_are_no_reward_models_are_told_by_their_keys(project: Project) -> None:
    for told, reward in {
        "stages.ppo.reward.models.sft: sft is made by a stage of kind sft": {"models": {"sft": 1.0}},
        "stages.ppo.reward.gate.model: 'rn' is no stage": {"gate": GateConfig("rn", 0.15)},
    }.items():
        with pytest.raises(ConfigError, match=re.escape(told)):
            build_graph(_config(project, **reward), Store(project.outputs))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["stages.rs.reward_model=null"],
            "stages.rs.reward_model: is null and nothing stands in its place",
        ),
        (
            ["stages.ppo.reward_model=null", "stages.ppo.reward.function=./my_reward.py:score"],
            "stages.ppo.reward_model: is null, but the value model of advantage=gae starts from it",
        ),
        (
            ["stages.eval.reward.ensemble=mean"],
            "stages.eval.reward.ensemble: mean needs two reward models or more",
        ),
        (["stages.eval.reward.models.rm=nan"], "stages.eval.reward.models.rm: must be a finite number"),
        (["stages.eval.reward.gate.below=1"], "stages.eval.reward.gate.below: must be at most"),
    ],
)
def test_reward_that_cannot_be_is_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _composed(*words)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reward_names_no_code_to_run() -> None:
    with pytest.raises(ConfigError, match="no configuration names code to run"):
        _composed("stages.rs.reward._target_=os.system")
