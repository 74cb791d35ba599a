"""Rejection sampling: which response is kept, and the curve of the best of n."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpipe.errors import AlignpipeError, CheckpointError, ConfigError
from alignpipe.evaluation.candidates import REASONS
from alignpipe.pipeline.build import build_graph
from alignpipe.pipeline.keys import add_keys
from alignpipe.pipeline.store import Store
from alignpipe.stages.rs import _curve
from tests.project import Project


def _folder(project: Project) -> Path:
    return project.outputs / "runs" / (project.outputs / "latest").read_text().strip() / "rs"


def _metrics(project: Project) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((_folder(project) / "alignpipe.json").read_text())["metrics"]
    return metrics


def _candidates(project: Project, stage: str = "rs") -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (_folder(project).parent / stage / "candidates.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["prompt"], []).append(row)
    return found


def _able(row: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that ended, are not empty and differ; the small world's copies of prompts are none."""
    ended = [item for item in row if item["finished"] and len(item["ids"]) > 1]
    return [item for place, item in enumerate(ended) if item["ids"] not in [o["ids"] for o in ended[:place]]]


def test_curve_goes_from_the_mean_to_the_best(finished: Project) -> None:
    metrics = _metrics(finished)
    curve = metrics["best_of_n"]
    assert len(curve) == 3
    assert curve == sorted(curve)
    assert curve[0] == pytest.approx(metrics["reward_mean"], abs=1e-6)
    assert curve[-1] == pytest.approx(metrics["reward_best"], abs=1e-6)


def test_curve_stands_in_the_metrics_for_every_n(finished: Project) -> None:
    line = json.loads((_folder(finished) / "metrics.jsonl").read_text().splitlines()[0])
    logged = [line[f"rs/best_of_{n}"] for n in (1, 2, 3)]
    assert logged == pytest.approx(_metrics(finished)["best_of_n"])
    assert line["rs/reward_mean"] == pytest.approx(logged[0])
    assert line["rs/reward_best"] == pytest.approx(logged[2])


def test_curve_of_known_rewards() -> None:
    # Best of two of (1, 2, 4): pairs give 2, 4, 4; of (0, 0, 3): 0, 3, 3.
    rewards = np.array([[4.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    assert _curve(rewards, np.ones((2, 3), dtype=bool)) == pytest.approx(
        [(7 / 3 + 1) / 2, (10 / 3 + 2) / 2, (4 + 3) / 2]
    )


def test_responses_that_must_not_be_chosen_are_not_in_the_curve() -> None:
    rewards = np.array([[4.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    able = np.array([[False, True, True], [True, False, False]])
    # Subsets of two with one able: of the first 2, 1, 2; of the second 0, 0.
    assert _curve(rewards, able) == pytest.approx([3 / 3, 5 / 5, 2 / 2])
    assert _curve(rewards, np.zeros((2, 3), dtype=bool)) == []


def test_figures_count_what_was_left_out_and_what_was_chosen(finished: Project) -> None:
    metrics, candidates = _metrics(finished), _candidates(finished)
    able = [_able(row) for row in candidates.values()]
    everything = [item for row in candidates.values() for item in row]
    assert metrics["filtered/no_eos"] == sum(not item["finished"] for item in everything) > 0
    assert sum(metrics[f"filtered/{reason}"] for reason in REASONS) == len(everything) - sum(map(len, able))
    assert metrics["unanswered"] == sum(not row for row in able)
    assert metrics["selected/new"] == sum(bool(row) for row in able)
    best = [min(row, key=lambda item: (-item["reward"], len(item["ids"]))) for row in able if row]
    assert metrics["reward_selected"] == pytest.approx(np.mean([item["reward"] for item in best]))
    assert metrics["reward_selected"] == pytest.approx(metrics["reward_best"])
    means = [np.mean([item["reward"] for item in row]) for row in able if row]
    assert metrics["reward_mean"] == pytest.approx(np.mean(means))
    lengths = [np.mean([len(item["ids"]) for item in items]) for items in (best, everything)]
    assert metrics["length_shift"] == pytest.approx(lengths[0] - lengths[1])


def test_training_rows_are_those_chosen_and_the_replayed(copied: Project) -> None:
    metrics, candidates = _metrics(copied), _candidates(copied)
    assert metrics["rows"] == metrics["selected/new"] + round(metrics["selected/new"] * 0.2 / 0.8)
    copied.run("pipeline.order=[rs]", "stages.rs.replay=0", "stages.rs.select=top_k", "stages.rs.top_k=2")
    # The same seed samples the same responses, whatever is chosen of them.
    assert _candidates(copied) == candidates
    assert _metrics(copied)["best_of_n"] == pytest.approx(metrics["best_of_n"])
    assert _metrics(copied)["rows"] == sum(min(2, len(_able(row))) for row in candidates.values())


def test_batches_of_scoring_sampling_and_training_change_nothing(copied: Project) -> None:
    metrics, candidates = _metrics(copied), _candidates(copied)
    (_folder(copied).resolve() / "alignpipe.json").unlink()
    copied.run("pipeline.order=[rs]", "stages.rs.micro_batch_size=4", "rollout.batch_size=7")
    assert copied.states() == {"rs": "done"}
    again, rows = _metrics(copied), _candidates(copied)
    assert again.pop("best_of_n") == pytest.approx(metrics.pop("best_of_n"), abs=1e-5)
    assert again == pytest.approx(metrics, abs=1e-5)
    assert list(rows) == list(candidates)
    for prompt, row in rows.items():
        assert [item["ids"] for item in row] == [item["ids"] for item in candidates[prompt]]
        rewards = [[item["reward"] for item in found[prompt]] for found in (rows, candidates)]
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_rso_is_chosen_by_a_word(copied: Project) -> None:
    candidates = [_able(row) for row in _candidates(copied).values()]
    words = ("pipeline.order=[rs]", "stages.rs.replay=0", "stages.rs.num_accepted=1")
    copied.run(*words, "stages.rs.select=rso", "stages.rs.rso_beta=1e-6")
    # So cold, it takes the best alone.
    best = [max(item["reward"] for item in row) for row in candidates if row]
    assert _metrics(copied)["reward_selected"] == pytest.approx(np.mean(best))


def test_pool_brings_the_responses_of_an_earlier_round_scored_anew(copied: Project) -> None:
    second = (
        "+stage@stages.rs_2=rs",
        "stages.rs_2.policy=rs",
        "stages.rs_2.reward_model=rm",
        "stages.rs_2.seed=9",
    )
    words = (*second, "stages.rs_2.replay=0", "pipeline.order=[rs,rs_2]")
    copied.run(*words)
    folder = _folder(copied).parent
    alone = json.loads((folder / "rs_2" / "alignpipe.json").read_text())
    own, earlier = _candidates(copied, "rs_2"), _candidates(copied, "rs")
    copied.run(*words, "stages.rs_2.pool=[rs]")
    folder = _folder(copied).parent
    united = json.loads((folder / "rs_2" / "alignpipe.json").read_text())
    # Its own file holds its own responses alone.
    assert _candidates(copied, "rs_2") == own
    expected = {"new": 0, "pool": 0}
    for prompt, row in own.items():
        able = _able([*row, *earlier[prompt]])
        # The reward model is the same here, so rewards of both files compare.
        if able:
            best = min(able, key=lambda item: (-round(item["reward"], 4), len(item["ids"])))
            expected["new" if best in row else "pool"] += 1
    assert united["metrics"]["selected/new"] == pytest.approx(expected["new"], abs=1)
    assert united["metrics"]["selected/pool_0"] == pytest.approx(expected["pool"], abs=1)
    assert united["metrics"]["selected/pool_0"] > 0
    assert united["metrics"]["reward_selected"] > alone["metrics"]["reward_selected"]
    assert united["key"] != alone["key"]
    assert (
        united["parents"]["pool_0"]["key"]
        == json.loads((folder / "rs" / "alignpipe.json").read_text())["key"]
    )


def test_pool_takes_stages_of_runs_and_folders_and_nothing_but_rs(copied: Project) -> None:
    config, store = copied.compose("pipeline.order=[rs]", "stages.rs.seed=3").config, Store(copied.outputs)

    def key(*pool: str) -> str:
        stages = config.stages | {"rs": replace(config.stages["rs"], pool=list(pool))}
        graph = build_graph(replace(config, stages=stages), store)
        add_keys(graph, config, store, "")
        return graph.nodes["rs"].key

    folder = str(_folder(copied).resolve())
    assert key("latest/rs") == key(folder) != key()
    with pytest.raises(
        ConfigError, match=r"stages.rs.pool: sft is made by a stage of kind sft; needed .* rs"
    ):
        key("sft")
    with pytest.raises(ConfigError, match=r"stages.rs.pool: base is made by no stage"):
        key("base")
    with pytest.raises(CheckpointError, match=r"stages.rs.pool: latest/rm is made by a stage of kind rm"):
        key("latest/rm")
    with pytest.raises(ConfigError, match=r"stages.rs.pool: 'rss' is no stage.*Did you mean rs\?"):
        key("rss")


def test_nothing_to_learn_is_one_line_with_the_reasons(copied: Project) -> None:
    with pytest.raises(
        AlignpipeError, match=r"rs: no response can be learnt, .*low_reward \d+.*lower min_reward"
    ):
        copied.run("pipeline.order=[rs]", "stages.rs.min_reward=99")
