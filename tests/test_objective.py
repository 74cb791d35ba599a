"""What an objective may name is known before anything runs; a training reward is refused unless allowed."""

import json

import pytest

from alignpipe.artifact import read_manifest
from alignpipe.compose import compose
from alignpipe.errors import ConfigError
from alignpipe.objective import (
    POLICY_FIGURES,
    STAGE_FIGURES,
    check_searchable,
    is_low_best,
    objective_value,
)
from tests.project import Project


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["objective=pp0.gold.overall"], "no stage 'pp0' here. Did you mean ppo.gold.overall?"),
        (["objective=ppo.gold.overal"], "no figure 'gold.overal'. Did you mean ppo.gold.overall?"),
        (["objective=rm.acuracy"], "Did you mean rm.accuracy?"),
        (["objective=rm.gold.overall"], "needs rm among the policies of the eval stage (base, sft, rs, ppo)"),
        (["objective=ppo"], "ppo is a stage, name one of its figures: ppo.gold.overall"),
        (["objective=ppo.gold.overall", "pipeline.order=[sft]"], "no stage 'ppo' here"),
        (["objective=sft.gold.overall", "pipeline.order=[sft]"], "needs an eval stage in pipeline.order"),
        (["objective=dpo.reward", "pipeline=zephyr_style"], "dpo.reward needs a reward_model in the eval"),
        (["objective=sft.gold.overall", "stages.eval.judge=none"], "needs data=toy"),
        (["objective=ppo.reward"], "is the reward that training maximizes"),
        (["objective=rs.reward_best"], "take rs.gold.overall, or allow it with objective_allow_proxy=true"),
        (["objective_direction=maximise"], "Did you mean maximize?"),
    ],
)
def test_objective_that_cannot_be_names_the_right_word(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert complaint in str(caught.value)


def test_proxy_is_taken_once_allowed_in_words() -> None:
    assert compose(["objective=ppo.reward", "objective_allow_proxy=true"]).config.objective == "ppo.reward"


def test_search_without_gold_names_a_figure() -> None:
    config = compose(["stage=sft"]).config
    with pytest.raises(
        ConfigError, match=r"no gold score to search by; for example objective=sft\.eval_loss"
    ):
        check_searchable(config, "optuna")


@pytest.mark.parametrize(
    ("words", "low"),
    [
        ([], False),
        (["objective=ppo.gold.overall"], False),
        (["objective=sft.eval_loss"], True),
        (["objective=ppo.kl"], True),
        (["objective=ppo.prejudice.gold_gap"], True),
        (["objective=ppo.kl", "objective_direction=maximize"], False),
        (["objective_direction=minimize"], True),
    ],
)
def test_losses_distances_and_gaps_are_best_low(words: list[str], low: bool) -> None:
    assert is_low_best(compose(words).config) is low


def test_value_is_the_scorecards_or_the_stages() -> None:
    card = {"policies": {"sft": {"gold": {"overall": 0.5}}, "ppo": {"gold": {"overall": 0.75}, "kl": None}}}
    metrics = {"ppo": {"kl": 2}, "sft": {"eval_loss": None}}
    assert objective_value(None, card, metrics) == 0.75
    assert objective_value("sft.gold.overall", card, metrics) == 0.5
    assert objective_value("ppo.kl", card, metrics) == 2.0
    assert objective_value("sft.eval_loss", card, metrics) is None
    assert objective_value(None, None, metrics) is None


def test_every_figure_that_is_offered_is_there_in_the_end(finished: Project) -> None:
    metrics = {}
    for folder in (finished.outputs / "stages").iterdir():
        manifest = read_manifest(folder)
        assert manifest is not None
        metrics[manifest.kind] = manifest.metrics
    for kind in metrics:
        for figure in STAGE_FIGURES[kind]:
            assert objective_value(f"{kind}.{figure}", None, metrics) is not None, f"{kind}.{figure}"
    (run,) = (finished.outputs / "runs").glob("*/scorecard.json")
    card = json.loads(run.read_text(encoding="utf-8"))
    for figure in POLICY_FIGURES:
        assert objective_value(f"ppo.{figure}", card, {}) is not None, figure
