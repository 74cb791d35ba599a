"""The scorecard as it is read by a person: what is shown, what is warned of, what comes next."""

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from alignpipe.evaluation.figures import written
from alignpipe.evaluation.statistics import Figure
from alignpipe.objective import POLICY_FIGURES
from alignpipe.pipeline.scorecard import hacked, print_scorecard


def _figures(overall: float | None, reward: float | None) -> dict[str, Any]:
    gold = dict.fromkeys(("overall", "helpful", "truthful", "harmless"), overall)
    interval = None if overall is None else [overall - 0.01, overall + 0.01]
    measured = {"gold": {**gold, "ci95": interval}, "reward": reward, "length": 7.25, "finished": 0.5}
    return written({}, None) | measured


def _scorecard(
    rewards: tuple[float | None, float | None], gain: float, interval: tuple[float, float]
) -> dict[str, Any]:
    return {
        "policies": {"sft": _figures(0.5, rewards[0]), "ppo": _figures(0.5 + gain, rewards[1])},
        "gains": [{"before": "sft", "after": "ppo", "gold": gain, "ci95": list(interval)}],
        "win_rate_against": None,
        "reward_model": {"accuracy": 0.875, "gold_accuracy": 0.75, "prejudice": None},
    }


def _gaps(reward: float, p_value: float) -> dict[str, Any]:
    found = {"gap": reward, "highest": "Borvos", "lowest": "Zumis", "ci95": [0.25, 0.75]}
    return {"details": {"reward": {**found, "by_chance": 0.375, "p_value": p_value}}}


def _printed(scorecard: dict[str, Any] | None) -> str:
    written = io.StringIO()
    print_scorecard(scorecard, Path("outputs/runs/mine"), Console(file=written, width=200, color_system=None))
    return written.getvalue()


def _rows(text: str, table: int) -> dict[str, list[str]]:
    """First cell -> the others, of the nth table."""
    block = text.strip("\n").split("\n\n")[table]
    lines = [line.split() for line in block.splitlines()]
    return {first: rest for first, *rest in lines if first in ("policy", "base", "sft", "ppo")}


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
    rows = _rows(text, 0)
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
        "win_rate_against": None,
        "reward_model": {"accuracy": None, "gold_accuracy": None, "prejudice": None},
    }
    text = _printed(scorecard)
    rows = _rows(text, 0)
    assert rows["base"] == ["-"] * 7 + ["7.2"]
    assert "reward model" not in text
    assert "wins are over" not in text
    # Of the second table only what was measured has a column.
    assert _rows(text, 1) == {"policy": ["EOS"], "base": ["0.500"]}


def test_wins_and_text_have_a_table_of_their_own_within_100_columns() -> None:
    scorecard = _scorecard((0.0, 1.5), 0.2, (0.1, 0.3))
    scorecard["win_rate_against"] = "sft"
    everything = {figure: Figure(0.5, 0.0, 1.0) for figure in POLICY_FIGURES}
    everything |= {figure: Figure(-761.125, 0.0, 1.0) for figure in ("perplexity", "reward", "kl", "length")}
    for figures, rate in zip(scorecard["policies"].values(), (0.5, 0.625), strict=True):
        figures |= {
            **written(everything, None),
            "gold": figures["gold"],
            "win_rate": {"gold": rate, "reward": 0},
        }
    scorecard["policies"] = {
        "./checkpoints/of/a/long/name": scorecard["policies"]["sft"],
        **scorecard["policies"],
    }
    text = _printed(scorecard)
    assert _rows(text, 1)["ppo"][7] == "0.625"
    assert "...ts/of/a/long/name" in text
    assert "wins are over sft; LC is what they would be at equal length" in text
    tables = text.split("gold sft -> ppo")[0].splitlines()
    assert max(map(len, tables)) <= 100


def test_terms_of_a_reward_stay_apart() -> None:
    scorecard = _scorecard((0.0, 1.5), 0.2, (0.1, 0.3))
    scorecard["policies"]["ppo"]["reward_terms"] = {"helpful_rm": 1.5, "harmless_rm": -0.75}
    text = _printed(scorecard)
    assert "reward of ppo: helpful_rm 1.500  harmless_rm -0.750" in text
    assert "reward of sft" not in text


def test_gaps_between_groups_are_marked_and_named_where_chance_rarely_makes_them() -> None:
    scorecard = _scorecard((0.0, 1.5), 0.2, (0.1, 0.3))
    scorecard["policies"]["ppo"]["prejudice"] = _gaps(0.5, 0.01)
    scorecard["reward_model"]["prejudice"] = _gaps(0.125, 0.4)
    text = _printed(scorecard)
    assert re.search(r"^ppo +0.500\* +0.375", text, flags=re.MULTILINE)
    assert re.search(r"^reward model +0.125 +0.375", text, flags=re.MULTILINE)
    assert "ppo: reward is higher by 0.500 for Borvos than for Zumis [+0.250, +0.750], p = 0.0100" in text
    assert "reward model: reward is higher" not in text


def test_without_an_eval_stage_nothing_is_shown() -> None:
    assert _printed(None) == ""
