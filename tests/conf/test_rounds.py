"""Rounds: which stages they make, what names mean in them, and what is wrong with a round in one line."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from alignpipe.checks import problems
from alignpipe.compose import compose
from alignpipe.compose.command_line import read_line
from alignpipe.compose.composition import Composed
from alignpipe.compose.key_search import search
from alignpipe.compose.rerun import rerun_yaml
from alignpipe.compose.rounds import rewrite_rounds, unroll
from alignpipe.compose.sweeps import compose_sweep
from alignpipe.config import Config, PipelineConfig, StageConfig
from alignpipe.errors import ConfigError
from alignpipe.hydra_front import show

ROUNDS = "pipeline=llama2_rounds"
NAMES = ["collect", "rm", "rs", "ppo"]
CHANGES: dict[str, dict[str, Any]] = {
    "collect": {"policy": "newest", "previous": "collect"},
    "rs": {"policy": "newest", "pool": ["rs"]},
    "eval": {"policies": ["base", "sft", "newest"]},
}


@cache
def _composed(*words: str) -> Composed:
    return compose(list(words))


def _template(*, stages: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Config:
    """A pipeline with a round that is not unrolled yet."""
    config = _composed().config
    pipeline = PipelineConfig(
        **{**vars(config.pipeline), "round": NAMES, "rounds": 3, "start": "sft", **changes}
    )
    told = {name: CHANGES.get(name, {}) | (stages or {}).get(name, {}) for name in config.stages}
    made = {name: replace(stage, **told[name]) for name, stage in config.stages.items()}
    return replace(config, stages=made, pipeline=pipeline)


def _stages(**changes: Any) -> dict[str, StageConfig]:
    return unroll(_template(**changes)).stages


def _value(stage: StageConfig, key: str) -> Any:
    return vars(stage)[key]


def test_rounds_of_the_file_are_those_of_the_paper() -> None:
    config = _composed(ROUNDS).config
    assert config.pipeline is not None
    order = config.pipeline.order
    assert order[:7] == ["sft", "collect_1", "rm_1", "rs_1", "collect_2", "rm_2", "rs_2"]
    assert order[-5:] == ["collect_5", "rm_5", "rs_5", "ppo_5", "eval"]
    assert list(config.stages) == order
    assert _value(config.stages["collect_1"], "policy") == "sft"
    assert _value(config.stages["eval"], "policies") == [
        "base",
        "sft",
        "rs_1",
        "rs_2",
        "rs_3",
        "rs_4",
        "ppo_5",
    ]
    assert _value(config.stages["eval"], "reward_model") == "rm_5"


def test_names_mean_the_same_round_else_the_one_before_else_the_start() -> None:
    stages = _stages(rounds=4, from_round={"ppo": 2})
    newest = {name: _value(stages[name], "policy") for name in stages if name.startswith(("collect", "rs"))}
    assert newest == {
        **{"collect_1": "sft", "rs_1": "sft", "collect_2": "rs_1", "rs_2": "rs_1"},
        **{"collect_3": "ppo_2", "rs_3": "ppo_2", "collect_4": "ppo_3", "rs_4": "ppo_3"},
    }
    assert [_value(stages[f"collect_{k}"], "previous") for k in (1, 2, 3)] == [None, "collect_1", "collect_2"]
    assert [stages[f"rm_{k}"].data.path for k in (1, 2)] == ["collect_1", "collect_2"]
    assert [_value(stages[f"rs_{k}"], "reward_model") for k in (1, 4)] == ["rm_1", "rm_4"]
    assert [_value(stages[f"rs_{k}"], "pool") for k in (1, 2, 3)] == [[], ["rs_1"], ["rs_1", "rs_2"]]
    assert (_value(stages["ppo_3"], "policy"), _value(stages["ppo_3"], "reference")) == ("rs_3", "sft")
    assert _value(stages["eval"], "policies") == ["base", "sft", "rs_1", "ppo_2", "ppo_3", "ppo_4"]
    assert _value(stages["eval"], "reward_model") == "rm_4"


def test_stage_of_the_round_that_runs_later_is_its_copy_of_the_round_before() -> None:
    stages = _stages(stages={"collect": {"policy": "ppo"}}, from_round={"ppo": 2})
    assert [_value(stages[f"collect_{k}"], "policy") for k in (1, 2, 3)] == ["sft", "sft", "ppo_2"]


def test_list_after_the_rounds_holds_every_copy_once() -> None:
    stages = _stages(stages={"eval": {"policies": ["sft", "rs", "newest", "rs"]}}, rounds=2)
    assert _value(stages["eval"], "policies") == ["sft", "rs_1", "rs_2", "ppo_1", "ppo_2"]


def test_gate_of_a_repeated_stage_stands_before_every_round() -> None:
    config = _template(rounds=2)
    gates = {"rm": {"accuracy": ">=0.7"}, "rm_2": {"accuracy": ">=0.8"}, "sft": {"eval_loss": "<9"}}
    assert unroll(replace(config, gates=gates)).gates == {
        "rm_1": {"accuracy": ">=0.7"},
        "rm_2": {"accuracy": ">=0.8"},
        "sft": {"eval_loss": "<9"},
    }


def test_order_that_names_copies_runs_a_part_of_the_rounds() -> None:
    config = unroll(_template(order=["rs_2", "eval"]))
    assert config.pipeline is not None
    assert config.pipeline.order == ["rs_2", "eval"]
    assert _value(config.stages["rs_2"], "policy") == "ppo_1"


def test_each_round_has_random_numbers_of_its_own_and_the_same_prompts() -> None:
    stages = _stages(stages={"collect": {"seed": 3}}, round_overrides={2: {"rs": {"seed": 77}}})
    assert [stages[f"collect_{k}"].seed for k in (1, 2, 3)] == [3, 1003, 2003]
    assert [stages[f"rs_{k}"].seed for k in (1, 2, 3)] == [0, 77, 2000]
    assert stages["collect_1"].data == stages["collect_3"].data
    assert stages["sft"].seed == 0
    assert _stages(stages={"collect": {"seed": 2**32 - 1}})["collect_2"].seed == 999


def test_override_changes_one_round_under_both_spellings_of_its_number() -> None:
    overrides = {
        2: {"rs": {"epochs": 3, "policy": "rs"}},
        "2": {"rs": {"data": {"world": {"mix": {"fact": 9}}}}},
    }
    stages = _stages(round_overrides=overrides)
    assert [_value(stages[f"rs_{k}"], "epochs") for k in (1, 2, 3)] == [1.0, 3.0, 1.0]
    assert [_value(stages[f"rs_{k}"], "policy") for k in (1, 2, 3)] == ["sft", "rs_1", "ppo_2"]
    mixes = [stages[f"rs_{k}"].data.world.mix for k in (1, 2)]
    assert mixes[1] == mixes[0] | {"fact": 9.0} != mixes[0]


def test_words_about_one_round_become_keys_that_hydra_knows() -> None:
    words = [
        "stages.rs_2.epochs=1,3",
        "stages.sft_2.epochs=1",
        "++pipeline.round_overrides.3.rs.a.b=x",
        "seed=1",
    ]
    assert rewrite_rounds(words, lambda: ["rs"]) == [
        "++pipeline.round_overrides.2.rs.epochs=1,3",
        *words[1:],
    ]
    # Rounds count from 1, and a name may end in a number of its own.
    assert rewrite_rounds(["stages.rs_0.epochs=1"], lambda: ["rs"]) == ["stages.rs_0.epochs=1"]
    assert rewrite_rounds(["stages.rs_b_2.epochs=1"], lambda: ["rs_b"])[0].startswith(
        "++pipeline.round_overrides.2.rs_b"
    )


def test_users_file_and_words_change_one_round_and_all(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [llama2_rounds, _self_]\n"
        "pipeline:\n  name: mine\n  rounds: 2\n  from_round: {ppo: 1}\n"
        "  round_overrides: {2: {ppo: {kl_coef: 0.05, lr_schedule: cosine}}}\n"
    )
    words = [
        "pipeline.round_overrides.2.ppo.gamma=0.5",
        "stages.ppo_2.kl_coef=0.07",
        "stages.ppo.clip_range=0.3",
    ]
    stages = compose([*words, "pipeline=mine", "--config-dir", str(tmp_path)]).config.stages

    def rounds(key: str) -> list[Any]:
        return [_value(stages[f"ppo_{k}"], key) for k in (1, 2)]

    assert rounds("kl_coef") == [0.1, 0.07]
    assert rounds("gamma") == [1.0, 0.5]
    assert rounds("clip_range") == [0.3, 0.3]
    assert rounds("lr_schedule") == ["linear", "cosine"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"round": []}, "pipeline.round: is empty, so there is nothing to repeat"),
        ({"round": [], "rounds": 1, "from_round": {"rs": 2}}, "pipeline.round: is empty"),
        ({"round": ["collect", "rss"]}, "pipeline.round: there is no stage 'rss'. Did you mean rs?"),
        ({"round": ["rs", "rs"]}, "pipeline.round: rs stands in it twice"),
        ({"order": ["sft", "collect", "rm"]}, "must stand side by side in pipeline.order"),
        (
            {"order": ["sft", "collect", "rm", "ppo", "rs"]},
            "to run a part, name its rounds: pipeline.order=[collect_1]",
        ),
        (
            {"from_round": {"pppo": 2}},
            "pipeline.from_round: 'pppo' is no stage of pipeline.round. Did you mean ppo?",
        ),
        (
            {"round_overrides": {9: {}}},
            "pipeline.round_overrides: there is no round 9; pipeline.rounds makes 1 to 3",
        ),
        ({"round_overrides": {"x": {}}}, "pipeline.round_overrides: there is no round 'x'"),
        ({"round_overrides": {2: {"rss": {}}}}, "'rss' is no stage of pipeline.round. Did you mean rs?"),
        (
            {"round_overrides": {2: {"rs": 3}}},
            "pipeline.round_overrides.2.rs: expected a section of keys, got 3",
        ),
        ({"round_overrides": {2: 3}}, "pipeline.round_overrides.2: expected a section of stages, got 3"),
        (
            {"from_round": {"ppo": 3}, "round_overrides": {2: {"ppo": {}}}},
            "pipeline.round_overrides.2: ppo takes part from round 3 on",
        ),
        (
            {"round_overrides": {2: {"rs": {"epohcs": 2}}}},
            "there is no key 'stages.rs_2.epohcs'. Did you mean stages.rs_2.epochs?",
        ),
        (
            {"round_overrides": {2: {"rs": {"data": {"max_row": 2}}}}},
            "Did you mean stages.rs_2.data.max_rows?",
        ),
        (
            {"round_overrides": {2: {"rs": {"kind": "ppo"}}}},
            "stages.rs_2.kind: every round of a stage is of one kind",
        ),
        ({"stages": {"rs": {"reward_model": "rs"}}, "round": ["collect", "rs"], "order": []}, None),
        (
            {"stages": {"rs": {"reward_model": "collect"}}, "round": ["rs", "collect"], "order": []},
            "rs_1.reward_model",
        ),
    ],
    ids=str,
)
def test_wrong_round_gets_one_line(changes: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        # A policy stands for a policy; that it is no reward model, the graph says.
        assert _value(_stages(**changes)["rs_1"], "reward_model") == "sft"
        return
    with pytest.raises(ConfigError) as caught:
        _stages(**changes)
    line = str(caught.value)
    assert expected in line
    assert "\n" not in line and len(line) < 500


def test_names_inside_a_reward_and_a_monitor_are_those_of_the_round() -> None:
    words = ["pipeline.rounds=2", "stages.ppo.reward.models={rm:0.5}", "stages.ppo.reward.gate.model=rm"]
    config = compose(["pipeline=llama2_rounds", *words, "stages.rs.monitor.judge=rm"]).config
    reward = _value(config.stages["ppo_2"], "reward")
    assert (reward.models, reward.gate.model) == ({"rm_2": 0.5}, "rm_2")
    assert [_value(config.stages[name], "monitor").judge for name in ("rs_1", "rs_2")] == ["rm_1", "rm_2"]


def test_stage_of_the_name_of_a_copy_is_refused() -> None:
    config = _template()
    with pytest.raises(ConfigError, match=r"^stages.rs_2: rounds make a stage of that name"):
        unroll(replace(config, stages=config.stages | {"rs_2": config.stages["rs"]}))


def test_number_of_rounds_has_bounds() -> None:
    assert [line for line in problems(_template(rounds=101)) if "rounds" in line] == [
        "pipeline.rounds: must be at most 100, got 101"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.rs_2.epochs=fast"], "stages.rs_2.epochs: expected a number, got 'fast'"),
        (["stages.rs_2.epochs=0"], "stages.rs_2.epochs: must be more than 0"),
        (["objective=rs_9.length_shift"], "there is no stage 'rs_9' here. Did you mean rs_"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_word_about_rounds_gets_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([ROUNDS, *words])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_bad_value_of_a_repeated_stage_is_named_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([ROUNDS, "stages.rs.epochs=0"])
    assert str(caught.value) == "stages.rs.epochs: must be more than 0, got 0.0"


def test_sweep_over_one_round_makes_a_job_a_value() -> None:
    jobs = compose_sweep(read_line(["-m", ROUNDS, "pipeline.rounds=2", "stages.rs_2.epochs=1,3"])).jobs
    epochs = [[_value(job.config.stages[f"rs_{k}"], "epochs") for k in (1, 2)] for job in jobs]
    assert epochs == [[1.0, 1.0], [1.0, 3.0]]


def test_file_of_a_job_with_rounds_composes_to_the_same_and_takes_words(tmp_path: Path) -> None:
    composed = compose([ROUNDS, "pipeline.rounds=2", "stages.rs_2.epochs=3"])
    (tmp_path / "job.yaml").write_text(rerun_yaml(composed.yaml), encoding="utf-8")
    file = ["--config-dir", str(tmp_path), "--config-name", "job"]
    again = compose([*file, "seed=5", "stages.rs_2.min_reward=0", "pipeline.rounds=3"]).config.stages
    assert again["rm_2"].data.path == "collect_2"
    assert [again[f"rs_{k}"].seed for k in (1, 2, 3)] == [5, 1005, 2005]
    assert [_value(again[f"rs_{k}"], "epochs") for k in (1, 2, 3)] == [1.0, 3.0, 1.0]
    assert [_value(again[f"rs_{k}"], "min_reward") for k in (1, 2, 3)] == [None, 0.0, None]


def test_hydras_own_look_shows_what_words_change_and_ours_what_runs() -> None:
    words = [ROUNDS, "pipeline.rounds=2", "stages.rs_2.epochs=3"]
    shown = OmegaConf.create(show(read_line([*words, "--cfg", "job"]), [*words, "--cfg", "job"]))
    assert shown.pipeline.rounds == 2
    assert list(shown.stages) == ["sft", "collect", "rm", "rs", "ppo", "eval"]
    assert shown.pipeline.round_overrides["2"].rs.epochs == 3
    assert "rs_2" in OmegaConf.create(_composed(ROUNDS).resolved_yaml).stages


def test_search_tells_the_meaning_of_a_copys_key() -> None:
    found = {item.key: item for item in search("rso_beta", _composed(ROUNDS))}
    assert {"stages.rs_1.rso_beta", "stages.rs_2.rso_beta"} <= set(found)
    item = found["stages.rs_2.rso_beta"]
    assert item.file == "stage/rs.yaml" and item.comment.startswith("Temperature at which rso accepts")


def test_run_name_may_hold_a_value_of_a_repeated_stage() -> None:
    config = _composed(ROUNDS, "run.name='kl-${stages.ppo.kl_coef}'").config
    assert config.run.name == "kl-0.1"


def test_online_dpo_starts_each_round_from_the_policy_before_it() -> None:
    stages = _composed("pipeline=online_dpo").config.stages
    assert list(stages) == ["sft", *(f"{kind}_{k}" for k in (1, 2, 3) for kind in ("collect", "dpo")), "eval"]
    for key, stage in (("policy", "collect"), ("policy", "dpo"), ("reference", "dpo")):
        assert [_value(stages[f"{stage}_{k}"], key) for k in (1, 2, 3)] == ["sft", "dpo_1", "dpo_2"]
    assert [stages[f"dpo_{k}"].data.path for k in (1, 2, 3)] == ["collect_1", "collect_2", "collect_3"]
    assert [_value(stages[f"collect_{k}"], "previous") for k in (1, 2, 3)] == [None] * 3
    assert _value(stages["eval"], "policies") == ["base", "sft", "dpo_1", "dpo_2", "dpo_3"]
