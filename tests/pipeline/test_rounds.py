"""Rounds as a user runs them: what earlier rounds made is carried on, and what is finished is not made again."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignpipe.compose import compose
from alignpipe.errors import CheckpointError, ConfigError
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.runner import run
from tests.project import Project

ROUNDS = "pipeline=llama2_rounds"


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "alignpipe.json").read_text())["metrics"]
    return metrics


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_two_rounds_go_on_from_one_and_three_from_two(copied: Project) -> None:
    folder = copied.run(ROUNDS, "pipeline.rounds=2")
    # The first round is the plain chain, whatever its stages are called.
    made = dict.fromkeys(("sft", "collect_1", "rm_1", "rs_1"), "reused")
    assert copied.states() == made | dict.fromkeys(("collect_2", "rm_2", "rs_2", "ppo_2", "eval"), "done")

    earlier, united = (_lines(folder / name / "rankings.jsonl") for name in ("collect_1", "collect_2"))
    figures = _metrics(folder / "collect_2")
    assert united[: len(earlier)] == earlier
    assert (figures["carried"], figures["prompts"]) == (len(earlier), len(united) - len(earlier))
    assert _metrics(folder / "collect_1")["carried"] == 0
    assert _metrics(folder / "rm_2")["rows"] > _metrics(folder / "rm_1")["rows"]

    figures = _metrics(folder / "rs_2")
    chosen = len(_lines(folder / "rs_2" / "candidates.jsonl")) / 3 - figures["unanswered"]
    assert figures["selected/new"] + figures["selected/pool_0"] == chosen
    assert figures["selected/pool_0"] > 0

    scorecard = json.loads((folder / "scorecard.json").read_text())
    assert list(scorecard["policies"]) == ["base", "sft", "rs_1", "ppo_2"]
    steps = [(gain["before"], gain["after"]) for gain in scorecard["gains"]]
    assert steps == [("base", "sft"), ("sft", "rs_1"), ("rs_1", "ppo_2")]

    rows = {row.name: row for row in make_plan(copied.compose(ROUNDS, "pipeline.rounds=3").config).rows}
    again = [name for name, row in rows.items() if row.state == "reuse"]
    assert again == ["sft", "collect_1", "rm_1", "rs_1", "collect_2", "rm_2", "rs_2"]
    assert rows["rs_3"].reads.split()[2] == "pool=rs_1,rs_2"
    # Two rounds are carried on, and the third asks the same prompts again.
    asked, known = rows["collect_3"].rows, len(united)
    assert asked is not None
    assert rows["rm_3"].rows == pytest.approx((known + asked) * 0.85, rel=0.15)
    assert all(row.estimate is not None for row in rows.values() if row.state == "run")


def test_change_of_one_round_reaches_that_round_and_those_after_it(project: Project) -> None:
    def keys(*words: str) -> dict[str, str]:
        plan = make_plan(project.compose(ROUNDS, "pipeline.rounds=3", *words).config)
        return {row.name: row.key for row in plan.rows}

    before, after = keys(), keys("stages.rs_2.rso_beta=0.1", "pipeline.from_round.ppo=9")
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"rs_2", "collect_3", "rm_3", "rs_3", "eval"}
    assert before.keys() - after.keys() == {"ppo_3"}


def test_previous_of_another_kind_is_refused(copied: Project) -> None:
    with pytest.raises(
        ConfigError, match=r"stages.collect.previous: sft is made by a stage of kind sft; needed .* coll"
    ):
        make_plan(copied.compose("stages.collect.previous=sft").config)
    with pytest.raises(
        CheckpointError, match=r"stages.collect.previous: latest/rs is made by a stage of kind rs"
    ):
        make_plan(copied.compose("stages.collect.previous=latest/rs").config)


@pytest.mark.slow  # three rounds on the embedded world take minutes
def test_gold_rises_over_the_rounds_of_the_embedded_world(tmp_path: Path) -> None:
    words = [ROUNDS, "pipeline.rounds=3", f"output_dir='{tmp_path}'"]
    composed = compose(words)
    done = run(composed.config, words, composed.yaml)
    scorecard = json.loads((tmp_path / "runs" / done.name / "scorecard.json").read_text())
    gold = {name: figures["gold"]["overall"] for name, figures in scorecard["policies"].items()}
    assert list(gold) == ["base", "sft", "rs_1", "rs_2", "ppo_3"]
    assert gold["sft"] + 0.02 < gold["rs_1"] < gold["rs_2"] < gold["ppo_3"]


@pytest.mark.slow  # four stages are trained and two sampled
def test_online_dpo_trains_each_round_on_responses_of_the_last(copied: Project) -> None:
    folder = copied.run("pipeline=online_dpo", "pipeline.rounds=2")
    states = copied.states()
    assert states.pop("sft") == states.pop("collect_1") == "reused"
    assert states == dict.fromkeys(("dpo_1", "collect_2", "dpo_2", "eval"), "done")
    parents = json.loads((folder / "dpo_2" / "alignpipe.json").read_text())["parents"]
    assert parents["policy"]["key"] == parents["reference"]["key"]
    assert list(json.loads((folder / "scorecard.json").read_text())["policies"])[2:] == ["dpo_1", "dpo_2"]
