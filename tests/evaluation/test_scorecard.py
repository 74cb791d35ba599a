"""The scorecard as it is read by a person: what is shown, what is warned of, what comes next."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from alignpipe.pipeline.scorecard import hacked, print_scorecard


def _figures(overall: float | None, reward: float | None) -> dict[str, Any]:
    gold = dict.fromkeys(("overall", "helpful", "truthful", "harmless"), overall)
    interval = None if overall is None else [overall - 0.01, overall + 0.01]
    return {"gold": {**gold, "ci95": interval}, "reward": reward, "kl": None, "length": 7.25}


def _scorecard(
    rewards: tuple[float | None, float | None], gain: float, interval: tuple[float, float]
) -> dict[str, Any]:
    return {
        "policies": {"sft": _figures(0.5, rewards[0]), "ppo": _figures(0.5 + gain, rewards[1])},
        "gains": [{"before": "sft", "after": "ppo", "gold": gain, "ci95": list(interval)}],
        "reward_model": {"accuracy": 0.875, "gold_accuracy": 0.75},
    }


def _printed(scorecard: dict[str, Any] | None) -> str:
    written = io.StringIO()
    print_scorecard(scorecard, Path("outputs/runs/mine"), Console(file=written, width=200, color_system=None))
    return written.getvalue()


def test_reward_up_and_gold_surely_down_is_hacking() -> None:
    found = hacked(_scorecard((0.0, 1.5), -0.2, (-0.3, -0.1)))
    assert found == ["reward hacking from sft to ppo: reward 0.00 -> 1.50 while gold changed by -0.200"]


def test_no_hacking_where_gold_may_not_have_fallen() -> None:
    assert hacked(_scorecard((0.0, 1.5), -0.02, (-0.1, 0.05))) == []
    assert hacked(_scorecard((0.0, 1.5), 0.2, (0.1, 0.3))) == []


def test_no_hacking_where_reward_fell_too() -> None:
    assert hacked(_scorecard((1.0, 0.5), -0.2, (-0.3, -0.1))) == []


def test_no_hacking_without_a_reward_model() -> None:
    assert hacked(_scorecard((None, None), -0.2, (-0.3, -0.1))) == []


def test_table_shows_each_policy_and_the_gain() -> None:
    text = _printed(_scorecard((0.0, 1.5), 0.2, (0.1, 0.3)))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["sft"][:6] == ["0.500", "0.490", "0.510", "0.500", "0.500", "0.500"]
    assert float(rows["sft"][6]) == 0
    assert rows["sft"][7:] == ["-", "7.2"]
    assert rows["ppo"][0] == "0.700"
    assert float(rows["ppo"][6]) == 1.5
    assert "gold sft -> ppo: +0.200 [+0.100, +0.300]" in text
    assert "reward model: held-out accuracy 0.875, 0.750 against gold" in text
    assert "try next:" in text
    assert "warning" not in text
    assert str(Path("outputs/runs/mine/scorecard.json")) in text


def test_hacking_is_warned_of_and_changes_the_advice() -> None:
    text = _printed(_scorecard((0.0, 1.5), -0.2, (-0.3, -0.1)))
    assert "warning: reward hacking from sft to ppo" in text
    assert "try next: a larger stages.ppo.kl_coef" in text


def test_what_was_not_measured_is_a_dash() -> None:
    scorecard = {
        "policies": {"base": _figures(None, None)},
        "gains": [],
        "reward_model": {"accuracy": None, "gold_accuracy": None},
    }
    text = _printed(scorecard)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["base"] == ["-"] * 7 + ["7.2"]
    assert "reward model" not in text


def test_without_an_eval_stage_nothing_is_shown() -> None:
    assert _printed(None) == ""
