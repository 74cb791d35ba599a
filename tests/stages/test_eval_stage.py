"""Evaluation: common random numbers, the reference's own KL, and prompts that nobody can judge."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignpipe.errors import AlignpipeError
from tests.project import Project

NOTHING = {"overall": None, "helpful": None, "truthful": None, "harmless": None, "ci95": None}


def _scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "scores.json").read_text())
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts that the embedded world does not know."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Why is {number} a number?"} for number in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_same_policy_twice_gets_the_same_figures(copied: Project) -> None:
    folder = copied.run(
        "stage=eval",
        "stage.policies=[latest/sft,latest/sft]",
        "stage.reference=latest/sft",
        "stage.reward_model=latest/rm",
    )
    scores = _scores(folder)
    first, second = scores["policies"]
    assert first == second
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert scores["gains"] == [{"before": 0, "after": 1, "gold": 0.0, "ci95": [0.0, 0.0]}]
    assert scores["num_prompts"] == 16


def test_other_policy_gets_other_figures(copied: Project) -> None:
    folder = copied.run(
        "stage=eval", "stage.policies=[base,latest/sft]", "stage.reference=latest/sft", "stage.num_prompts=8"
    )
    scores = _scores(folder)
    base, sft = scores["policies"]
    assert base["kl"] > 1
    assert sft["kl"] == pytest.approx(0.0, abs=1e-6)
    assert sft["reward"] is None
    gain = scores["gains"][0]
    assert gain["gold"] == pytest.approx(sft["gold"]["overall"] - base["gold"]["overall"])
    assert gain["ci95"][0] <= gain["gold"] <= gain["ci95"][1]


def test_prompts_of_ones_own_have_no_gold(copied: Project, prompts: Path) -> None:
    folder = copied.run(
        "stage=eval",
        "stage.policies=[latest/sft]",
        "stage.reference=latest/sft",
        "stage.reward_model=latest/rm",
        f"data='{prompts}'",
        "data.shares.eval=0.5",
        "data.shares.sft=0.5",
        "data.shares.preference=0",
        "data.shares.rl=0",
    )
    policy = _scores(folder)["policies"][0]
    assert policy["gold"] == NOTHING
    assert policy["prejudice"] is None
    assert isinstance(policy["reward"], float)
    assert policy["kl"] == pytest.approx(0.0, abs=1e-6)
    assert _scores(folder)["gains"] == []
    scorecard = json.loads((folder / "scorecard.json").read_text())
    (named,) = scorecard["policies"].values()
    assert named["gold"] == NOTHING


def test_toy_judge_on_prompts_of_ones_own_is_refused(copied: Project, prompts: Path) -> None:
    with pytest.raises(AlignpipeError, match="judge"):
        copied.run("stage=eval", "stage.policies=[latest/sft]", "stage.judge=toy", f"data='{prompts}'")


def test_judge_none_leaves_gold_out_on_the_embedded_world(copied: Project) -> None:
    folder = copied.run("stage=eval", "stage.policies=[latest/sft]", "stage.judge=none")
    policy = _scores(folder)["policies"][0]
    assert policy["gold"] == NOTHING
    assert policy["prejudice"] is None
    assert policy["kl"] is None
    assert policy["reward"] is None
    assert policy["length"] > 0
