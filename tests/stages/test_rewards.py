"""Rewards on the finished chain: a function alone, beside a reward model, under a gate; stopped, resumed, adapted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignpipe.artifact import sha256_file
from alignpipe.errors import AlignpipeError, ConfigError
from tests.project import Project
from tests.stopping import stopped_at_the_first_save

RS = ("stage=rs", "stage.policy=latest/sft", "stage.num_prompts=24")
PPO = ("stage=ppo", "stage.policy=latest/sft", "stage.reference=latest/sft", "stage.log_steps=1")
EVAL = ("stage=eval", "stage.policies=[latest/sft]", "stage.num_prompts=12", "stage.judge=none")
MODEL = "stage.reward_model=latest/rm"


def _letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [
        len(response) / 10 - len(prompt) / 100 for prompt, response in zip(prompts, responses, strict=True)
    ]


SOURCE = '''"""A reward of my own."""


def letters(prompts, responses):
    assert len(prompts) == len(responses)
    return [len(response) / 10 - len(prompt) / 100 for prompt, response in zip(prompts, responses, strict=True)]


def broken(prompts, responses):
    return [1 / 0 for _ in responses]
'''


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The word that names a function in the working folder."""
    (tmp_path / "my_reward.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return "stage.reward.function=./my_reward.py:letters"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _policy(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "scores.json").read_text())["policies"][0]
    return found | {f"reward/{name}": mean for name, mean in found.get("reward_terms", {}).items()}


def test_rs_scores_every_response_by_the_function(copied: Project, function: str) -> None:
    folder = copied.run(*RS, "stage.reward_model=null", function) / "rs"
    rows = _rows(folder / "candidates.jsonl")
    assert len(rows) == 24 * 3
    by_hand = _letters([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert [row["reward"] for row in rows] == pytest.approx(by_hand)
    figures = _rows(folder / "metrics.jsonl")[0]
    assert figures["reward/function"] == pytest.approx(sum(by_hand) / len(by_hand))


def test_terms_add_up_with_their_weights(copied: Project, function: str) -> None:
    half = "stage.reward.function_weight=0.5"
    policy = _policy(copied.run(*EVAL, MODEL, function, half, "stage.reward.models={latest/rm:2}"))
    model, mine = policy["reward/latest/rm"], policy["reward/function"]
    assert policy["reward"] == pytest.approx(2 * model + 0.5 * mine)
    # The reward model's own term is what it is without company.
    assert _policy(copied.run(*EVAL, MODEL))["reward"] == pytest.approx(model)


@pytest.mark.parametrize(("below", "shut"), [(0.999, 1.0), (1e-6, 0.0)])
def test_below_the_gate_its_model_is_heard_alone(
    copied: Project, function: str, below: float, shut: float
) -> None:
    words = (function, "stage.reward.gate.model=latest/rm", f"stage.reward.gate.below={below}")
    policy = _policy(copied.run(*EVAL, *words))
    assert policy["reward/gated"] == shut
    assert policy["reward"] == pytest.approx(policy["reward/latest/rm" if shut else "reward/function"])


def test_ensemble_of_a_model_with_itself_is_the_model(copied: Project) -> None:
    # Two names of one folder: two models to the stage, which cannot disagree.
    folder = next((copied.outputs / "stages").glob("rm-*"))
    words = (MODEL, f"stage.reward.models={{{folder}:1}}", "stage.reward.ensemble=mean_minus_std")
    policy = _policy(copied.run(*EVAL, *words))
    assert policy["reward"] == pytest.approx(policy["reward/latest/rm"])
    assert policy["reward"] == pytest.approx(policy[f"reward/{folder}"])


def test_ppo_learns_from_both_and_resumes_bit_for_bit(copied: Project, function: str) -> None:
    words = (*PPO, MODEL, function, "stage.save_steps=1")
    folder = copied.run(*words) / "ppo"
    weights, lines = sha256_file(folder / "model.safetensors"), _rows(folder / "metrics.jsonl")
    assert all({"reward/latest/rm", "reward/function"} <= line.keys() for line in lines)
    assert copied.states() == {"ppo": "done"}
    copied.run(*words)
    assert copied.states() == {"ppo": "reused"}
    task = copied.prepare("ppo", *words)
    with stopped_at_the_first_save():
        copied.run(*words)
    copied.run(*words)
    assert sha256_file(task.target / "model.safetensors") == weights
    # An edit, and the stage is another one.
    Path("my_reward.py").write_text(SOURCE.replace("/ 10", "/ 20"), encoding="utf-8")
    assert sha256_file(copied.run(*words) / "ppo" / "model.safetensors") != weights


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_pp"])
def test_ppo_without_any_model_that_rewards(copied: Project, function: str, advantage: str) -> None:
    words = (
        *PPO,
        "stage.reward_model=null",
        function,
        f"stage.advantage={advantage}",
        "stage.num_rollouts=1",
    )
    folder = copied.run(*words, "stage.num_samples=2", "stage.missing_eos_penalty=0") / "ppo"
    (line,) = _rows(folder / "metrics.jsonl")
    assert line["objective/score"] == pytest.approx(line["reward/function"])
    row = _rows(folder / "samples.jsonl")[0]
    assert row["reward"] == pytest.approx(_letters([row["prompt"]], [row["response"]])[0])


def test_ensemble_of_one_model_with_one_head_is_refused(copied: Project) -> None:
    with pytest.raises(ConfigError, match="needs members that can disagree, but latest/rm has one head"):
        copied.run(*EVAL, MODEL, "stage.reward.ensemble=mean_minus_std")


def test_mistake_in_the_function_is_one_line_and_its_traceback_is_kept(
    copied: Project, function: str
) -> None:
    with pytest.raises(AlignpipeError) as caught:
        copied.run(*RS, MODEL, function.replace("letters", "broken"))
    line = str(caught.value)
    assert line.startswith("./my_reward.py:10: ZeroDivisionError: division by zero, at prompts[0] = ")
    assert "\n" not in line and caught.value.exit_code == 1
    log = Path(line.rpartition("; see ")[2])
    assert "return [1 / 0 for _ in responses]" in log.read_text()
    assert copied.states() == {"rs": "failed"}
