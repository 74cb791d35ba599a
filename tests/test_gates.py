"""A gate that does not hold ends the run before the next stage; figures and bounds are checked before anything runs."""

from pathlib import Path

import pytest

from alignpipe.compose import compose
from alignpipe.errors import AlignpipeError, ConfigError
from alignpipe.gates import Gate, find_gates
from alignpipe.pipeline.scorecard import SCORECARD
from tests.project import Project

SHORT = ("pipeline.order=[sft,eval]", "stages.eval.policies=[sft]", "stages.eval.reward_model=null")


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        (
            "gates.rm.acuracy=>=0.7",
            "gates.rm.acuracy: stage rm has no figure 'acuracy'. Did you mean rm.accuracy?",
        ),
        ("gates.pp0.kl=<9", "gates.pp0.kl: there is no stage 'pp0' here. Did you mean ppo.kl?"),
        ("gates.rm.accuracy=0.7", "0.7 is no bound; write one of >= <= > < and a number"),
        ("gates.rm.accuracy=>=much", "'>=much' is no bound"),
        ("gates.rm=0.7", "gates.rm: give figures and their bounds"),
        ("gates.ppo.gold.overal=>=0.7", "no figure 'gold.overal'. Did you mean ppo.gold.overall?"),
        ("gate_action=halt", "gate_action: there is no 'halt' here"),
    ],
)
def test_gate_that_cannot_be_names_the_right_word(word: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert complaint in str(caught.value)


def test_gates_are_read_from_words_and_sections() -> None:
    words = ["gates.rm.gold_accuracy=>=0.7", "gates.ppo.gold.overall=>.5", 'gates={sft:{eval_loss:"< 1e-1"}}']
    assert find_gates(compose(words).config) == [
        Gate("rm", "gold_accuracy", ">=", 0.7),
        Gate("ppo", "gold.overall", ">", 0.5, of_policy=True),
        Gate("sft", "eval_loss", "<", 0.1),
    ]


def test_figure_that_a_stage_ends_with_needs_no_scorecard() -> None:
    (gate,) = find_gates(compose(["gates.collect.finished=>=0.9", "pipeline.order=[sft,collect]"]).config)
    assert not gate.of_policy
    # The scorecard has a kl of ppo too; the stage's own is known first.
    (gate,) = find_gates(compose(["gates.ppo.kl=<=20"]).config)
    assert not gate.of_policy


@pytest.mark.parametrize(
    ("sign", "holds"),
    [
        (">=", (False, True, True)),
        ("<=", (True, True, False)),
        (">", (False, False, True)),
        ("<", (True, False, False)),
    ],
)
def test_bound_holds_as_its_sign_says(sign: str, holds: tuple[bool, bool, bool]) -> None:
    gate = Gate("rm", "accuracy", sign, 0.7)
    found = tuple(gate.why_shut({"accuracy": value}) is None for value in (0.6, 0.7, 0.8))
    assert found == holds


def test_figure_that_is_missing_shuts_a_gate() -> None:
    assert "ended without this figure" in str(Gate("rm", "accuracy", ">=", 0.7).why_shut({"accuracy": None}))


def test_shut_gate_stops_before_the_next_stage_and_the_same_words_without_it_go_on(tmp_path: Path) -> None:
    project = Project(tmp_path / "outputs")
    with pytest.raises(
        AlignpipeError, match=r"gate sft\.eval_loss <=0\.01: it is \d.*go on with gate_action=warn"
    ) as caught:
        project.run(*SHORT, "gates.sft.eval_loss=<=0.01")
    assert caught.value.exit_code == 1
    assert project.states() == {"sft": "done", "eval": "waiting"}
    # A reused stage stands before the same gate.
    with pytest.raises(AlignpipeError, match=r"gate sft\.eval_loss"):
        project.run(*SHORT, "gates.sft.eval_loss=<=0.01")
    project.run(*SHORT, "gates.sft.eval_loss=<=0.01", "gate_action=warn")
    assert project.states() == {"sft": "reused", "eval": "done"}


def test_gate_of_a_policy_is_looked_at_once_it_is_judged(tmp_path: Path) -> None:
    project = Project(tmp_path / "outputs")
    with pytest.raises(AlignpipeError, match=r"gate sft\.gold\.overall >1"):
        project.run(*SHORT, "gates.sft.gold.overall=>1")
    assert project.states() == {"sft": "done", "eval": "done"}
    assert (
        tmp_path / "outputs" / "runs" / (tmp_path / "outputs" / "latest").read_text().strip() / SCORECARD
    ).is_file()
    assert project.run(*SHORT, "gates.sft.gold.overall=>=0", "gates.sft.eval_loss=<=100")
