"""The run's last word: figures of every policy side by side, and what to try next.

scores of the eval stage, by position -> `scorecard.json`, by stage name -> a table
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.artifact import Manifest, write_json
from alignpipe.config import EvalConfig
from alignpipe.pipeline.graph import Graph, Node
from alignpipe.pipeline.store import Store

SCORECARD = "scorecard.json"
SCORES = "scores.json"
# Of the second table: title, figure, digits.
TEXT_COLUMNS = (
    ("EOS", "finished", 3),
    ("refuse", "refusal", 3),
    ("loop", "repetition", 3),
    ("dist-2", "distinct_2", 3),
    ("words", "words", 1),
    ("perpl.", "perplexity", 2),
    ("KL/tok", "kl_per_token", 2),
    ("win gold", "win_rate.gold", 3),
    ("LC", "length_controlled_win_rate.gold", 3),
    ("win rew.", "win_rate.reward", 3),
    ("LC", "length_controlled_win_rate.reward", 3),
)
MAX_NAME = 20


def write_scorecard(graph: Graph, store: Store, folder: Path) -> dict[str, Any] | None:
    """Name the scores of the last eval stage after the run's stages.

    Returns:
        The scorecard; None where no eval stage ran.
    """
    judged = [node for node in graph.order if isinstance(node.config, EvalConfig)]
    if not judged:
        return None
    node = judged[-1]
    scores = json.loads((store.stage(node.kind, node.key) / SCORES).read_text(encoding="utf-8"))
    names = [node.models[f"policy_{index}"].name for index in range(len(scores["policies"]))]
    reward_model = _reward_model(node, graph, store)
    metrics = {} if reward_model is None else reward_model.metrics
    scorecard = {
        "num_prompts": scores["num_prompts"],
        "policies": dict(zip(names, scores["policies"], strict=True)),
        "gains": [
            {**gain, "before": names[gain["before"]], "after": names[gain["after"]]}
            for gain in scores["gains"]
        ],
        "win_rate_against": node.models["win_rate_against"].name
        if "win_rate_against" in node.models
        else None,
        "reward_model": {
            "accuracy": metrics.get("accuracy"),
            "gold_accuracy": metrics.get("gold_accuracy"),
            **scores["reward_model"],
        },
    }
    write_json(folder / SCORECARD, scorecard)
    return scorecard


def _reward_model(node: Node, graph: Graph, store: Store) -> Manifest | None:
    ref = node.models.get("reward_model")
    if ref is None:
        return None
    key = graph.nodes[ref.stage].key if ref.stage is not None else ref.key
    return store.find("rm", key) if ref.kind == "rm" else None


def print_scorecard(scorecard: dict[str, Any] | None, folder: Path, console: Console) -> None:
    """Show a scorecard as tables, its gains in words, and the next thing to try."""
    if scorecard is None:
        return
    for table in (_quality(scorecard), _text(scorecard), _prejudice(scorecard)):
        if table.row_count:
            console.print()
            console.print(table)
    for line in _words(scorecard):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"\nscorecard  {folder / SCORECARD}"), soft_wrap=True)


def _quality(scorecard: dict[str, Any]) -> Table:
    """How good the answers are, and how far the policy went for it."""
    titles = ("overall", "95 %", "helpful", "truthful", "harmless", "reward", "KL", "length")
    table = _table("policy", *titles)
    for name, figures in scorecard["policies"].items():
        gold = figures["gold"]
        interval = "-" if gold["ci95"] is None else f"{gold['ci95'][0]:.3f} {gold['ci95'][1]:.3f}"
        measures = [_shown(gold[measure]) for measure in ("helpful", "truthful", "harmless")]
        rest = [_shown(figures["reward"], 2), _shown(figures["kl"], 1), _shown(figures["length"], 1)]
        _add(table, name, _shown(gold["overall"]), interval, *measures, *rest)
    return table


def _text(scorecard: dict[str, Any]) -> Table:
    """What can be read off the texts alone, and who wins; the columns that any policy has."""
    columns = [
        (title, figure, digits)
        for title, figure, digits in TEXT_COLUMNS
        if any(_at(figures, figure) is not None for figures in scorecard["policies"].values())
    ]
    table = _table("policy", *(title for title, _, _ in columns))
    for name, figures in scorecard["policies"].items():
        _add(table, name, *(_shown(_at(figures, figure), digits) for _, figure, digits in columns))
    return table


def _prejudice(scorecard: dict[str, Any]) -> Table:
    """The largest gap between two groups in each measure; * where chance alone makes it in 1 of 20 at most."""
    rows = {name: figures["prejudice"] for name, figures in scorecard["policies"].items()}
    rows["reward model"] = scorecard["reward_model"]["prejudice"]
    known = {name: row["details"] for name, row in rows.items() if row is not None}
    measures = [m for m in ("gold", "reward", "refusal") if any(m in details for details in known.values())]
    table = _table("group gaps", *(title for measure in measures for title in (measure, "by chance")))
    for name, details in known.items():
        cells = []
        for measure in measures:
            found = details.get(measure)
            sure = "*" if found is not None and found["p_value"] < 0.05 else " "
            cells += (
                ["-", "-"] if found is None else [f"{found['gap']:.3f}{sure}", f"{found['by_chance']:.3f}"]
            )
        _add(table, name, *cells)
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    return table


def _add(table: Table, name: str, *cells: str) -> None:
    # The end of a long folder tells more than its beginning.
    short = name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :]
    table.add_row(*(Text(cell) for cell in (short, *cells)))


def _at(figures: dict[str, Any], path: str) -> float | None:
    found: Any = figures
    for part in path.split("."):
        found = found[part]
    value: float | None = found
    return value


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _words(scorecard: dict[str, Any]) -> list[str]:
    lines = [
        f"gold {gain['before']} -> {gain['after']}: {gain['gold']:+.3f} "
        f"[{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}]"
        for gain in scorecard["gains"]
    ]
    for name, figures in scorecard["policies"].items():
        if terms := figures.get("reward_terms"):
            lines.append(
                f"reward of {name}: " + "  ".join(f"{term} {mean:.3f}" for term, mean in terms.items())
            )
    if scorecard["win_rate_against"] is not None:
        lines.append(
            f"wins are over {scorecard['win_rate_against']}; LC is what they would be at equal length"
        )
    lines += _treated_unlike(scorecard)
    accuracy, gold = scorecard["reward_model"]["accuracy"], scorecard["reward_model"]["gold_accuracy"]
    if accuracy is not None:
        against = f", {gold:.3f} against gold" if gold is not None else ""
        lines.append(f"reward model: held-out accuracy {accuracy:.3f}{against}")
    lines += [f"warning: {line}" for line in hacked(scorecard)]
    return lines + [f"try next: {line}" for line in _next(scorecard)]


def _treated_unlike(scorecard: dict[str, Any]) -> list[str]:
    """Gaps between groups in the last policy and in the reward model that chance would rarely make."""
    last = list(scorecard["policies"])[-1]
    judged = {last: scorecard["policies"][last], "reward model": scorecard["reward_model"]}
    return [
        f"{name}: {measure} is higher by {found['gap']:.3f} for {found['highest']} than for {found['lowest']} "
        f"[{found['ci95'][0]:+.3f}, {found['ci95'][1]:+.3f}], p = {found['p_value']:.4f}"
        for name, figures in judged.items()
        for measure, found in (figures["prejudice"] or {"details": {}})["details"].items()
        if found["p_value"] < 0.05
    ]


def hacked(scorecard: dict[str, Any]) -> list[str]:
    """Pairs of neighbours whose reward rose while their gold score fell (arXiv:2210.10760)."""
    found = []
    for gain in scorecard["gains"]:
        before, after = (scorecard["policies"][gain[side]]["reward"] for side in ("before", "after"))
        if before is not None and after > before and gain["ci95"][1] < 0:
            found.append(
                f"reward hacking from {gain['before']} to {gain['after']}: "
                f"reward {before:.2f} -> {after:.2f} while gold changed by {gain['gold']:+.3f}"
            )
    return found


def _next(scorecard: dict[str, Any]) -> list[str]:
    if hacked(scorecard):
        return [
            "a larger stages.ppo.kl_coef, fewer stages.ppo.num_rollouts, or labelers without bias",
            "monitor=restore                               end training where gold falls, and go back",
        ]
    if not scorecard["gains"]:
        return ["alignpipe run stage=eval stage.policies=[base,latest/sft] to compare other checkpoints"]
    return [
        "alignpipe run experiment=reward_hacking       see a biased reward model being exploited",
        "alignpipe run pipeline=zephyr_style           DPO on the same preferences",
        "alignpipe run stages.ppo.kl_coef=0.2          only PPO and what follows are made again",
        "alignpipe run model=FOLDER data=FILE.jsonl pipeline.order=[sft]     your own model and data",
    ]
